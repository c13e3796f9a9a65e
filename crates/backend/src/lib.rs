//! The contract between the decoder and a device.
//!
//! A [`Device`] is one CPU, one virtual slice of a CPU, or one GPU. The decoder drives it
//! through a short list of operations on buffers that the decoder owns: an operation
//! allocates nothing, synchronises with nothing and decides nothing by the clock, so a step
//! can be captured as a graph, replayed, or run on a device with a byte limit of its own.
//!
//! The traits are split by family ([`DeviceMemory`], [`StepOps`], [`NormOps`],
//! [`LinearOps`], [`AttentionOps`], [`ElementwiseOps`]). Fused operations have default
//! compositions of the plain ones; a fast backend overrides them, and [`conformance`]
//! holds every backend, fused or not, to the scalar [`reference`].
//!
//! # Conventions
//! - Activations are `f32`, row-major, `[rows, width]` with no padding between rows, at the
//!   start of a buffer that may be longer.
//! - `rows` are independent: the bits of a row's results depend on the weights and on the
//!   row's own sequence, never on its neighbours, on `rows`, or on how a prompt was cut.
//! - Keys and values live in pages of [`PAGE_TOKENS`] tokens, laid out
//!   `[pages, kv_heads, PAGE_TOKENS, head_dim]`; in the [`quantised`] formats scales follow the
//!   codes of each head's page ([`HeadLayout`]).

mod buffer;
pub mod conformance;
mod draw;
mod error;
mod ops;
pub mod quantised;
pub mod reference;
mod step;

pub use buffer::HostBuffer;
pub use draw::{Draw, DrawKinds, DrawLimits, FIRST_RANKS, LogitChange, NOT_FINITE, NOTHING_LEFT};
pub use error::{DeviceError, MemoryState, ProcessMemory};
pub use ops::{
    Activation, AttentionArgs, AttentionOps, CacheShape, Device, DeviceMemory, ElementwiseOps,
    GatedLinear, HeadNorm, KvLayer, LinearOps, LinearOutput, LogitArgs, Norm, NormKind,
    NormLinears, NormOps, StepOps, Store,
};
pub use quantised::HeadLayout;
pub use step::{Rope, RopeStyle, SequenceKey, StepBatch, WorkspaceShape};

/// Tokens of one cache page, on every backend (as in ExLlamaV2).
pub const PAGE_TOKENS: usize = 256;
