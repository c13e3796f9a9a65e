//! Which sequences run in the next step, how many of their tokens, and on which pages.
//!
//! Pure: no model, no clock, no thread. The engine asks for a step, runs it, and tells what
//! came of it. Running jobs always advance; prompts are cut into chunks that fill what is left
//! of the step. Jobs take pages as they grow; when none is left the youngest job of the lowest
//! priority gives its own back, waits, and later goes on from the same tokens.

mod admission;
mod assign;
mod step;

use std::cmp::Reverse;

use oxllama_backend::PAGE_TOKENS;

use crate::costs::LatencyGoal;
use crate::pages::{PageHash, PageId, PageTable, PrefixCounters, SequencePages};

pub use step::{Step, StepPart};

/// A job's number; the engine gives them in order of submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// The bounds that steps are made for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerSettings {
    /// Pages of the cache.
    pub pages: usize,
    /// Sequences of a step, which is as many as run at a time.
    pub max_sequences: usize,
    /// Rows of a step.
    pub max_rows: usize,
    /// Rows of a step whose logits are wanted; at least `max_sequences`.
    pub max_logit_rows: usize,
    /// Prompt tokens of a step.
    pub max_chunk_tokens: usize,
    /// As [`RunnerLimits::stages`](oxllama_model::RunnerLimits::stages).
    pub stages: usize,
    /// Tokens of one sequence.
    pub context_tokens: usize,
    /// How much prefill may ride along with running jobs; `None`: as much as fits in a step.
    pub latency: Option<LatencyGoal>,
}

/// One token sequence of a request: the prompt of a job, or its negative prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Where its chain of pages begins.
    pub root: PageHash,
    /// Its tokens, at least one.
    pub token_ids: Vec<u32>,
}

/// What the scheduler knows of a job.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its number; a larger one is younger.
    pub id: JobId,
    /// A higher one goes first.
    pub priority: i32,
    /// How many later jobs may start before this one while it does not fit.
    pub max_skips: u32,
    /// Sequences that advance together and get the same new tokens; at least one.
    pub prompts: Vec<Prompt>,
    /// At most this many tokens follow each prompt.
    pub max_new_tokens: usize,
}

/// Why a job can never run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Even alone it would run out of pages.
    #[error(
        "the job can never fit: its {prompts} prompt(s) of {prompt_tokens} tokens with \
         {new_tokens} new ones each need {needed_pages} pages of {page_tokens} tokens, and the \
         cache has {pages}: ask for fewer new tokens, shorten the prompt, or give the cache \
         more room (--cache-tokens)",
        page_tokens = PAGE_TOKENS
    )]
    NeverFits {
        /// Sequences of the job.
        prompts: usize,
        /// Their prompt tokens together.
        prompt_tokens: usize,
        /// Tokens that may follow each, within the context.
        new_tokens: usize,
        /// Pages for all of that.
        needed_pages: usize,
        /// Pages that there are.
        pages: usize,
    },
    /// It has more sequences than a step.
    #[error(
        "the job has {found} sequences but steps are planned for {most}: raise --batch to at \
         least {found}"
    )]
    TooManySequences {
        /// Of the job.
        found: usize,
        /// Of a step.
        most: usize,
    },
}

impl SchedulerSettings {
    /// Whether a job could ever run under these bounds.
    ///
    /// # Errors
    /// It could not, with the arithmetic.
    pub fn check(&self, prompt_tokens: &[usize], max_new_tokens: usize) -> Result<(), Refusal> {
        let found = prompt_tokens.len();
        if found > self.max_sequences {
            let most = self.max_sequences;
            return Err(Refusal::TooManySequences { found, most });
        }
        let most_tokens = |prompt: usize| {
            prompt
                .saturating_add(max_new_tokens)
                .min(self.context_tokens.max(prompt))
        };
        let needed_pages: usize = prompt_tokens
            .iter()
            .map(|&prompt| most_tokens(prompt).div_ceil(PAGE_TOKENS))
            .sum();
        if needed_pages > self.pages {
            let longest = prompt_tokens.iter().copied().max().unwrap_or(0);
            return Err(Refusal::NeverFits {
                prompts: found,
                prompt_tokens: prompt_tokens.iter().sum(),
                new_tokens: most_tokens(longest) - longest,
                needed_pages,
                pages: self.pages,
            });
        }
        Ok(())
    }
}

/// One sequence of a task.
#[derive(Debug)]
struct Sequence {
    root: PageHash,
    /// Prompt and answer so far.
    token_ids: Vec<u32>,
    /// What the cache holds of them.
    pages: SequencePages,
    /// While waiting: hashes of the full pages that it can share.
    chain: Vec<PageHash>,
}

impl Sequence {
    fn new(prompt: Prompt) -> Self {
        let mut sequence = Self {
            root: prompt.root,
            token_ids: prompt.token_ids,
            pages: SequencePages::new(prompt.root),
            chain: Vec::new(),
        };
        sequence.make_chain();
        sequence
    }

    /// Tokens that another sequence's pages may serve: all but the last, whose logits are
    /// wanted.
    fn shareable(&self) -> &[u32] {
        &self.token_ids[..self.token_ids.len() - 1]
    }

    fn make_chain(&mut self) {
        self.chain = self.root.chain(self.shareable());
    }

    /// Tokens that have not been run.
    fn pending(&self) -> usize {
        self.token_ids.len() - self.pages.tokens()
    }

    /// Pages still to be taken for the tokens there are.
    fn missing_pages(&self) -> usize {
        let needed = self.token_ids.len().div_ceil(PAGE_TOKENS);
        needed.saturating_sub(self.pages.table().len())
    }
}

/// A job, waiting or running.
#[derive(Debug)]
struct Task {
    id: JobId,
    priority: i32,
    max_skips: u32,
    /// Later jobs that started before it.
    skips: u32,
    sequences: Vec<Sequence>,
    /// Guesses at the tokens that come next, for the next step alone.
    drafts: Vec<u32>,
}

impl Task {
    /// Smaller goes first.
    fn order(&self) -> (Reverse<i32>, JobId) {
        (Reverse(self.priority), self.id)
    }

    /// Whether all that is left of its sequences is one token each: a new one comes of the
    /// next step.
    fn is_decoding(&self) -> bool {
        self.sequences
            .iter()
            .all(|sequence| sequence.pending() == 1)
    }
}

/// Jobs in flight over one cache.
#[derive(Debug)]
pub struct Scheduler {
    settings: SchedulerSettings,
    pages: PageTable,
    /// In order.
    waiting: Vec<Task>,
    /// In order: the last is the first to be preempted.
    running: Vec<Task>,
    preemptions: u64,
}

impl Scheduler {
    /// A scheduler with no jobs and an empty cache.
    pub fn new(settings: SchedulerSettings) -> Self {
        Self {
            pages: PageTable::new(settings.pages),
            settings,
            waiting: Vec::new(),
            running: Vec::new(),
            preemptions: 0,
        }
    }

    /// The bounds.
    pub fn settings(&self) -> &SchedulerSettings {
        &self.settings
    }

    /// Queues a job.
    ///
    /// # Errors
    /// It could never run.
    pub fn submit(&mut self, request: Request) -> Result<(), Refusal> {
        let lengths: Vec<usize> = request
            .prompts
            .iter()
            .map(|prompt| prompt.token_ids.len())
            .collect();
        self.settings.check(&lengths, request.max_new_tokens)?;
        let task = Task {
            id: request.id,
            priority: request.priority,
            max_skips: request.max_skips,
            skips: 0,
            sequences: request.prompts.into_iter().map(Sequence::new).collect(),
            drafts: Vec::new(),
        };
        insert(&mut self.waiting, task);
        Ok(())
    }

    /// Jobs that have not started, or were preempted, in the order in which they would start.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = JobId> {
        self.waiting.iter().map(|task| task.id)
    }

    /// Jobs that hold pages, the ones that go first before others.
    pub fn running(&self) -> impl ExactSizeIterator<Item = JobId> {
        self.running.iter().map(|task| task.id)
    }

    /// Pages that jobs hold.
    pub fn held_pages(&self) -> usize {
        self.pages.held()
    }

    /// How often the prefix cache helped.
    pub fn prefix_counters(&self) -> PrefixCounters {
        self.pages.counters()
    }

    /// How often a job had to give back its pages.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// All tokens of a running job's sequence, prompt and answer so far, and its pages.
    pub fn sequence(&self, id: JobId, sequence: usize) -> Option<(&[u32], &[PageId])> {
        let sequence = self.task(id)?.sequences.get(sequence)?;
        Some((&sequence.token_ids, sequence.pages.table()))
    }

    /// The drafts of a running job that the next step will run, or the last one ran.
    pub fn drafts(&self, id: JobId) -> &[u32] {
        self.task(id).map_or(&[], |task| &task.drafts)
    }

    /// Running jobs that wait for nothing but the next step to draw their next token.
    pub fn decoding(&self) -> impl Iterator<Item = JobId> {
        let tasks = self.running.iter().filter(|task| task.is_decoding());
        tasks.map(|task| task.id)
    }

    /// Guesses what follows a running job's tokens: the next step computes the logits after
    /// each. Fewer may be taken up, or none; see [`StepPart::drafts`].
    pub fn set_drafts(&mut self, id: JobId, drafts: &[u32]) {
        if let Some(task) = find(&mut self.running, id) {
            task.drafts.clear();
            task.drafts.extend_from_slice(drafts);
        }
    }

    /// Notes that `part` has run, and that `new_tokens` follow its sequence: none after a chunk
    /// of a prompt; after a part with logits the drafts that were accepted and one more.
    pub fn complete(&mut self, part: &StepPart, new_tokens: &[u32]) {
        let Some(task) = find(&mut self.running, part.job) else {
            return;
        };
        task.drafts.clear();
        let sequence = &mut task.sequences[part.sequence];
        sequence.token_ids.extend_from_slice(new_tokens);
        let accepted = part.drafts.min(new_tokens.len().saturating_sub(1));
        let computed = part.first + part.tokens + accepted;
        self.pages
            .commit(&mut sequence.pages, &sequence.token_ids[..computed]);
    }

    /// Makes a job's sequences forget all but their first `prompt + kept_new` tokens, where
    /// `prompt_tokens` are the lengths of the prompts. The copies to run before the next step
    /// are added to it by the next [`Self::plan_step`].
    pub fn rewind(&mut self, id: JobId, prompt_tokens: &[usize], kept_new: usize, step: &mut Step) {
        let Some(task) = find(&mut self.running, id) else {
            return;
        };
        task.drafts.clear();
        for (sequence, prompt) in task.sequences.iter_mut().zip(prompt_tokens) {
            let kept = prompt + kept_new;
            sequence.token_ids.truncate(kept);
            // The last token runs again: its logits are wanted.
            let copy = self
                .pages
                .truncate(&mut sequence.pages, &sequence.token_ids, kept - 1);
            step.carried_copies.extend(copy);
        }
    }

    /// Ends a job, wherever it is; what it computed stays in the cache.
    pub fn finish(&mut self, id: JobId) {
        if let Some(mut task) = remove(&mut self.running, id) {
            for sequence in &mut task.sequences {
                self.pages.release(&mut sequence.pages);
            }
        }
        remove(&mut self.waiting, id);
    }

    /// After `step` failed: its jobs are gone, all others wait to start again, and nothing that
    /// the step was to compute or copy is believed. Returns the jobs that are gone.
    pub fn fail_step(&mut self, step: &Step) -> Vec<JobId> {
        let mut failed = Vec::new();
        for mut task in std::mem::take(&mut self.running) {
            for sequence in &mut task.sequences {
                self.pages.discard(&mut sequence.pages);
            }
            if step.parts.iter().any(|part| part.job == task.id) {
                failed.push(task.id);
            } else {
                self.requeue(task);
            }
        }
        self.pages.forget_copies(&step.copies);
        self.pages.forget_copies(&step.carried_copies);
        failed
    }

    /// Forgets what nobody holds of the cache, which after a failed step is everything: where steps
    /// before it may not have run to their end either.
    pub fn forget_cached(&mut self) {
        self.pages.clear();
    }

    /// Forgets everything cached. Only while no job runs: waiting jobs start from nothing.
    pub fn reset(&mut self, settings: SchedulerSettings) {
        self.settings = settings;
        self.pages = PageTable::new(settings.pages);
    }

    /// Checks all books; see [`PageTable::audit`].
    ///
    /// # Errors
    /// The first rule that is broken, in words.
    pub fn audit(&self) -> Result<(), String> {
        let running = self.running.iter().flat_map(|task| &task.sequences);
        self.pages.audit(running.map(|sequence| &sequence.pages))?;
        let waiting = self.waiting.iter().flat_map(|task| &task.sequences);
        if waiting
            .into_iter()
            .any(|sequence| !sequence.pages.table().is_empty())
        {
            return Err("a waiting job holds pages".to_owned());
        }
        let sequences = self.running_sequences();
        if sequences > self.settings.max_sequences {
            return Err(format!("{sequences} sequences run"));
        }
        let ordered = |tasks: &[Task]| tasks.is_sorted_by_key(Task::order);
        if !ordered(&self.running) || !ordered(&self.waiting) {
            return Err("jobs are out of order".to_owned());
        }
        Ok(())
    }

    /// A running task.
    fn task(&self, id: JobId) -> Option<&Task> {
        self.running.iter().find(|task| task.id == id)
    }

    /// Sequences of all running tasks.
    fn running_sequences(&self) -> usize {
        self.running.iter().map(|task| task.sequences.len()).sum()
    }

    /// Takes a running task's pages and puts it back in the queue.
    fn preempt(&mut self, index: usize) -> JobId {
        let mut task = self.running.remove(index);
        for sequence in &mut task.sequences {
            self.pages.release(&mut sequence.pages);
        }
        self.preemptions += 1;
        let id = task.id;
        self.requeue(task);
        id
    }

    fn requeue(&mut self, mut task: Task) {
        task.drafts.clear();
        task.skips = 0;
        task.sequences.iter_mut().for_each(Sequence::make_chain);
        insert(&mut self.waiting, task);
    }
}

fn find(tasks: &mut [Task], id: JobId) -> Option<&mut Task> {
    tasks.iter_mut().find(|task| task.id == id)
}

fn insert(tasks: &mut Vec<Task>, task: Task) {
    let place = tasks.partition_point(|other| other.order() < task.order());
    tasks.insert(place, task);
}

fn remove(tasks: &mut Vec<Task>, id: JobId) -> Option<Task> {
    let index = tasks.iter().position(|task| task.id == id)?;
    Some(tasks.remove(index))
}
