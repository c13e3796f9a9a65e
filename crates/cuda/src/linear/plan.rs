//! How one product is divided among the multiprocessors.

use super::layout::Layout;

/// Bytes of shared memory of a warp; `RING_BYTES` in `linear.cu`.
pub(crate) const RING_BYTES: usize = 4096;

/// Warps of a block of threads, at most.
pub(crate) const MOST_WARPS: usize = 16;

/// Blocks of K that a warp should have at least: fewer are not worth its share of the sums.
const LEAST_BLOCKS: usize = 2;

/// The division of one matrix. It depends on the matrix and the device alone, so that the order
/// of sums does not depend on what else a launch has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Parts of K that different blocks of threads take.
    pub(crate) split_k: usize,
    /// Parts of such a part that different warps take.
    pub(crate) warps: usize,
}

impl Plan {
    pub(crate) fn new(layout: &Layout, multiprocessors: usize) -> Self {
        Self::of(layout.tiles, layout.blocks, multiprocessors)
    }

    /// `split_k · tiles` never exceeds the multiprocessors where K is split.
    fn of(tiles: usize, blocks: usize, multiprocessors: usize) -> Self {
        // Two blocks of threads a multiprocessor are as good as one of twice the warps.
        let wanted = if tiles >= 2 * multiprocessors {
            MOST_WARPS / 2
        } else {
            MOST_WARPS
        };
        let mut warps = wanted;
        while warps > 1 && blocks < warps * LEAST_BLOCKS {
            warps /= 2;
        }
        let most = blocks / (warps * LEAST_BLOCKS);
        let split_k = (multiprocessors / tiles.max(1)).min(most).max(1);
        Self { split_k, warps }
    }
}

/// Sums of split products that one launch of five matrices may have, and counters: no more than
/// a multiprocessor each, per matrix.
pub(crate) fn most_partials(matrices: usize, multiprocessors: usize) -> usize {
    matrices * multiprocessors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_belongs_to_one_warp() {
        for multiprocessors in [28, 84, 132] {
            for tiles in [1, 2, 7, 8, 31, 64, 65, 66, 67, 128, 344, 4008] {
                for blocks in [1, 2, 3, 5, 18, 31, 64, 128, 344, 896] {
                    let plan = Plan::of(tiles, blocks, multiprocessors);
                    assert!(plan.warps.is_power_of_two() && plan.warps <= MOST_WARPS);
                    let ranges = plan.split_k * plan.warps;
                    // As the kernel divides them.
                    let mut next = 0;
                    for range in 0..ranges {
                        assert_eq!(blocks * range / ranges, next);
                        next = blocks * (range + 1) / ranges;
                    }
                    assert_eq!(next, blocks);
                    assert!(blocks * ranges < i32::MAX as usize);
                    if plan.split_k > 1 {
                        assert!(plan.split_k * tiles <= multiprocessors);
                        assert!(blocks >= ranges * LEAST_BLOCKS);
                    }
                }
            }
        }
    }

    #[test]
    fn known_shapes_are_divided_as_meant() {
        let plan = |tiles, blocks| Plan::of(tiles, blocks, 132);
        let parts = |split_k, warps| Plan { split_k, warps };
        assert_eq!(plan(128, 344), parts(1, 16), "7B down");
        assert_eq!(plan(344, 128), parts(1, 8), "7B gate");
        assert_eq!(plan(64, 64), parts(2, 16), "1.1B q");
        assert_eq!(plan(8, 64), parts(2, 16), "1.1B k");
        assert_eq!(plan(1, 1), parts(1, 1));
    }
}
