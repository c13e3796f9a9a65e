//! A row of logits of which some tokens are forbidden and some changed, without a copy of it.

use std::cmp::Ordering;

use super::SampleError;
use super::numbers::{self, BLOCK, Block};
use crate::TokenMask;

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) token_id: u32,
    /// Its logit after penalties; finite.
    pub(super) logit: f32,
}

/// The order of candidates: by logit, equal ones by id.
pub(super) fn most_likely_first(a: &Candidate, b: &Candidate) -> Ordering {
    // Numbers, so always comparable; unlike `total_cmp` this takes -0 for 0, as `<` does.
    b.logit
        .partial_cmp(&a.logit)
        .unwrap_or(Ordering::Equal)
        .then(a.token_id.cmp(&b.token_id))
}

/// The row's scratch memory, kept from token to token.
///
/// Changed tokens are struck from the row and listed beside it: penalties touch a few thousand
/// tokens of a hundred thousand, so a copy of the row would cost more than they do.
#[derive(Debug, Default)]
pub(super) struct RowScratch {
    /// A bit for each token of the row that may be drawn with the logit it has there.
    allowed: Vec<u32>,
    /// For each block, a bound that none of its allowed logits exceeds.
    bounds: Vec<f32>,
    /// Tokens with logits of their own.
    adjusted: Vec<Candidate>,
}

impl RowScratch {
    /// Begins a row: tokens that `mask` allows (`None`: all), of the first `vocab_size`.
    ///
    /// # Errors
    /// The mask allows nothing, or an allowed logit is NaN or positive infinity.
    pub(super) fn begin<'a>(
        &'a mut self,
        logits: &'a [f32],
        mask: Option<&TokenMask>,
        vocab_size: usize,
    ) -> Result<Row<'a>, SampleError> {
        let logits = &logits[..logits.len().min(vocab_size)];
        self.adjusted.clear();
        self.allow(mask, logits.len());
        if mask.is_some() && self.allowed.iter().all(|word| *word == 0) {
            return Err(SampleError::NothingAllowed);
        }
        self.bounds.clear();
        let (allowed, bounds) = (&self.allowed, &mut self.bounds);
        let mut fault = false;
        numbers::for_each_block(logits, |index, block| {
            let word = allowed[index];
            if word == 0 {
                bounds.push(f32::NEG_INFINITY);
                return;
            }
            let (mut bound, has_fault) = numbers::highest(block);
            if has_fault {
                // It matters only where the mask looks.
                let (masked, has_fault) = numbers::highest(&masked(block, word));
                bound = masked;
                fault |= has_fault;
            }
            bounds.push(bound);
        });
        if fault {
            return Err(SampleError::NotFinite);
        }
        Ok(Row {
            logits,
            allowed: &mut self.allowed,
            bounds: &self.bounds,
            adjusted: &mut self.adjusted,
        })
    }

    fn allow(&mut self, mask: Option<&TokenMask>, vocab_size: usize) {
        let words = vocab_size.div_ceil(BLOCK);
        self.allowed.clear();
        if let Some(mask) = mask {
            self.allowed.extend(mask.words().iter().take(words));
            self.allowed.resize(words, 0);
        } else {
            self.allowed.resize(words, u32::MAX);
        }
        if let (Some(last), used @ 1..) = (self.allowed.last_mut(), vocab_size % BLOCK) {
            *last &= (1 << used) - 1;
        }
    }
}

/// The block with negative infinity where `word` has no bit.
fn masked(block: &Block, word: u32) -> Block {
    let mut masked = *block;
    let mut forbidden = !word;
    while forbidden != 0 {
        masked[forbidden.trailing_zeros() as usize] = f32::NEG_INFINITY;
        forbidden &= forbidden - 1;
    }
    masked
}

/// One row of logits in the making, then in use.
#[derive(Debug)]
pub(super) struct Row<'a> {
    logits: &'a [f32],
    allowed: &'a mut [u32],
    bounds: &'a [f32],
    adjusted: &'a mut Vec<Candidate>,
}

impl Row<'_> {
    /// The token's logit in the row, if it may be drawn and was not changed yet.
    pub(super) fn unchanged(&self, token_id: u32) -> Option<f32> {
        let index = token_id as usize;
        let word = self.allowed.get(index / BLOCK)?;
        (word >> (index % BLOCK) & 1 == 1).then(|| self.logits[index])
    }

    /// Gives a token that [`Self::unchanged`] knows another logit; negative infinity forbids it.
    pub(super) fn change(&mut self, token_id: u32, logit: f32) {
        let index = token_id as usize;
        self.allowed[index / BLOCK] &= !(1 << (index % BLOCK));
        if logit > f32::NEG_INFINITY {
            // A penalty below 1 can push a huge logit over the edge.
            let logit = logit.min(f32::MAX);
            self.adjusted.push(Candidate { token_id, logit });
        }
    }

    /// Appends the `count` most likely tokens that come after `below`, in order.
    pub(super) fn rank(&self, below: Option<Candidate>, count: usize, out: &mut Vec<Candidate>) {
        if count == 0 {
            return;
        }
        let mut selection = Selection {
            start: out.len(),
            out,
            count,
            below,
            bar: None,
            bar_logit: f32::NEG_INFINITY,
        };
        for (index, (&bound, &word)) in self.bounds.iter().zip(&*self.allowed).enumerate() {
            if bound < selection.bar_logit || word == 0 {
                continue;
            }
            let first = index * BLOCK;
            let end = self.logits.len().min(first + BLOCK);
            for (place, &logit) in self.logits[first..end].iter().enumerate() {
                if logit >= selection.bar_logit && word >> place & 1 == 1 {
                    let token_id = (first + place) as u32;
                    selection.push(Candidate { token_id, logit });
                }
            }
        }
        for candidate in &*self.adjusted {
            if candidate.logit >= selection.bar_logit {
                selection.push(*candidate);
            }
        }
        selection.finish();
    }

    /// Calls `visit` with blocks of all logits that come after `below`, and a bound on each.
    pub(super) fn for_each_block_below(
        &self,
        below: Candidate,
        mut visit: impl FnMut(f32, &Block),
    ) {
        numbers::for_each_block(self.logits, |index, block| {
            let (bound, word) = (self.bounds[index], self.allowed[index]);
            if word == 0 || bound == f32::NEG_INFINITY {
                return;
            }
            if word == u32::MAX && bound < below.logit {
                visit(bound, block);
                return;
            }
            let mut block = masked(block, word);
            for (place, logit) in block.iter_mut().enumerate() {
                let token_id = (index * BLOCK + place) as u32;
                let candidate = Candidate {
                    token_id,
                    logit: *logit,
                };
                if most_likely_first(&below, &candidate).is_ge() {
                    *logit = f32::NEG_INFINITY;
                }
            }
            visit(bound.min(below.logit), &block);
        });
        let mut block = [f32::NEG_INFINITY; BLOCK];
        let mut used = 0;
        for candidate in &*self.adjusted {
            if most_likely_first(&below, candidate).is_lt() {
                block[used] = candidate.logit;
                used += 1;
                if used == BLOCK {
                    visit(numbers::highest(&block).0, &block);
                    block.fill(f32::NEG_INFINITY);
                    used = 0;
                }
            }
        }
        if used > 0 {
            visit(numbers::highest(&block).0, &block);
        }
    }
}

/// The most likely tokens seen so far, with a bar that rises: each time a few times as many as
/// wanted have come together, the rest is dropped and only better ones are let in.
struct Selection<'a> {
    out: &'a mut Vec<Candidate>,
    /// Where the selection begins in `out`.
    start: usize,
    count: usize,
    below: Option<Candidate>,
    bar: Option<Candidate>,
    bar_logit: f32,
}

impl Selection<'_> {
    fn push(&mut self, candidate: Candidate) {
        let comes_after = |earlier: &Candidate| most_likely_first(earlier, &candidate).is_lt();
        if candidate.logit == f32::NEG_INFINITY
            || self.below.is_some_and(|below| !comes_after(&below))
            || self.bar.is_some_and(|bar| comes_after(&bar))
        {
            return;
        }
        self.out.push(candidate);
        if self.out.len() - self.start >= self.count.saturating_mul(4) {
            self.drop_the_rest();
            self.bar = self.out.last().copied();
            self.bar_logit = self.bar.map_or(f32::NEG_INFINITY, |bar| bar.logit);
        }
    }

    /// Leaves `count` tokens at most; the last of them is the least likely.
    fn drop_the_rest(&mut self) {
        let found = &mut self.out[self.start..];
        if found.len() > self.count {
            found.select_nth_unstable_by(self.count - 1, most_likely_first);
            self.out.truncate(self.start + self.count);
        }
    }

    fn finish(mut self) {
        self.drop_the_rest();
        self.out[self.start..].sort_unstable_by(most_likely_first);
    }
}
