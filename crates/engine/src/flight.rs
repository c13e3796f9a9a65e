//! The jobs in flight, and what a step does to them.

use std::collections::HashMap;

use oxllama_model::{AdapterId, ModelError, NO_ADAPTER, StepPlan};

use crate::active::{Active, Outcome};
use crate::draft::DraftModel;
use crate::job::{Event, FinishReason, Speculation};
use crate::scheduler::{JobId, Scheduler, Step, StepPart};
use crate::speculate::ngram_drafts;
use crate::{EngineError, mix_guidance};

/// Everything that the engine's thread has but for the model: so a step's logits, which belong
/// to the model, can be read while this changes.
pub(crate) struct Flight {
    pub(crate) scheduler: Scheduler,
    pub(crate) jobs: HashMap<JobId, Active>,
    pub(crate) draft: Option<DraftModel>,
    pub(crate) step: Step,
    /// Jobs that ended in this step.
    pub(crate) ended: Vec<(JobId, FinishReason, Option<EngineError>)>,
    /// Scratch: a job's logits mixed with those of its negative prompt.
    mixed: Vec<f32>,
    /// Scratch: tokens that a job has drawn in this step.
    new_tokens: Vec<u32>,
}

impl Flight {
    pub(crate) fn new(scheduler: Scheduler, draft: Option<DraftModel>) -> Self {
        Self {
            scheduler,
            jobs: HashMap::new(),
            draft,
            step: Step::default(),
            ended: Vec::new(),
            mixed: Vec::new(),
            new_tokens: Vec::new(),
        }
    }

    /// Guesses ahead for jobs where it pays: tokens from n-grams, and places for what the draft
    /// model will guess once the step's pages are known.
    pub(crate) fn choose_drafts(&mut self) {
        let decoding: Vec<JobId> = self.scheduler.decoding().collect();
        for id in decoding {
            let Some(active) = self.jobs.get_mut(&id) else {
                continue;
            };
            // The step gives one token even without guesses.
            let useful = active.tokens_left().saturating_sub(1);
            let most = active.draft_length.choose().min(useful);
            if most == 0 {
                continue;
            }
            match (active.job.speculation, self.scheduler.sequence(id, 0)) {
                (Speculation::Ngram, Some((token_ids, _))) => {
                    let drafts = ngram_drafts(token_ids, most).to_vec();
                    self.scheduler.set_drafts(id, &drafts);
                }
                (Speculation::DraftModel, _) => self.scheduler.set_drafts(id, &vec![0; most]),
                _ => {}
            }
        }
    }

    /// Lets the draft model guess what [`Self::choose_drafts`] left places for.
    pub(crate) fn guess(&mut self) -> Result<(), ModelError> {
        match &mut self.draft {
            Some(draft) => draft.guess(&self.step, &mut self.scheduler, &mut self.jobs),
            None => Ok(()),
        }
    }

    /// Writes the step as a model runs it.
    pub(crate) fn fill(&self, plan: &mut StepPlan) {
        self.scheduler.fill(&self.step, plan);
        let adapter = |part: &StepPart| self.jobs.get(&part.job)?.job.adapter;
        let parts = &self.step.parts;
        if parts.iter().any(|part| adapter(part).is_some()) {
            let ids = parts
                .iter()
                .map(|part| adapter(part).map_or(NO_ADAPTER, AdapterId::get));
            plan.sequence_adapters.extend(ids);
        }
    }

    /// Jobs of the step that need masks, with their drafts.
    pub(crate) fn constrained(&mut self) -> Vec<(&mut Active, &[u32])> {
        let Self {
            scheduler,
            jobs,
            step,
            ..
        } = self;
        let wants_masks = |id: JobId| {
            let draws = |part: &&StepPart| part.job == id && part.wants_logits;
            step.parts.iter().find(draws)
        };
        jobs.iter_mut()
            .filter(|(_, active)| active.constraint.is_some())
            .filter_map(|(&id, active)| {
                let part = wants_masks(id)?;
                Some((active, &scheduler.drafts(id)[..part.drafts]))
            })
            .collect()
    }

    /// Draws what follows each part that has logits, and notes what was computed. `logits` are
    /// f32 `[logit rows of the step, vocab_size]`.
    pub(crate) fn take_results(&mut self, mut logits: &[f32], vocab_size: usize) {
        let parts = std::mem::take(&mut self.step.parts);
        for of_job in parts.chunk_by(|a, b| a.job == b.job) {
            let rows: usize = of_job.iter().map(StepPart::logit_rows).sum();
            let (own, rest) = logits.split_at(rows * vocab_size);
            logits = rest;
            self.take_job(of_job, own);
        }
        self.step.parts = parts;
    }

    /// As [`Self::take_results`], for the parts of one job.
    fn take_job(&mut self, parts: &[StepPart], logits: &[f32]) {
        let id = parts[0].job;
        let Some(active) = self.jobs.get_mut(&id) else {
            return;
        };
        self.new_tokens.clear();
        let mut outcome = Outcome::Continues;
        if !logits.is_empty() {
            let drafts = &self.scheduler.drafts(id)[..parts[0].drafts];
            let logits = match &active.job.guidance {
                Some(guidance) => {
                    let (positive, negative) = logits.split_at(logits.len() / 2);
                    let vocab_size = positive.len() / (drafts.len() + 1);
                    self.mixed.clear();
                    self.mixed.extend_from_slice(positive);
                    let rows = self.mixed.chunks_exact_mut(vocab_size);
                    for (positive, negative) in rows.zip(negative.chunks_exact(vocab_size)) {
                        mix_guidance(positive, negative, guidance.scale);
                    }
                    &self.mixed[..]
                }
                None => logits,
            };
            let context_tokens = self.scheduler.settings().context_tokens;
            active.note_logits();
            outcome = active.draw(logits, drafts, context_tokens, &mut self.new_tokens);
            let accepted = self.new_tokens.len().saturating_sub(1).min(drafts.len());
            active.note_drafts(drafts.len(), accepted);
            if let Some(draft) = &mut self.draft {
                draft.rewind(id, parts[0].first + parts[0].tokens + accepted);
            }
        } else if active.clock.prefilled.is_none()
            && let Some(part) = parts.iter().find(|part| part.sequence == 0)
        {
            let done = part.first + part.tokens;
            let total = active.prompt_tokens[0];
            active.events.send(Event::Prefill { done, total });
        }
        for part in parts {
            self.scheduler.complete(part, &self.new_tokens);
        }
        active.show();
        match outcome {
            Outcome::Continues => {}
            Outcome::Rewinds { kept_new } => {
                let prompts = &active.prompt_tokens;
                self.scheduler.rewind(id, prompts, kept_new, &mut self.step);
                if let Some(draft) = &mut self.draft {
                    draft.rewind(id, prompts[0] + kept_new - 1);
                }
            }
            Outcome::Finishes(reason) => self.ended.push((id, reason, None)),
            Outcome::Fails(error) => self.ended.push((id, FinishReason::Error, Some(error))),
        }
    }
}
