//! The crate's error type.

use oxllama_backend::DeviceError;
use oxllama_format::FormatError;
use oxllama_memory::{Bytes, CacheFormat, DeviceId, PlanError, Purpose, Shortfall, SplitError};

/// Why a model cannot be understood, planned, loaded or stepped.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `config.json` names an architecture that no family here describes.
    #[error(
        "architecture \"{found}\" is not supported: expected one of {}; convert the model to one \
         of these, or use another program",
        known.join(", ")
    )]
    UnknownArchitecture {
        /// `architectures[0]`.
        found: String,
        /// Every architecture of the registry.
        known: Vec<&'static str>,
    },

    /// A value of `config.json` is missing, of the wrong type or out of range.
    #[error("config.json: `{key}`: found {found}, expected {expected}")]
    Config {
        /// The key, with dots for nesting.
        key: String,
        /// The value in the file, shortened; `nothing` where the key is absent.
        found: String,
        /// The values that would do.
        expected: String,
    },

    /// A tensor's header disagrees with `config.json`.
    #[error(
        "tensor `{tensor}` contradicts config.json: its {what} is {found}, but {reason} makes it \
         {expected}; one of the two files belongs to another model"
    )]
    Contradiction {
        /// Full tensor name, or the name of a linear without its suffix.
        tensor: String,
        /// What differs, e.g. `shape`, `out_features`.
        what: &'static str,
        /// The file's value.
        found: String,
        /// The configuration's value.
        expected: String,
        /// The keys that the expectation comes from.
        reason: String,
    },

    /// A weight that the architecture needs is in none of the model's files.
    #[error("weight `{tensor}` is missing: expected {expected}")]
    MissingWeight {
        /// The name looked for first.
        tensor: String,
        /// What it is, and the other names that would do.
        expected: String,
    },

    /// A weight is present that the configuration says is not.
    #[error(
        "weight `{tensor}` is present but config.json says there is none: `{key}` is {value}; \
         loading would ignore it and compute another function than the model's"
    )]
    UnexpectedWeight {
        /// Full tensor name.
        tensor: String,
        /// The key that denies it.
        key: String,
        /// That key's value.
        value: String,
    },

    /// A request that makes no sense, whatever the sizes.
    #[error("a model is asked for {found} {what}: expected {expected}")]
    Request {
        /// What was counted.
        what: &'static str,
        /// The value asked for.
        found: u64,
        /// The values that would do.
        expected: String,
    },

    /// There is no plan; says why, and what would fit.
    #[error(transparent)]
    Plan(#[from] PlanError),

    /// The model's heads are not whole groups of the asked cache format.
    #[error(
        "a {format} cache keeps keys and values in groups of {group} numbers, which heads of \
         {head_dim} dimensions cannot be cut into: use a cache of format f16"
    )]
    UnquantisableCache {
        /// The format asked for.
        format: CacheFormat,
        /// Dimensions of the model's heads.
        head_dim: usize,
        /// Numbers in a group.
        group: usize,
    },

    /// A plan and what it is to be carried out on do not belong together.
    #[error(
        "the plan does not fit what is to be loaded: {what}: found {found}, expected {expected}"
    )]
    PlanMismatch {
        /// What differs.
        what: &'static str,
        /// The value of the devices or the model.
        found: String,
        /// The plan's value.
        expected: String,
    },

    /// The machine has less memory for this process than the load would take.
    #[error(
        "loading takes {needed} of the host's memory ({device} and others on the host), but of \
         {total} only {available} are left for this process: free memory, raise the container's \
         limit, or plan with a lower cap"
    )]
    HostMemory {
        /// A device whose memory is host memory.
        device: DeviceId,
        /// Bytes that loading would take.
        needed: Bytes,
        /// Bytes that may be taken.
        available: Bytes,
        /// All memory of the machine or of the container.
        total: Bytes,
    },

    /// A buffer turned out larger than what was planned for its purpose.
    #[error("the {purpose} planned for {device} does not hold {what}: {source}")]
    PlanTooSmall {
        /// The device.
        device: DeviceId,
        /// The purpose whose reservation ran out.
        purpose: Purpose,
        /// The buffer that no longer fitted.
        what: String,
        /// The ledger's words.
        source: Box<SplitError>,
    },

    /// One of a step's arrays is larger than planned, or disagrees with another.
    #[error("a step has {found} {what}: expected {expected}")]
    Step {
        /// What was counted.
        what: &'static str,
        /// The step's value.
        found: usize,
        /// The values that would do.
        expected: String,
    },

    /// A token id that the model does not have.
    #[error("row {row} has token id {token_id}: expected one below the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// Row of the step.
        row: usize,
        /// Its token.
        token_id: u32,
        /// Tokens of the model.
        vocab_size: usize,
    },

    /// A position past the planned context or past its sequence's pages.
    #[error("row {row} has position {position}: expected one below {limit}, {reason}")]
    PositionOutOfRange {
        /// Row of the step.
        row: usize,
        /// Its position.
        position: u32,
        /// Exclusive bound.
        limit: usize,
        /// Where the bound comes from.
        reason: &'static str,
    },

    /// A page that the cache does not have.
    #[error(
        "sequence {sequence} has page {page} at place {place} of its table: expected one below \
         the {pages} pages of the cache"
    )]
    PageOutOfRange {
        /// Sequence of the step.
        sequence: usize,
        /// Place in its page table.
        place: usize,
        /// The page id there.
        page: u32,
        /// Pages of the cache.
        pages: usize,
    },

    /// An adapter changes a part of the model that adapters cannot change here.
    #[error(
        "adapter module `{module}` {reason}: expected model.layers.N, N below {layers}, and one \
         of {}; this adapter is for another model or has to be merged into its own",
        known.join(", ")
    )]
    AdapterModule {
        /// The module's name in the adapter.
        module: String,
        /// What is wrong with it.
        reason: String,
        /// Layers of the model.
        layers: usize,
        /// Every linear of a layer that adapters may change.
        known: Vec<&'static str>,
    },

    /// An adapter was made for a model of other extents.
    #[error(
        "adapter module `{module}` has {what} {found}: expected {expected}; this adapter is for \
         another model"
    )]
    AdapterShape {
        /// The module's name in the adapter.
        module: String,
        /// Which extent.
        what: &'static str,
        /// The adapter's value.
        found: usize,
        /// The model's.
        expected: String,
    },

    /// A factor for an adapter that is not a number.
    #[error("an adapter is to be scaled by {found}: expected a finite number")]
    AdapterScale {
        /// The factor asked for.
        found: f32,
    },

    /// An adapter that is not loaded.
    #[error("adapter {found} is not loaded: expected one of {loaded:?}")]
    UnknownAdapter {
        /// The adapter asked for.
        found: u32,
        /// Those that are loaded.
        loaded: Vec<u32>,
    },

    /// A copy from or to a page that cannot be.
    #[error("copy {index} of a step names page {page}: expected {expected}")]
    PageCopy {
        /// Which of the step's copies.
        index: usize,
        /// The page id found.
        page: u32,
        /// The page ids that would do.
        expected: String,
    },

    /// A device failed or refused.
    #[error(transparent)]
    Device(Box<DeviceError>),

    /// The model's files are malformed.
    #[error(transparent)]
    Format(Box<FormatError>),

    /// The ledger has less than the plan counted on.
    #[error(transparent)]
    Shortfall(#[from] Shortfall),
}

/// Boxed: both are large, and every step of a model returns this crate's error.
impl From<DeviceError> for ModelError {
    fn from(error: DeviceError) -> Self {
        Self::Device(Box::new(error))
    }
}

/// Boxed for the same reason.
impl From<FormatError> for ModelError {
    fn from(error: FormatError) -> Self {
        Self::Format(Box::new(error))
    }
}
