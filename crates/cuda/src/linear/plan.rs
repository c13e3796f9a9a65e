//! How one product is divided among the multiprocessors.

use super::layout::Layout;
use crate::context::GpuInfo;

/// Bytes of shared memory of a warp's ring in `oxl_linear_32`; `RING_BYTES` in `linear.cuh`.
pub(crate) const RING_BYTES: usize = 4096;

/// Bytes of a warp's ring of units: `SLOTS * SLOT_BYTES` in `linear.cu`.
const UNIT_RING_BYTES: usize = 2 * (2048 + 128);

/// Blocks of a unit, at most: activations must have room for as many.
const MOST_UNIT_BLOCKS: usize = 4;

/// Tiles whose sums are joined at once, at most.
const MOST_TILE_BUFFERS: usize = 8;

/// Bytes of a unit in the table of a range.
const UNIT_ENTRY_BYTES: usize = 8;

/// Warps of a block of threads (CTA), at most; `MOST_WARPS` in `linear.cuh`.
pub(crate) const MOST_WARPS: usize = 16;

/// Column tiles of a CTA for more than [`STREAMED_ROWS`] rows; `WIDE_TILES` in `linear_wide.cu`.
pub(crate) const WIDE_TILES: usize = 4;

/// Rows up to which CTAs stream tile after tile.
pub(crate) const STREAMED_ROWS: usize = 16;

/// Rows of a tensor core's operand, and of the sums that lie in shared memory at once.
pub(crate) const NARROW_ROWS: usize = 8;

/// Ranges of K that are summed before others join; `RANGES_OF_SUM` in `linear.cuh`.
const RANGES_OF_SUM: usize = 4;

/// Blocks of K that a range should have at least: fewer are not worth their share of the sums.
const LEAST_BLOCKS: usize = 2;

/// Shared memory of a CTA that is not dynamic, at most.
const STATIC_SHARED_BYTES: usize = 2 * 1024;

/// Dynamic shared memory that a CTA of `oxl_linear_32` needs.
pub(crate) const WIDE_SHARED_BYTES: usize = (MOST_WARPS + WIDE_TILES) * RING_BYTES;

/// Bytes of one row's activations of a block.
const ROW_BLOCK_BYTES: usize = 64;

/// Bytes of a warp's sums of one row.
const ROW_SUM_BYTES: usize = 128;

/// Dynamic shared memory that a CTA may have.
pub(crate) fn most_shared_bytes(gpu: &GpuInfo) -> usize {
    gpu.shared_per_block.get() as usize - STATIC_SHARED_BYTES
}

/// The division of one matrix. It depends on its inputs and the device alone, so that the order
/// of sums does not depend on what else a launch has to do, and matrices that share their inputs
/// are divided alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Ranges of K, one a warp: a power of two.
    pub(crate) ranges: usize,
    /// Blocks of the longest range.
    pub(crate) range_blocks: usize,
}

/// What the shared memory of a launch of few rows depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamShape {
    /// Up to [`STREAMED_ROWS`].
    pub(crate) rows: usize,
    /// Of the launch.
    pub(crate) matrices: usize,
    /// Column tiles that a CTA has, at most.
    pub(crate) tiles_of_cta: usize,
}

/// The shared memory of a launch of few rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Streamed {
    /// Blocks of activations that a warp keeps.
    pub(crate) x_blocks: usize,
    /// Tiles whose sums are joined at once.
    pub(crate) tile_buffers: usize,
    /// Dynamic shared memory of a CTA.
    pub(crate) shared_bytes: usize,
}

impl Plan {
    pub(crate) fn new(layout: &Layout, most_shared_bytes: usize) -> Self {
        Self::of(layout.blocks, most_shared_bytes)
    }

    pub(crate) fn of(blocks: usize, most_shared_bytes: usize) -> Self {
        // Rings and activations of sixteen warps want more than smaller devices have.
        let mut ranges = match most_shared_bytes {
            0..131_072 => MOST_WARPS / 2,
            _ => MOST_WARPS,
        };
        while ranges > 1 && blocks < ranges * LEAST_BLOCKS {
            ranges /= 2;
        }
        Self {
            ranges,
            range_blocks: blocks.div_ceil(ranges),
        }
    }

    /// The first block of a range of a matrix of `blocks`, as the kernels divide them.
    pub(crate) fn range_start(&self, range: usize, blocks: usize) -> usize {
        blocks * range / self.ranges
    }

    /// How a launch of `rows` rows, up to [`STREAMED_ROWS`], shares its memory; `None` where tables
    /// of so many inputs leave no room: then rows are multiplied as more rows are.
    pub(crate) fn streamed(
        &self,
        shape: StreamShape,
        most_shared_bytes: usize,
    ) -> Option<Streamed> {
        let StreamShape {
            rows,
            matrices,
            tiles_of_cta,
        } = shape;
        let sum_bytes = rows.min(NARROW_ROWS) * ROW_SUM_BYTES;
        let fixed = UNIT_RING_BYTES + matrices * self.range_blocks * UNIT_ENTRY_BYTES;
        let room = (most_shared_bytes / self.ranges).checked_sub(fixed + sum_bytes)?;
        let block_bytes = rows * ROW_BLOCK_BYTES;
        let x_blocks = (room / block_bytes).min(self.range_blocks);
        if x_blocks < self.range_blocks.min(MOST_UNIT_BLOCKS) {
            return None;
        }
        let room = room - x_blocks * block_bytes;
        // Activations that do not all fit are copied for every tile anew: more of them rather
        // than more sums.
        let buffers = if rows > NARROW_ROWS {
            1
        } else {
            1 + (room / sum_bytes).min(tiles_of_cta.clamp(1, MOST_TILE_BUFFERS) - 1)
        };
        Some(Streamed {
            x_blocks,
            tile_buffers: buffers,
            shared_bytes: self.ranges * (fixed + x_blocks * block_bytes + buffers * sum_bytes),
        })
    }

    /// Parts of K of four ranges or fewer, whose sums are joined at last.
    pub(crate) fn parts(&self) -> usize {
        self.ranges.div_ceil(RANGES_OF_SUM)
    }

    /// CTAs that share the K of `tiles` column tiles of a launch of more than [`STREAMED_ROWS`]
    /// rows: one for each part where tiles alone do not make work for all multiprocessors.
    pub(crate) fn split(&self, tiles: usize, multiprocessors: usize) -> usize {
        if tiles <= WIDE_TILES * multiprocessors {
            self.parts()
        } else {
            1
        }
    }
}

/// Tiles' sums that a launch of up to `rows` rows may leave for others to join, at most; there are
/// no more counters.
pub(crate) fn most_partials(rows: usize, multiprocessors: usize) -> usize {
    if rows <= STREAMED_ROWS {
        return 0;
    }
    WIDE_TILES * multiprocessors * MOST_WARPS.div_ceil(RANGES_OF_SUM)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dynamic shared memory of CTAs of compute capabilities 8.6, 8.0 and 9.0.
    const SHARED_BYTES: [usize; 3] = [97 * 1024, 161 * 1024, 225 * 1024];

    #[test]
    fn every_block_belongs_to_one_warp() {
        for shared_bytes in SHARED_BYTES {
            for blocks in [1, 2, 3, 5, 18, 31, 64, 128, 344, 896, 65_535] {
                let plan = Plan::of(blocks, shared_bytes);
                assert!(plan.ranges.is_power_of_two() && plan.ranges <= MOST_WARPS);
                assert!(plan.parts().is_power_of_two());
                // As the kernels divide them.
                let mut next = 0;
                for range in 0..plan.ranges {
                    assert_eq!(blocks * range / plan.ranges, next);
                    let end = blocks * (range + 1) / plan.ranges;
                    assert!(end > next && end - next <= plan.range_blocks);
                    next = end;
                }
                assert_eq!(next, blocks);
                assert!(blocks * plan.ranges < i32::MAX as usize);
            }
        }
    }

    #[test]
    fn launches_fit_into_shared_memory() {
        for shared_bytes in SHARED_BYTES {
            assert!(WIDE_SHARED_BYTES <= shared_bytes);
            for blocks in [1, 18, 64, 128, 344, 896] {
                let plan = Plan::of(blocks, shared_bytes);
                for rows in 1..=STREAMED_ROWS {
                    for tiles_of_cta in [0, 1, 5, 30] {
                        let shape = StreamShape {
                            rows,
                            matrices: 1,
                            tiles_of_cta,
                        };
                        let streamed = plan.streamed(shape, shared_bytes).unwrap();
                        assert!(streamed.shared_bytes <= shared_bytes);
                        assert!((1..=plan.range_blocks).contains(&streamed.x_blocks));
                        assert!((1..=tiles_of_cta.max(1)).contains(&streamed.tile_buffers));
                    }
                }
            }
        }
        let few = |rows| StreamShape {
            rows,
            matrices: 3,
            tiles_of_cta: 3,
        };
        let plan = Plan::of(128, SHARED_BYTES[2]);
        for rows in [1, 8, 16] {
            let streamed = plan.streamed(few(rows), SHARED_BYTES[2]).unwrap();
            assert_eq!(streamed.x_blocks, 8, "all of 4096 inputs");
        }
        let longest = Plan::of(65_535, SHARED_BYTES[2]);
        assert_eq!(longest.streamed(few(1), SHARED_BYTES[2]), None);
    }

    #[test]
    fn partial_sums_have_room() {
        let plan = Plan::of(128, SHARED_BYTES[2]);
        for multiprocessors in [1, 28, 132] {
            for tiles in [1, 4, 5, 128, 528, 529, 4008] {
                let split = plan.split(tiles, multiprocessors);
                if split > 1 {
                    assert!(tiles * split <= most_partials(32, multiprocessors));
                }
            }
        }
    }
}
