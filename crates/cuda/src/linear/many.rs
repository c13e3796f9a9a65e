//! Products of many rows with weights as they are stored, where a GPU has the kernels for it.

use oxllama_backend::DeviceError;

use super::MOST_MATRICES;
use super::launch::{Finish, LinearMatrix, Operand, store_numbers};
use super::layout::UNIT_BYTES;
use crate::context::GpuInfo;
use crate::device::CudaDevice;
use crate::error::CudaUnavailable;
use crate::launch::Launch;
use crate::module::{Kernel, Modules};
use crate::prepare::activation_number;

/// Threads of a block of threads (CTA); `MANY_THREADS` in `many.cuh`.
const THREADS: usize = 384;

/// CTAs of a cluster, which share rows; `CLUSTER` in `many.cuh`.
const CLUSTER: usize = 2;

/// Column tiles of a CTA; `CTA_TILES` in `many.cuh`.
const CTA_TILES: usize = 4;

/// Column tiles of an item.
const ITEM_TILES: usize = CLUSTER * CTA_TILES;

/// Blocks of a chunk; `CHUNK_BLOCKS` in `many.cuh`.
const CHUNK_BLOCKS: usize = 2;

/// Bytes of a row of a chunk; `CHUNK_ROW_BYTES` in `many.cuh`.
const CHUNK_ROW_BYTES: usize = 128;

/// Bytes of the scales of a chunk; `CHUNK_SCALE_BYTES` in `many.cuh`.
const CHUNK_SCALE_BYTES: usize = CTA_TILES * CHUNK_BLOCKS * 256;

/// Stages of the ring, at most; `MOST_STAGES` in `many.cuh`.
const MOST_STAGES: usize = 16;

/// Shared memory of a CTA that is not dynamic.
const STATIC_SHARED_BYTES: usize = 11 * 1024;

/// `NOT_GATED` in `many.cuh`.
const NOT_GATED: i32 = -1;

/// The ring begins at a multiple of this.
const ALIGNMENT: usize = 1024;

/// Rows of an item of each kernel.
const ITEM_ROWS: [usize; 3] = [64, 128, 256];

/// What an item costs by each kernel, in the same unit: weights are taken apart for few rows as for many.
const ITEM_COSTS: [usize; 3] = [12, 13, 18];

/// Rows of a chunk in memory are a multiple of this, so that every kernel's items are there as a whole.
pub(crate) const ROWS_OF_CHUNK: usize = 256;

/// `LinearManyArgs` of `many.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct LinearManyArgs {
    matrix_count: i32,
    rows: i32,
    row_stride: i32,
    blocks: i32,
    items: i32,
    accumulate: i32,
    store_scale: f32,
    stages: i32,
    block_bytes: i32,
    gate: i32,
    matrices: [LinearMatrix; MOST_MATRICES],
}

/// The entries of `linear_many.cu`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ManyKernels {
    /// By [`ITEM_ROWS`].
    kernels: [Kernel; 3],
    /// Dynamic shared memory that a CTA may have.
    shared_bytes: usize,
}

impl ManyKernels {
    /// `None` where the GPU has no such kernels: they are made for compute capability 9.0 alone.
    pub(crate) fn find(modules: &Modules, gpu: &GpuInfo) -> Result<Option<Self>, CudaUnavailable> {
        let whole = gpu.shared_per_block.get() as usize;
        let Some(shared_bytes) = whole.checked_sub(STATIC_SHARED_BYTES) else {
            return Ok(None);
        };
        let find = |name| modules.kernel_if_any("linear_many", name, shared_bytes);
        let all = [
            find("oxl_linear_many_64")?,
            find("oxl_linear_many_128")?,
            find("oxl_linear_many_256")?,
        ];
        Ok(match all {
            [Some(few), Some(more), Some(most)] => Some(Self {
                kernels: [few, more, most],
                shared_bytes,
            }),
            _ => None,
        })
    }
}

/// How a product is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Division {
    /// Of [`ITEM_ROWS`].
    kernel: usize,
    /// Clusters.
    clusters: usize,
    stages: usize,
    shared_bytes: usize,
}

impl Division {
    /// The division of `rows` rows by `items` items of outputs, whose widest weights have `bits` bits.
    fn of(
        (rows, items): (usize, usize),
        bits: usize,
        multiprocessors: usize,
        shared_bytes: usize,
    ) -> Self {
        let most_clusters = (multiprocessors / CLUSTER).max(1);
        let count = |kernel: usize| items * rows.div_ceil(ITEM_ROWS[kernel]);
        let cost = |kernel: usize| count(kernel).div_ceil(most_clusters) * ITEM_COSTS[kernel];
        // Of those that cost the same, the one that takes weights apart least often.
        let kernels = (0..ITEM_ROWS.len()).rev();
        let kernel = kernels.min_by_key(|&kernel| cost(kernel)).unwrap_or(0);
        let stage_bytes = ITEM_ROWS[kernel] * CHUNK_ROW_BYTES
            + CHUNK_SCALE_BYTES
            + CTA_TILES * CHUNK_BLOCKS * bits * UNIT_BYTES;
        let stages = ((shared_bytes - ALIGNMENT) / stage_bytes).min(MOST_STAGES);
        Self {
            kernel,
            clusters: count(kernel).min(most_clusters),
            stages,
            shared_bytes: ALIGNMENT + stages * stage_bytes,
        }
    }
}

impl CudaDevice {
    /// `out ← finish(W · x + bias)` for matrices that share rows `x`, which lie in chunks
    /// (`RowLayout::Chunks`).
    ///
    /// # Safety
    /// The operands' addresses point to what they say, `x` to rows in chunks, and stay allocated until the
    /// stream has passed this.
    pub(super) unsafe fn multiply_many(
        &self,
        kernels: &ManyKernels,
        operands: &[Operand<'_>],
        rows: usize,
        finish: Finish,
    ) -> Result<(), DeviceError> {
        let ((accumulate, store_scale), gate) = match finish {
            Finish::Store(store) => (store_numbers(store), NOT_GATED),
            Finish::Gate(activation, _) => ((0, 1.0), activation_number(activation)),
        };
        let mut matrices = [LinearMatrix::default(); MOST_MATRICES];
        let mut items = 0;
        for (target, operand) in matrices.iter_mut().zip(operands) {
            *target = LinearMatrix::of(operand, items);
            items += operand.weights.layout.tiles.div_ceil(ITEM_TILES);
        }
        if gate != NOT_GATED {
            // Half of an item's tiles are the gate's, the others those of up.
            let tiles = operands[0].weights.layout.tiles;
            items = tiles.div_ceil(ITEM_TILES / 2);
        }
        let bits = operands.iter().map(|operand| operand.weights.widest_bits);
        let bits = bits.max().unwrap_or(0) as usize;
        let multiprocessors = self.info().multiprocessors;
        let division = Division::of((rows, items), bits, multiprocessors, kernels.shared_bytes);
        let args = LinearManyArgs {
            matrix_count: operands.len() as i32,
            rows: rows as i32,
            row_stride: rows.next_multiple_of(ROWS_OF_CHUNK) as i32,
            blocks: operands[0].weights.layout.blocks as i32,
            items: items as i32,
            accumulate,
            store_scale,
            stages: division.stages as i32,
            block_bytes: (bits * UNIT_BYTES) as i32,
            gate,
            matrices,
        };
        let launch = Launch {
            shared_bytes: division.shared_bytes,
            ..Launch::linear(CLUSTER * division.clusters, THREADS)
        };
        // SAFETY: the structure is the kernel's; the rest is the caller's promise.
        unsafe { self.launch(kernels.kernels[division.kernel], launch, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dynamic shared memory on an H100.
    const SHARED_BYTES: usize = 227 * 1024 - STATIC_SHARED_BYTES;

    #[test]
    fn every_width_leaves_room_for_stages() {
        for bits in [2, 3, 4, 5, 6, 8, 16] {
            for rows in [129, 512, 2048] {
                for items in [1, 16, 172] {
                    let division = Division::of((rows, items), bits, 132, SHARED_BYTES);
                    assert!((3..=MOST_STAGES).contains(&division.stages), "{division:?}");
                    assert!(division.shared_bytes <= SHARED_BYTES, "{division:?}");
                    assert!((1..=66).contains(&division.clusters), "{division:?}");
                }
            }
        }
    }

    #[test]
    fn fewer_rows_an_item_where_multiprocessors_would_have_none() {
        let rows_of = |rows, items| {
            let division = Division::of((rows, items), 4, 132, SHARED_BYTES);
            ITEM_ROWS[division.kernel]
        };
        // llama2-7b: o, q k v, gate and up.
        assert_eq!(rows_of(512, 16), 128);
        assert_eq!(rows_of(512, 48), 256);
        assert_eq!(rows_of(2048, 16), 256);
        assert_eq!(rows_of(2048, 86), 256);
        // tinyllama-1b: o.
        assert_eq!(rows_of(512, 8), 64);
    }

    #[test]
    fn the_structure_has_the_kernels_size() {
        assert_eq!(
            size_of::<LinearManyArgs>(),
            10 * 4 + MOST_MATRICES * size_of::<LinearMatrix>()
        );
    }
}
