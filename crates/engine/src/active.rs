//! A job in flight: everything about it that is not pages and rows.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use oxllama_backend::{Draw, DrawLimits, LogitChange, NOT_FINITE, NOTHING_LEFT};

use crate::job::{Event, FinishReason, Job, Timings, TokenLogprob, Usage};
use crate::output::{Output, Pushed};
use crate::speculate::DraftLength;
use crate::stream::EventSender;
use crate::{
    Constraint, ConstraintError, EngineError, SampleError, Sampler, TokenMask, token_logprobs,
};

/// Rewinds after which a job that cannot get round its banned strings is given up.
const MOST_REWINDS: usize = 1000;

/// A job as it was accepted, ready to run.
pub(crate) struct Active {
    pub(crate) job: Job,
    pub(crate) events: EventSender,
    /// Tokens of the prompt, and of the negative one if there is one.
    pub(crate) prompt_tokens: Vec<usize>,
    pub(crate) sampler: Sampler,
    pub(crate) output: Output,
    pub(crate) constraint: Option<Constraint>,
    /// What the first token may be, if it replaces one of the prompt.
    pub(crate) healing: Option<TokenMask>,
    pub(crate) draft_length: DraftLength,
    pub(crate) usage: Usage,
    pub(crate) clock: Clock,
    /// The place in the queue that was last told.
    pub(crate) told_position: Option<usize>,
    pub(crate) allowed: Allowed,
}

/// When things happened to a job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    pub(crate) submitted: Instant,
    pub(crate) started: Option<Instant>,
    pub(crate) prefilled: Option<Instant>,
    pub(crate) decode_steps: usize,
}

impl Clock {
    /// Submitted now.
    pub(crate) fn start() -> Self {
        Self {
            submitted: Instant::now(),
            started: None,
            prefilled: None,
            decode_steps: 0,
        }
    }
}

/// What may be drawn, beyond the job's own settings.
pub(crate) struct Allowed {
    /// Tokens that may not be drawn at a place of the answer.
    bans: HashMap<usize, Vec<u32>>,
    rewinds: usize,
    /// Masks for the rows of the next draw, as far as the constraint allows the drafts.
    masks: Vec<Result<TokenMask, ConstraintError>>,
    /// Scratch: everything together for one row.
    mask: TokenMask,
}

impl Allowed {
    /// Everything, of a vocabulary of `vocab_size`.
    pub(crate) fn everything(vocab_size: usize) -> Self {
        Self {
            bans: HashMap::new(),
            rewinds: 0,
            masks: Vec::new(),
            mask: TokenMask::none(vocab_size),
        }
    }
}

/// How a job goes on after a draw.
pub(crate) enum Outcome {
    Continues,
    /// The answer goes on after its first so many tokens, with another token.
    Rewinds {
        kept_new: usize,
    },
    Finishes(FinishReason),
    Fails(EngineError),
}

impl Active {
    /// Notes that a step has given logits to draw from.
    pub(crate) fn note_logits(&mut self) {
        match self.clock.prefilled {
            Some(_) => self.clock.decode_steps += 1,
            None => self.clock.prefilled = Some(Instant::now()),
        }
    }

    /// Notes how guesses fared.
    pub(crate) fn note_drafts(&mut self, drafted: usize, accepted: usize) {
        self.draft_length.observe(drafted, accepted);
        self.usage.drafted_tokens += drafted;
        self.usage.accepted_tokens += accepted;
    }

    /// Tokens that may still be drawn before the job's own limit.
    pub(crate) fn tokens_left(&self) -> usize {
        self.job.max_new_tokens.saturating_sub(self.output.tokens())
    }

    /// Computes what the constraint allows after the answer so far and after each of `drafts`.
    /// Runs beside the device.
    pub(crate) fn prepare_masks(&mut self, drafts: &[u32]) {
        self.allowed.masks.clear();
        let Some(constraint) = &mut self.constraint else {
            return;
        };
        let mut accepted = 0;
        for place in 0..=drafts.len() {
            let mut mask = TokenMask::none(self.allowed.mask.vocab_size());
            let masked = constraint.mask(&mut mask);
            let failed = masked.is_err();
            self.allowed.masks.push(masked.map(|()| mask));
            if failed || place == drafts.len() || constraint.accept(drafts[place]).is_err() {
                break;
            }
            accepted += 1;
            if constraint.is_complete() {
                break;
            }
        }
        if let Err(error) = constraint.rollback(accepted) {
            self.allowed.masks = vec![Err(error)];
        }
    }

    /// The next token as a draw that a device with `limits` can make, whose changes are added to
    /// `changes`. `None` where the host must see the logits.
    pub(crate) fn device_draw(
        &mut self,
        limits: &DrawLimits,
        changes: &mut Vec<LogitChange>,
    ) -> Option<Draw> {
        let Job {
            sampling,
            logprobs,
            return_logits,
            guidance,
            max_new_tokens,
            min_new_tokens,
            ..
        } = &self.job;
        let place = self.output.tokens();
        let shows_logits = logprobs.is_some() || *return_logits || guidance.is_some();
        let has_mask = self.constraint.is_some()
            || (self.healing.is_some() && place == 0)
            || self.allowed.bans.contains_key(&place)
            || place < *min_new_tokens;
        // How many tokens are guessed depends on the neighbours, and rows of guesses are the host's:
        // a job draws in one place throughout, unless both draw the same to the last bit.
        let is_guessed = self.draft_length.may_guess() && !sampling.is_greedy();
        if shows_logits || has_mask || is_guessed || *max_new_tokens == 0 {
            return None;
        }
        self.sampler.device_draw(limits, place as u64, changes)
    }

    /// Goes on with what the device drew.
    pub(crate) fn take_drawn(
        &mut self,
        drawn: u32,
        context_tokens: usize,
        new_tokens: &mut Vec<u32>,
    ) -> Outcome {
        let drawn = match drawn {
            NOT_FINITE => Err(SampleError::NotFinite),
            NOTHING_LEFT if self.job.sampling.logit_bias.is_empty() => Err(SampleError::NotFinite),
            NOTHING_LEFT => Err(SampleError::NothingAllowed),
            token_id => Ok(token_id),
        };
        match drawn {
            Ok(token_id) => {
                let outcome = self.take_token((token_id, None, None), context_tokens, new_tokens);
                outcome.unwrap_or(Outcome::Continues)
            }
            Err(error) => Outcome::Fails(self.located(error)),
        }
    }

    /// Draws from `logits`, f32 `[rows, vocab_size]`: the rows after the last token and after
    /// each of `drafts`, as long as the drafts are what is drawn. The tokens that follow the
    /// sequence are added to `new_tokens`.
    pub(crate) fn draw(
        &mut self,
        logits: &[f32],
        drafts: &[u32],
        context_tokens: usize,
        new_tokens: &mut Vec<u32>,
    ) -> Outcome {
        if self.job.max_new_tokens == 0 {
            return Outcome::Finishes(FinishReason::Length);
        }
        let vocab_size = self.allowed.mask.vocab_size();
        for (row, logits) in logits.chunks_exact(vocab_size).enumerate() {
            let token_id = match self.draw_token(row, logits) {
                Ok(token_id) => token_id,
                Err(error) => return Outcome::Fails(error),
            };
            let top = self.job.logprobs;
            let logprob = top.map(|top| token_logprobs(logits, token_id, top));
            let raw = self.job.return_logits.then(|| logits.to_vec());
            let drawn = (token_id, logprob, raw);
            if let Some(outcome) = self.take_token(drawn, context_tokens, new_tokens) {
                return outcome;
            }
            if drafts.get(row) != Some(&token_id) {
                break;
            }
        }
        Outcome::Continues
    }

    /// Makes a drawn token part of the answer; `None`: the job goes on after it.
    fn take_token(
        &mut self,
        (token_id, logprob, raw): (u32, Option<TokenLogprob>, Option<Vec<f32>>),
        context_tokens: usize,
        new_tokens: &mut Vec<u32>,
    ) -> Option<Outcome> {
        if self.job.stop_token_ids.contains(&token_id) {
            return Some(Outcome::Finishes(FinishReason::Stop));
        }
        match self.output.push(token_id, logprob, raw) {
            Pushed::Banned { first_token } => return Some(self.rewind(first_token)),
            Pushed::Stopped => {
                new_tokens.push(token_id);
                return Some(Outcome::Finishes(FinishReason::Stop));
            }
            Pushed::Continues => {}
        }
        new_tokens.push(token_id);
        self.sampler.observe(token_id);
        if let Some(constraint) = &mut self.constraint {
            if let Err(error) = constraint.accept(token_id) {
                return Some(Outcome::Fails(error.into()));
            }
            if constraint.is_complete() {
                return Some(Outcome::Finishes(FinishReason::Stop));
            }
        }
        let longest = self.prompt_tokens.iter().copied().max().unwrap_or(0);
        let fills_context = longest + self.output.tokens() > context_tokens;
        let is_full = self.tokens_left() == 0 || fills_context;
        is_full.then_some(Outcome::Finishes(FinishReason::Length))
    }

    fn draw_token(&mut self, row: usize, logits: &[f32]) -> Result<u32, EngineError> {
        let place = self.output.tokens();
        let is_masked = self.set_mask(row, place)?;
        let mask = is_masked.then_some(&self.allowed.mask);
        let drawn = self.sampler.sample(logits, mask, place as u64);
        drawn.map_err(|error| self.located(error))
    }

    /// Why the next token cannot be drawn, with the position that it was to be drawn from.
    fn located(&self, error: SampleError) -> EngineError {
        let position = self.prompt_tokens[0] + self.output.tokens() - 1;
        match error {
            SampleError::NotFinite => EngineError::NotFinite { position },
            SampleError::NothingAllowed => EngineError::NothingAllowed { position },
        }
    }

    /// Sets the mask for the token at `place` of the answer; false: every token may be drawn.
    fn set_mask(&mut self, row: usize, place: usize) -> Result<bool, EngineError> {
        let healing = self.healing.as_ref().filter(|_| place == 0);
        let constrained = match self.allowed.masks.get(row) {
            Some(Ok(mask)) => Some(mask),
            Some(Err(error)) => return Err(error.clone().into()),
            None => None,
        };
        let banned = self.allowed.bans.get(&place);
        let keeps_on = place < self.job.min_new_tokens && !self.job.stop_token_ids.is_empty();
        if healing.is_none() && constrained.is_none() && banned.is_none() && !keeps_on {
            return Ok(false);
        }
        match constrained.or(healing) {
            Some(mask) => self.allowed.mask.clone_from(mask),
            None => {
                let vocab_size = self.allowed.mask.vocab_size();
                self.allowed.mask = TokenMask::all(vocab_size);
            }
        }
        if let (Some(_), Some(healing)) = (constrained, healing) {
            self.allowed.mask.intersect(healing);
        }
        for &token_id in banned.into_iter().flatten() {
            self.allowed.mask.forbid(token_id);
        }
        if keeps_on {
            for &token_id in &self.job.stop_token_ids {
                self.allowed.mask.forbid(token_id);
            }
        }
        Ok(true)
    }

    /// Takes back the answer from its token `first_token` on, which is the start of a banned
    /// string; another token is drawn there next.
    fn rewind(&mut self, first_token: usize) -> Outcome {
        self.allowed.rewinds += 1;
        if self.allowed.rewinds > MOST_REWINDS {
            return Outcome::Fails(EngineError::BannedEverywhere {
                rewinds: MOST_REWINDS,
            });
        }
        // The token that completed the string was not accepted anywhere yet.
        let accepted = self.output.tokens() - 1;
        let banned = self.output.token_id(first_token);
        self.output.truncate(first_token);
        self.sampler.truncate(self.prompt_tokens[0] + first_token);
        if let Some(constraint) = &mut self.constraint
            && let Err(error) = constraint.rollback(accepted - first_token)
        {
            return Outcome::Fails(error.into());
        }
        // What was banned further on was banned after other tokens.
        self.allowed.bans.retain(|&place, _| place <= first_token);
        self.allowed
            .bans
            .entry(first_token)
            .or_default()
            .extend(banned);
        Outcome::Rewinds {
            kept_new: first_token,
        }
    }

    /// Tells the stream what may be shown.
    pub(crate) fn show(&mut self) {
        if let Some(event) = self.output.take() {
            self.events.send(event);
        }
    }

    /// Tells the stream the rest, and that this was all.
    pub(crate) fn finish(mut self, reason: FinishReason, error: Option<Arc<EngineError>>) {
        if let Some(event) = self.output.finish() {
            self.events.send(event);
        }
        let now = Instant::now();
        let Clock {
            submitted,
            started,
            prefilled,
            decode_steps,
        } = self.clock;
        let seconds = |from: Instant, to: Instant| (to - from).as_secs_f64();
        self.usage.generated_tokens = self.output.tokens();
        self.events.send(Event::Finished {
            reason,
            usage: self.usage,
            timings: Timings {
                queue_s: seconds(submitted, started.unwrap_or(now)),
                prefill_s: started.map_or(0.0, |from| seconds(from, prefilled.unwrap_or(now))),
                decode_s: prefilled.map_or(0.0, |from| seconds(from, now)),
                decode_steps,
            },
            error,
        });
    }
}
