//! How attention's kernels are launched: extents, shared memory and scratch, from shapes alone.

use oxllama_backend::quantised::GROUP;
use oxllama_backend::{CacheShape, HeadLayout, PAGE_TOKENS, WorkspaceShape};
use oxllama_memory::ElementFormat;

use super::THREADS;
use super::tiles::{BLOCK_HEADS, MOST_PIECES, SPLIT_HEADS, TILE_TOKENS, block_heads, most_pieces};
use crate::context::GpuInfo;
use crate::step::aligned;

/// The kernels' number of a format; `FORMAT_*` in `pages.cuh`.
pub(super) fn format_number(format: ElementFormat) -> i32 {
    match format {
        ElementFormat::F32 => 0,
        ElementFormat::F16 => 1,
        ElementFormat::Q8 => 2,
        ElementFormat::Q4 => 3,
    }
}

/// Dimensions that the kernels are compiled for.
pub(super) const PADDED_HEAD_DIMS: [usize; 3] = [64, 128, 256];

/// The smallest of [`PADDED_HEAD_DIMS`] that holds `head_dim`, by its place there; `None` for
/// heads that the kernels do not take: longer ones, and odd ones.
pub(super) fn head_dim_index(head_dim: usize) -> Option<usize> {
    if !head_dim.is_multiple_of(2) {
        return None;
    }
    PADDED_HEAD_DIMS
        .iter()
        .position(|&padded| head_dim <= padded)
}

/// `score_factor` and `cap_factor` of the kernels: scores come in units of log2 e.
pub(super) fn score_factors(scale: f32, softcap: Option<f32>) -> (f32, f32) {
    let log2_e = std::f32::consts::LOG2_E;
    match softcap {
        None => (scale * log2_e, 0.0),
        Some(cap) => (2.0 * log2_e * scale / cap, cap * log2_e),
    }
}

/// How the query heads of one kv head are dealt to blocks of `heads_of_block`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HeadTiles {
    /// Query heads that a block takes of one row.
    pub(super) heads_per_tile: usize,
    /// Blocks that take all of a row's.
    pub(super) head_tiles: usize,
}

impl HeadTiles {
    pub(super) fn of(group: usize, heads_of_block: usize) -> Self {
        let heads_per_tile = group.clamp(1, heads_of_block);
        Self {
            heads_per_tile,
            head_tiles: group.div_ceil(heads_per_tile),
        }
    }

    /// `AttendArgs::inverse_heads`.
    pub(super) fn inverse(self) -> usize {
        (1_usize << 16).div_ceil(self.heads_per_tile)
    }
}

/// A block's shared memory: a ring of stages behind what else it keeps there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ring {
    /// Tiles of keys and values that are on their way or in use.
    pub(super) slots: usize,
    /// Bytes of each.
    pub(super) slot_bytes: usize,
    /// All of the block's.
    pub(super) shared_bytes: usize,
}

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

/// `BLOCK_BYTES` of `walk.cuh`.
const WALK_BLOCK_BYTES: usize = 128;

/// Whether tiles of fp16 can be copied 16 bytes at a time.
pub(super) fn is_fp16_in_units(shape: &CacheShape) -> bool {
    [shape.key_layout(), shape.value_layout()]
        .into_iter()
        .all(|layout| layout.format == ElementFormat::F16 && layout.head_dim.is_multiple_of(8))
}

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
        let ring = Ring::fit(shape, padded, tiles_at, limit, blocks)?;
        Some(Self {
            staging_at,
            tiles_at,
            ring,
        })
    }
}

impl Ring {
    /// For the walking kernel, whose slots are stages: a tile of keys and one of values. `None`:
    /// the GPU has too little shared memory.
    pub(super) fn walk(shape: &CacheShape, padded: usize, gpu: &GpuInfo) -> Option<Self> {
        let tile_bytes = TILE_TOKENS * padded * 2;
        let stored = |layout: HeadLayout| {
            if layout.format.is_quantised() {
                TILE_TOKENS * (layout.vector_bytes() + layout.scale_bytes())
            } else {
                tile_bytes
            }
        };
        let slot_bytes = stored(shape.key_layout()) + stored(shape.value_layout());
        let decoded = match (shape.format.is_quantised(), padded) {
            (false, _) => 0,
            (true, ..=128) => 2 * tile_bytes,
            (true, _) => tile_bytes,
        };
        let heads = block_heads(padded);
        let rest = WALK_BLOCK_BYTES + heads * 2 * padded + decoded;
        let slots = (shared_limit(gpu).checked_sub(rest)? / slot_bytes).min(2);
        (slots > 0).then_some(Self {
            slots,
            slot_bytes,
            shared_bytes: rest + slots * slot_bytes,
        })
    }

    /// For `attention_groups.cu`: stages as above, behind queries that begin at a multiple of 1,024 bytes.
    pub(super) const fn groups(padded: usize) -> Self {
        const SLOTS: usize = 4;
        const ALIGNMENT: usize = 1024;
        let slot_bytes = 2 * TILE_TOKENS * padded * 2;
        Self {
            slots: SLOTS,
            slot_bytes,
            shared_bytes: ALIGNMENT + BLOCK_HEADS * padded * 2 + SLOTS * slot_bytes,
        }
    }

    /// As many stages of the splitting kernel as leave room for `blocks` blocks, or for fewer blocks
    /// of two stages ([`QUEUING_BLOCKS`] have one at least), or for one block of one stage; and for results where
    /// the stages were.
    fn fit(
        shape: &CacheShape,
        padded: usize,
        fixed: usize,
        limit: usize,
        blocks: usize,
    ) -> Option<Self> {
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
        (slots >= least).then_some(Self {
            slots,
            slot_bytes,
            shared_bytes: fixed + slots * slot_bytes,
        })
    }
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

/// Shared memory that a block may have.
fn shared_limit(gpu: &GpuInfo) -> usize {
    gpu.shared_per_block.get() as usize
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

/// Query heads of all rows of a step up to which sequences are split among blocks: partial
/// results take 32 KiB and more of scratch each.
const MOST_PARTIAL_HEADS: usize = 1024;

/// Where attention's scratch lies, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ScratchLayout {
    /// Rows whose sequences may be split among blocks.
    pub(super) partial_rows: usize,
    /// Pieces that a row may have.
    pub(super) most_pieces: usize,
    /// f16 `[rows, heads, padded_head_dim]`
    pub(super) queries: usize,
    /// f32 `[partial_rows, heads, most_pieces, padded_head_dim]`
    pub(super) partial_out: usize,
    /// f32 `[partial_rows, heads, most_pieces, 2]`
    pub(super) partial_state: usize,
    /// i32 `[partial_rows * heads]`, zero between launches.
    pub(super) counters: usize,
    /// All bytes.
    pub(super) end: usize,
}

impl ScratchLayout {
    pub(super) fn of(shape: &WorkspaceShape) -> Self {
        // What the kernels do not take is refused when it comes.
        let index = head_dim_index(shape.head_dim).unwrap_or(PADDED_HEAD_DIMS.len() - 1);
        let padded = PADDED_HEAD_DIMS[index];
        let most_partial_rows = (MOST_PARTIAL_HEADS / shape.heads.max(1)).max(1);
        let partial_rows = shape.rows.min(most_partial_rows);
        let most_pieces = most_pieces(shape.pages_per_sequence * PAGE_TOKENS);
        let partial_heads = partial_rows * shape.heads;
        let mut end = 0;
        let mut place = |bytes: usize| {
            let start = end;
            end += aligned(bytes);
            start
        };
        Self {
            partial_rows,
            most_pieces,
            queries: place(shape.rows * shape.heads * padded * 2),
            partial_out: place(partial_heads * most_pieces * padded * size_of::<f32>()),
            partial_state: place(partial_heads * most_pieces * 2 * size_of::<f32>()),
            counters: place(partial_heads * size_of::<i32>()),
            end,
        }
    }
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

/// Whether a cache is one that the kernels read: quantised heads are whole groups.
pub(super) fn is_whole(shape: &CacheShape) -> bool {
    !shape.format.is_quantised() || shape.head_dim.is_multiple_of(GROUP)
}

#[cfg(test)]
mod tests {
    use oxllama_memory::{Bytes, CacheFormat, DeviceId};

    use super::*;

    fn gpu(multiprocessors: usize, shared_per_block: usize) -> GpuInfo {
        GpuInfo {
            id: DeviceId::cuda(0),
            ordinal: 0,
            name: "a GPU".to_owned(),
            pci_bus: String::new(),
            capability: (9, 0),
            multiprocessors,
            memory: Bytes::ZERO,
            l2_cache: Bytes::ZERO,
            shared_per_block: Bytes::from_usize(shared_per_block),
        }
    }

    const HOPPER_SHARED: usize = 232_448;
    const ADA_SHARED: usize = 101_376;

    fn cache(head_dim: usize, format: CacheFormat) -> CacheShape {
        CacheShape {
            pages: 1,
            kv_heads: 8,
            head_dim,
            format,
        }
    }

    fn workspace(rows: usize, pages_per_sequence: usize) -> WorkspaceShape {
        WorkspaceShape {
            rows,
            sequences: rows,
            pages_per_sequence,
            max_in_features: 4096,
            max_out_features: 4096,
            draw_width: 0,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            rotary_dim: 128,
            ropes: 1,
        }
    }

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
                        let stages = memory.ring.shared_bytes - memory.tiles_at;
                        assert!(results_bytes(padded) <= stages);
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
        for padded in [64, 128] {
            let cache = cache(padded, CacheFormat::F16);
            let memory = SplitMemory::of(&cache, padded, Some(4), QUEUING_BLOCKS, &gpu).unwrap();
            let all = QUEUING_BLOCKS * (memory.ring.shared_bytes + RESERVED_SHARED_BYTES);
            assert!(all <= HOPPER_SHARED + 1024, "{memory:?}");
        }
    }

    #[test]
    fn heads_longer_than_the_kernels_or_odd_are_refused() {
        let cases = [
            (64, Some(0)),
            (80, Some(1)),
            (256, Some(2)),
            (258, None),
            (63, None),
        ];
        for (head_dim, index) in cases {
            assert_eq!(head_dim_index(head_dim), index, "{head_dim}");
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

    #[test]
    fn scratch_holds_every_block_that_shares() {
        for rows in [1, 7, 32, 64, 2_048] {
            let shape = workspace(rows, 64);
            let scratch = ScratchLayout::of(&shape);
            let counters = (scratch.end - scratch.counters) / size_of::<i32>();
            // A tile has a row at least, and a block of it a query head at least.
            assert!(counters >= scratch.partial_rows * shape.heads);
            assert!(
                scratch.partial_state - scratch.partial_out
                    >= scratch.partial_rows * shape.heads * scratch.most_pieces * 128 * 4
            );
        }
    }

    #[test]
    fn large_groups_are_dealt_to_several_blocks() {
        let tiles = |group, heads| {
            let tiles = HeadTiles::of(group, heads);
            (tiles.heads_per_tile, tiles.head_tiles)
        };
        assert_eq!(tiles(1, SPLIT_HEADS), (1, 1));
        assert_eq!(tiles(7, SPLIT_HEADS), (7, 1));
        assert_eq!(tiles(71, SPLIT_HEADS), (16, 5));
        assert_eq!(tiles(71, block_heads(128)), (71, 1));
        assert_eq!(tiles(71, block_heads(256)), (64, 2));
    }

    #[test]
    fn a_query_heads_row_is_found_without_dividing() {
        for heads in 1..=128 {
            let tiles = HeadTiles::of(heads, 128);
            for m in 0..128 {
                assert_eq!((m * tiles.inverse()) >> 16, m / heads, "{m} of {heads}");
            }
        }
    }

    #[test]
    fn scores_come_in_powers_of_two() {
        let (factor, cap) = score_factors(0.125, None);
        assert_eq!((2.0_f32.powf(8.0 * factor), cap), (1.0_f32.exp(), 0.0));
        let (factor, cap) = score_factors(0.5, Some(30.0));
        // What the kernels make of a product of 40.
        let score = cap * (1.0 - 2.0 / ((40.0 * factor).exp2() + 1.0));
        let expected = 30.0 * (20.0_f32 / 30.0).tanh() * std::f32::consts::LOG2_E;
        assert!((score - expected).abs() < 1e-4, "{score} {expected}");
    }
}
