//! Attention over the paged cache.
//!
//! A row's positions are cut at absolute multiples of [`BLOCK_TOKENS`] and of a page. Scores and
//! softmax go block by block within a page, starting afresh at each page, and the pages' results
//! are merged in ascending order. Where the cuts are depends on the row's position alone, so its
//! bits do not change with other rows, with how a prompt was chunked, or with which thread
//! computed which page.
//!
//! Blocks of keys and values are converted to f32 when a task comes to them, whatever the cache's
//! format ([`vectors`]): nothing longer than a block is ever held in another format. Quantised
//! vectors stay rotated; the task rotates its queries and its results instead.

use oxllama_backend::{HeadLayout, PAGE_TOKENS};

use crate::rowwise::{RowNorm, RowRope, norm_row_generic, rotate};
use crate::simd::Simd;

mod scratch;
mod task;
mod vectors;

pub(crate) use scratch::AttentionScratch;
pub(crate) use task::attend;

/// Positions whose scores are normalised together.
pub(crate) const BLOCK_TOKENS: usize = 64;
/// Rows of one sequence that share a converted block of keys and values.
pub(crate) const TASK_ROWS: usize = 16;

/// What one attention operation works on: extents, and where everything is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan<'a> {
    /// f32 `[rows, heads, head_dim]`, rotated in place.
    pub(crate) queries: *mut f32,
    /// f32 `[rows, kv_heads, head_dim]`, rotated in place.
    pub(crate) keys: *mut f32,
    /// f32 `[rows, kv_heads, head_dim]`
    pub(crate) values: *const f32,
    /// f32 `[rows, heads, head_dim]`
    pub(crate) out: *mut f32,
    /// `[pages, kv_heads]` of `key_layout`
    pub(crate) key_cache: *mut u8,
    /// `[pages, kv_heads]` of `value_layout`
    pub(crate) value_cache: *mut u8,
    /// How a head's keys lie in a page.
    pub(crate) key_layout: HeadLayout,
    /// How its values do.
    pub(crate) value_layout: HeadLayout,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
    /// Dimensions of a head.
    pub(crate) head_dim: usize,
    /// Multiplies scores.
    pub(crate) scale: f32,
    /// Caps scores.
    pub(crate) softcap: Option<f32>,
    /// Visible positions, the row's own included.
    pub(crate) window: Option<usize>,
    /// Per query head, `weight` being the first head's.
    pub(crate) query_norm: Option<RowNorm>,
    /// Per key head likewise.
    pub(crate) key_norm: Option<RowNorm>,
    /// Tables of the first row; the following rows' come after it.
    pub(crate) rope: Option<RowRope>,
    /// `[rows]`
    pub(crate) positions: &'a [u32],
    /// `[rows]`
    pub(crate) row_sequences: &'a [u32],
    /// `[sequences, pages_per_sequence]`
    pub(crate) page_tables: &'a [u32],
    /// Row length of `page_tables`.
    pub(crate) pages_per_sequence: usize,
}

impl Plan<'_> {
    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Where the keys and the values of `kv_head` in a page start.
    ///
    /// # Safety
    /// The row has that page, and the cache does.
    unsafe fn head_page(
        &self,
        row: usize,
        page_index: usize,
        kv_head: usize,
    ) -> (*mut u8, *mut u8) {
        let table = self.row_sequences[row] as usize * self.pages_per_sequence;
        let page = self.page_tables[table + page_index] as usize;
        let head_page = page * self.kv_heads + kv_head;
        // SAFETY: the caller's contract.
        unsafe {
            (
                self.key_cache.add(head_page * self.key_layout.page_bytes()),
                self.value_cache
                    .add(head_page * self.value_layout.page_bytes()),
            )
        }
    }

    /// First position that `row` sees.
    fn first_visible(&self, row: usize) -> usize {
        let position = self.positions[row] as usize;
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Norms and rotates one head.
///
/// # Safety
/// As [`Simd`]'s; the head has the dimensions of norm and rope.
#[inline(always)]
unsafe fn finish_head<S: Simd>(
    vector: *mut f32,
    norm: Option<RowNorm>,
    head: usize,
    rope: Option<&RowRope>,
) {
    // SAFETY: the caller's contract.
    unsafe {
        if let Some(norm) = norm {
            let norm = RowNorm {
                weight: norm.weight.add(head * norm.width),
                ..norm
            };
            norm_row_generic::<S>(norm, vector, vector);
        }
        if let Some(rope) = rope {
            rotate::<S>(rope, vector);
        }
    }
}

/// Norms and rotates the query heads of one key head in one row, and its key; stores key and value.
///
/// # Safety
/// As [`Simd`]'s; the plan's pointers have the extents it states, its pages exist, and nobody
/// else touches this row's heads.
#[inline(always)]
pub(crate) unsafe fn prepare<S: Simd>(plan: &Plan<'_>, row: usize, kv_head: usize) {
    let head_dim = plan.head_dim;
    let position = plan.positions[row] as usize;
    // SAFETY: row and heads exist, and the slot's page does.
    unsafe {
        let rope = plan.rope.map(|rope| RowRope {
            cosines: rope.cosines.add(row * rope.pairs),
            sines: rope.sines.add(row * rope.pairs),
            ..rope
        });
        for head in kv_head * plan.group()..(kv_head + 1) * plan.group() {
            let query = plan.queries.add((row * plan.heads + head) * head_dim);
            finish_head::<S>(query, plan.query_norm, head, rope.as_ref());
        }
        let at = (row * plan.kv_heads + kv_head) * head_dim;
        let key = plan.keys.add(at);
        finish_head::<S>(key, plan.key_norm, kv_head, rope.as_ref());
        let (key_page, value_page) = plan.head_page(row, position / PAGE_TOKENS, kv_head);
        let token = position % PAGE_TOKENS;
        vectors::store::<S>(plan.key_layout, key_page, token, key);
        vectors::store::<S>(plan.value_layout, value_page, token, plan.values.add(at));
    }
}
