//! Model families as data, the one decoder, loading by plan.

mod config;
mod error;
mod families;
mod rope;
mod runner;
mod spec;

pub use error::ModelError;
pub use families::known_architectures;
pub use rope::{RopeOverrides, RopeScaling, RopeSpec, rope};
pub use runner::{Runner, RunnerLimits, StepPlan};
pub use spec::{Biases, BlockShape, LayerSpec, ModelSpec, NormSpec};
