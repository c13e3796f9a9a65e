//! What can go wrong with a job.

use oxllama_model::ModelError;
use oxllama_text::TextError;

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

    /// The pool has no page left.
    #[error("the cache has no free page left: all {pages} pages are in use")]
    OutOfPages {
        /// Pages in the pool.
        pages: usize,
    },

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
