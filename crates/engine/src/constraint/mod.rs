//! Constraints: what an answer must look like, as sets of allowed tokens.
//!
//! A [`ConstraintSpec`] is compiled once a job by the engine's [`ConstraintCompiler`] to a
//! [`Constraint`], which says at each place of the answer what may follow. The grammars are those
//! of the llguidance crate.

mod compiler;
mod spec;
mod vocabulary;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use llguidance::TokenParser;
use llguidance::api::StopReason;

pub use compiler::ConstraintCompiler;
pub use spec::ConstraintSpec;

use crate::TokenMask;

/// A constraint was refused, or cannot be obeyed any further. Other jobs are unharmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// The tokenizer's vocabulary cannot be searched by grammars.
    #[error("constraints cannot be used with this model's vocabulary: {message}")]
    Vocabulary {
        /// llguidance's words.
        message: String,
    },

    /// The specification is longer than what is compiled.
    #[error("the {kind} has {bytes} bytes, at most {limit} are accepted; simplify it")]
    TooLong {
        /// The kind of constraint.
        kind: &'static str,
        /// Its length.
        bytes: usize,
        /// The most that is accepted.
        limit: usize,
    },

    /// The specification is nested too deeply.
    #[error("the {kind} is nested more than {limit} levels deep; flatten it")]
    TooDeep {
        /// The kind of constraint.
        kind: &'static str,
        /// The most that is accepted.
        limit: usize,
    },

    /// An empty list of choices.
    #[error("the list of choices is empty; give at least one")]
    NoChoices,

    /// llguidance refused the specification.
    #[error("the {kind} is not accepted: {message}")]
    Rejected {
        /// The kind of constraint.
        kind: &'static str,
        /// llguidance's words.
        message: String,
    },

    /// A Lark grammar with lexemes whose text is not settled when it is written.
    #[error(
        "the Lark grammar uses stop= or max_tokens=, which cannot be rolled back; use suffix= or a \
         repetition such as {{1,20}}"
    )]
    NotReversible,

    /// The token breaks the constraint.
    #[error("token {token_id} is not allowed here by the constraint")]
    TokenNotAllowed {
        /// The token.
        token_id: u32,
    },

    /// The constraint asks for text that the vocabulary cannot spell.
    #[error(
        "the constraint allows no token at all after {tokens} tokens: it asks for text that this \
         model's vocabulary cannot spell, so allow something else there"
    )]
    NoTokenAllowed {
        /// Tokens accepted so far.
        tokens: usize,
    },

    /// A rollback past the beginning.
    #[error("{tokens} tokens cannot be rolled back: only {accepted} were accepted")]
    RollbackTooFar {
        /// Tokens to roll back.
        tokens: usize,
        /// Tokens accepted so far.
        accepted: usize,
    },

    /// The grammar grew too complex on the way, or llguidance failed.
    #[error("the constraint failed after {tokens} tokens: {message}; simplify it")]
    Failed {
        /// Tokens accepted so far.
        tokens: usize,
        /// llguidance's words.
        message: String,
    },
}

/// What an answer must look like, and how far it has come.
///
/// Nothing here is bound to a thread: the engine asks for masks on a worker while the device
/// computes logits. A clone is independent and begins where the original stands, so the
/// completions of one prompt share the compilation.
pub struct Constraint {
    parser: TokenParser,
    stop_ids: Arc<[u32]>,
    vocab_size: usize,
    /// Tokens accepted, without a stop token.
    accepted: usize,
    /// A stop token was accepted after them.
    ended: bool,
    /// What may follow, once it has been asked for.
    next: Option<TokenMask>,
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        Self {
            // An ordinary clone would share the lexer's states, and their lock, with this one.
            parser: self.parser.deep_clone(),
            stop_ids: Arc::clone(&self.stop_ids),
            vocab_size: self.vocab_size,
            accepted: self.accepted,
            ended: self.ended,
            next: self.next.clone(),
        }
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Constraint")
            .field("accepted", &self.accepted)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Constraint {
    fn new(mut parser: TokenParser, stop_ids: Arc<[u32]>, vocab_size: usize) -> Self {
        parser.start_without_prompt();
        Self {
            parser,
            stop_ids,
            vocab_size,
            accepted: 0,
            ended: false,
            next: None,
        }
    }

    /// Sets `out` to the tokens that may follow: where the answer may end, all the tokenizer's
    /// stop tokens are among them, elsewhere none is. Where only one spelling is possible, only
    /// the tokenizer's own way to write it is allowed. Asking again costs nothing.
    ///
    /// # Errors
    /// [`ConstraintError::NoTokenAllowed`] if the vocabulary cannot spell what must follow;
    /// [`Self::rollback`] leads out of that. [`ConstraintError::Failed`] if the grammar grew too
    /// complex: the constraint is of no use any more.
    pub fn mask(&mut self, out: &mut TokenMask) -> Result<(), ConstraintError> {
        out.clone_from(self.next()?);
        Ok(())
    }

    /// Goes one token on.
    ///
    /// # Errors
    /// [`ConstraintError::TokenNotAllowed`] if the token breaks the constraint, which then stands
    /// where it stood; [`ConstraintError::Failed`] as for [`Self::mask`].
    pub fn accept(&mut self, token_id: u32) -> Result<(), ConstraintError> {
        let refused = ConstraintError::TokenNotAllowed { token_id };
        if self.ended || token_id as usize >= self.vocab_size {
            return Err(refused);
        }
        if self.stop_ids.contains(&token_id) {
            if !self.may_end() {
                return Err(refused);
            }
            self.ended = true;
            self.next = None;
            return Ok(());
        }
        let parser = &mut self.parser;
        let valid = llguidance::panic_utils::catch_unwind(AssertUnwindSafe(|| {
            if !parser.validate_token(token_id)? {
                return Ok(false);
            }
            parser.consume_token(token_id)?;
            parser.check_stop()?;
            Ok(true)
        }));
        if !valid.map_err(|error| self.failed(&error))? {
            return Err(refused);
        }
        self.accepted += 1;
        self.next = None;
        Ok(())
    }

    /// Takes back the last `tokens` tokens that were accepted, a stop token among them.
    ///
    /// # Errors
    /// [`ConstraintError::RollbackTooFar`] if fewer were accepted; [`ConstraintError::Failed`] if
    /// the constraint had failed before.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), ConstraintError> {
        let accepted = self.accepted + usize::from(self.ended);
        if tokens > accepted {
            return Err(ConstraintError::RollbackTooFar { tokens, accepted });
        }
        if tokens == 0 {
            return Ok(());
        }
        let of_grammar = tokens - usize::from(self.ended);
        let parser = &mut self.parser;
        llguidance::panic_utils::catch_unwind(AssertUnwindSafe(|| parser.rollback(of_grammar)))
            .map_err(|error| self.failed(&error))?;
        self.accepted -= of_grammar;
        self.ended = false;
        self.next = None;
        Ok(())
    }

    /// Whether the answer is complete: nothing but a stop token may follow, or one was accepted.
    /// May compute the mask that [`Self::mask`] then returns. False after a failure, which
    /// [`Self::mask`] reports.
    pub fn is_complete(&mut self) -> bool {
        if self.ended {
            return true;
        }
        if !self.may_end() {
            return false;
        }
        let stop_ids = Arc::clone(&self.stop_ids);
        self.next().is_ok_and(|mask| mask.count() == stop_ids.len())
    }

    /// Whether the answer may end here. False after a failure, which [`Self::mask`] reports.
    pub fn may_end(&mut self) -> bool {
        let parser = &mut self.parser;
        self.ended
            || llguidance::panic_utils::catch_unwind(AssertUnwindSafe(|| Ok(parser.is_accepting())))
                .unwrap_or(false)
    }

    /// What may follow.
    fn next(&mut self) -> Result<&TokenMask, ConstraintError> {
        if self.next.is_none() {
            self.next = Some(self.compute_next()?);
        }
        Ok(self.next.as_ref().expect("it was just set"))
    }

    fn compute_next(&mut self) -> Result<TokenMask, ConstraintError> {
        if self.ended {
            return Ok(TokenMask::none(self.vocab_size));
        }
        let parser = &mut self.parser;
        // A parser that stopped because the grammar is complete computes no masks.
        let mut mask = if parser.stop_reason() == StopReason::NoExtension {
            TokenMask::none(self.vocab_size)
        } else {
            let words =
                llguidance::panic_utils::catch_unwind(AssertUnwindSafe(|| parser.compute_mask()))
                    .map_err(|error| self.failed(&error))?;
            TokenMask::from_words(words.as_slice(), self.vocab_size)
        };
        let may_end = self.may_end();
        for &id in &*self.stop_ids {
            if may_end {
                mask.allow(id);
            } else {
                mask.forbid(id);
            }
        }
        if mask.count() == 0 && !may_end {
            return Err(ConstraintError::NoTokenAllowed {
                tokens: self.accepted,
            });
        }
        Ok(mask)
    }

    fn failed(&self, error: &impl std::fmt::Display) -> ConstraintError {
        let tokens = self.accepted;
        match self.parser.stop_reason() {
            StopReason::NoExtensionBias => ConstraintError::NoTokenAllowed { tokens },
            _ => ConstraintError::Failed {
                tokens,
                message: message_of(error),
            },
        }
    }
}

/// llguidance's words, without the backtrace of a panic and the dump of its state.
fn message_of(error: &impl std::fmt::Display) -> String {
    const LONGEST: usize = 2_000;
    let message = error.to_string();
    let end = ["\n<backtrace>", "\n<state>", "\n<non-verbose/>"]
        .iter()
        .filter_map(|mark| message.find(mark))
        .min()
        .unwrap_or(message.len());
    message[..end].trim().chars().take(LONGEST).collect()
}
