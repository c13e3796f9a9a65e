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
    first: i32,
    end: i32,
    accumulate: i32,
    store_scale: f32,
    stages: i32,
    block_bytes: i32,
    gate: i32,
    reserved: i32,
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
        let names = [
            "oxl_linear_many_64",
            "oxl_linear_many_128",
            "oxl_linear_many_256",
        ];
        let kernels =
            modules.kernels_if_any("linear_many", names.map(|name| (name, shared_bytes)))?;
        Ok(kernels.map(|kernels| Self {
            kernels,
            shared_bytes,
        }))
    }
}

/// What a launch costs beside its items, in the same unit.
const LAUNCH_COST: usize = 1;

/// Pairs of an item and its rows, `first` to `end`, and how they are launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Division {
    /// Of [`ITEM_ROWS`].
    kernel: usize,
    first: usize,
    end: usize,
    /// Clusters.
    clusters: usize,
    stages: usize,
    shared_bytes: usize,
}

/// What there is to multiply: by how many clusters at most, with how much shared memory.
#[derive(Debug, Clone, Copy)]
struct Work {
    rows: usize,
    items: usize,
    /// Of the widest weights.
    bits: usize,
    most_clusters: usize,
    shared_bytes: usize,
}

impl Work {
    fn pairs(&self, kernel: usize) -> usize {
        self.items * self.rows.div_ceil(ITEM_ROWS[kernel])
    }

    /// What so many pairs cost: whole rounds of all clusters.
    fn cost(&self, kernel: usize, pairs: usize) -> usize {
        pairs.div_ceil(self.most_clusters) * ITEM_COSTS[kernel]
    }

    fn division(&self, kernel: usize, first: usize, end: usize) -> Division {
        let stage_bytes = ITEM_ROWS[kernel] * CHUNK_ROW_BYTES
            + CHUNK_SCALE_BYTES
            + CTA_TILES * CHUNK_BLOCKS * self.bits * UNIT_BYTES;
        let stages = ((self.shared_bytes - ALIGNMENT) / stage_bytes).min(MOST_STAGES);
        Division {
            kernel,
            first,
            end,
            clusters: (end - first).min(self.most_clusters),
            stages,
            shared_bytes: ALIGNMENT + stages * stage_bytes,
        }
    }

    /// The launches of all of it: one, or one of whole rounds and, where that costs less, a second one with pairs of half
    /// the rows for the rest.
    fn divide(&self) -> (Division, Option<Division>) {
        // Of those that cost the same, the one that takes weights apart least often.
        let kernels = (0..ITEM_ROWS.len()).rev();
        let cost = |kernel: usize| self.cost(kernel, self.pairs(kernel));
        let best = kernels.min_by_key(|&kernel| cost(kernel)).unwrap_or(0);
        let halves = (1..ITEM_ROWS.len()).rev().filter_map(|kernel| {
            let pairs = self.pairs(kernel);
            let whole = pairs / self.most_clusters * self.most_clusters;
            // Each pair is two of half its rows.
            let is_even = 2 * pairs == self.pairs(kernel - 1);
            let rest = self.cost(kernel - 1, 2 * (pairs - whole));
            let all = self.cost(kernel, whole) + rest + LAUNCH_COST;
            (is_even && 0 < whole && whole < pairs).then_some((all, kernel, whole))
        });
        match halves.min() {
            Some((all, kernel, whole)) if all < cost(best) => (
                self.division(kernel, 0, whole),
                Some(self.division(kernel - 1, 2 * whole, self.pairs(kernel - 1))),
            ),
            _ => (self.division(best, 0, self.pairs(best)), None),
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
        let work = Work {
            rows,
            items,
            bits,
            most_clusters: (self.info().multiprocessors / CLUSTER).max(1),
            shared_bytes: kernels.shared_bytes,
        };
        let (first, second) = work.divide();
        for division in std::iter::once(first).chain(second) {
            let args = LinearManyArgs {
                matrix_count: operands.len() as i32,
                rows: rows as i32,
                row_stride: rows.next_multiple_of(ROWS_OF_CHUNK) as i32,
                blocks: operands[0].weights.layout.blocks as i32,
                first: division.first as i32,
                end: division.end as i32,
                accumulate,
                store_scale,
                stages: division.stages as i32,
                block_bytes: (bits * UNIT_BYTES) as i32,
                gate,
                reserved: 0,
                matrices,
            };
            let launch = Launch {
                shared_bytes: division.shared_bytes,
                ..Launch::linear(CLUSTER * division.clusters, THREADS)
            };
            // SAFETY: the structure is the kernel's; the rest is the caller's promise.
            unsafe { self.launch(kernels.kernels[division.kernel], launch, &args)? };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dynamic shared memory on an H100.
    const SHARED_BYTES: usize = 227 * 1024 - STATIC_SHARED_BYTES;

    fn work(rows: usize, items: usize) -> Work {
        Work {
            rows,
            items,
            bits: 4,
            most_clusters: 66,
            shared_bytes: SHARED_BYTES,
        }
    }

    #[test]
    fn every_width_leaves_room_for_stages() {
        for bits in [2, 3, 4, 5, 6, 8, 16] {
            for rows in [129, 512, 2048] {
                for items in [1, 16, 172] {
                    let work = Work {
                        bits,
                        ..work(rows, items)
                    };
                    let (first, second) = work.divide();
                    for division in std::iter::once(first).chain(second) {
                        assert!((3..=MOST_STAGES).contains(&division.stages), "{division:?}");
                        assert!(division.shared_bytes <= SHARED_BYTES, "{division:?}");
                        assert!((1..=66).contains(&division.clusters), "{division:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn launches_cover_every_pair_once() {
        for rows in [49, 128, 129, 200, 256, 257, 300, 384, 500, 1024, 2048, 5000] {
            for items in [1, 8, 10, 44, 48, 65, 66, 67, 86, 300] {
                let work = work(rows, items);
                let (first, second) = work.divide();
                // Rows of 64 of an item.
                let place = |kernel: usize, pair: usize| {
                    let tiles = rows.div_ceil(ITEM_ROWS[kernel]);
                    (pair / tiles, pair % tiles * (ITEM_ROWS[kernel] / 64))
                };
                assert_eq!(first.first, 0);
                let last = second.unwrap_or(first);
                assert_eq!(last.end, work.pairs(last.kernel));
                if let Some(second) = second {
                    let end = place(first.kernel, first.end);
                    assert_eq!(end, place(second.kernel, second.first), "{work:?}");
                }
            }
        }
    }

    #[test]
    fn fewer_rows_an_item_where_multiprocessors_would_have_none() {
        let rows_of = |rows, items| {
            let (first, second) = work(rows, items).divide();
            let rows = |division: Division| ITEM_ROWS[division.kernel];
            (rows(first), second.map(rows))
        };
        // llama2-7b: o, q k v, gate and up.
        assert_eq!(rows_of(512, 16), (128, None));
        assert_eq!(rows_of(512, 48), (256, Some(128)));
        assert_eq!(rows_of(2048, 16), (256, None));
        assert_eq!(rows_of(2048, 48), (256, None));
        assert_eq!(rows_of(2048, 86), (256, Some(128)));
        // tinyllama-1b: o; q, k and v; gate and up.
        assert_eq!(rows_of(512, 8), (64, None));
        assert_eq!(rows_of(2048, 10), (256, Some(128)));
        assert_eq!(rows_of(2048, 44), (256, Some(128)));
    }

    #[test]
    fn the_structure_has_the_kernels_size() {
        assert_eq!(
            size_of::<LinearManyArgs>(),
            12 * 4 + MOST_MATRICES * size_of::<LinearMatrix>()
        );
    }
}
