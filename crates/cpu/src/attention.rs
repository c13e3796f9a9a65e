//! Attention over the paged cache.
//!
//! A row's positions are cut at absolute multiples of [`BLOCK_TOKENS`] and of a page. Scores and
//! softmax go block by block within a page, starting afresh at each page, and the pages' results
//! are merged in ascending order. Where the cuts are depends on the row's position alone, so its
//! bits do not change with other rows, with how a prompt was chunked, or with which thread
//! computed which page.

use oxllama_backend::PAGE_TOKENS;

use crate::float::Element;
use crate::rowwise::{RowNorm, RowRope, cap, exp, norm_row_generic, rotate};
use crate::simd::{LANES, Simd};

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
    /// `[pages, kv_heads, PAGE_TOKENS, head_dim]`
    pub(crate) key_cache: *mut u8,
    /// `[pages, kv_heads, PAGE_TOKENS, head_dim]`
    pub(crate) value_cache: *mut u8,
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

    /// Index of the first element of a page's `kv_head`.
    fn page_element(&self, row: usize, page_index: usize, kv_head: usize) -> usize {
        let table = self.row_sequences[row] as usize * self.pages_per_sequence;
        let page = self.page_tables[table + page_index] as usize;
        (page * self.kv_heads + kv_head) * PAGE_TOKENS * self.head_dim
    }

    /// First position that `row` sees.
    fn first_visible(&self, row: usize) -> usize {
        let position = self.positions[row] as usize;
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// One thread's scratch, all f32; `padded` is `head_dim` rounded up to whole vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionScratch {
    /// `[BLOCK_TOKENS, padded]`
    keys: *mut f32,
    /// `[BLOCK_TOKENS, padded]`
    values: *mut f32,
    /// `[TASK_ROWS, group, padded]`
    queries: *mut f32,
    /// `[TASK_ROWS, group, padded]`: Σ p·v of the current page.
    page_sums: *mut f32,
    /// `[TASK_ROWS, group, padded]`: of the pages before.
    sums: *mut f32,
    /// `[TASK_ROWS, group, 4]`: the current page's largest score and Σ p, then those before it.
    states: *mut f32,
    /// `[group, BLOCK_TOKENS]`
    scores: *mut f32,
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
pub(crate) unsafe fn prepare<S: Simd, E: Element>(plan: &Plan<'_>, row: usize, kv_head: usize) {
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
        let slot = plan.page_element(row, position / PAGE_TOKENS, kv_head)
            + position % PAGE_TOKENS * head_dim;
        for d in (0..head_dim).step_by(LANES) {
            let count = (head_dim - d).min(LANES);
            let key = S::load_first(key.add(d), count);
            E::store_first::<S>(plan.key_cache, slot + d, key, count);
            let value = S::load_first(plan.values.add(at + d), count);
            E::store_first::<S>(plan.value_cache, slot + d, value, count);
        }
    }
}

/// Attends rows `first_row..end_row`, all of one sequence and at most [`TASK_ROWS`], for the
/// query heads of one key head.
///
/// # Safety
/// As [`prepare`]'s; every visible position of these rows is in the cache, `scratch` is this
/// thread's own.
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd, E: Element>(
    plan: &Plan<'_>,
    scratch: &AttentionScratch,
    (first_row, end_row): (usize, usize),
    kv_head: usize,
) {
    let task = Task {
        plan,
        scratch,
        first_row,
        kv_head,
        group: plan.group(),
        padded: padded(plan.head_dim),
    };
    let rows = end_row - first_row;
    let start = (first_row..end_row)
        .map(|row| plan.first_visible(row))
        .min()
        .unwrap_or(0);
    let last = plan.positions[first_row..end_row]
        .iter()
        .copied()
        .max()
        .unwrap_or(0) as usize;
    // SAFETY: the caller's contract.
    unsafe {
        task.begin::<S>(rows);
        for page in start / PAGE_TOKENS..=last / PAGE_TOKENS {
            for row in 0..rows {
                task.begin_page::<S>(row);
            }
            let page_start = page * PAGE_TOKENS;
            for block in (page_start..page_start + PAGE_TOKENS).step_by(BLOCK_TOKENS) {
                if block > last || block + BLOCK_TOKENS <= start {
                    continue;
                }
                let tokens = (last + 1 - block).min(BLOCK_TOKENS);
                let skipped = start.saturating_sub(block);
                task.load_block::<S, E>(block, skipped, tokens);
                for row in 0..rows {
                    task.block_row::<S>(row, block);
                }
            }
            for row in 0..rows {
                task.end_page::<S>(row);
            }
        }
        task.finish::<S>(rows);
    }
}

/// Some rows of one sequence and one key head. Rows count from `first_row`.
struct Task<'a> {
    plan: &'a Plan<'a>,
    scratch: &'a AttentionScratch,
    first_row: usize,
    kv_head: usize,
    group: usize,
    padded: usize,
}

/// Index of the current page's largest score in a state.
const PAGE_MAX: usize = 0;
/// Of its Σ p.
const PAGE_TOTAL: usize = 1;
/// Largest score of the pages before.
const MAX: usize = 2;
/// Their Σ p.
const TOTAL: usize = 3;

impl Task<'_> {
    /// # Safety
    /// `row` and `member` exist.
    #[inline(always)]
    unsafe fn state(&self, row: usize, member: usize) -> *mut f32 {
        // SAFETY: the caller's contract.
        unsafe { self.scratch.states.add((row * self.group + member) * 4) }
    }

    /// Element of a `[TASK_ROWS, group, padded]` array.
    #[inline(always)]
    fn head(&self, row: usize, member: usize) -> usize {
        (row * self.group + member) * self.padded
    }

    /// Copies the queries, padded with zeros, and clears the sums.
    ///
    /// # Safety
    /// As [`attend`]'s, as for all functions here.
    #[inline(always)]
    unsafe fn begin<S: Simd>(&self, rows: usize) {
        let plan = self.plan;
        for row in 0..rows {
            for member in 0..self.group {
                let head = self.kv_head * self.group + member;
                let from = ((self.first_row + row) * plan.heads + head) * plan.head_dim;
                // SAFETY: the head exists.
                unsafe {
                    for d in (0..self.padded).step_by(LANES) {
                        let count = (plan.head_dim - d).min(LANES);
                        let query = S::load_first(plan.queries.add(from + d), count);
                        let at = self.head(row, member) + d;
                        S::store(self.scratch.queries.add(at), query);
                        S::store(self.scratch.sums.add(at), S::splat(0.0));
                    }
                    let state = self.state(row, member);
                    *state.add(MAX) = f32::NEG_INFINITY;
                    *state.add(TOTAL) = 0.0;
                }
            }
        }
    }

    /// # Safety
    /// As [`attend`]'s.
    #[inline(always)]
    unsafe fn begin_page<S: Simd>(&self, row: usize) {
        for member in 0..self.group {
            // SAFETY: the row exists.
            unsafe {
                let state = self.state(row, member);
                *state.add(PAGE_MAX) = f32::NEG_INFINITY;
                *state.add(PAGE_TOTAL) = 0.0;
                let sums = self.scratch.page_sums.add(self.head(row, member));
                for d in (0..self.padded).step_by(LANES) {
                    S::store(sums.add(d), S::splat(0.0));
                }
            }
        }
    }

    /// Converts keys and values `first..tokens` of a block to f32.
    ///
    /// # Safety
    /// As [`attend`]'s.
    #[inline(always)]
    unsafe fn load_block<S: Simd, E: Element>(&self, block: usize, first: usize, tokens: usize) {
        let plan = self.plan;
        let head_dim = plan.head_dim;
        let page = plan.page_element(self.first_row, block / PAGE_TOKENS, self.kv_head);
        let page = page + block % PAGE_TOKENS * head_dim;
        for token in first..tokens {
            // SAFETY: the block lies within its page.
            unsafe {
                let from = page + token * head_dim;
                for d in (0..self.padded).step_by(LANES) {
                    let (key, value) = if d + LANES <= head_dim {
                        (
                            E::load::<S>(plan.key_cache, from + d),
                            E::load::<S>(plan.value_cache, from + d),
                        )
                    } else {
                        (
                            E::load_first::<S>(plan.key_cache, from + d, head_dim - d),
                            E::load_first::<S>(plan.value_cache, from + d, head_dim - d),
                        )
                    };
                    S::store(self.scratch.keys.add(token * self.padded + d), key);
                    S::store(self.scratch.values.add(token * self.padded + d), value);
                }
            }
        }
    }

    /// One row against the block at position `block`.
    ///
    /// # Safety
    /// As [`attend`]'s; the block is loaded.
    #[inline(always)]
    unsafe fn block_row<S: Simd>(&self, row: usize, block: usize) {
        let position = self.plan.positions[self.first_row + row] as usize;
        let visible = self.plan.first_visible(self.first_row + row);
        if position < block || visible >= block + BLOCK_TOKENS {
            return;
        }
        let start = visible.saturating_sub(block);
        let end = (position + 1 - block).min(BLOCK_TOKENS);
        // SAFETY: the caller's contract.
        unsafe {
            for member in 0..self.group {
                self.weigh::<S>(row, member, start, end);
            }
            let mut member = 0;
            if S::ROWS == 8 {
                while member + 4 <= self.group {
                    self.add_values::<S, 4>(row, member, start, end);
                    member += 4;
                }
                if member + 3 == self.group {
                    self.add_values::<S, 3>(row, member, start, end);
                    return;
                }
                while member + 2 <= self.group {
                    self.add_values::<S, 2>(row, member, start, end);
                    member += 2;
                }
            }
            while member < self.group {
                self.add_values::<S, 1>(row, member, start, end);
                member += 1;
            }
        }
    }

    /// Scores of tokens `start..end` of the block, made into weights relative to the page's
    /// largest score so far; what the page has summed before is scaled to match.
    ///
    /// # Safety
    /// As [`Self::block_row`]'s.
    #[inline(always)]
    unsafe fn weigh<S: Simd>(&self, row: usize, member: usize, start: usize, end: usize) {
        // SAFETY: tokens below BLOCK_TOKENS; the keys' scratch holds that many.
        unsafe {
            let query = self.scratch.queries.add(self.head(row, member));
            let scores = self.scratch.scores.add(member * BLOCK_TOKENS);
            let first = start / LANES * LANES;
            let mut largest = S::splat(f32::NEG_INFINITY);
            for token in (first..end).step_by(LANES) {
                let keys = self.scratch.keys.add(token * self.padded);
                let mut dots = [S::splat(0.0); LANES];
                for d in (0..self.padded).step_by(LANES) {
                    let query = S::load(query.add(d));
                    for (t, dot) in dots.iter_mut().enumerate() {
                        *dot = S::fma(query, S::load(keys.add(t * self.padded + d)), *dot);
                    }
                }
                let score = S::mul(S::reduce_add_each(&dots), S::splat(self.plan.scale));
                let score = cap::<S>(score, self.plan.softcap);
                let from = start.saturating_sub(token);
                let to = (end - token).min(LANES);
                let score = S::select_range(score, f32::NEG_INFINITY, from, to);
                largest = S::max(largest, score);
                S::store(scores.add(token), score);
            }
            let state = self.state(row, member);
            let before = *state.add(PAGE_MAX);
            let now = S::reduce_max(largest).max(before);
            let mut total = S::splat(0.0);
            for token in (first..end).step_by(LANES) {
                let weight = exp::<S>(S::sub(S::load(scores.add(token)), S::splat(now)));
                S::store(scores.add(token), weight);
                total = S::add(total, weight);
            }
            let factor = exp_scalar::<S>(before - now);
            *state.add(PAGE_MAX) = now;
            *state.add(PAGE_TOTAL) = *state.add(PAGE_TOTAL) * factor + S::reduce_add(total);
            // Where the maximum stands the factor is one, and multiplying would change nothing.
            if factor != 1.0 {
                let sums = self.scratch.page_sums.add(self.head(row, member));
                for d in (0..self.padded).step_by(LANES) {
                    S::store(sums.add(d), S::mul(S::load(sums.add(d)), S::splat(factor)));
                }
            }
        }
    }

    /// Adds the weighted values of tokens `start..end` to the page's sums of `M` heads.
    ///
    /// # Safety
    /// As [`Self::block_row`]'s; the heads are weighed.
    #[inline(always)]
    unsafe fn add_values<S: Simd, const M: usize>(
        &self,
        row: usize,
        member: usize,
        start: usize,
        end: usize,
    ) {
        let mut d = 0;
        // SAFETY: the caller's contract.
        unsafe {
            while d + 4 * LANES <= self.padded {
                self.add_values_at::<S, M, 4>((row, member), d, start, end);
                d += 4 * LANES;
            }
            while d < self.padded {
                self.add_values_at::<S, M, 1>((row, member), d, start, end);
                d += LANES;
            }
        }
    }

    /// As [`Self::add_values`], for `V` vectors of dimensions from `d` on.
    ///
    /// # Safety
    /// As [`Self::block_row`]'s.
    #[inline(always)]
    unsafe fn add_values_at<S: Simd, const M: usize, const V: usize>(
        &self,
        (row, member): (usize, usize),
        d: usize,
        start: usize,
        end: usize,
    ) {
        // SAFETY: heads, dimensions and tokens exist.
        unsafe {
            let sums = self.scratch.page_sums.add(self.head(row, member) + d);
            let weights = self.scratch.scores.add(member * BLOCK_TOKENS);
            let mut accumulators = [[S::splat(0.0); V]; M];
            for m in 0..M {
                for v in 0..V {
                    accumulators[m][v] = S::load(sums.add(m * self.padded + v * LANES));
                }
            }
            for token in start..end {
                let from = self.scratch.values.add(token * self.padded + d);
                let mut values = [S::splat(0.0); V];
                for (v, value) in values.iter_mut().enumerate() {
                    *value = S::load(from.add(v * LANES));
                }
                for m in 0..M {
                    let weight = S::splat(*weights.add(m * BLOCK_TOKENS + token));
                    for v in 0..V {
                        accumulators[m][v] = S::fma(weight, values[v], accumulators[m][v]);
                    }
                }
            }
            for m in 0..M {
                for v in 0..V {
                    S::store(sums.add(m * self.padded + v * LANES), accumulators[m][v]);
                }
            }
        }
    }

    /// Merges the page into what came before it.
    ///
    /// # Safety
    /// As [`attend`]'s.
    #[inline(always)]
    unsafe fn end_page<S: Simd>(&self, row: usize) {
        for member in 0..self.group {
            // SAFETY: the row exists.
            unsafe {
                let state = self.state(row, member);
                let (page_max, page_total) = (*state.add(PAGE_MAX), *state.add(PAGE_TOTAL));
                if page_total == 0.0 {
                    // The row sees nothing of this page.
                    continue;
                }
                let now = page_max.max(*state.add(MAX));
                let old_factor = exp_scalar::<S>(*state.add(MAX) - now);
                let page_factor = exp_scalar::<S>(page_max - now);
                *state.add(MAX) = now;
                *state.add(TOTAL) = *state.add(TOTAL) * old_factor + page_total * page_factor;
                let sums = self.scratch.sums.add(self.head(row, member));
                let page_sums = self.scratch.page_sums.add(self.head(row, member));
                for d in (0..self.padded).step_by(LANES) {
                    let old = S::mul(S::load(sums.add(d)), S::splat(old_factor));
                    let page = S::load(page_sums.add(d));
                    S::store(sums.add(d), S::fma(page, S::splat(page_factor), old));
                }
            }
        }
    }

    /// Divides by the totals and writes the result.
    ///
    /// # Safety
    /// As [`attend`]'s.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, rows: usize) {
        let plan = self.plan;
        for row in 0..rows {
            for member in 0..self.group {
                let head = self.kv_head * self.group + member;
                // SAFETY: the head exists.
                unsafe {
                    let total = S::splat(1.0 / *self.state(row, member).add(TOTAL));
                    let sums = self.scratch.sums.add(self.head(row, member));
                    let out = ((self.first_row + row) * plan.heads + head) * plan.head_dim;
                    for d in (0..plan.head_dim).step_by(LANES) {
                        let count = (plan.head_dim - d).min(LANES);
                        let y = S::mul(S::load(sums.add(d)), total);
                        S::store_first(plan.out.add(out + d), y, count);
                    }
                }
            }
        }
    }
}

/// [`exp`] of one number.
///
/// # Safety
/// As [`Simd`]'s.
#[inline(always)]
unsafe fn exp_scalar<S: Simd>(x: f32) -> f32 {
    // SAFETY: a maximum over equal lanes is that lane.
    unsafe { S::reduce_max(exp::<S>(S::splat(x))) }
}
