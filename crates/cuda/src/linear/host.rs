//! Embeddings in the host's memory, whose rows the device reads over the bus.

use cudarc::driver::sys::CUdeviceptr;
use half::f16;
use oxllama_backend::DeviceError;
use oxllama_format::LinearSource;
use oxllama_memory::{Bytes, Reservation};

use super::layout::{BLOCK_INPUTS, Layout, TILE_OUTPUTS, groups, section_ends};
use super::plan::{Plan, most_shared_bytes};
use super::{CudaLinear, LinearMemory};
use crate::device::CudaDevice;
use crate::stream::PinnedBuffer;

/// Numbers of a block: [`BLOCK_INPUTS`] inputs of each output of a tile.
const BLOCK: usize = TILE_OUTPUTS * BLOCK_INPUTS;

/// Writes `values`, `[tokens, width]`, in the tile layout of fp16 weights (`tiles.cuh`) with
/// `blocks` blocks of inputs a tile: within a block, each output's inputs lie together. What is
/// padding in `tiles` stays as it is.
fn fill_tiles(tiles: &mut [f16], values: &[f16], (width, blocks): (usize, usize)) {
    for (token, row) in values.chunks_exact(width).enumerate() {
        let (tile, output) = (token / TILE_OUTPUTS, token % TILE_OUTPUTS);
        for (block, inputs) in row.chunks(BLOCK_INPUTS).enumerate() {
            let start = (tile * blocks + block) * BLOCK + output * BLOCK_INPUTS;
            tiles[start..start + inputs.len()].copy_from_slice(inputs);
        }
    }
}

impl CudaDevice {
    /// Brings a linear of floats into page-locked memory that `reservation` accounts for, in the
    /// layout that it would have on the device. Only what [`Self::launch_embed`] reads is filled in.
    pub(super) fn load_on_host(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> Result<CudaLinear, DeviceError> {
        let header = source.header();
        let layout = Layout::new(&header);
        let needed = Bytes::from_usize(layout.total);
        let what = || format!("an embedding of {header:?} on {}", reservation.device());
        self.check_reservation(what, needed, &reservation)?;
        let LinearSource::Float(linear) = source else {
            return Err(DeviceError::Operation {
                device: self.context().id().clone(),
                operation: format!("keeping weights on {}", reservation.device()),
                reason: "only those of an embedding can be, which are floats".to_owned(),
            });
        };
        let mut memory = PinnedBuffer::new(self.context(), layout.total)?;
        let scaled = linear.to_f16_scaled()?;
        let extents = (header.in_features, layout.blocks);
        fill_tiles(memory.as_mut_slice(), &scaled.values, extents);
        // Page-locked memory has the same address on the device: addresses are unified on every
        // GPU that is supported.
        let address = memory.as_slice::<u8>().as_ptr().addr() as CUdeviceptr;
        let sections = section_ends(&groups(source));
        Ok(CudaLinear {
            in_features: header.in_features,
            out_features: header.out_features,
            matrix: layout.matrix(address, &sections, scaled.scale),
            order: super::Order::plain(),
            bias: None,
            plan: Plan::of(layout.blocks, most_shared_bytes(self.info())),
            // Rows are taken from it; it is not multiplied.
            range_units: 0,
            widest_bits: 0,
            layout,
            _memory: LinearMemory::Host((memory, reservation)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Neighbouring inputs of a token that one thread of `oxl_embed` loads.
    const VECTOR: usize = 8;

    /// Where `oxl_embed` looks for eight inputs of a token, in vectors.
    fn vector_of(token: usize, eight: usize, blocks: usize) -> usize {
        let piece = token % TILE_OUTPUTS / 8;
        let lane = token % 8 * 4 + eight % 4;
        let block = token / TILE_OUTPUTS * blocks + eight / 4;
        block * 128 + piece * 32 + lane
    }

    #[test]
    fn rows_lie_where_the_kernel_looks_for_them() {
        for (tokens, width) in [(1, 8), (33, 40), (70, 96)] {
            let blocks = usize::div_ceil(width, BLOCK_INPUTS);
            let values: Vec<f16> = (0..tokens * width)
                .map(|index| f16::from_bits(index as u16 + 1))
                .collect();
            let tiles = usize::div_ceil(tokens, TILE_OUTPUTS);
            let mut found = vec![f16::ZERO; tiles * blocks * BLOCK];
            fill_tiles(&mut found, &values, (width, blocks));
            for (index, value) in values.iter().enumerate() {
                let (token, input) = (index / width, index % width);
                let vector = vector_of(token, input / VECTOR, blocks);
                assert_eq!(found[vector * VECTOR + input % VECTOR], *value);
            }
            let filled = found.iter().filter(|value| value.to_bits() != 0).count();
            assert_eq!(filled, values.len());
        }
    }
}
