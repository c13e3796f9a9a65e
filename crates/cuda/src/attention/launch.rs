//! How attention's kernels are launched: extents, shared memory and scratch, from shapes alone.

use oxllama_backend::quantised::GROUP;
use oxllama_backend::{CacheShape, HeadLayout, PAGE_TOKENS, WorkspaceShape};
use oxllama_memory::ElementFormat;

use super::tiles::{BLOCK_HEADS, TILE_TOKENS, block_heads, most_pieces};
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

/// `BLOCK_BYTES` of `walk.cuh`.
const WALK_BLOCK_BYTES: usize = 128;

/// Whether tiles of fp16 can be copied 16 bytes at a time.
pub(super) fn is_fp16_in_units(shape: &CacheShape) -> bool {
    [shape.key_layout(), shape.value_layout()]
        .into_iter()
        .all(|layout| layout.format == ElementFormat::F16 && layout.head_dim.is_multiple_of(8))
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
}

/// Shared memory that a block may have.
pub(super) fn shared_limit(gpu: &GpuInfo) -> usize {
    gpu.shared_per_block.get() as usize
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

/// Whether a cache is one that the kernels read: quantised heads are whole groups.
pub(super) fn is_whole(shape: &CacheShape) -> bool {
    !shape.format.is_quantised() || shape.head_dim.is_multiple_of(GROUP)
}

#[cfg(test)]
pub(super) mod tests {
    use oxllama_memory::{Bytes, CacheFormat, DeviceId};

    use super::super::tiles::SPLIT_HEADS;
    use super::*;

    pub(in crate::attention) fn gpu(multiprocessors: usize, shared_per_block: usize) -> GpuInfo {
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

    pub(in crate::attention) fn cache(head_dim: usize, format: CacheFormat) -> CacheShape {
        CacheShape {
            pages: 1,
            kv_heads: 8,
            head_dim,
            format,
        }
    }

    pub(in crate::attention) fn workspace(
        rows: usize,
        pages_per_sequence: usize,
    ) -> WorkspaceShape {
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
