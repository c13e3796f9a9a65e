//! The engine's thread: one step after another.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use oxllama_backend::PAGE_TOKENS;
use oxllama_model::{
    AdapterId, CacheRequest, ModelError, Runner, RunnerLimits, StepOutput, StepPlan,
};

use crate::EngineError;
use crate::active::Active;
use crate::draft::DraftModel;
use crate::engine::{Command, EngineStats, Phase, Shared, reshaped};
use crate::flight::Flight;
use crate::job::{Event, FinishReason};
use crate::scheduler::{JobId, Scheduler};

pub(crate) struct Worker {
    shared: Arc<Shared>,
    runner: Box<dyn Runner>,
    plan: StepPlan,
    flight: Flight,
    queue_changed: bool,
    steps: u64,
    /// Steps whose chunks of prompts count as computed although no output has shown it yet.
    unconfirmed_steps: usize,
    /// Why no step can follow.
    ended_by: Option<Arc<EngineError>>,
}

impl Worker {
    pub(crate) fn new(
        shared: Arc<Shared>,
        runner: Box<dyn Runner>,
        draft: Option<Box<dyn Runner>>,
        scheduler: Scheduler,
    ) -> Self {
        Self {
            shared,
            runner,
            plan: StepPlan::default(),
            flight: Flight::new(scheduler, draft.map(DraftModel::new)),
            queue_changed: false,
            steps: 0,
            unconfirmed_steps: 0,
            ended_by: None,
        }
    }

    /// Runs until the engine is shut down. However it ends, every job is told.
    pub(crate) fn run(mut self) {
        let ran = catch_unwind(AssertUnwindSafe(|| while self.turn() {}));
        let error = match ran {
            Ok(()) => self.ended_by.clone(),
            Err(_) => Some(Arc::new(EngineError::Panicked)),
        };
        let reason = match error {
            Some(_) => FinishReason::Error,
            None => FinishReason::Cancelled,
        };
        let mut inbox = self.shared.lock();
        inbox.phase = Phase::Closed;
        inbox.ended_by = self.ended_by.take();
        for command in std::mem::take(&mut inbox.commands) {
            if let Command::Submit(submission) = command {
                let (request, active) = *submission;
                self.flight.jobs.insert(request.id, active);
            }
        }
        inbox.unstarted = 0;
        inbox.unfinished = 0;
        drop(inbox);
        for (_, active) in self.flight.jobs.drain() {
            let error = error.clone();
            // What a panic left of a job may panic again; its stream ends all the same.
            let _ = catch_unwind(AssertUnwindSafe(|| active.finish(reason, error)));
        }
        self.shared.notify();
    }

    /// One step, or a wait for something to do. False: the engine is to end.
    fn turn(&mut self) -> bool {
        if !self.take_commands() {
            return false;
        }
        self.drop_unwanted();
        self.flight.choose_drafts();
        self.flight.scheduler.plan_step(&mut self.flight.step);
        self.tell_queue();
        if !self.flight.step.is_empty() {
            self.run_step();
        }
        self.end_jobs();
        self.ended_by.is_none()
    }

    /// Does what was asked since the last step; waits while there is nothing to do at all.
    fn take_commands(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut inbox = shared.lock();
        while !inbox.is_due() && self.flight.jobs.is_empty() && inbox.phase != Phase::Closed {
            inbox = shared.wait(inbox);
        }
        if inbox.phase == Phase::Closed {
            return false;
        }
        let commands = inbox.take_due();
        drop(inbox);
        for command in commands {
            self.obey(command);
        }
        true
    }

    fn obey(&mut self, command: Command) {
        // Whoever asked may be gone: then nobody needs the answer.
        match command {
            Command::Submit(submission) => {
                let (request, active) = *submission;
                let id = request.id;
                self.flight.jobs.insert(id, active);
                self.queue_changed = true;
                if let Err(refusal) = self.flight.scheduler.submit(request) {
                    // The cache was reshaped since it was accepted.
                    self.flight
                        .ended
                        .push((id, FinishReason::Error, Some(refusal.into())));
                }
            }
            Command::Reshape(request, reply) => {
                let _ = reply.send(self.reshape(request));
            }
            Command::LoadAdapter(source, scale, reply) => {
                let loaded = self.runner.load_adapter(&source, scale);
                let _ = reply.send(loaded.map_err(EngineError::from));
            }
            Command::UnloadAdapter(id, reply) => {
                let _ = reply.send(self.unload_adapter(id));
            }
            Command::Stats(reply) => {
                let _ = reply.send(self.stats());
            }
        }
    }

    fn reshape(&mut self, request: CacheRequest) -> Result<RunnerLimits, EngineError> {
        if !self.flight.jobs.is_empty() {
            let jobs = self.flight.jobs.len();
            return Err(EngineError::NotIdle { jobs });
        }
        let tokens_of = |pages: usize| Some((pages * PAGE_TOKENS) as u64);
        let before = self.runner.limits().pages;
        if let Some(draft) = &mut self.flight.draft {
            // The two caches share their page table: the draft's may not be the smaller one.
            let tokens = request.tokens.or(tokens_of(before));
            draft
                .runner()
                .reshape_cache(CacheRequest { tokens, ..request })?;
        }
        let result = self.runner.reshape_cache(request).copied();
        if let (Err(_), Some(draft)) = (&result, &mut self.flight.draft) {
            let tokens = tokens_of(before);
            draft.runner().reshape_cache(CacheRequest {
                tokens,
                format: None,
            })?;
        }
        let limits = *self.runner.limits();
        let settings = reshaped(&self.shared, &limits);
        self.flight.scheduler.reset(settings);
        self.shared.lock().limits = settings;
        Ok(result?)
    }

    fn unload_adapter(&mut self, id: AdapterId) -> Result<(), EngineError> {
        let uses = |active: &&Active| active.job.adapter == Some(id);
        let jobs = self.flight.jobs.values().filter(uses).count();
        if jobs > 0 {
            let id = id.get();
            return Err(EngineError::AdapterInUse { id, jobs });
        }
        Ok(self.runner.unload_adapter(id)?)
    }

    fn stats(&self) -> EngineStats {
        let settings = self.flight.scheduler.settings();
        EngineStats {
            waiting_jobs: self.flight.scheduler.waiting().len(),
            running_jobs: self.flight.scheduler.running().len(),
            held_pages: self.flight.scheduler.held_pages(),
            pages: settings.pages,
            prefix: self.flight.scheduler.prefix_counters(),
            preemptions: self.flight.scheduler.preemptions(),
            steps: self.steps,
            costs: settings.latency.map(|goal| goal.costs),
        }
    }

    /// Ends jobs whose stream was dropped or whose deadline has passed.
    fn drop_unwanted(&mut self) {
        let mut now = None;
        for (&id, active) in &self.flight.jobs {
            if active.events.is_cancelled() {
                self.flight.ended.push((id, FinishReason::Cancelled, None));
            } else if let Some(deadline) = active.job.deadline
                && *now.get_or_insert_with(Instant::now) >= deadline
            {
                self.flight.ended.push((id, FinishReason::Deadline, None));
            }
        }
        self.end_jobs();
    }

    /// Tells jobs that start, that wait, and that wait again.
    fn tell_queue(&mut self) {
        for &(id, cached_tokens) in &self.flight.step.admitted {
            let Some(active) = self.flight.jobs.get_mut(&id) else {
                continue;
            };
            active.told_position = None;
            if let Some(draft) = &mut self.flight.draft {
                draft.start(id, cached_tokens);
            }
            if active.clock.started.is_none() {
                active.clock.started = Some(Instant::now());
                active.usage.cached_tokens = cached_tokens.min(active.prompt_tokens[0]);
                self.shared.lock().unstarted -= 1;
            }
            active.events.send(Event::Started { cached_tokens });
        }
        for id in &self.flight.step.preempted {
            if let Some(active) = self.flight.jobs.get_mut(id) {
                active.usage.preemptions += 1;
            }
        }
        let changes =
            !self.flight.step.admitted.is_empty() || !self.flight.step.preempted.is_empty();
        if !std::mem::take(&mut self.queue_changed) && !changes {
            return;
        }
        for (position, id) in self.flight.scheduler.waiting().enumerate() {
            if let Some(active) = self.flight.jobs.get_mut(&id)
                && active.told_position != Some(position)
            {
                active.told_position = Some(position);
                active.events.send(Event::Queued { position });
            }
        }
    }

    fn run_step(&mut self) {
        self.steps += 1;
        if let Err(error) = self.flight.guess() {
            self.fail_step(error, false);
            return;
        }
        let limits = *self.runner.limits();
        self.flight.fill(&mut self.plan, limits.draws);
        let wants_output = !self.plan.logit_rows.is_empty();
        if let Err(error) = self.submit_beside_masks() {
            self.fail_step(error, false);
            return;
        }
        if !wants_output {
            self.unconfirmed_steps += 1;
            let vocab_size = self.runner.spec().vocab_size;
            self.flight.take_results(StepOutput::default(), vocab_size);
            return;
        }
        let steps_ahead = match self.run_ahead(limits.stages) {
            Ok(steps) => steps,
            Err(error) => {
                self.fail_step(error, true);
                return;
            }
        };
        let vocab_size = self.runner.spec().vocab_size;
        match self.runner.output() {
            Ok(output) => {
                self.flight.take_results(output, vocab_size);
                self.unconfirmed_steps = steps_ahead;
            }
            Err(error) => self.fail_step(error, false),
        }
    }

    /// Submits the step, while masks for its draws are made.
    fn submit_beside_masks(&mut self) -> Result<(), ModelError> {
        let constrained = self.flight.constrained();
        let (runner, plan) = (&mut self.runner, &self.plan);
        std::thread::scope(move |scope| {
            if !constrained.is_empty() {
                // A panic there is one here, when the scope ends.
                scope.spawn(move || {
                    for (active, drafts) in constrained {
                        active.prepare_masks(drafts);
                    }
                });
            }
            runner.submit(plan)
        })
    }

    /// Submits prompts while the step's output is awaited: a step for each device that would have
    /// nothing to do until then. Returns how many.
    fn run_ahead(&mut self, stages: usize) -> Result<usize, ModelError> {
        if stages < 2 {
            return Ok(0);
        }
        self.unconfirmed_steps += usize::from(self.flight.take_chunks());
        for step in 1..stages {
            if !self.flight.fill_ahead(&mut self.plan) {
                return Ok(step - 1);
            }
            self.runner.submit(&self.plan)?;
            self.flight.take_ahead();
            self.steps += 1;
            self.unconfirmed_steps += 1;
        }
        Ok(stages - 1)
    }

    /// Ends the jobs of a step that the device failed; all others start again, unless no step can
    /// succeed any more: then the engine ends, and every job with it.
    fn fail_step(&mut self, error: ModelError, is_ahead: bool) {
        let error = Arc::new(EngineError::from(error));
        if error.is_final() {
            self.ended_by = Some(error);
            return;
        }
        let Flight {
            scheduler,
            step,
            ahead,
            ..
        } = &mut self.flight;
        let failed = scheduler.fail_step(if is_ahead { ahead } else { step });
        if std::mem::take(&mut self.unconfirmed_steps) > 0 {
            scheduler.forget_cached();
        }
        for id in failed {
            self.finish(id, FinishReason::Error, Some(Arc::clone(&error)));
        }
        self.queue_changed = true;
    }

    fn end_jobs(&mut self) {
        for (id, reason, error) in std::mem::take(&mut self.flight.ended) {
            self.flight.scheduler.finish(id);
            self.finish(id, reason, error.map(Arc::new));
        }
    }

    fn finish(&mut self, id: JobId, reason: FinishReason, error: Option<Arc<EngineError>>) {
        if let Some(draft) = &mut self.flight.draft {
            draft.finish(id);
        }
        let Some(active) = self.flight.jobs.remove(&id) else {
            return;
        };
        self.queue_changed = true;
        let mut inbox = self.shared.lock();
        inbox.unfinished -= 1;
        if active.clock.started.is_none() {
            inbox.unstarted -= 1;
        }
        drop(inbox);
        active.finish(reason, error);
        self.shared.notify();
    }
}
