//! How the kernel that splits sequences among blocks is launched: its grid and its shared memory, from shapes alone.

use oxllama_backend::{CacheShape, HeadLayout};

use super::THREADS;
use super::launch::{HeadTiles, Ring, ScratchLayout, shared_limit};
use super::tiles::{MOST_PIECES, SPLIT_HEADS, TILE_TOKENS};
use crate::context::GpuInfo;

/// Most stages of a ring: more tiles than a block takes on alone need not be on their way. `copies_wait` counts no more.
const MOST_SLOTS: usize = 4;

/// What the driver keeps of a multiprocessor's shared memory for each block.
const RESERVED_SHARED_BYTES: usize = 1024;

/// Elements by which a row in shared memory is longer than a head; `PADDING` in `attention.cuh`.
const PADDING: usize = 8;

/// Bytes by which rows of codes are longer than a vector; `ROW_PADDING_BYTES` in `codes.cuh`.
const ROW_PADDING_BYTES: usize = 16;

/// `SplitShared` of `attention_split.cu`.
fn split_shared_bytes(padded_head_dim: usize) -> usize {
    896 + 4 * padded_head_dim
}

/// Blocks of the splitting kernel that a multiprocessor is to hold, at most.
const MOST_SPLIT_BLOCKS: usize = 3;

/// The same where sequences of fp16 are split among blocks: pieces, a power of two in number, are dealt more
/// evenly to fewer blocks, which have more of them on their way.
const SHARING_BLOCKS: usize = 2;

/// The same where more blocks of fp16 are needed than would be held at once: each has one stage alone and waits for its next
/// tile, but a round of blocks less has to wait for others to end; and of quantised heads, whose stages are small and whose
/// instructions take longer than their bytes.
const QUEUING_BLOCKS: usize = 4;

/// A block of the splitting kernel's shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SplitMemory {
    /// Where the step's heads lie as they come, in bytes from its start.
    pub(super) staging_at: usize,
    /// Where tiles lie.
    pub(super) tiles_at: usize,
    pub(super) ring: Ring,
}

impl SplitMemory {
    /// For blocks of `heads` query heads of one row that they prepare themselves, or of
    /// [`SPLIT_HEADS`] that are prepared, `blocks` of which a multiprocessor is to hold. `None`: the
    /// GPU has too little shared memory, as those with 99 KiB a block have for fp16 heads of more
    /// than 128 dimensions.
    pub(super) fn of(
        shape: &CacheShape,
        padded: usize,
        heads: Option<usize>,
        blocks: usize,
        gpu: &GpuInfo,
    ) -> Option<Self> {
        let row = padded + PADDING;
        let queries = heads.unwrap_or(SPLIT_HEADS) * row * 2;
        let weights = SPLIT_HEADS * (TILE_TOKENS + PADDING) * 2;
        // Weights take the place of fp16's queries.
        let both = if shape.format.is_quantised() {
            queries + weights
        } else {
            queries.max(weights)
        };
        let staging_at = split_shared_bytes(padded) + both.next_multiple_of(128);
        let staging = heads.map_or(0, |heads| (heads + 2) * padded * size_of::<f32>());
        let tiles_at = staging_at + staging.next_multiple_of(128);
        let limit = shared_limit(gpu);
        let ring = ring(shape, padded, tiles_at, limit, blocks)?;
        Some(Self {
            staging_at,
            tiles_at,
            ring,
        })
    }
}

/// As many stages of the splitting kernel as leave room for `blocks` blocks, or for fewer blocks
/// of two stages ([`QUEUING_BLOCKS`] have one at least), or for one block of one stage; and for results where
/// the stages were.
fn ring(
    shape: &CacheShape,
    padded: usize,
    fixed: usize,
    limit: usize,
    blocks: usize,
) -> Option<Ring> {
    let stored = |layout: HeadLayout| {
        TILE_TOKENS * (layout.vector_bytes() + ROW_PADDING_BYTES + layout.scale_bytes())
    };
    let slot_bytes = if shape.format.is_quantised() {
        stored(shape.key_layout()) + stored(shape.value_layout())
    } else {
        2 * TILE_TOKENS * (padded + PADDING) * 2
    };
    let slots = |blocks: usize| {
        let share = if blocks == 1 {
            limit
        } else {
            (limit / blocks).saturating_sub(RESERVED_SHARED_BYTES)
        };
        share.saturating_sub(fixed) / slot_bytes
    };
    let least = results_bytes(padded).div_ceil(slot_bytes);
    let least_slots = |blocks| if blocks == QUEUING_BLOCKS { 1 } else { 2 };
    let mut most_first = (1..=blocks).rev();
    let held = most_first.find(|&blocks| slots(blocks) >= least.max(least_slots(blocks)));
    let slots = slots(held.unwrap_or(1)).min(MOST_SLOTS);
    (slots >= least).then_some(Ring {
        slots,
        slot_bytes,
        shared_bytes: fixed + slots * slot_bytes,
    })
}

/// Bytes of a block's results, which lie where tiles did: of all query heads, or what folds the pieces of several blocks and
/// four dimensions of one for every thread.
fn results_bytes(padded: usize) -> usize {
    /// `MOST_FOLDED` of `split_results.cuh`.
    const MOST_FOLDED: usize = MOST_PIECES + 2;
    let whole = SPLIT_HEADS * (padded + PADDING) * size_of::<f32>();
    let factors = SPLIT_HEADS * MOST_FOLDED * 2 * size_of::<f32>();
    whole.max(factors + THREADS * 4 * size_of::<f32>())
}

/// How the splitting kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SplitGrid {
    pub(super) heads: HeadTiles,
    pub(super) grid: [usize; 3],
    /// `AttendSplitArgs::tiles_alone`.
    pub(super) tiles_alone: usize,
    /// How many a multiprocessor is to hold.
    pub(super) blocks_of_multiprocessor: usize,
}

impl SplitGrid {
    /// Over `tiles` tiles that have `rows` rows together.
    pub(super) fn of(
        (tiles, rows): (usize, usize),
        cache: &CacheShape,
        group: usize,
        scratch: &ScratchLayout,
        gpu: &GpuInfo,
    ) -> Self {
        let heads = HeadTiles::of(group, SPLIT_HEADS);
        let blocks_of_tile = cache.kv_heads * heads.head_tiles;
        let blocks = tiles * blocks_of_tile;
        let blocks_of_multiprocessor = blocks_of_multiprocessor(blocks, cache, gpu);
        // As many blocks as the GPU is to hold at once. What a row gives does not depend on this.
        let held = gpu.multiprocessors * blocks_of_multiprocessor;
        let sharers = if rows <= scratch.partial_rows {
            (held / blocks.max(1)).clamp(1, scratch.most_pieces)
        } else {
            1
        };
        Self {
            heads,
            grid: [tiles, blocks_of_tile, sharers],
            tiles_alone: tiles_alone(blocks, gpu),
            blocks_of_multiprocessor,
        }
    }
}

/// Blocks of the splitting kernel that a multiprocessor is to hold, where `blocks` blocks are needed
/// for one piece of each tile of rows.
fn blocks_of_multiprocessor(blocks: usize, cache: &CacheShape, gpu: &GpuInfo) -> usize {
    /// Of more dimensions two blocks take all registers.
    const MOST_QUEUING_DIMS: usize = 128;
    let most = if cache.head_dim > MOST_QUEUING_DIMS {
        MOST_SPLIT_BLOCKS
    } else {
        QUEUING_BLOCKS
    };
    if cache.format.is_quantised() {
        return most;
    }
    let each = blocks.div_ceil(gpu.multiprocessors);
    if each <= SHARING_BLOCKS {
        SHARING_BLOCKS
    } else if each <= MOST_SPLIT_BLOCKS {
        MOST_SPLIT_BLOCKS
    } else {
        most
    }
}

/// Tiles up to which a block takes all that its rows see, where `blocks` blocks have them: folding
/// what several blocks found takes as long as two tiles, and more when it keeps none from idling.
pub(super) fn tiles_alone(blocks: usize, gpu: &GpuInfo) -> usize {
    if 2 * blocks <= gpu.multiprocessors {
        2
    } else {
        4
    }
}

#[cfg(test)]
mod tests {
    use oxllama_memory::CacheFormat;

    use super::super::launch::tests::{cache, gpu, workspace};
    use super::super::launch::{PADDED_HEAD_DIMS, head_dim_index, is_whole};
    use super::super::tiles::most_pieces;
    use super::*;

    const HOPPER_SHARED: usize = 232_448;
    const ADA_SHARED: usize = 101_376;

    #[test]
    fn every_head_has_a_ring_on_every_gpu() {
        for shared in [HOPPER_SHARED, ADA_SHARED] {
            let gpu = gpu(100, shared);
            for format in CacheFormat::ALL {
                if format == CacheFormat::F32 {
                    continue;
                }
                for head_dim in (2..=256).step_by(2) {
                    let cache = cache(head_dim, format);
                    if !is_whole(&cache) {
                        continue;
                    }
                    let padded = PADDED_HEAD_DIMS[head_dim_index(head_dim).unwrap()];
                    let split = |(heads, blocks)| {
                        let memory = SplitMemory::of(&cache, padded, heads, blocks, &gpu)?;
                        // Results lie where tiles did, or what folds them and a piece for every thread.
                        let results = SPLIT_HEADS * (padded + PADDING) * size_of::<f32>();
                        let factors = SPLIT_HEADS * most_pieces(1 << 20) * 2 * size_of::<f32>();
                        let needed = results.max(factors + THREADS * 4 * size_of::<f32>());
                        assert!(needed <= memory.ring.shared_bytes - memory.tiles_at);
                        Some(memory.ring)
                    };
                    let heads = [None, Some(1), Some(SPLIT_HEADS)];
                    let rings =
                        heads.map(|heads| [1, 2, 3, 4].map(|blocks| split((heads, blocks))));
                    let rings = rings.as_flattened();
                    let is_large = padded == 256 && format == CacheFormat::F16;
                    assert!(rings.iter().all(Option::is_some) || is_large && shared == ADA_SHARED);
                    let walk = Ring::walk(&cache, padded, &gpu);
                    assert!(walk.is_some(), "{cache:?} in {shared}");
                    for ring in rings.iter().chain([&walk]).flatten() {
                        assert!(ring.shared_bytes <= shared, "{cache:?}: {ring:?}");
                        assert!((1..=MOST_SLOTS).contains(&ring.slots));
                        assert!(ring.slot_bytes.is_multiple_of(16));
                    }
                }
            }
        }
    }

    #[test]
    fn the_usual_heads_leave_room_for_several_blocks() {
        let gpu = gpu(132, HOPPER_SHARED);
        for format in [CacheFormat::F16, CacheFormat::Q8, CacheFormat::Q4] {
            let cache = cache(128, format);
            for blocks in [SHARING_BLOCKS, MOST_SPLIT_BLOCKS] {
                let split = SplitMemory::of(&cache, 128, Some(4), blocks, &gpu);
                let split = split.unwrap().ring;
                assert!(split.slots >= 2, "{split:?}");
                let all = blocks * (split.shared_bytes + RESERVED_SHARED_BYTES);
                assert!(all <= HOPPER_SHARED + 1024);
            }
            let walk = Ring::walk(&cache, 128, &gpu).unwrap();
            assert_eq!(walk.slots, 2, "{walk:?}");
            assert!(2 * (walk.shared_bytes + RESERVED_SHARED_BYTES) <= HOPPER_SHARED + 1024);
        }
    }

    #[test]
    fn more_blocks_are_held_where_many_wait() {
        let gpu = gpu(132, HOPPER_SHARED);
        let of = |blocks, cache| blocks_of_multiprocessor(blocks, &cache, &gpu);
        let (fp16, q4) = (cache(128, CacheFormat::F16), cache(128, CacheFormat::Q4));
        assert_eq!(
            [264, 265, 396, 397].map(|blocks| of(blocks, fp16)),
            [2, 3, 3, 4]
        );
        assert_eq!([1, 397].map(|blocks| of(blocks, q4)), [4, 4]);
        assert_eq!(of(397, cache(256, CacheFormat::F16)), 3);
        for (padded, format) in [
            (64, CacheFormat::F16),
            (128, CacheFormat::F16),
            (128, CacheFormat::Q8),
            (128, CacheFormat::Q4),
        ] {
            let cache = cache(padded, format);
            let memory = SplitMemory::of(&cache, padded, Some(4), QUEUING_BLOCKS, &gpu).unwrap();
            let all = QUEUING_BLOCKS * (memory.ring.shared_bytes + RESERVED_SHARED_BYTES);
            assert!(all <= HOPPER_SHARED + 1024, "{memory:?}");
        }
    }

    #[test]
    fn few_rows_are_shared_among_enough_blocks() {
        let gpu = gpu(132, HOPPER_SHARED);
        let scratch = ScratchLayout::of(&workspace(64, 32));
        let grid = |rows| {
            SplitGrid::of(
                (rows, rows),
                &cache(128, CacheFormat::F16),
                4,
                &scratch,
                &gpu,
            )
            .grid
        };
        assert_eq!(grid(1), [1, 8, 33]);
        assert_eq!(grid(8), [8, 8, 4]);
        // More rows than there is room for partial results.
        assert_eq!(grid(33), [33, 8, 1]);
    }

    #[test]
    fn blocks_take_more_alone_where_none_would_idle() {
        let gpu = gpu(132, HOPPER_SHARED);
        let scratch = ScratchLayout::of(&workspace(64, 32));
        let alone = |rows| {
            let cache = cache(128, CacheFormat::F16);
            SplitGrid::of((rows, rows), &cache, 4, &scratch, &gpu).tiles_alone
        };
        assert_eq!([1, 8, 9, 32].map(alone), [2, 2, 4, 4]);
    }

    #[test]
    fn a_short_context_needs_few_pieces() {
        let gpu = gpu(132, HOPPER_SHARED);
        let scratch = ScratchLayout::of(&workspace(1, 1));
        assert_eq!((scratch.partial_rows, scratch.most_pieces), (1, 4));
        let grid = SplitGrid::of((1, 1), &cache(128, CacheFormat::F16), 4, &scratch, &gpu).grid;
        assert_eq!(grid, [1, 8, 4]);
    }
}
