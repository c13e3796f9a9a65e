//! How linear weights lie on the device: sizes from headers, and what kernels are told.
//!
//! The order of weights within a tile is defined in `tiles.cuh`.

use cudarc::driver::sys::CUdeviceptr;
use half::f16;
use oxllama_format::{Encoding, LinearHeader, LinearSource};

use super::ranges::most_table_bytes;
use crate::step::aligned;

/// Outputs of a column tile; `TILE_OUTPUTS` in `tiles.cuh`.
pub(crate) const TILE_OUTPUTS: usize = 32;

/// Inputs of a block; `BLOCK_INPUTS` in `tiles.cuh`.
pub(crate) const BLOCK_INPUTS: usize = 32;

/// Bytes of a block of one bit; `BLOCK_UNIT_BYTES` in `tiles.cuh`.
pub(crate) const UNIT_BYTES: usize = TILE_OUTPUTS * BLOCK_INPUTS / 8;

/// Widths of EXL2's sections in their order.
const SECTION_BITS: [u32; 6] = [8, 6, 5, 4, 3, 2];

/// Most blocks of a matrix: block numbers have 16 bits in [`BlockInfo`].
pub(crate) const MOST_BLOCKS: usize = 65_535;

/// Bytes of a tile's scales for one group: EXL2 has codes, GPTQ fp16.
const EXL2_SCALE_BYTES: usize = TILE_OUTPUTS / 2;
const GPTQ_SCALE_BYTES: usize = TILE_OUTPUTS * 2;

/// `ENCODING_*` of `tiles.cuh`.
pub(super) const ENCODING_EXL2: i32 = 0;
pub(super) const ENCODING_GPTQ: i32 = 1;
const ENCODING_FLOAT: i32 = 2;

/// `BlockInfo` of `tiles.cuh`.
pub(crate) type BlockInfo = [u32; 2];

/// `TileMatrix` of `tiles.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct TileMatrix {
    pub(crate) weights: CUdeviceptr,
    pub(crate) scales: CUdeviceptr,
    pub(crate) zeros: CUdeviceptr,
    pub(crate) block_table: CUdeviceptr,
    pub(crate) range_table: CUdeviceptr,
    pub(crate) blocks: i32,
    pub(crate) groups: i32,
    pub(crate) tiles: i32,
    pub(crate) tile_units: i32,
    pub(crate) section_ends: [i32; SECTION_BITS.len()],
    pub(crate) encoding: i32,
    pub(crate) scale: f32,
}

/// Where the parts of a matrix start, in bytes from the start of its memory, and its extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) tiles: usize,
    pub(crate) blocks: usize,
    pub(crate) groups: usize,
    /// Bytes of a tile by [`UNIT_BYTES`].
    pub(crate) tile_units: usize,
    /// `ENCODING_*` of `tiles.cuh`.
    pub(crate) encoding: i32,
    pub(crate) scales: usize,
    pub(crate) zeros: usize,
    pub(crate) block_table: usize,
    pub(crate) range_table: usize,
    /// u32 `[in_features]`
    pub(crate) permutation: usize,
    /// u32 `[in_features]`: its inverse
    pub(crate) places: usize,
    /// f32 `[out_features]`
    pub(crate) bias: usize,
    /// One word that loading floats needs.
    pub(crate) largest: usize,
    /// Bytes of all.
    pub(crate) total: usize,
}

impl Layout {
    /// The layout of the weights that `header` describes. Everything that decides a size stands
    /// in the header: EXL2's rows of words are its tiles' units.
    pub(crate) fn new(header: &LinearHeader) -> Self {
        let tiles = header.out_features.div_ceil(TILE_OUTPUTS);
        let blocks = header.in_features.div_ceil(BLOCK_INPUTS);
        let (encoding, groups, tile_units, scale_bytes, zero_bytes) = match header.encoding {
            Encoding::Exl2 {
                packed_words,
                groups,
            } => (ENCODING_EXL2, groups, packed_words, EXL2_SCALE_BYTES, 0),
            Encoding::Gptq { groups, .. } => (
                ENCODING_GPTQ,
                groups,
                4 * blocks,
                GPTQ_SCALE_BYTES,
                TILE_OUTPUTS,
            ),
            Encoding::Float(_) => (ENCODING_FLOAT, 1, 16 * blocks, 0, 0),
        };
        let has_order = match header.encoding {
            Encoding::Exl2 { .. } => true,
            Encoding::Gptq { act_order, .. } => act_order,
            Encoding::Float(_) => false,
        };
        let order_bytes = if has_order { header.in_features * 4 } else { 0 };
        let is_float = matches!(header.encoding, Encoding::Float(_));
        let mut end = 0;
        let mut part = |bytes: usize| {
            let start = end;
            end = start + aligned(bytes);
            start
        };
        part(tiles * tile_units * UNIT_BYTES);
        Self {
            tiles,
            blocks,
            groups,
            tile_units,
            encoding,
            scales: part(tiles * groups * scale_bytes),
            zeros: part(tiles * groups * zero_bytes),
            block_table: part(blocks * size_of::<BlockInfo>()),
            range_table: part(most_table_bytes(blocks)),
            permutation: part(order_bytes),
            places: part(order_bytes),
            bias: part(if header.bias {
                header.out_features * 4
            } else {
                0
            }),
            largest: part(if is_float { 4 } else { 0 }),
            total: end,
        }
    }

    /// Whether the weights are plain fp16 numbers.
    pub(crate) fn is_float(&self) -> bool {
        self.encoding == ENCODING_FLOAT
    }

    /// Places of a row of fp16 activations.
    pub(crate) fn padded_inputs(&self) -> usize {
        self.blocks * BLOCK_INPUTS
    }

    /// The matrix as kernels take it, in memory from `address` on.
    pub(crate) fn matrix(
        &self,
        address: CUdeviceptr,
        sections: &[i32; SECTION_BITS.len()],
        scale: f32,
    ) -> TileMatrix {
        TileMatrix {
            weights: address,
            scales: address + self.scales as u64,
            zeros: address + self.zeros as u64,
            block_table: address + self.block_table as u64,
            range_table: address + self.range_table as u64,
            blocks: self.blocks as i32,
            groups: self.groups as i32,
            tiles: self.tiles as i32,
            tile_units: self.tile_units as i32,
            section_ends: *sections,
            encoding: self.encoding,
            scale,
        }
    }
}

/// Blocks of one width that share their scales.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Group {
    pub(crate) bits: u32,
    pub(crate) blocks: usize,
    /// EXL2's m of the group, else 1.
    pub(crate) largest_scale: f16,
}

/// The groups of a source in packed order.
pub(crate) fn groups(source: &LinearSource<'_>) -> Vec<Group> {
    match source {
        LinearSource::Exl2(linear) => linear
            .groups()
            .iter()
            .enumerate()
            .map(|(index, group)| Group {
                bits: group.bits,
                blocks: group.rows / BLOCK_INPUTS,
                largest_scale: linear.scale_max_f16(index),
            })
            .collect(),
        LinearSource::Gptq(linear) => (0..linear.groups())
            .map(|index| {
                let before = index * linear.group_size();
                let rows = (linear.in_features() - before).min(linear.group_size());
                Group {
                    bits: 4,
                    blocks: rows / BLOCK_INPUTS,
                    largest_scale: f16::ONE,
                }
            })
            .collect(),
        LinearSource::Float(linear) => vec![Group {
            bits: 16,
            blocks: linear.in_features().div_ceil(BLOCK_INPUTS),
            largest_scale: f16::ONE,
        }],
    }
}

/// One entry a block.
pub(crate) fn block_table(groups: &[Group]) -> Vec<BlockInfo> {
    let mut table = Vec::new();
    for (index, group) in groups.iter().enumerate() {
        let end = table.len() + group.blocks;
        let info = [
            index as u32 | group.bits << 24,
            end as u32 | u32::from(group.largest_scale.to_bits()) << 16,
        ];
        table.resize(end, info);
    }
    table
}

/// Where the sections of each width end, in blocks.
pub(crate) fn section_ends(groups: &[Group]) -> [i32; SECTION_BITS.len()] {
    let mut end = 0;
    SECTION_BITS.map(|bits| {
        let section = groups.iter().filter(|group| group.bits == bits);
        end += section.map(|group| group.blocks as i32).sum::<i32>();
        end
    })
}

#[cfg(test)]
mod tests;
