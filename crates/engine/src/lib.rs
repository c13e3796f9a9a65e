//! From tokens to text: many jobs on one model.
//!
//! An [`Engine`] takes [`Job`]s from any thread and answers each with a [`JobStream`] of
//! [`Event`]s. Its own thread goes round four pure parts:
//!
//! 1. the [`Scheduler`] says which sequences run in the next step, on which pages of the cache;
//! 2. the model runs the step ([`Runner`](oxllama_model::Runner));
//! 3. each job's [`Sampler`] draws from its logits, under its [`Constraint`] if it has one;
//! 4. the tokens become text, and the text events.
//!
//! A job's tokens depend on the job alone: not on what runs beside it, how prompts are cut into
//! chunks, whether the cache knew a prefix, whether it was preempted, or how well guesses fared.
//!
//! It knows nothing of files, devices or terminals.

mod active;
mod constraint;
mod costs;
mod draft;
mod engine;
mod error;
mod evaluate;
mod flight;
mod hold;
mod job;
mod mask;
mod names;
mod output;
mod pages;
mod sampler;
mod scheduler;
mod settings;
mod speculate;
mod stream;
mod worker;

pub use constraint::{Constraint, ConstraintCompiler, ConstraintError, ConstraintSpec};
pub use costs::{LatencyGoal, StepCosts};
pub use engine::{Engine, EngineParts, EngineSettings, EngineStats};
pub use error::EngineError;
pub use evaluate::{Comparison, Evaluation, evaluate};
pub use hold::Hold;
pub use job::{
    Completion, Event, FinishReason, Guidance, Job, RankedToken, Speculation, Timings,
    TokenLogprob, Usage,
};
pub use mask::TokenMask;
pub use names::near_names;
pub use pages::{PageHash, PageId, PageTable, PrefixCounters, SequencePages};
pub use sampler::{SampleError, Sampler, SamplerVocabulary, mix_guidance, token_logprobs};
pub use scheduler::{
    JobId, Prompt, Refusal, Request, Scheduler, SchedulerSettings, Step, StepPart,
};
pub use settings::{SamplingSettings, SettingsError, Stage};
pub use speculate::{DraftLength, ngram_drafts};
pub use stream::{Collected, JobStream};
