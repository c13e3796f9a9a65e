//! Some rows against the pages of their sequence.

use oxllama_backend::PAGE_TOKENS;
use oxllama_backend::quantised::rotate;

use super::scratch::{AttentionScratch, padded};
use super::{BLOCK_TOKENS, Plan, vectors};
use crate::rowwise::{cap, exp};
use crate::simd::{LANES, Simd};

/// Attends rows `first_row..end_row`, all of one sequence and at most [`TASK_ROWS`], for the
/// query heads of one key head.
///
/// # Safety
/// As [`super::prepare`]'s; every visible position of these rows is in the cache, `scratch` is this
/// thread's own.
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd>(
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
                task.load_block::<S>(block, skipped, tokens);
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

    /// Copies the queries, padded with zeros and rotated as the keys are, and clears the sums.
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
                    if plan.key_layout.format.is_quantised() {
                        let query = self.scratch.queries.add(self.head(row, member));
                        rotate(std::slice::from_raw_parts_mut(query, plan.head_dim));
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
    unsafe fn load_block<S: Simd>(&self, block: usize, first: usize, tokens: usize) {
        let plan = self.plan;
        let start = block % PAGE_TOKENS;
        let range = start + first..start + tokens;
        let skipped = first * self.padded;
        // SAFETY: the block lies within its page.
        unsafe {
            let page = plan.head_page(self.first_row, block / PAGE_TOKENS, self.kv_head);
            let keys = self.scratch.keys.add(skipped);
            vectors::load::<S>(plan.key_layout, page.0, range.clone(), keys);
            let values = self.scratch.values.add(skipped);
            vectors::load::<S>(plan.value_layout, page.1, range, values);
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

    /// Divides by the totals, rotates back what values were rotated by, and writes the result.
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
                    if plan.value_layout.format.is_quantised() {
                        rotate(std::slice::from_raw_parts_mut(sums, plan.head_dim));
                    }
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
