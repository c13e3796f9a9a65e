//! The jobs in flight, and what a step does to them.

use std::collections::HashMap;

use oxllama_backend::DrawLimits;
use oxllama_model::{AdapterId, ModelError, NO_ADAPTER, StepOutput, StepPlan};

use crate::active::{Active, Outcome};
use crate::draft::DraftModel;
use crate::job::{Event, FinishReason, Speculation};
use crate::scheduler::{JobId, Scheduler, Step, StepPart};
use crate::speculate::ngram_drafts;
use crate::{EngineError, mix_guidance};

/// What a step gives one of its jobs.
enum JobOutput<'a> {
    /// f32 `[logit rows of its parts, vocab_size]`
    Logits(&'a [f32]),
    /// What the device drew.
    Drawn(u32),
}

/// Everything that the engine's thread has but for the model: so a step's logits, which belong
/// to the model, can be read while this changes.
pub(crate) struct Flight {
    pub(crate) scheduler: Scheduler,
    pub(crate) jobs: HashMap<JobId, Active>,
    pub(crate) draft: Option<DraftModel>,
    pub(crate) step: Step,
    /// Prompts that run while the step's output is awaited.
    pub(crate) ahead: Step,
    /// Jobs that ended in this step.
    pub(crate) ended: Vec<(JobId, FinishReason, Option<EngineError>)>,
    /// Scratch: a job's logits mixed with those of its negative prompt.
    mixed: Vec<f32>,
    /// Scratch: tokens that a job has drawn in this step.
    new_tokens: Vec<u32>,
    /// Jobs whose tokens the device draws in this step, in the order of its parts.
    drawn_jobs: Vec<JobId>,
    /// Scratch: the rows that the device draws from.
    drawn_rows: Vec<u32>,
}

impl Flight {
    pub(crate) fn new(scheduler: Scheduler, draft: Option<DraftModel>) -> Self {
        Self {
            scheduler,
            jobs: HashMap::new(),
            draft,
            step: Step::default(),
            ahead: Step::default(),
            ended: Vec::new(),
            mixed: Vec::new(),
            new_tokens: Vec::new(),
            drawn_jobs: Vec::new(),
            drawn_rows: Vec::new(),
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

    /// Writes the step as a model runs it, which draws within `limits`.
    pub(crate) fn fill(&mut self, plan: &mut StepPlan, limits: Option<DrawLimits>) {
        self.fill_rows(&self.step, plan);
        self.fill_draws(plan, limits);
    }

    /// Plans a step of prompts that need not wait for the output of the current one, and writes it
    /// as a model runs it. False: there is none.
    pub(crate) fn fill_ahead(&mut self, plan: &mut StepPlan) -> bool {
        self.scheduler.plan_ahead(&self.step.parts, &mut self.ahead);
        self.fill_rows(&self.ahead, plan);
        !self.ahead.parts.is_empty()
    }

    fn fill_rows(&self, step: &Step, plan: &mut StepPlan) {
        self.scheduler.fill(step, plan);
        let adapter = |part: &StepPart| self.jobs.get(&part.job)?.job.adapter;
        let parts = &step.parts;
        if parts.iter().any(|part| adapter(part).is_some()) {
            let ids = parts
                .iter()
                .map(|part| adapter(part).map_or(NO_ADAPTER, AdapterId::get));
            plan.sequence_adapters.extend(ids);
        }
    }

    /// Leaves draws to the device where it can make them, and moves their rows to the end.
    fn fill_draws(&mut self, plan: &mut StepPlan, limits: Option<DrawLimits>) {
        self.drawn_jobs.clear();
        let Some(limits) = limits else {
            return;
        };
        self.drawn_rows.clear();
        let (mut row, mut kept) = (0, 0);
        for part in &self.step.parts {
            let rows = part.logit_rows();
            let drawn = match self.jobs.get_mut(&part.job) {
                Some(active) if rows == 1 => active.device_draw(&limits, &mut plan.changes),
                _ => None,
            };
            if let Some(draw) = drawn {
                plan.draws.push(draw);
                self.drawn_jobs.push(part.job);
                self.drawn_rows.push(plan.logit_rows[row]);
            } else {
                plan.logit_rows.copy_within(row..row + rows, kept);
                kept += rows;
            }
            row += rows;
        }
        plan.logit_rows[kept..].copy_from_slice(&self.drawn_rows);
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

    /// Draws what follows each part that has logits, unless the device has, and notes what was
    /// computed.
    pub(crate) fn take_results(&mut self, output: StepOutput<'_>, vocab_size: usize) {
        let parts = std::mem::take(&mut self.step.parts);
        let drawn_jobs = std::mem::take(&mut self.drawn_jobs);
        let mut drawn = drawn_jobs.iter().zip(output.drawn).peekable();
        let mut logits = output.logits;
        for of_job in parts.chunk_by(|a, b| a.job == b.job) {
            if let Some((_, &token_id)) = drawn.next_if(|(id, _)| **id == of_job[0].job) {
                self.take_job(of_job, JobOutput::Drawn(token_id));
                continue;
            }
            let rows: usize = of_job.iter().map(StepPart::logit_rows).sum();
            let (own, rest) = logits.split_at(rows * vocab_size);
            logits = rest;
            self.take_job(of_job, JobOutput::Logits(own));
        }
        self.step.parts = parts;
        self.drawn_jobs = drawn_jobs;
    }

    /// Notes what the step computes of jobs that want no logits, which is so for all steps after it,
    /// and keeps the parts of all others. Returns whether there are any.
    pub(crate) fn take_chunks(&mut self) -> bool {
        let parts = std::mem::take(&mut self.step.parts);
        for of_job in parts.chunk_by(|a, b| a.job == b.job) {
            if of_job.iter().any(|part| part.wants_logits) {
                self.step.parts.extend_from_slice(of_job);
            } else {
                self.take_job(of_job, JobOutput::Logits(&[]));
            }
        }
        self.step.parts.len() < parts.len()
    }

    /// The same for the step ahead, where nobody wants logits.
    pub(crate) fn take_ahead(&mut self) {
        let parts = std::mem::take(&mut self.ahead.parts);
        for of_job in parts.chunk_by(|a, b| a.job == b.job) {
            self.take_job(of_job, JobOutput::Logits(&[]));
        }
        self.ahead.parts = parts;
    }

    /// As [`Self::take_results`], for the parts of one job.
    fn take_job(&mut self, parts: &[StepPart], output: JobOutput<'_>) {
        let id = parts[0].job;
        let Some(active) = self.jobs.get_mut(&id) else {
            return;
        };
        self.new_tokens.clear();
        let mut outcome = Outcome::Continues;
        let context_tokens = self.scheduler.settings().context_tokens;
        if let JobOutput::Drawn(token_id) = output {
            active.note_logits();
            outcome = active.take_drawn(token_id, context_tokens, &mut self.new_tokens);
            if let Some(draft) = &mut self.draft {
                draft.rewind(id, parts[0].first + parts[0].tokens);
            }
        } else if let JobOutput::Logits(logits @ [_, ..]) = output {
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
