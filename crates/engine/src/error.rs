//! What can go wrong with a job.

use std::sync::Arc;

use oxllama_backend::DeviceError;
use oxllama_model::ModelError;
use oxllama_text::TextError;

use crate::scheduler::Refusal;
use crate::{ConstraintError, SettingsError};

/// A job was refused, or failed. Other jobs are unharmed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No token to start from.
    #[error(
        "the prompt is empty: this model adds no token of its own, so give at least one \
         character of text"
    )]
    EmptyPrompt,

    /// The prompt alone fills the context.
    #[error(
        "the prompt has {prompt_tokens} tokens but the planned context holds {context_tokens}, \
         of which at least one is for the answer: shorten the prompt or raise --context \
         (`oxllama plan` shows the longest that fits)"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens that were planned.
        context_tokens: usize,
    },

    /// A token id outside the model's vocabulary.
    #[error("token id {token_id} is outside the model's vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id found.
        token_id: u32,
        /// Ids below this are valid.
        vocab_size: usize,
    },

    /// More tokens at least than at most.
    #[error(
        "min_new_tokens is {min_new_tokens} but max_new_tokens is {max_new_tokens}: raise the \
         latter or lower the former"
    )]
    TokenLimits {
        /// At least.
        min_new_tokens: usize,
        /// At most.
        max_new_tokens: usize,
    },

    /// A guidance scale that is no number.
    #[error("the guidance scale is {found}, expected a finite number (1 is no guidance)")]
    GuidanceScale {
        /// The scale found.
        found: f32,
    },

    /// Even alone the job could not run.
    #[error(transparent)]
    Refused(#[from] Refusal),

    /// Too many jobs wait.
    #[error(
        "{limit} jobs wait already: submit again when some have started, or raise the limit of \
         the queue"
    )]
    QueueFull {
        /// Most jobs that may wait.
        limit: usize,
    },

    /// An adapter that is not loaded.
    #[error("there is no adapter {id}: it was not loaded, or is unloaded again")]
    UnknownAdapter {
        /// The number found.
        id: u32,
    },

    /// An adapter that cannot be unloaded yet.
    #[error("adapter {id} is in use by {jobs} jobs: wait until they end, or cancel them")]
    AdapterInUse {
        /// The adapter.
        id: u32,
        /// Jobs that name it.
        jobs: usize,
    },

    /// The cache can be changed only while nothing runs.
    #[error("{jobs} jobs are in flight: the cache can be changed when they have ended")]
    NotIdle {
        /// Jobs that wait or run.
        jobs: usize,
    },

    /// The draft model was planned for less than the model.
    #[error(
        "the draft model has {found} {what} and the model {needed}: plan both with the same \
         --context and --cache-tokens"
    )]
    DraftTooSmall {
        /// What there is too little of.
        what: &'static str,
        /// Of the draft model.
        found: usize,
        /// Of the model.
        needed: usize,
    },

    /// The draft model's logits are not of the model's tokens.
    #[error(
        "the draft model has a vocabulary of {found} tokens and the model {needed}: take a draft \
         of the same vocabulary, padding included, or guess from n-grams"
    )]
    DraftVocabulary {
        /// Of the draft model.
        found: usize,
        /// Of the model.
        needed: usize,
    },

    /// Every way on leads to a banned string.
    #[error(
        "after going back {rewinds} times the answer still runs into a banned string: ban fewer \
         or longer strings"
    )]
    BannedEverywhere {
        /// How often another token was tried.
        rewinds: usize,
    },

    /// The engine takes no jobs any more.
    #[error("the engine has been shut down, or is about to be")]
    Closed,

    /// The model's device failed for good, and the engine with it.
    #[error("the engine has ended: {cause}")]
    Ended {
        /// What ended it.
        cause: Arc<EngineError>,
    },

    /// The engine's thread failed by a mistake of its own.
    #[error("the engine failed by a bug of its own and has ended: please report this")]
    Panicked,

    /// The system refused the engine a thread.
    #[error("cannot start the engine's thread: {0}")]
    Thread(#[from] std::io::Error),

    /// The model computed something that is not a number.
    #[error(
        "the model's logits at position {position} are not finite: its weights are damaged or \
         overflow; `oxllama inspect` shows the formats, and another quantisation may work"
    )]
    NotFinite {
        /// Position in the sequence.
        position: usize,
    },

    /// Constraints and logit bias leave no token.
    #[error(
        "no token is allowed at position {position}: the constraints and the logit bias \
         contradict each other"
    )]
    NothingAllowed {
        /// Position in the sequence.
        position: usize,
    },

    /// An evaluation asks for more text than there is, or rows that are too short.
    #[error("{found_tokens} tokens of text cannot give {rows} rows of {length}: {hint}")]
    EvaluationText {
        /// Tokens the text has.
        found_tokens: usize,
        /// Rows asked for.
        rows: usize,
        /// Tokens a row.
        length: usize,
        /// What to do.
        hint: &'static str,
    },

    /// Two models that cannot be compared.
    #[error(
        "the reference has a vocabulary of {reference} tokens and the model {model}: they \
         cannot be compared; give the model that this one was made from"
    )]
    VocabularyMismatch {
        /// Of the reference.
        reference: usize,
        /// Of the model.
        model: usize,
    },

    /// The sampling settings contradict themselves.
    #[error(transparent)]
    Settings(#[from] SettingsError),

    /// The constraint was refused, or cannot be obeyed.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),

    /// Tokenizer, template, stop or banned strings.
    #[error(transparent)]
    Text(#[from] TextError),

    /// The model or its device failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl EngineError {
    /// Why an engine takes nothing more; `cause` ended it, where nobody asked it to end.
    pub(crate) fn closed(cause: Option<&Arc<Self>>) -> Self {
        cause.map_or(Self::Closed, |cause| Self::Ended {
            cause: Arc::clone(cause),
        })
    }

    /// Whether a device that the model needs accepts nothing more.
    pub(crate) fn is_final(&self) -> bool {
        let Self::Model(ModelError::Device(error)) = self else {
            return false;
        };
        matches!(**error, DeviceError::Lost { .. })
    }
}
