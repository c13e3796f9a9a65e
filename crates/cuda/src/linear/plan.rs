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
    /// Equal shares of the tiles at most, each of one CTA or of those that have the parts of K.
    pub(crate) shares: usize,
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
    /// The others: a CTA has a part of K.
    Parts {
        /// Whether the CTAs that have them are a cluster, by `oxl_linear_cluster_..`.
        in_cluster: bool,
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
            shares: limits.multiprocessors,
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
        let part = self.part(shape, CLUSTER_PARTS);
        // What a CTA joins of a tile: its share of the sums of all parts.
        let warp_bytes = part.warp_bytes + part.sum_bytes + BARRIER_BYTES;
        // Of gate and of up a warp has as many.
        let matrices_apart = if shape.is_gated { 2 } else { 1 };
        let tiles = shape.tiles / matrices_apart;
        let clusters = limits.clusters.min(tiles);
        let cluster_tiles = tiles.div_ceil(clusters.max(1));
        let gated_bytes = if shape.is_gated {
            cluster_tiles * part.sum_bytes / CLUSTER_PARTS
        } else {
            0
        };
        let fixed_bytes = part.fixed_bytes + RANGES_BYTES + gated_bytes;
        let fitting_warps = limits.shared_bytes.checked_sub(fixed_bytes)? / warp_bytes;
        let warps = warps
            .min(CLUSTER_WARPS)
            .min(fitting_warps)
            .min(cluster_tiles);
        if warps == 0 {
            return None;
        }
        let rounds = matrices_apart * cluster_tiles.div_ceil(warps);
        // Tiles' sums are joined beside others' products.
        let cost = rounds * part.blocks;
        let division = Division {
            rows: shape.rows,
            kind: Kind::Parts {
                in_cluster: true,
                parts: CLUSTER_PARTS,
                part_blocks: part.blocks,
            },
            warps,
            shares: clusters,
            shared_bytes: fixed_bytes + warps * warp_bytes,
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
        let part = self.part(shape, parts);
        let shared_bytes = part.fixed_bytes + warps * part.warp_bytes;
        let shares = (limits.multiprocessors / parts).max(1);
        let tiles_of_warp = shape.tiles.div_ceil(shares).div_ceil(warps);
        let cost = tiles_of_warp * (part.blocks + BLOCKS_OF_A_TILE);
        let division = Division {
            rows: shape.rows,
            kind: Kind::Parts {
                in_cluster: false,
                parts,
                part_blocks: part.blocks,
            },
            warps,
            shares,
            shared_bytes,
        };
        (shared_bytes <= limits.shared_bytes).then_some((cost, division))
    }

    /// One of so many parts of K, whoever joins their sums.
    fn part(&self, shape: LaunchShape, parts: usize) -> Part {
        let padded_rows = shape.rows.next_multiple_of(ROWS_OF_TILE);
        let ranges = self.ranges / parts;
        let blocks = self.blocks.div_ceil(parts);
        let sum_bytes = padded_rows * ROW_SUM_BYTES;
        let table_bytes = shape.matrices * ranges * shape.range_units * UNIT_ENTRY_BYTES;
        Part {
            blocks,
            sum_bytes,
            // Sums of ranges wait for their neighbours'.
            warp_bytes: RING_BYTES + ranges / 2 * sum_bytes,
            fixed_bytes: blocks * padded_rows * ROW_BLOCK_BYTES + table_bytes,
        }
    }
}

/// A part of K and what a CTA that has it takes of shared memory.
struct Part {
    /// Of the longest part.
    blocks: usize,
    /// Of a warp's sums of a tile.
    sum_bytes: usize,
    /// Of each warp: its ring, and sums that wait.
    warp_bytes: usize,
    /// Of all warps: rows and tables.
    fixed_bytes: usize,
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
mod tests;
