//! From tokens to text: sequences, cache pages, sampling and generation.
//!
//! The engine turns a [`Job`] into a run of [`StepPlan`](oxllama_model::StepPlan)s, samples
//! from the logits that a [`Runner`](oxllama_model::Runner) returns, and reports [`Event`]s.
//! It knows nothing of files, devices or terminals.

mod constraint;
mod error;
mod evaluate;
mod generator;
mod job;
mod mask;
mod pages;
mod sampler;
mod settings;

pub use constraint::{Constraint, ConstraintCompiler, ConstraintError, ConstraintSpec};
pub use error::EngineError;
pub use evaluate::{Comparison, Evaluation, evaluate};
pub use generator::Generator;
pub use job::{Completion, Event, FinishReason, Job, RankedToken, Timings, TokenLogprob};
pub use mask::TokenMask;
pub use pages::{PageId, PagePool, SequencePages};
pub use sampler::{SampleError, Sampler, SamplerVocabulary, mix_guidance, token_logprobs};
pub use settings::{SamplingSettings, SettingsError, Stage};
