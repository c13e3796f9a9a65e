//! Drawing the next token from a row of logits.

mod candidates;
mod device;
mod dry;
mod logprobs;
mod numbers;
mod penalties;
mod random;
mod row;
mod stages;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::sync::Arc;

pub use logprobs::{mix_guidance, token_logprobs};
pub use vocabulary::SamplerVocabulary;

use crate::{SamplingSettings, TokenMask};
use candidates::Candidates;
use dry::Dry;
use penalties::Penalties;
use random::{Stream, uniform};
use row::{Candidate, Row, RowScratch};
use vocabulary::{Sets, token_set};

/// No token can be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model's logits are no distribution.
    #[error("a logit is NaN or infinite, or none is finite")]
    NotFinite,
    /// The mask and the logit bias leave no token.
    #[error("the constraints and the logit bias together allow no token")]
    NothingAllowed,
}

/// Draws tokens for one job.
///
/// A draw depends on the settings, the history, the logits, the mask, the seed and the token's
/// number alone, so a job continues with the same tokens after an interruption, whatever ran
/// beside it. Mirostat's limit depends on the earlier draws as well; it is kept for each place
/// of the history.
#[derive(Debug)]
pub struct Sampler {
    settings: SamplingSettings,
    seed: u64,
    /// Ids from here on are never drawn.
    vocab_size: usize,
    history: Vec<u32>,
    penalties: Penalties,
    dry: Dry,
    dry_breakers: Arc<TokenMask>,
    xtc_ignored: Arc<TokenMask>,
    /// Mirostat's limit for each length of the history from 0; empty without mirostat.
    mu: Vec<f32>,
    /// The limit after the token last drawn, for the history that it was drawn for.
    next_mu: Option<(usize, f32)>,
    row: RowScratch,
    ranked: Vec<Candidate>,
}

impl Sampler {
    /// A sampler over logits of `vocab_size` tokens. `settings` are expected to be checked.
    pub fn new(
        settings: SamplingSettings,
        seed: u64,
        vocab_size: usize,
        vocabulary: &SamplerVocabulary,
    ) -> Self {
        type Default = fn(&Sets) -> &Arc<TokenMask>;
        let set = |is_used: bool, ids: &Option<Vec<u32>>, default: Default| match ids {
            Some(ids) => Arc::new(token_set(ids, vocab_size)),
            None if is_used => Arc::clone(default(vocabulary.sets())),
            None => Arc::new(TokenMask::none(0)),
        };
        let dry_breakers = set(
            settings.dry_multiplier > 0.0,
            &settings.dry_sequence_breakers,
            |sets| &sets.dry_breakers,
        );
        let xtc_ignored = set(
            settings.xtc_probability > 0.0,
            &settings.xtc_ignore_tokens,
            |sets| &sets.xtc_ignored,
        );
        let first_mu = if settings.mirostat_mu > 0.0 {
            settings.mirostat_mu
        } else {
            2.0 * settings.mirostat_tau
        };
        Self {
            seed,
            vocab_size: vocab_size.min(vocabulary.size),
            history: Vec::new(),
            penalties: Penalties::new(&settings),
            dry: Dry::new(&settings),
            dry_breakers,
            xtc_ignored,
            mu: settings.mirostat.then_some(first_mu).into_iter().collect(),
            next_mu: None,
            row: RowScratch::default(),
            ranked: Vec::new(),
            settings,
        }
    }

    /// Notes a token of the prompt or of the answer.
    ///
    /// Mirostat's limit moves on if the token follows a [`Self::sample`], else it stays.
    pub fn observe(&mut self, token_id: u32) {
        if let Some(&mu) = self.mu.last() {
            let drawn = self.next_mu.take();
            let moved = drawn.filter(|(length, _)| *length == self.history.len());
            self.mu.push(moved.map_or(mu, |(_, mu)| mu));
        }
        self.history.push(token_id);
    }

    /// Goes back to where the history had its first `length` tokens.
    pub fn truncate(&mut self, length: usize) {
        self.penalties.truncate(&self.history, length);
        self.history.truncate(length);
        self.mu.truncate(self.history.len() + 1);
        self.next_mu = None;
    }

    /// The tokens observed.
    pub fn history(&self) -> &[u32] {
        &self.history
    }

    /// How tokens are drawn.
    pub fn settings(&self) -> &SamplingSettings {
        &self.settings
    }

    /// Draws token number `step` of the job from `logits`, f32 `[vocab_size]`, among those that
    /// `mask` allows.
    ///
    /// # Errors
    /// A logit that may be drawn is NaN or positive infinity, all are negative infinity, or
    /// nothing is allowed.
    pub fn sample(
        &mut self,
        logits: &[f32],
        mask: Option<&TokenMask>,
        step: u64,
    ) -> Result<u32, SampleError> {
        let random = uniform(self.seed, Stream::Draw, step);
        let skew = self.settings.skew;
        let mut candidates = self.candidates(logits, mask, step)?;
        let (drawn, probability) = draw(&mut candidates, random, skew);
        if let Some(mu) = self.mu.last() {
            let surprise_bits = -probability.log2() as f32;
            let error = self.settings.mirostat_tau - surprise_bits;
            let next = mu + self.settings.mirostat_eta * error;
            self.next_mu = Some((self.history.len(), next));
        }
        Ok(drawn)
    }

    /// The distribution that token number `step` is drawn from.
    fn candidates<'a>(
        &'a mut self,
        logits: &'a [f32],
        mask: Option<&TokenMask>,
        step: u64,
    ) -> Result<Candidates<'a>, SampleError> {
        let settings = &self.settings;
        self.penalties.collect(&self.history);
        self.dry.search(&self.history, &self.dry_breakers);
        let mut row = self.row.begin(logits, mask, self.vocab_size)?;
        adjust(&mut row, settings, &self.penalties, &self.dry);

        let first_ranks = stages::first_ranks(settings).unwrap_or(candidates::FIRST_RANKS);
        let Some(mut candidates) = Candidates::new(row, &mut self.ranked, first_ranks) else {
            let may_forbid = mask.is_some() || !settings.logit_bias.is_empty();
            return Err(if may_forbid {
                SampleError::NothingAllowed
            } else {
                SampleError::NotFinite
            });
        };
        if settings.is_greedy() {
            candidates.keep(1);
            return Ok(candidates);
        }
        let context = stages::Context {
            mu: self.mu.last().copied().unwrap_or_default(),
            xtc_random: uniform(self.seed, Stream::Xtc, step),
            xtc_ignored: &self.xtc_ignored,
        };
        stages::run(&mut candidates, settings, &context);
        Ok(candidates)
    }
}

/// Changes the logits of tokens that occurred, are biased, or would continue a repetition.
fn adjust(row: &mut Row<'_>, settings: &SamplingSettings, penalties: &Penalties, dry: &Dry) {
    // A token may be all three; the first that names it does all of it.
    for (&token_id, bias) in &settings.logit_bias {
        if let Some(logit) = row.unchanged(token_id) {
            let logit = penalties.apply(token_id, logit) + bias - dry.penalty(token_id);
            row.change(token_id, logit);
        }
    }
    for token_id in dry.token_ids() {
        if let Some(logit) = row.unchanged(token_id) {
            let logit = penalties.apply(token_id, logit) - dry.penalty(token_id);
            row.change(token_id, logit);
        }
    }
    for &occurrence in penalties.occurrences() {
        if let Some(logit) = row.unchanged(occurrence.token_id) {
            row.change(occurrence.token_id, penalties.apply_to(occurrence, logit));
        }
    }
}

/// Draws by `random` in 0..1, and returns the token with its probability among the candidates.
fn draw(candidates: &mut Candidates<'_>, random: f64, skew: f32) -> (u32, f64) {
    let total = candidates.total();
    let mut random = random;
    if skew != 0.0 {
        // Which tokens count as unlikely is a matter of their order.
        candidates.rank_all();
        random = random.powf(f64::from(-skew).exp());
    }
    let (drawn, weight) = candidates.at_mass(random * total);
    (drawn.token_id, weight / total)
}
