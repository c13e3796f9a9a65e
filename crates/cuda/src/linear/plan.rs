//! How one product is divided among the multiprocessors.

use super::layout::Layout;

/// Bytes of shared memory of a warp; `RING_BYTES` in `linear.cu`.
pub(crate) const RING_BYTES: usize = 4096;

/// Warps of a block of threads (CTA), at most.
pub(crate) const MOST_WARPS: usize = 16;

/// Column tiles of a CTA for more than [`NARROW_ROWS`] rows; `WIDE_TILES` in `linear.cu`.
pub(crate) const WIDE_TILES: usize = 4;

/// Rows up to which a CTA has one column tile.
pub(crate) const NARROW_ROWS: usize = 8;

/// Ranges of K that are summed before others join; `RANGES_OF_SUM` in `linear.cu`.
const RANGES_OF_SUM: usize = 4;

/// Blocks of K that a range should have at least: fewer are not worth their share of the sums.
const LEAST_BLOCKS: usize = 2;

/// The division of one matrix. It depends on the matrix and the device alone, so that the order
/// of sums does not depend on what else a launch has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Parts of K whose sums are joined at last: a power of two.
    pub(crate) split_k: usize,
    /// Ranges of such a part, one a warp: a power of two.
    pub(crate) ranges: usize,
}

/// The division as a launch of some number of rows sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Division {
    /// Column tiles of a CTA.
    pub(crate) tiles: usize,
    /// CTAs that share a tile's K.
    pub(crate) split: usize,
    /// Ranges of K in a CTA.
    pub(crate) ranges: usize,
    /// CTAs of the split whose sums are joined before others.
    pub(crate) sum_parts: usize,
}

impl Plan {
    pub(crate) fn new(layout: &Layout, multiprocessors: usize) -> Self {
        Self::of(layout.tiles, layout.blocks, multiprocessors)
    }

    fn of(tiles: usize, blocks: usize, multiprocessors: usize) -> Self {
        // A multiprocessor holds about sixteen warps, of one CTA or several: the more tiles there
        // are, the smaller their CTAs, so that all run at once or few wait.
        let wanted = if 4 * tiles <= 5 * multiprocessors {
            MOST_WARPS
        } else if 2 * tiles <= 5 * multiprocessors {
            MOST_WARPS / 2
        } else {
            MOST_WARPS / 4
        };
        let mut ranges = wanted;
        while ranges > 1 && blocks < ranges * LEAST_BLOCKS {
            ranges /= 2;
        }
        let most = blocks / (ranges * LEAST_BLOCKS);
        let split = (multiprocessors / tiles.max(1)).min(most).max(1);
        Self {
            split_k: 1 << split.ilog2(),
            ranges,
        }
    }

    /// For launches of up to `rows` rows. The ranges are the same for every number of rows, and
    /// so is the order in which their sums are joined.
    pub(crate) fn division(&self, rows: usize) -> Division {
        if rows <= NARROW_ROWS {
            return Division {
                tiles: 1,
                split: self.split_k,
                ranges: self.ranges,
                sum_parts: 1,
            };
        }
        let ranges = self.ranges.min(RANGES_OF_SUM);
        let sum_parts = self.ranges / ranges;
        Division {
            tiles: WIDE_TILES,
            split: self.split_k * sum_parts,
            ranges,
            sum_parts,
        }
    }
}

/// Tiles' sums that a launch of `matrices` matrices with up to `rows` rows may leave for others to
/// join, at most; there are no more counters.
pub(crate) fn most_partials(matrices: usize, rows: usize, multiprocessors: usize) -> usize {
    // Where K is split there are at most as many tiles' parts as multiprocessors, each of up to
    // four CTAs; where it is not, up to 5/4 of them have four CTAs and up to 5/2 have two.
    let of_one = if rows <= NARROW_ROWS {
        multiprocessors
    } else {
        5 * multiprocessors
    };
    matrices * of_one
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPROCESSORS: [usize; 5] = [1, 28, 84, 108, 132];
    const TILES: [usize; 14] = [1, 2, 7, 8, 31, 64, 66, 67, 128, 165, 166, 330, 331, 4008];

    #[test]
    fn every_block_belongs_to_one_warp() {
        for multiprocessors in MULTIPROCESSORS {
            for tiles in TILES {
                for blocks in [1, 2, 3, 5, 18, 31, 64, 128, 344, 896, 65_535] {
                    let plan = Plan::of(tiles, blocks, multiprocessors);
                    assert!(plan.ranges.is_power_of_two() && plan.ranges <= MOST_WARPS);
                    assert!(plan.split_k.is_power_of_two());
                    let ranges = plan.split_k * plan.ranges;
                    // As the kernel divides them.
                    let mut next = 0;
                    for range in 0..ranges {
                        assert_eq!(blocks * range / ranges, next);
                        next = blocks * (range + 1) / ranges;
                    }
                    assert_eq!(next, blocks);
                    assert!(blocks * ranges < i32::MAX as usize);
                    for rows in [1, 8, 9, 32] {
                        check_division(plan, tiles, rows, multiprocessors);
                    }
                }
            }
        }
    }

    fn check_division(plan: Plan, tiles: usize, rows: usize, multiprocessors: usize) {
        let division = plan.division(rows);
        assert_eq!(division.split * division.ranges, plan.split_k * plan.ranges);
        assert_eq!(division.split, plan.split_k * division.sum_parts);
        assert!(division.tiles * division.ranges <= MOST_WARPS);
        if division.split > 1 {
            let partials = tiles * division.split;
            assert!(partials <= most_partials(1, rows, multiprocessors));
        }
        // What one CTA joins at first is what the other kind joins at first.
        assert!(division.sum_parts == 1 || division.ranges == RANGES_OF_SUM);
    }

    #[test]
    fn known_shapes_are_divided_as_meant() {
        let plan = |tiles, blocks| Plan::of(tiles, blocks, 132);
        let parts = |split_k, ranges| Plan { split_k, ranges };
        assert_eq!(plan(128, 344), parts(1, 16), "7B down");
        assert_eq!(plan(344, 128), parts(1, 4), "7B gate");
        assert_eq!(plan(176, 64), parts(1, 8), "1.1B gate");
        assert_eq!(plan(64, 64), parts(2, 16), "1.1B q");
        assert_eq!(plan(8, 64), parts(2, 16), "1.1B k");
        assert_eq!(plan(1, 1), parts(1, 1));
        let wide = plan(128, 344).division(32);
        assert_eq!((wide.split, wide.ranges, wide.sum_parts), (4, 4, 4));
    }
}
