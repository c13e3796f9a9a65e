//! Model families as data, the one decoder, loading by plan.
//!
//! The way of a model:
//! 1. [`ModelSpec::from_config`] reads what the model is;
//! 2. [`plan_model`] says from headers alone which bytes go on which device;
//! 3. [`Decoder::load`] reserves all of them, then reads the weights;
//! 4. [`Runner::run`] takes one step after another, allocating nothing.

mod config;
mod decoder;
mod error;
mod families;
mod inspect;
mod load;
mod lora;
mod pairing;
mod plan;
mod reshape;
mod rope;
mod runner;
mod spec;
mod stage;
mod weights;

pub use decoder::Decoder;
pub use error::ModelError;
pub use families::known_architectures;
pub use inspect::{Inspection, LinearReport, inspect};
pub use load::{LoadOptions, LoadProgress};
pub use lora::{AdapterId, NO_ADAPTER};
pub use pairing::{DraftError, DraftWarning, PairedModel, TokenDifference, diagnose_draft};
pub use plan::{EmbeddingPlace, Footprint, ModelPlan, ModelRequest, plan_model};
pub use reshape::CacheRequest;
pub use rope::{RopeOverrides, RopeScaling, RopeSpec, rope};
pub use runner::{PageCopy, Runner, RunnerLimits, StepOutput, StepPlan, chunk_tokens};
pub use spec::{Biases, BlockShape, LayerSpec, ModelSpec, NormSpec};
