//! The engine: jobs in, events out.

use std::collections::HashSet;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;

use oxllama_format::AdapterSource;
use oxllama_model::{AdapterId, CacheRequest, Runner, RunnerLimits};
use oxllama_text::{Tokenizer, VocabularyIndex};
use serde::Serialize;

use crate::active::{Active, Allowed, Clock};
use crate::costs::{LatencyGoal, StepCosts};
use crate::job::{Job, Speculation, Usage};
use crate::output::Output;
use crate::pages::{PageHash, PrefixCounters};
use crate::scheduler::{JobId, Prompt, Request, Scheduler, SchedulerSettings};
use crate::speculate::DraftLength;
use crate::stream::{JobStream, Wake, channel};
use crate::worker::Worker;
use crate::{
    Constraint, ConstraintCompiler, ConstraintError, EngineError, Sampler, SamplerVocabulary,
    TokenMask,
};

/// How an engine runs its jobs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineSettings {
    /// Jobs that may wait; one more is refused.
    pub queue_limit: usize,
    /// Prompt tokens of a step; `None`: as many as a step was planned for.
    pub max_chunk_tokens: Option<usize>,
    /// A step may take this many times as long when prompts of others ride along. Step costs are
    /// measured when the engine starts. `None`: nothing is measured, prompts take all the rows
    /// there are.
    pub latency_factor: Option<f64>,
    /// Most tokens guessed ahead for a job and step.
    pub max_draft_tokens: usize,
    /// What a token guessed by the draft model costs, as a share of a step; counts of right
    /// guesses are weighed against it.
    pub draft_cost: f64,
    /// The same for a token guessed from n-grams.
    pub ngram_cost: f64,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            queue_limit: 1024,
            max_chunk_tokens: None,
            latency_factor: Some(3.0),
            max_draft_tokens: 4,
            draft_cost: 0.3,
            ngram_cost: 0.15,
        }
    }
}

/// What an engine runs on.
pub struct EngineParts {
    /// The model.
    pub runner: Box<dyn Runner>,
    /// A smaller model of the same vocabulary and with as many cache pages, to guess ahead.
    pub draft: Option<Box<dyn Runner>>,
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
}

/// How an engine fares.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EngineStats {
    /// Jobs that wait.
    pub waiting_jobs: usize,
    /// Jobs that run.
    pub running_jobs: usize,
    /// Pages that running jobs hold.
    pub held_pages: usize,
    /// Pages of the cache.
    pub pages: usize,
    /// The prefix cache, since the start or the last reshaping.
    pub prefix: PrefixCounters,
    /// How often a job had to give up its room.
    pub preemptions: u64,
    /// Forward steps.
    pub steps: u64,
    /// What steps take, if it was measured.
    pub costs: Option<StepCosts>,
}

/// A model that serves many jobs at once.
///
/// One thread of its own drives the model; everything here may be called from any thread.
/// Dropping the engine cancels what runs.
pub struct Engine {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the engine's handle and its thread share.
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    changed: Condvar,
    tokenizer: Tokenizer,
    settings: EngineSettings,
    vocab_size: usize,
    has_draft: bool,
    sampler_vocabulary: SamplerVocabulary,
    vocabulary: OnceLock<VocabularyIndex>,
    constraints: OnceLock<Result<ConstraintCompiler, ConstraintError>>,
}

/// What was made of a job before it is queued, for every seed alike.
#[derive(Clone)]
struct Prepared {
    constraint: Option<Constraint>,
    /// Tokens of the prompt that are not healed.
    kept_prompt_tokens: usize,
    /// What the first new token may be.
    healing: Option<TokenMask>,
}

/// What waits for the engine's thread.
pub(crate) struct Inbox {
    pub(crate) commands: Vec<Command>,
    /// How many want `commands` to be left where they are.
    pub(crate) holds: usize,
    pub(crate) phase: Phase,
    /// Jobs that were submitted and have not started.
    pub(crate) unstarted: usize,
    /// Jobs that were submitted and have not ended.
    pub(crate) unfinished: usize,
    pub(crate) limits: SchedulerSettings,
    /// The loaded adapters that new jobs may name.
    adapters: HashSet<AdapterId>,
    next_job: u64,
    /// Why the engine's thread has ended, where nobody asked it to.
    pub(crate) ended_by: Option<Arc<EngineError>>,
}

/// How far an engine's life has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Open,
    /// No new jobs; those that there are run to their end.
    Draining,
    /// What runs is cancelled.
    Closed,
}

pub(crate) enum Command {
    Submit(Box<(Request, Active)>),
    Reshape(CacheRequest, SyncSender<Result<RunnerLimits, EngineError>>),
    LoadAdapter(
        Box<AdapterSource>,
        f32,
        SyncSender<Result<AdapterId, EngineError>>,
    ),
    UnloadAdapter(AdapterId, SyncSender<Result<(), EngineError>>),
    Stats(SyncSender<EngineStats>),
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something changes the inbox.
    pub(crate) fn wait<'a>(&self, inbox: MutexGuard<'a, Inbox>) -> MutexGuard<'a, Inbox> {
        let waited = self.changed.wait(inbox);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }
}

impl Wake for Shared {
    fn wake(&self) {
        // The lock orders this after whatever the thread looked at before it began to wait.
        drop(self.lock());
        self.notify();
    }
}

/// The bounds that a runner's limits set.
fn scheduler_settings(
    limits: &RunnerLimits,
    settings: &EngineSettings,
    costs: Option<StepCosts>,
) -> SchedulerSettings {
    let chunk = settings.max_chunk_tokens.unwrap_or(limits.max_rows);
    let latency = costs.zip(settings.latency_factor);
    SchedulerSettings {
        pages: limits.pages,
        max_sequences: limits.max_sequences,
        max_rows: limits.max_rows,
        max_logit_rows: limits.max_logit_rows,
        max_chunk_tokens: chunk.clamp(1, limits.max_rows),
        stages: limits.stages,
        context_tokens: limits.context_tokens,
        latency: latency.map(|(costs, factor)| LatencyGoal { costs, factor }),
    }
}

impl Engine {
    /// Measures step costs if asked to, and starts the engine's thread.
    ///
    /// # Errors
    /// The draft model does not fit the model, a measured step fails, or the system refuses a
    /// thread.
    pub fn start(mut parts: EngineParts, settings: EngineSettings) -> Result<Self, EngineError> {
        let limits = *parts.runner.limits();
        if let Some(draft) = &parts.draft {
            check_draft(&limits, draft.limits())?;
            let (found, needed) = (draft.spec().vocab_size, parts.runner.spec().vocab_size);
            if found != needed {
                return Err(EngineError::DraftVocabulary { found, needed });
            }
        }
        let costs = match settings.latency_factor {
            Some(factor) => Some(StepCosts::measure(&mut *parts.runner, factor)?),
            None => None,
        };
        let bounds = scheduler_settings(&limits, &settings, costs);
        let shared = Arc::new(Shared {
            inbox: Mutex::new(Inbox {
                commands: Vec::new(),
                holds: 0,
                phase: Phase::Open,
                unstarted: 0,
                unfinished: 0,
                limits: bounds,
                adapters: HashSet::new(),
                next_job: 0,
                ended_by: None,
            }),
            changed: Condvar::new(),
            vocab_size: parts.runner.spec().vocab_size,
            has_draft: parts.draft.is_some(),
            sampler_vocabulary: SamplerVocabulary::new(&parts.tokenizer),
            tokenizer: parts.tokenizer,
            settings,
            vocabulary: OnceLock::new(),
            constraints: OnceLock::new(),
        });
        let scheduler = Scheduler::new(bounds);
        let worker = Worker::new(Arc::clone(&shared), parts.runner, parts.draft, scheduler);
        let thread = std::thread::Builder::new()
            .name("oxllama-engine".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.shared.tokenizer
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Queues a job.
    ///
    /// # Errors
    /// The job makes no sense, can never fit, or the queue is full; nothing else is harmed.
    pub fn submit(&self, job: Job) -> Result<JobStream, EngineError> {
        let prepared = self.prepare(&job)?;
        self.queue(job, prepared)
    }

    /// Queues `count` jobs that differ in their seeds alone: `job.seed`, and others made from
    /// it. Their prompt is computed once, and so is what their constraint compiles to.
    ///
    /// # Errors
    /// As [`Self::submit`]; none of them runs then.
    pub fn submit_choices(&self, job: Job, count: usize) -> Result<Vec<JobStream>, EngineError> {
        let prepared = self.prepare(&job)?;
        (0..count as u64)
            .map(|choice| {
                // The first keeps the seed, so that it is the answer that one job would get.
                let seed = job.seed ^ choice.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let job = Job {
                    seed,
                    ..job.clone()
                };
                self.queue(job, prepared.clone())
            })
            .collect()
    }

    /// Checks a job and makes what does not depend on its seed.
    fn prepare(&self, job: &Job) -> Result<Prepared, EngineError> {
        self.check(job)?;
        let constraint = match &job.constraint {
            Some(spec) => Some(self.compiler()?.compile(spec)?),
            None => None,
        };
        let (kept_prompt_tokens, healing) = self.heal(job);
        Ok(Prepared {
            constraint,
            kept_prompt_tokens,
            healing,
        })
    }

    /// Makes the rest of a job, and queues it.
    fn queue(&self, job: Job, prepared: Prepared) -> Result<JobStream, EngineError> {
        let shared = &self.shared;
        let (prompt_ids, healed) = job.prompt_ids.split_at(prepared.kept_prompt_tokens);
        let output = Output::new(
            &shared.tokenizer,
            &job.stop_strings,
            &job.banned_strings,
            healed.first().copied(),
        )?;
        let mut sampler = Sampler::new(
            job.sampling.clone(),
            job.seed,
            shared.vocab_size,
            &shared.sampler_vocabulary,
        );
        prompt_ids.iter().for_each(|&id| sampler.observe(id));
        let mut prompts = vec![prompt_ids.to_vec()];
        if let Some(guidance) = &job.guidance {
            prompts.push(guidance.negative_ids.clone());
        }
        let weak: Weak<Shared> = Arc::downgrade(shared);
        let (events, stream) = channel(weak);
        let active = Active {
            events,
            prompt_tokens: prompts.iter().map(Vec::len).collect(),
            sampler,
            output,
            constraint: prepared.constraint,
            healing: prepared.healing,
            draft_length: self.draft_length(&job),
            usage: Usage {
                prompt_tokens: prompt_ids.len(),
                ..Usage::default()
            },
            clock: Clock::start(),
            told_position: None,
            allowed: Allowed::everything(shared.vocab_size),
            job,
        };
        self.enqueue(prompts, active)?;
        Ok(stream)
    }

    /// Changes the size or the format of the cache; what it held is forgotten.
    ///
    /// # Errors
    /// Jobs are in flight, or memory is short: then the cache is as it was, but empty (a draft
    /// model's may have the new format).
    pub fn reshape_cache(&self, request: CacheRequest) -> Result<RunnerLimits, EngineError> {
        self.ask(|reply| Command::Reshape(request, reply))?
    }

    /// Loads a LoRA adapter, whose effect is multiplied by `scale`, for jobs to name.
    ///
    /// # Errors
    /// The adapter is for another model, or memory is short.
    pub fn load_adapter(
        &self,
        source: AdapterSource,
        scale: f32,
    ) -> Result<AdapterId, EngineError> {
        let source = Box::new(source);
        let id = self.ask(|reply| Command::LoadAdapter(source, scale, reply))??;
        self.shared.lock().adapters.insert(id);
        Ok(id)
    }

    /// Frees a LoRA adapter.
    ///
    /// # Errors
    /// It is not loaded, or a job uses it.
    pub fn unload_adapter(&self, id: AdapterId) -> Result<(), EngineError> {
        // From here on no new job can name it.
        let was_loaded = self.shared.lock().adapters.remove(&id);
        let result = self.ask(|reply| Command::UnloadAdapter(id, reply))?;
        if result.is_err() && was_loaded {
            self.shared.lock().adapters.insert(id);
        }
        result
    }

    /// How the engine fares.
    ///
    /// # Errors
    /// The engine has ended.
    pub fn stats(&self) -> Result<EngineStats, EngineError> {
        self.ask(Command::Stats)
    }

    /// Takes no more jobs, and waits until those that there are have ended.
    pub fn drain(&self) {
        let mut inbox = self.shared.lock();
        if inbox.phase == Phase::Open {
            inbox.phase = Phase::Draining;
        }
        while inbox.unfinished > 0 && inbox.phase != Phase::Closed {
            inbox = self.shared.wait(inbox);
        }
    }

    /// Cancels what runs and ends the engine's thread.
    pub fn shutdown(&self) {
        self.shared.lock().phase = Phase::Closed;
        self.shared.notify();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A panic there has been told to every job.
            let _ = thread.join();
        }
    }

    /// Runs a command on the engine's thread and waits for its answer.
    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, EngineError> {
        let (reply, answer) = sync_channel(1);
        let mut inbox = self.shared.lock();
        if inbox.phase == Phase::Closed {
            return Err(EngineError::closed(inbox.ended_by.as_ref()));
        }
        inbox.commands.push(command(reply));
        drop(inbox);
        self.shared.notify();
        answer
            .recv()
            .map_err(|_| EngineError::closed(self.shared.lock().ended_by.as_ref()))
    }

    fn check(&self, job: &Job) -> Result<(), EngineError> {
        let vocab_size = self.shared.vocab_size;
        job.sampling.check()?;
        job.sampling.check_vocabulary(vocab_size)?;
        let negative = job.guidance.as_ref().map(|guidance| &guidance.negative_ids);
        if let Some(guidance) = &job.guidance
            && !guidance.scale.is_finite()
        {
            let found = guidance.scale;
            return Err(EngineError::GuidanceScale { found });
        }
        if job.min_new_tokens > job.max_new_tokens {
            return Err(EngineError::TokenLimits {
                min_new_tokens: job.min_new_tokens,
                max_new_tokens: job.max_new_tokens,
            });
        }
        let context_tokens = self.shared.lock().limits.context_tokens;
        for prompt in [Some(&job.prompt_ids), negative].into_iter().flatten() {
            if prompt.is_empty() {
                return Err(EngineError::EmptyPrompt);
            }
            if prompt.len() >= context_tokens {
                let prompt_tokens = prompt.len();
                return Err(EngineError::PromptTooLong {
                    prompt_tokens,
                    context_tokens,
                });
            }
            if let Some(&token_id) = prompt.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(EngineError::TokenOutOfRange {
                    token_id,
                    vocab_size,
                });
            }
        }
        Ok(())
    }

    /// Prompt tokens that are kept, and what the first new token may be.
    fn heal(&self, job: &Job) -> (usize, Option<TokenMask>) {
        let shared = &self.shared;
        let all = (job.prompt_ids.len(), None);
        if !job.token_healing {
            return all;
        }
        let index = shared
            .vocabulary
            .get_or_init(|| VocabularyIndex::new(&shared.tokenizer));
        let Some(healing) = index.heal(&job.prompt_ids) else {
            return all;
        };
        let mut mask = TokenMask::none(shared.vocab_size);
        index
            .tokens_with_prefix(&healing.prefix)
            .for_each(|id| mask.allow(id));
        (healing.kept_tokens, Some(mask))
    }

    fn compiler(&self) -> Result<&ConstraintCompiler, EngineError> {
        let shared = &self.shared;
        let compiler = shared
            .constraints
            .get_or_init(|| ConstraintCompiler::new(&shared.tokenizer, shared.vocab_size));
        compiler.as_ref().map_err(|error| error.clone().into())
    }

    fn draft_length(&self, job: &Job) -> DraftLength {
        let settings = &self.shared.settings;
        match job.speculation {
            Speculation::DraftModel if self.shared.has_draft => {
                DraftLength::new(settings.max_draft_tokens, settings.draft_cost)
            }
            Speculation::Ngram => DraftLength::new(settings.max_draft_tokens, settings.ngram_cost),
            Speculation::DraftModel | Speculation::Off => DraftLength::new(0, 1.0),
        }
    }

    fn enqueue(&self, prompts: Vec<Vec<u32>>, active: Active) -> Result<(), EngineError> {
        let shared = &self.shared;
        let mut inbox = shared.lock();
        if inbox.phase != Phase::Open {
            return Err(EngineError::closed(inbox.ended_by.as_ref()));
        }
        inbox
            .limits
            .check(&active.prompt_tokens, active.job.max_new_tokens)?;
        let limit = shared.settings.queue_limit;
        if inbox.unstarted >= limit {
            return Err(EngineError::QueueFull { limit });
        }
        let root = match active.job.adapter {
            None => PageHash::root(&[]),
            // Numbers of adapters do not come again after unloading.
            Some(id) if inbox.adapters.contains(&id) => PageHash::root(&id.get().to_le_bytes()),
            Some(id) => return Err(EngineError::UnknownAdapter { id: id.get() }),
        };
        let prompts = prompts
            .into_iter()
            .map(|token_ids| Prompt { root, token_ids });
        let request = Request {
            id: JobId(inbox.next_job),
            priority: active.job.priority,
            max_skips: active.job.max_skips,
            prompts: prompts.collect(),
            max_new_tokens: active.job.max_new_tokens,
        };
        inbox.next_job += 1;
        inbox.unstarted += 1;
        inbox.unfinished += 1;
        inbox
            .commands
            .push(Command::Submit(Box::new((request, active))));
        drop(inbox);
        shared.notify();
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The bounds after the cache was reshaped.
pub(crate) fn reshaped(shared: &Shared, limits: &RunnerLimits) -> SchedulerSettings {
    let costs = shared.lock().limits.latency.map(|goal| goal.costs);
    scheduler_settings(limits, &shared.settings, costs)
}

fn check_draft(target: &RunnerLimits, draft: &RunnerLimits) -> Result<(), EngineError> {
    let bounds = [
        ("cache pages", draft.pages, target.pages),
        (
            "context tokens",
            draft.context_tokens,
            target.context_tokens,
        ),
        ("sequences", draft.max_sequences, target.max_sequences),
    ];
    match bounds.into_iter().find(|(_, found, needed)| found < needed) {
        Some((what, found, needed)) => Err(EngineError::DraftTooSmall {
            what,
            found,
            needed,
        }),
        None => Ok(()),
    }
}
