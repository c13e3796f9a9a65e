//! A row of logits of which some tokens are forbidden and some changed, without a copy of it.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use super::SampleError;
use super::numbers::{self, BLOCK, Block, LANES, SPAN, Span};
use crate::TokenMask;

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) token_id: u32,
    /// Its logit after penalties; finite.
    pub(super) logit: f32,
}

impl Candidate {
    /// A number that is smaller the more likely the token: by logit, equal ones by id.
    fn rank_key(&self) -> u64 {
        // Adding 0 takes -0 for 0, as comparisons do. Positive numbers order as their bits do,
        // negative ones the other way round.
        let bits = (self.logit + 0.0).to_bits();
        let falling = if bits >> 31 == 0 {
            !bits ^ (1 << 31)
        } else {
            bits
        };
        u64::from(falling) << 32 | u64::from(self.token_id)
    }
}

/// The order of candidates.
pub(super) fn most_likely_first(a: &Candidate, b: &Candidate) -> Ordering {
    a.rank_key().cmp(&b.rank_key())
}

/// The row's scratch memory, kept from token to token.
///
/// Changed tokens are struck from the row and listed beside it: penalties touch a few thousand
/// tokens of a hundred thousand, so a copy of the row would cost more than they do.
#[derive(Debug, Default)]
pub(super) struct RowScratch {
    /// A bit for each token of the row that may be drawn with the logit it has there.
    allowed: Vec<u32>,
    /// For each group of tokens (see [`group_of`]) a bound that no logit in it exceeds.
    bounds: Vec<f32>,
    /// For each group a logit that one of its tokens has, or negative infinity.
    reached: Vec<f32>,
    /// Scratch for [`Row::bar`].
    maxima: Vec<f32>,
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
        let mut is_faulty = false;
        numbers::for_each_chunk(logits, |index, span: &Span| {
            let words = &allowed[index * LANES..][..LANES];
            if words.iter().all(|word| *word == 0) {
                bounds.extend([f32::NEG_INFINITY; LANES]);
                return;
            }
            if words.iter().all(|word| *word == u32::MAX) {
                let (highest, is_suspicious) = numbers::highest(span);
                is_faulty |= is_suspicious && numbers::has_fault(span);
                bounds.extend(highest);
            } else {
                // What the mask forbids matters to nobody, be it a fault.
                let span = masked_span(span, words);
                let (highest, is_suspicious) = numbers::highest(&span);
                is_faulty |= is_suspicious && numbers::has_fault(&span);
                bounds.extend(highest);
            }
        });
        if is_faulty {
            return Err(SampleError::NotFinite);
        }
        self.reached.clone_from(&self.bounds);
        Ok(Row {
            logits,
            allowed: &mut self.allowed,
            bounds: &self.bounds,
            reached: &mut self.reached,
            maxima: &mut self.maxima,
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
        self.allowed.resize(words.next_multiple_of(LANES), 0);
    }
}

/// The group that a token is in: in each span every eighth token is in the same one, which
/// lets vector code find the highest of all groups at once.
fn group_of(token: usize) -> usize {
    token / SPAN * LANES + token % LANES
}

fn largest(values: &[f32; LANES]) -> f32 {
    values
        .iter()
        .copied()
        .fold(f32::NEG_INFINITY, numbers::larger)
}

fn masked_span(span: &Span, words: &[u32]) -> Span {
    let mut masked = *span;
    for (block, word) in masked.as_chunks_mut::<BLOCK>().0.iter_mut().zip(words) {
        *block = numbers::masked(block, *word);
    }
    masked
}

/// One row of logits in the making, then in use.
#[derive(Debug)]
pub(super) struct Row<'a> {
    logits: &'a [f32],
    allowed: &'a mut [u32],
    bounds: &'a [f32],
    reached: &'a mut [f32],
    maxima: &'a mut Vec<f32>,
    adjusted: &'a mut Vec<Candidate>,
}

impl Row<'_> {
    fn is_allowed(&self, token: usize) -> bool {
        let word = self.allowed.get(token / BLOCK);
        word.is_some_and(|word| word >> (token % BLOCK) & 1 == 1)
    }

    /// The token's logit in the row, if it may be drawn and was not changed yet.
    #[inline]
    pub(super) fn unchanged(&self, token_id: u32) -> Option<f32> {
        let token = token_id as usize;
        self.is_allowed(token).then(|| self.logits[token])
    }

    /// Gives a token that [`Self::unchanged`] knows another logit; negative infinity forbids it.
    #[inline]
    pub(super) fn change(&mut self, token_id: u32, logit: f32) {
        let token = token_id as usize;
        self.allowed[token / BLOCK] &= !(1 << (token % BLOCK));
        let group = group_of(token);
        // Looking for the next one in the group would cost more than it is worth.
        let reached = &mut self.reached[group];
        *reached = if self.logits[token] == *reached {
            f32::NEG_INFINITY
        } else {
            *reached
        };
        if logit > f32::NEG_INFINITY {
            // A penalty below 1 can push a huge logit over the edge.
            let logit = logit.min(f32::MAX);
            self.adjusted.push(Candidate { token_id, logit });
        }
    }

    /// A logit that at least `count` tokens reach: the `count`-th of those that groups reach,
    /// or spans where those are enough.
    fn bar(&mut self, count: usize) -> f32 {
        self.maxima.clear();
        let groups = self.reached.len();
        if groups / LANES >= count.saturating_mul(4) {
            let spans = self.reached.as_chunks::<LANES>().0;
            self.maxima.extend(spans.iter().map(largest));
        } else if groups >= count {
            self.maxima.extend_from_slice(self.reached);
        } else {
            return f32::NEG_INFINITY;
        }
        let falling = |a: &f32, b: &f32| b.total_cmp(a);
        *self.maxima.select_nth_unstable_by(count - 1, falling).1
    }

    /// Appends the `count` most likely tokens that come after `below`, in order.
    pub(super) fn rank(
        &mut self,
        below: Option<Candidate>,
        count: usize,
        out: &mut Vec<Candidate>,
    ) {
        if count == 0 {
            return;
        }
        let bar_logit = match below {
            Some(_) => f32::NEG_INFINITY,
            None => self.bar(count),
        };
        let mut selection = Selection {
            start: out.len(),
            out,
            count,
            below,
            bar: None,
            bar_logit,
        };
        for (index, bounds) in self.bounds.as_chunks::<LANES>().0.iter().enumerate() {
            if largest(bounds) < selection.bar_logit {
                continue;
            }
            for (lane, bound) in bounds.iter().enumerate() {
                if *bound >= selection.bar_logit && *bound > f32::NEG_INFINITY {
                    self.push_group(index * LANES + lane, &mut selection);
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

    fn push_group(&self, group: usize, selection: &mut Selection<'_>) {
        let first = group / LANES * SPAN + group % LANES;
        let end = self.logits.len().min(first + SPAN - group % LANES);
        let logits = self.logits[first..end].iter().step_by(LANES);
        for (place, &logit) in logits.enumerate() {
            let token = first + place * LANES;
            if logit >= selection.bar_logit && self.is_allowed(token) {
                let token_id = token as u32;
                selection.push(Candidate { token_id, logit });
            }
        }
    }

    /// Calls `visit` with blocks of all tokens that come after `below`, until it breaks off.
    pub(super) fn try_each_block_below(
        &self,
        below: Candidate,
        mut visit: impl FnMut(Part<'_>) -> ControlFlow<()>,
    ) {
        let starts = (0..self.logits.len()).step_by(BLOCK);
        for (start, &word) in starts.zip(&*self.allowed) {
            if word == 0 {
                continue;
            }
            let mut logits = numbers::filled_up(&self.logits[start..]);
            if word != u32::MAX {
                logits = numbers::masked(&logits, word);
            }
            let first = start as u32;
            if logits.iter().any(|logit| *logit >= below.logit) {
                for (token_id, logit) in (first..).zip(&mut logits) {
                    let candidate = Candidate {
                        token_id,
                        logit: *logit,
                    };
                    if most_likely_first(&below, &candidate).is_ge() {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
            let ids = PartIds::From(first);
            if visit(Part { logits, ids }).is_break() {
                return;
            }
        }
        for adjusted in self.adjusted.chunks(BLOCK) {
            let mut logits = [f32::NEG_INFINITY; BLOCK];
            for (logit, candidate) in logits.iter_mut().zip(adjusted) {
                if most_likely_first(&below, candidate).is_lt() {
                    *logit = candidate.logit;
                }
            }
            let ids = PartIds::Of(adjusted);
            if visit(Part { logits, ids }).is_break() {
                return;
            }
        }
    }
}

/// Up to [`BLOCK`] tokens of a row.
pub(super) struct Part<'a> {
    /// Their logits; negative infinity for those that cannot be drawn.
    pub(super) logits: Block,
    ids: PartIds<'a>,
}

enum PartIds<'a> {
    From(u32),
    Of(&'a [Candidate]),
}

impl Part<'_> {
    /// The token at `place`, whose logit is finite.
    pub(super) fn candidate(&self, place: usize) -> Candidate {
        match self.ids {
            PartIds::From(first) => Candidate {
                token_id: first + place as u32,
                logit: self.logits[place],
            },
            PartIds::Of(adjusted) => adjusted[place],
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
            found.select_nth_unstable_by_key(self.count - 1, Candidate::rank_key);
            self.out.truncate(self.start + self.count);
        }
    }

    fn finish(mut self) {
        self.drop_the_rest();
        self.out[self.start..].sort_unstable_by_key(Candidate::rank_key);
    }
}
