//! One thread's scratch.

use super::{BLOCK_TOKENS, TASK_ROWS};
use crate::simd::LANES;

/// One thread's scratch, all f32; `padded` is `head_dim` rounded up to whole vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionScratch {
    /// `[BLOCK_TOKENS, padded]`
    pub(super) keys: *mut f32,
    /// `[BLOCK_TOKENS, padded]`
    pub(super) values: *mut f32,
    /// `[TASK_ROWS, group, padded]`
    pub(super) queries: *mut f32,
    /// `[TASK_ROWS, group, padded]`: Σ p·v of the current page.
    pub(super) page_sums: *mut f32,
    /// `[TASK_ROWS, group, padded]`: of the pages before.
    pub(super) sums: *mut f32,
    /// `[TASK_ROWS, group, 4]`: the current page's largest score and Σ p, then those before it.
    pub(super) states: *mut f32,
    /// `[group, BLOCK_TOKENS]`
    pub(super) scores: *mut f32,
}

/// Dimensions of a head rounded up to whole vectors.
pub(crate) const fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

impl AttentionScratch {
    /// f32 elements that a thread needs.
    pub(crate) const fn elements(heads: usize, kv_heads: usize, head_dim: usize) -> usize {
        let group = heads.div_ceil(kv_heads);
        let padded = padded(head_dim);
        2 * BLOCK_TOKENS * padded
            + 3 * TASK_ROWS * group * padded
            + (TASK_ROWS * group * 4).next_multiple_of(LANES)
            + group * BLOCK_TOKENS
    }

    /// Cuts [`Self::elements`] elements into parts.
    ///
    /// # Safety
    /// `base` points to that many elements.
    pub(crate) unsafe fn new(base: *mut f32, group: usize, head_dim: usize) -> Self {
        let padded = padded(head_dim);
        let block = BLOCK_TOKENS * padded;
        let rows = TASK_ROWS * group * padded;
        // SAFETY: the parts add up to `elements`.
        unsafe {
            let queries = base.add(2 * block);
            let states = queries.add(3 * rows);
            Self {
                keys: base,
                values: base.add(block),
                queries,
                page_sums: queries.add(rows),
                sums: queries.add(2 * rows),
                states,
                scores: states.add((TASK_ROWS * group * 4).next_multiple_of(LANES)),
            }
        }
    }
}
