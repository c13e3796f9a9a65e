//! How one product is divided among the multiprocessors.

use super::MOST_MATRICES;
use super::layout::TILE_OUTPUTS;
use crate::context::GpuInfo;

/// Bytes of a warp's ring of units: `SLOTS * SLOT_BYTES` in `units.cuh`.
const RING_BYTES: usize = 2 * (2048 + 128);

/// Tiles whose sums `oxl_linear_few` joins at once, at most.
const MOST_TILE_BUFFERS: usize = 16;

/// Bytes of a unit in the table of a range: `Unit` in `units.cuh`.
const UNIT_ENTRY_BYTES: usize = 8;

/// Warps of a block of threads (CTA), at most; `MOST_WARPS` in `linear.cuh`.
pub(crate) const MOST_WARPS: usize = 16;

/// Rows of a tensor core's operand; `ROWS_OF_TILE` in `linear.cuh`.
pub(crate) const ROWS_OF_TILE: usize = 8;

/// Rows of the largest launch.
pub(crate) const ROWS_OF_LAUNCH: usize = 32;

/// Ranges of a part of K, at most: there is room for the sums of two that wait for others.
const MOST_PART_RANGES: usize = 4;

/// Blocks of threads (CTAs) of a cluster, each of which has a part of K; `CLUSTER_PARTS` in `linear_cluster.cu`.
pub(crate) const CLUSTER_PARTS: usize = 8;

/// Warps of such a CTA, at most.
pub(crate) const CLUSTER_WARPS: usize = 12;

/// Ranges of each of those parts: no other plans have kernels.
const CLUSTER_RANGES: usize = MOST_WARPS / CLUSTER_PARTS;

/// Tiles' sums of parts of K that a launch leaves for others to join, at most: 16 MiB of 32 rows.
const MOST_PARTIALS: usize = 4096;

/// Blocks of K that a range should have at least: fewer are not worth their share of the sums.
const LEAST_BLOCKS: usize = 2;

/// Shared memory of a CTA that is not dynamic, at most.
const STATIC_SHARED_BYTES: usize = 2 * 1024;

/// Bytes of one row's activations of a block.
const ROW_BLOCK_BYTES: usize = 64;

/// Bytes of a warp's sums of one row.
const ROW_SUM_BYTES: usize = 128;

/// A CTA that has as many tiles of gate as of up may have so many times the tiles that it would have otherwise: with 12/11
/// (codellama-34b) the kernel that is saved costs more, with 8/7 (llama3-8b) and 4/3 (tinyllama-1b) less.
const MOST_UNEVEN: (usize, usize) = (11, 10);

/// Bytes of where a tile's outputs go, if they are gated.
const TILE_PLACES_BYTES: usize = 128;

/// Dynamic shared memory that a CTA may have.
pub(crate) fn most_shared_bytes(gpu: &GpuInfo) -> usize {
    gpu.shared_per_block.get() as usize - STATIC_SHARED_BYTES
}

/// The division of one matrix. It depends on its inputs and the device alone, so that the order
/// of sums does not depend on what else a launch has to do, and matrices that share their inputs
/// are divided alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Blocks of K.
    pub(crate) blocks: usize,
    /// Ranges of K, one a warp: a power of two.
    pub(crate) ranges: usize,
    /// Blocks of the longest range.
    pub(crate) range_blocks: usize,
}

/// What is multiplied by one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaunchShape {
    /// Rows that there are: a launch takes up to [`ROWS_OF_LAUNCH`] of them.
    pub(crate) rows: usize,
    /// How many matrices.
    pub(crate) matrices: usize,
    /// Column tiles of all of them.
    pub(crate) tiles: usize,
    /// Units of the range that has most of them; no more than blocks.
    pub(crate) range_units: usize,
    /// Whether they are gate and up of as many outputs, whose gated product is stored: by `oxl_linear_few_gated` or
    /// `oxl_linear_cluster_gated_16`.
    pub(crate) is_gated: bool,
}

/// How a launch is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Division {
    /// Rows of the launch.
    pub(crate) rows: usize,
    /// By which kernel.
    pub(crate) kind: Kind,
    /// Warps of a CTA.
    pub(crate) warps: usize,
    /// Dynamic shared memory of a CTA.
    pub(crate) shared_bytes: usize,
}

/// The kernel of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `oxl_linear_few`: a CTA has all of K.
    Few {
        /// Tiles whose sums are joined at once.
        tile_buffers: usize,
    },
    /// `oxl_linear_cluster_..`: the CTAs of a cluster have the parts of K, [`CLUSTER_PARTS`].
    Cluster {
        /// Blocks of the longest part.
        part_blocks: usize,
        /// How many clusters.
        clusters: usize,
    },
    /// The others: a CTA has a part of K.
    Parts {
        /// Parts of K: a power of two.
        parts: usize,
        /// Blocks of the longest part.
        part_blocks: usize,
    },
}

impl Plan {
    pub(crate) fn of(blocks: usize, most_shared_bytes: usize) -> Self {
        /// Blocks up to which eight ranges are short enough for smaller devices.
        const BLOCKS_OF_EIGHT: usize = 1024;
        // Rings and activations of sixteen warps want more than smaller devices have.
        let mut ranges = match most_shared_bytes {
            0..131_072 if blocks <= BLOCKS_OF_EIGHT => MOST_WARPS / 2,
            _ => MOST_WARPS,
        };
        while ranges > 1 && blocks < ranges * LEAST_BLOCKS {
            ranges /= 2;
        }
        Self {
            blocks,
            ranges,
            range_blocks: blocks.div_ceil(ranges),
        }
    }

    /// The first block of a range, as the kernels divide them.
    pub(crate) fn range_start(&self, range: usize) -> usize {
        self.blocks * range / self.ranges
    }

    /// Whether products with a matrix of so many inputs can be divided at all. `range_units`: units of the
    /// range that has most of them.
    pub(crate) fn can_be_divided(&self, range_units: usize, limits: Limits) -> bool {
        let shape = LaunchShape {
            rows: 1,
            matrices: 1,
            tiles: 1,
            range_units,
            is_gated: false,
        };
        self.divide(shape, limits).is_some()
    }

    /// The division of the next launch over `shape`; `None` where so many inputs leave no room
    /// even for one row.
    pub(crate) fn divide(&self, shape: LaunchShape, limits: Limits) -> Option<Division> {
        // As many in each launch: two of 17 cost less than one of 32 and one of 2.
        let launches = shape.rows.div_ceil(ROWS_OF_LAUNCH);
        let rows = shape.rows.div_ceil(launches.max(1));
        let few = |rows| self.few(LaunchShape { rows, ..shape }, limits);
        if shape.is_gated {
            return match shape.rows.div_ceil(ROWS_OF_TILE) {
                0 | 1 => few(shape.rows),
                2 => self.gated_cluster(shape, limits),
                _ => None,
            };
        }
        let parts = |rows: usize| {
            let row_tiles = rows.div_ceil(ROWS_OF_TILE);
            let fewer = (1..row_tiles).rev().map(|tiles| tiles * ROWS_OF_TILE);
            let by_rows = |rows| self.parts(LaunchShape { rows, ..shape }, limits);
            std::iter::once(rows).chain(fewer).find_map(by_rows)
        };
        let whole = (rows <= ROWS_OF_TILE).then(|| few(rows)).flatten();
        whole
            .or_else(|| parts(rows))
            .or_else(|| (1..=rows.min(ROWS_OF_TILE)).rev().find_map(few))
    }

    /// All of K in every CTA, if its activations fit.
    fn few(&self, shape: LaunchShape, limits: Limits) -> Option<Division> {
        /// What buffers leave, so that the next kernel's small blocks, of which the driver keeps a kilobyte
        /// each, start beside a CTA: six rows of codellama-34b took 13% longer without.
        const ROOM_BYTES: usize = 6 * 1024;
        let LaunchShape {
            rows,
            matrices,
            tiles,
            range_units,
            is_gated,
        } = shape;
        let sum_bytes = rows * ROW_SUM_BYTES;
        let even_tiles = tiles.div_ceil(limits.multiprocessors);
        let (cta_tiles, gated_bytes) = if is_gated {
            let pairs = (tiles / 2).div_ceil(limits.multiprocessors);
            if 2 * pairs * MOST_UNEVEN.1 > even_tiles * MOST_UNEVEN.0 {
                return None;
            }
            (2 * pairs, pairs * (sum_bytes + TILE_PLACES_BYTES))
        } else {
            (even_tiles, 0)
        };
        let fixed = RING_BYTES
            + matrices * range_units * UNIT_ENTRY_BYTES
            + self.range_blocks * rows * ROW_BLOCK_BYTES;
        let buffers = |bytes: usize| {
            let bytes = bytes.checked_sub(gated_bytes)?;
            Some((bytes / self.ranges).checked_sub(fixed)? / sum_bytes)
        };
        let most_buffers = buffers(limits.shared_bytes)?;
        let beside_others = buffers(limits.shared_bytes.saturating_sub(ROOM_BYTES)).unwrap_or(0);
        let tile_buffers = beside_others
            .max(most_buffers.min(1))
            .min(cta_tiles)
            .min(MOST_TILE_BUFFERS);
        (tile_buffers > 0).then_some(Division {
            rows,
            kind: Kind::Few { tile_buffers },
            warps: self.ranges,
            shared_bytes: self.ranges * (fixed + tile_buffers * sum_bytes) + gated_bytes,
        })
    }

    /// K in parts, whose activations and warps must fit into a multiprocessor.
    fn parts(&self, shape: LaunchShape, limits: Limits) -> Option<Division> {
        let most_warps = limits.most_warps(shape.rows);
        [most_warps, 4, 1].into_iter().find_map(|warps| {
            let least_parts = self.ranges.div_ceil(MOST_PART_RANGES);
            let parts = |shift| least_parts << shift;
            let possible = (0..).map(parts).take_while(|&parts| parts <= self.ranges);
            let divisions = possible.filter_map(|parts| self.in_parts(shape, parts, warps, limits));
            let all = divisions.chain(self.in_cluster(shape, warps, limits));
            let best = all.min_by_key(|&(cost, _)| cost);
            best.map(|(_, division)| division)
        })
    }

    /// Gate and up of 9 to 16 rows by clusters, if gating them costs less than the kernel that is saved.
    fn gated_cluster(&self, shape: LaunchShape, limits: Limits) -> Option<Division> {
        /// Blocks that a warp could multiply meanwhile: 5 us.
        const BLOCKS_OF_A_KERNEL: usize = 8;
        let warps = limits.most_warps(shape.rows);
        let (cost, division) = self.in_cluster(shape, warps, limits)?;
        let alone = LaunchShape {
            is_gated: false,
            ..shape
        };
        let (cost_alone, _) = self.in_cluster(alone, warps, limits)?;
        (cost <= cost_alone + BLOCKS_OF_A_KERNEL).then_some(division)
    }

    /// The parts of a cluster by up to so many warps, and what that costs; `None` if it does not fit.
    fn in_cluster(
        &self,
        shape: LaunchShape,
        warps: usize,
        limits: Limits,
    ) -> Option<(usize, Division)> {
        /// A warp's barriers, and what a CTA has of the matrices (`ClusterExchange::bytes`).
        const BARRIER_BYTES: usize = 16;
        const RANGES_BYTES: usize = 16 * MOST_MATRICES;
        // Of fewer rows sums are few, and those in memory cost less than the multiprocessors that are in no cluster.
        let are_few = shape.rows <= ROWS_OF_TILE;
        if are_few || limits.clusters == 0 || self.ranges != CLUSTER_PARTS * CLUSTER_RANGES {
            return None;
        }
        let padded_rows = shape.rows.next_multiple_of(ROWS_OF_TILE);
        let part_blocks = self.blocks.div_ceil(CLUSTER_PARTS);
        // Sums of a range that wait for the other's, and of all parts that a CTA joins.
        let warp_bytes = RING_BYTES + 2 * padded_rows * ROW_SUM_BYTES + BARRIER_BYTES;
        let table_bytes = shape.matrices * CLUSTER_RANGES * shape.range_units * UNIT_ENTRY_BYTES;
        let fixed = part_blocks * padded_rows * ROW_BLOCK_BYTES + table_bytes + RANGES_BYTES;
        // Of gate and of up a warp has as many.
        let matrices_apart = if shape.is_gated { 2 } else { 1 };
        let tiles = shape.tiles / matrices_apart;
        let clusters = limits.clusters.min(tiles);
        let cluster_tiles = tiles.div_ceil(clusters.max(1));
        let gated_bytes = if shape.is_gated {
            cluster_tiles * padded_rows * ROW_SUM_BYTES / CLUSTER_PARTS
        } else {
            0
        };
        let fitting_warps = limits.shared_bytes.checked_sub(fixed + gated_bytes)? / warp_bytes;
        let warps = warps
            .min(CLUSTER_WARPS)
            .min(fitting_warps)
            .min(cluster_tiles);
        if warps == 0 {
            return None;
        }
        let rounds = matrices_apart * cluster_tiles.div_ceil(warps);
        // Tiles' sums are joined beside others' products.
        let cost = rounds * part_blocks;
        let division = Division {
            rows: shape.rows,
            kind: Kind::Cluster {
                part_blocks,
                clusters,
            },
            warps,
            shared_bytes: fixed + warps * warp_bytes + gated_bytes,
        };
        Some((cost, division))
    }

    /// So many parts of K by so many warps, and what that costs; `None` if it does not fit.
    fn in_parts(
        &self,
        shape: LaunchShape,
        parts: usize,
        warps: usize,
        limits: Limits,
    ) -> Option<(usize, Division)> {
        /// Blocks that could be multiplied while a tile's sums are written, reported and joined.
        const BLOCKS_OF_A_TILE: usize = 20;
        let padded_rows = shape.rows.next_multiple_of(ROWS_OF_TILE);
        let ranges = self.ranges / parts;
        let part_blocks = self.blocks.div_ceil(parts);
        let waiting_bytes = ranges / 2 * padded_rows * ROW_SUM_BYTES;
        let table_bytes = shape.matrices * ranges * shape.range_units * UNIT_ENTRY_BYTES;
        let x_bytes = part_blocks * padded_rows * ROW_BLOCK_BYTES;
        let shared_bytes = warps * (RING_BYTES + waiting_bytes) + x_bytes + table_bytes;
        let shares = (limits.multiprocessors / parts).max(1);
        let tiles_of_warp = shape.tiles.div_ceil(shares).div_ceil(warps);
        let cost = tiles_of_warp * (part_blocks + BLOCKS_OF_A_TILE);
        let division = Division {
            rows: shape.rows,
            kind: Kind::Parts { parts, part_blocks },
            warps,
            shared_bytes,
        };
        (shared_bytes <= limits.shared_bytes).then_some((cost, division))
    }
}

/// What a device gives a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Dynamic shared memory that a CTA may have.
    pub(crate) shared_bytes: usize,
    /// How many multiprocessors.
    pub(crate) multiprocessors: usize,
    /// Whether the device code is made for compute capability 9.0, not for an older one.
    pub(crate) is_hopper: bool,
    /// How many clusters of [`CLUSTER_PARTS`] CTAs run at once; 0: there are no kernels of them.
    pub(crate) clusters: usize,
}

impl Limits {
    pub(crate) fn of(gpu: &GpuInfo, is_hopper: bool, clusters: usize) -> Self {
        Self {
            shared_bytes: most_shared_bytes(gpu),
            multiprocessors: gpu.multiprocessors,
            is_hopper,
            clusters,
        }
    }

    /// Warps of a CTA that has a part of K, at most: more rows take more registers, but for how the compiler happens
    /// to deal with them.
    fn most_warps(self, rows: usize) -> usize {
        match rows.div_ceil(ROWS_OF_TILE) {
            1 => 16,
            2 => 12,
            _ if self.is_hopper => 12,
            _ => 8,
        }
    }
}

/// Tiles' sums of parts of K that there is room for beside products of up to `out_features` outputs;
/// there are no more counters.
pub(crate) fn most_partials(out_features: usize) -> usize {
    let tiles = MOST_MATRICES * out_features.div_ceil(TILE_OUTPUTS);
    (tiles * MOST_WARPS).clamp(MOST_WARPS, MOST_PARTIALS)
}

/// Bytes of one tile's sums of a part of K, for up to `rows` rows.
pub(crate) fn partial_bytes(rows: usize) -> usize {
    rows.min(ROWS_OF_LAUNCH).next_multiple_of(ROWS_OF_TILE) * ROW_SUM_BYTES
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
                let mut next = 0;
                for range in 0..plan.ranges {
                    assert_eq!(plan.range_start(range), next);
                    let end = plan.range_start(range + 1);
                    assert!(end > next && end - next <= plan.range_blocks);
                    next = end;
                }
                assert_eq!(next, blocks);
                assert!(blocks * plan.ranges < i32::MAX as usize);
            }
        }
    }

    #[test]
    fn launches_fit_and_take_all_rows() {
        for shared_bytes in SHARED_BYTES {
            let is_hopper = shared_bytes == SHARED_BYTES[2];
            let limits = Limits {
                shared_bytes,
                multiprocessors: 100,
                is_hopper,
                clusters: if is_hopper { 11 } else { 0 },
            };
            for blocks in [1, 2, 18, 64, 128, 344, 896, 1664] {
                let plan = Plan::of(blocks, shared_bytes);
                for (matrices, tiles) in [(1, 1), (3, 384), (MOST_MATRICES, 5000)] {
                    for all in [1, 7, 8, 9, 16, 17, 24, 25, 32, 33, 64, 100, 128] {
                        let mut left = all;
                        while left > 0 {
                            let shape = LaunchShape {
                                rows: left,
                                matrices,
                                tiles,
                                range_units: plan.range_blocks,
                                is_gated: false,
                            };
                            // Those that do not fit together are multiplied one by one.
                            let alone = LaunchShape {
                                matrices: 1,
                                ..shape
                            };
                            let division = plan
                                .divide(shape, limits)
                                .or_else(|| plan.divide(alone, limits))
                                .unwrap();
                            check(&plan, &division, limits);
                            left -= division.rows;
                        }
                    }
                }
            }
        }
    }

    fn check(plan: &Plan, division: &Division, limits: Limits) {
        assert!((1..=ROWS_OF_LAUNCH).contains(&division.rows));
        assert!(division.shared_bytes <= limits.shared_bytes, "{division:?}");
        assert!((1..=MOST_WARPS).contains(&division.warps));
        match division.kind {
            Kind::Few { tile_buffers } => {
                assert!(division.rows <= ROWS_OF_TILE && division.warps == plan.ranges);
                assert!((1..=MOST_TILE_BUFFERS).contains(&tile_buffers));
            }
            Kind::Cluster {
                part_blocks,
                clusters,
            } => {
                assert!((1..=limits.clusters).contains(&clusters));
                assert_eq!(plan.ranges, CLUSTER_PARTS * CLUSTER_RANGES);
                assert!(division.rows <= 8 || division.warps <= 12);
                for part in 0..CLUSTER_PARTS {
                    let start = plan.range_start(part * CLUSTER_RANGES);
                    let end = plan.blocks * (part + 1) / CLUSTER_PARTS;
                    assert_eq!(start, plan.blocks * part / CLUSTER_PARTS);
                    assert!(end - start <= part_blocks);
                }
            }
            Kind::Parts { parts, part_blocks } => {
                assert!(parts.is_power_of_two() && parts <= plan.ranges);
                assert!(plan.ranges / parts <= MOST_PART_RANGES);
                assert!(division.rows <= 8 || division.warps <= 12);
                assert!(division.rows <= 16 || limits.is_hopper || division.warps <= 8);
                for part in 0..parts {
                    let start = plan.blocks * part / parts;
                    let end = plan.blocks * (part + 1) / parts;
                    assert_eq!(start, plan.range_start(part * plan.ranges / parts));
                    assert!(end - start <= part_blocks);
                }
            }
        }
    }

    #[test]
    fn usual_shapes_are_divided_as_the_kernels_were_made_for() {
        let limits = Limits {
            shared_bytes: SHARED_BYTES[2],
            multiprocessors: 132,
            is_hopper: true,
            clusters: 0,
        };
        let division = |blocks, tiles, rows, limits: Limits| {
            let plan = Plan::of(blocks, limits.shared_bytes);
            let shape = LaunchShape {
                rows,
                matrices: 1,
                tiles,
                range_units: plan.range_blocks.div_ceil(4),
                is_gated: false,
            };
            let division = plan.divide(shape, limits).unwrap();
            match division.kind {
                Kind::Few { .. } => (division.rows, division.warps, 0),
                Kind::Cluster { clusters, .. } => (division.rows, division.warps, clusters * 100),
                Kind::Parts { parts, .. } => (division.rows, division.warps, parts),
            }
        };
        assert_eq!(division(128, 384, 1, limits), (1, 16, 0));
        assert_eq!(division(128, 384, 8, limits), (8, 16, 0));
        assert_eq!(division(344, 128, 8, limits), (8, 16, 16));
        assert_eq!(division(128, 384, 16, limits), (16, 12, 4));
        assert_eq!(division(128, 384, 32, limits), (32, 12, 4));
        assert_eq!(division(128, 128, 32, limits), (32, 12, 8));
        assert_eq!(division(344, 128, 32, limits), (32, 12, 8));
        assert_eq!(division(688, 256, 32, limits), (32, 12, 16));
        assert_eq!(division(128, 384, 33, limits), (17, 12, 4));
        let limits = Limits {
            clusters: 15,
            ..limits
        };
        assert_eq!(division(128, 384, 8, limits), (8, 16, 0));
        assert_eq!(division(344, 128, 8, limits), (8, 16, 16));
        // A cluster has 26 tiles: three rounds of twelve warps. With 33 shares of four parts it would be one of twice
        // as many blocks, and sums in memory.
        assert_eq!(division(128, 384, 32, limits), (32, 12, 1500));
        assert_eq!(division(128, 688, 32, limits), (32, 12, 1500));
        assert_eq!(division(128, 128, 32, limits), (32, 9, 1500));
        assert_eq!(division(64, 8, 32, limits), (32, 1, 800));
        let gated = |blocks, tiles, rows, limits: Limits| {
            let plan = Plan::of(blocks, limits.shared_bytes);
            let shape = LaunchShape {
                rows,
                matrices: 2,
                tiles,
                range_units: plan.range_blocks.div_ceil(4),
                is_gated: true,
            };
            let division = plan.divide(shape, limits)?;
            Some((
                division.warps,
                matches!(division.kind, Kind::Cluster { .. }),
            ))
        };
        assert_eq!(gated(128, 688, 8, limits), Some((16, false)));
        assert_eq!(gated(128, 688, 9, limits), Some((12, true)));
        assert_eq!(gated(128, 688, 16, limits), Some((12, true)));
        assert_eq!(gated(128, 688, 17, limits), None);
        // Thirty tiles of each are six rounds instead of five.
        assert_eq!(gated(128, 896, 16, limits), None);
        // As the conformance suite's, here and on a small GPU.
        let small = Limits {
            clusters: 2,
            ..limits
        };
        for limits in [limits, small] {
            assert_eq!(gated(32, 624, 9, limits), Some((12, true)));
        }
        // Its rows leave room for four warps.
        assert_eq!(division(688, 256, 32, limits), (32, 12, 16));
    }

    #[test]
    fn what_leaves_no_room_is_not_divided() {
        let limits = Limits {
            shared_bytes: SHARED_BYTES[2],
            multiprocessors: 132,
            is_hopper: true,
            clusters: 16,
        };
        let plan = Plan::of(65_535, limits.shared_bytes);
        assert!(!plan.can_be_divided(plan.range_blocks, limits));
        let plan = Plan::of(6_000, limits.shared_bytes);
        assert!(plan.can_be_divided(plan.range_blocks / 4, limits));
    }

    #[test]
    fn every_tile_has_room_for_all_its_parts() {
        assert_eq!(most_partials(1), 5 * MOST_WARPS);
        assert_eq!(most_partials(128_256), MOST_PARTIALS);
        assert!(most_partials(0) >= MOST_WARPS);
        assert_eq!(partial_bytes(1), 8 * 128);
        assert_eq!(partial_bytes(2048), 32 * 128);
    }
}
