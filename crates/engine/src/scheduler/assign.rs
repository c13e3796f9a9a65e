//! Pages and rows for the jobs that run.

use oxllama_backend::PAGE_TOKENS;
use oxllama_model::chunk_tokens;

use super::{JobId, Scheduler, Step, StepPart, Task};

/// What is left of a step.
struct Left {
    rows: usize,
    logit_rows: usize,
    chunk_tokens: usize,
    /// Seconds that prefill may add; `None`: without bound.
    seconds: Option<f64>,
}

impl Scheduler {
    /// Makes the next step: starts jobs, gives every running one its pages, preempts where
    /// there are none, and shares out the rows.
    pub fn plan_step(&mut self, step: &mut Step) {
        step.begin();
        self.admit(step);
        self.trim_drafts();
        self.give_pages(step);
        let mut left = Left {
            rows: self.settings.max_rows,
            logit_rows: self.settings.max_logit_rows,
            chunk_tokens: self.chunk_tokens(),
            seconds: self.spare_seconds(),
        };
        self.assign_decodes(step, &mut left);
        self.assign_prefills(step, &mut left, &[]);
    }

    /// Makes a step of prompts alone, to be run before the output of the last step is there, in
    /// which `awaited` are the parts that wait for it: their jobs are left as they are. It wants no
    /// logits, starts nobody and takes no pages from anybody; it may be empty.
    pub fn plan_ahead(&mut self, awaited: &[StepPart], step: &mut Step) {
        step.begin();
        let is_awaited = |id: JobId| awaited.iter().any(|part| part.job == id);
        for index in 0..self.running.len() {
            let task = &self.running[index];
            if !task.is_decoding() && !is_awaited(task.id) {
                // One that finds no room runs what it has room for.
                self.grow_task(index);
            }
        }
        let mut left = Left {
            rows: self.settings.max_rows,
            logit_rows: 0,
            chunk_tokens: self.chunk_tokens(),
            seconds: self.spare_seconds(),
        };
        self.assign_prefills(step, &mut left, awaited);
    }

    /// Prompt tokens of a step: those with which all prompts that are under way end soonest.
    fn chunk_tokens(&self) -> usize {
        let prefilling = self.running.iter().filter(|task| !task.is_decoding());
        let sequences = prefilling.flat_map(|task| &task.sequences);
        // Of whole prompts, so that it is the same from one chunk to the next.
        let tokens = sequences.map(|sequence| sequence.token_ids.len()).sum();
        let best = chunk_tokens(tokens, self.settings.stages);
        best.min(self.settings.max_chunk_tokens)
    }

    /// Seconds that prefill may add to a step; `None`: without bound.
    fn spare_seconds(&self) -> Option<f64> {
        let goal = self.settings.latency?;
        let (mut rows, mut attended) = (0, 0);
        for task in self.running.iter().filter(|task| task.is_decoding()) {
            for sequence in &task.sequences {
                let own = 1 + task.drafts.len();
                rows += own;
                attended += own * sequence.pages.tokens();
            }
        }
        (rows > 0).then(|| goal.spare_seconds(rows, attended))
    }

    /// Drops drafts that the step has no rows for. Half of the spare rows stay for prompts.
    fn trim_drafts(&mut self) {
        let sequences = self.running_sequences();
        let mut rows = self.settings.max_rows.saturating_sub(sequences);
        if self.running.iter().any(|task| !task.is_decoding()) {
            rows /= 2;
        }
        let mut logit_rows = self.settings.max_logit_rows.saturating_sub(sequences);
        for task in &mut self.running {
            if !task.is_decoding() {
                task.drafts.clear();
            }
            let width = task.sequences.len();
            let longest = task
                .sequences
                .iter()
                .map(|sequence| sequence.token_ids.len())
                .max();
            let room = self
                .settings
                .context_tokens
                .saturating_sub(longest.unwrap_or(0));
            task.drafts
                .truncate((rows / width).min(logit_rows / width).min(room));
            rows -= task.drafts.len() * width;
            logit_rows -= task.drafts.len() * width;
        }
    }

    /// Gives each running task, in order, the pages of its part of the step.
    fn give_pages(&mut self, step: &mut Step) {
        let mut index = 0;
        while index < self.running.len() {
            if self.grow_task(index) {
                index += 1;
                continue;
            }
            if !self.running[index].drafts.is_empty() {
                self.running[index].drafts.clear();
                continue;
            }
            let last = self.running.len() - 1;
            let task = &self.running[index];
            let may_preempt = last > index
                && (task.is_decoding()
                    || index == 0
                    || self.running[last].priority < task.priority);
            if may_preempt {
                let id = self.preempt(last);
                step.preempted.push(id);
            } else if task.is_decoding() {
                let id = self.preempt(index);
                step.preempted.push(id);
            } else {
                // A prompt that finds no room runs what it has room for, and waits.
                index += 1;
            }
        }
    }

    /// Pages for the tokens of a task that the next step may run.
    fn grow_task(&mut self, index: usize) -> bool {
        let Self {
            running,
            pages,
            settings,
            ..
        } = self;
        let Task {
            sequences, drafts, ..
        } = &mut running[index];
        sequences.iter_mut().all(|sequence| {
            let chunk = sequence.pending().min(settings.max_chunk_tokens.max(1));
            let tokens = sequence.pages.tokens() + chunk + drafts.len();
            pages.grow(&mut sequence.pages, tokens)
        })
    }

    fn assign_decodes(&self, step: &mut Step, left: &mut Left) {
        for task in self.running.iter().filter(|task| task.is_decoding()) {
            for (index, sequence) in task.sequences.iter().enumerate() {
                let part = StepPart {
                    job: task.id,
                    sequence: index,
                    first: sequence.pages.tokens(),
                    tokens: 1,
                    drafts: task.drafts.len(),
                    wants_logits: true,
                };
                left.rows -= part.rows();
                left.logit_rows -= part.logit_rows();
                step.parts.push(part);
            }
        }
    }

    /// Rows for prompts, but for those of jobs in `awaited`.
    fn assign_prefills(&self, step: &mut Step, left: &mut Left, awaited: &[StepPart]) {
        // However little time there is, the first prompt in line goes on.
        let mut least = 1;
        for task in self.running.iter().filter(|task| !task.is_decoding()) {
            if awaited.iter().any(|part| part.job == task.id) {
                continue;
            }
            for (index, sequence) in task.sequences.iter().enumerate() {
                let first = sequence.pages.tokens();
                let room = sequence.pages.table().len() * PAGE_TOKENS - first;
                // Sequences that advance together keep their last tokens for a common step.
                let together = usize::from(task.sequences.len() > 1);
                let pending = sequence.pending();
                let mut tokens = (pending - together)
                    .min(room)
                    .min(left.rows)
                    .min(left.chunk_tokens);
                if let (Some(goal), Some(seconds)) = (self.settings.latency, left.seconds) {
                    tokens = tokens.min(goal.costs.rows_within(seconds, first).max(least));
                }
                let mut wants_logits = tokens == pending;
                if wants_logits && left.logit_rows == 0 {
                    wants_logits = false;
                    tokens -= 1;
                }
                if tokens == 0 {
                    continue;
                }
                if let (Some(goal), Some(seconds)) = (self.settings.latency, &mut left.seconds) {
                    *seconds -= goal.costs.prefill_seconds(tokens, first);
                }
                least = 0;
                left.rows -= tokens;
                left.chunk_tokens -= tokens;
                left.logit_rows -= usize::from(wants_logits);
                step.parts.push(StepPart {
                    job: task.id,
                    sequence: index,
                    first,
                    tokens,
                    drafts: 0,
                    wants_logits,
                });
            }
        }
    }
}
