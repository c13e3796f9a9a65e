//! A small model that guesses what a large one will say.

use std::collections::HashMap;
use std::ops::Range;

use oxllama_backend::PAGE_TOKENS;
use oxllama_model::{ModelError, Runner, StepPlan};

use crate::active::Active;
use crate::scheduler::{JobId, Scheduler, Step, StepPart};

/// A draft model. Its cache has the same pages as the target's, and a page has the same number
/// and the same tokens in both: one page table serves two models.
///
/// What the draft's cache holds for a sequence may be less than the target's, or stale where
/// pages were filled while nothing was guessed. That costs guesses, never a wrong token.
pub(crate) struct DraftModel {
    runner: Box<dyn Runner>,
    plan: StepPlan,
    /// Tokens of each job's first sequence that the draft has run.
    computed: HashMap<JobId, usize>,
}

/// A draft this close behind catches up in the step that guesses.
const CAUGHT_UP_TOKENS: usize = 8;

/// One job's guesses in the making.
struct Guessing {
    part: StepPart,
    tokens: Vec<u32>,
}

impl DraftModel {
    pub(crate) fn new(runner: Box<dyn Runner>) -> Self {
        Self {
            runner,
            plan: StepPlan::default(),
            computed: HashMap::new(),
        }
    }

    pub(crate) fn runner(&mut self) -> &mut dyn Runner {
        &mut *self.runner
    }

    /// Notes that a job starts with so many tokens in the cache.
    pub(crate) fn start(&mut self, id: JobId, cached_tokens: usize) {
        self.computed.insert(id, cached_tokens);
    }

    /// Notes that a job's tokens from `tokens` on are others now.
    pub(crate) fn rewind(&mut self, id: JobId, tokens: usize) {
        if let Some(computed) = self.computed.get_mut(&id) {
            *computed = (*computed).min(tokens);
        }
    }

    pub(crate) fn finish(&mut self, id: JobId) {
        self.computed.remove(&id);
    }

    /// Runs the step's copies, and guesses the drafts of its parts: as many as the parts have.
    ///
    /// # Errors
    /// The draft model's device failed.
    pub(crate) fn guess(
        &mut self,
        step: &Step,
        scheduler: &mut Scheduler,
        jobs: &mut HashMap<JobId, Active>,
    ) -> Result<(), ModelError> {
        let wanted = |part: &&StepPart| {
            let job = jobs.get(&part.job).map(|active| active.job.speculation);
            part.sequence == 0 && part.drafts > 0 && job == Some(crate::Speculation::DraftModel)
        };
        let mut guessing: Vec<Guessing> = step
            .parts
            .iter()
            .filter(wanted)
            .map(|&part| Guessing {
                part,
                tokens: Vec::new(),
            })
            .collect();
        if !step.copies.is_empty() {
            self.plan.clear();
            self.plan.page_copies.extend_from_slice(&step.copies);
            self.runner.run(&self.plan)?;
        }
        for guess in &guessing {
            self.catch_up(guess.part.job, scheduler)?;
        }
        let longest = guessing.iter().map(|guess| guess.part.drafts).max();
        for round in 0..longest.unwrap_or(0) {
            let mut going: Vec<&mut Guessing> = guessing
                .iter_mut()
                .filter(|guess| guess.part.drafts > round)
                .collect();
            self.guess_next(&mut going, scheduler, jobs)?;
        }
        for guess in guessing {
            let id = guess.part.job;
            scheduler.set_drafts(id, &guess.tokens);
            if let Some(active) = jobs.get_mut(&id) {
                let known = active.sampler.history().len() - guess.tokens.len();
                active.sampler.truncate(known);
            }
        }
        Ok(())
    }

    /// Runs what the target knows of a job and the draft does not, but for the last few tokens.
    fn catch_up(&mut self, id: JobId, scheduler: &Scheduler) -> Result<(), ModelError> {
        let Some((known, _)) = scheduler.sequence(id, 0) else {
            return Ok(());
        };
        let limits = self.runner.limits();
        let max_rows = limits.max_rows;
        // As many for every sequence at once fit in a step.
        let caught_up = (max_rows / limits.max_sequences).clamp(1, CAUGHT_UP_TOKENS);
        loop {
            let first = *self.computed.entry(id).or_insert(0);
            if known.len() - first.min(known.len()) <= caught_up {
                return Ok(());
            }
            let end = (first + max_rows).min(known.len() - 1);
            self.plan.clear();
            self.plan.pages_per_sequence = end.div_ceil(PAGE_TOKENS);
            self.push_rows(id, scheduler, &[], first..end, 0);
            self.runner.run(&self.plan)?;
            self.computed.insert(id, end);
        }
    }

    /// Guesses one more token for each job, all in one step.
    fn guess_next(
        &mut self,
        going: &mut [&mut Guessing],
        scheduler: &Scheduler,
        jobs: &mut HashMap<JobId, Active>,
    ) -> Result<(), ModelError> {
        self.plan.clear();
        let total = |guess: &Guessing| guess.part.first + guess.part.tokens + guess.tokens.len();
        let pages = going.iter().map(|guess| total(guess).div_ceil(PAGE_TOKENS));
        self.plan.pages_per_sequence = pages.max().unwrap_or(0);
        for guess in &*going {
            let id = guess.part.job;
            let total = total(guess);
            let first = self.computed.get(&id).copied().unwrap_or(0).min(total - 1);
            self.push_rows(id, scheduler, &guess.tokens, first..total, 1);
            self.computed.insert(id, total);
        }
        let vocab_size = self.runner.spec().vocab_size;
        let logits = self.runner.run(&self.plan)?.logits;
        for (guess, logits) in going.iter_mut().zip(logits.chunks_exact(vocab_size)) {
            let drawn = jobs.get_mut(&guess.part.job).map(|active| {
                let place = active.output.tokens() + guess.tokens.len();
                // A guess that cannot be drawn is a bad guess and nothing worse.
                let drawn = active
                    .sampler
                    .sample(logits, None, place as u64)
                    .unwrap_or(0);
                // Penalties count the guesses before this one, as they will if those are right.
                active.sampler.observe(drawn);
                drawn
            });
            guess.tokens.push(drawn.unwrap_or(0));
        }
        Ok(())
    }

    /// Adds to the plan the rows `range` of a job's first sequence, whose tokens go on with
    /// `guesses`; the last `logit_rows` of them with logits.
    fn push_rows(
        &mut self,
        id: JobId,
        scheduler: &Scheduler,
        guesses: &[u32],
        range: Range<usize>,
        logit_rows: usize,
    ) {
        let Some((known, table)) = scheduler.sequence(id, 0) else {
            return;
        };
        let tokens = known.iter().chain(guesses).copied();
        let pages = &table[..range.end.div_ceil(PAGE_TOKENS)];
        self.plan.push_sequence(
            tokens.skip(range.start).take(range.len()),
            range.start,
            pages.iter().map(|page| page.0),
            logit_rows,
        );
    }
}
