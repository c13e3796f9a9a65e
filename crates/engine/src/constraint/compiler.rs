//! From a specification to a constraint.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use llguidance::ParserFactory;
use oxllama_text::Tokenizer;
use toktrie::TokEnv;

use super::vocabulary::Vocabulary;
use super::{Constraint, ConstraintError, ConstraintSpec, message_of};

/// llguidance follows chains of references recursively: 3,000 of them need more than 8 MiB, and
/// 7,500, about as many as a specification has room for, fit here. What is not used costs
/// addresses only.
const COMPILE_STACK_BYTES: usize = 1 << 29;

/// Compiles constraints for one tokenizer.
///
/// Building it takes a second or less and some tens of bytes for each byte of the vocabulary, so
/// an engine makes one when the first constraint comes, and shares it between its threads.
pub struct ConstraintCompiler {
    factory: ParserFactory,
    stop_ids: Arc<[u32]>,
    vocab_size: usize,
}

impl std::fmt::Debug for ConstraintCompiler {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ConstraintCompiler")
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

impl ConstraintCompiler {
    /// A compiler for a tokenizer and a model with logits for `vocab_size` tokens, which may be
    /// more than the tokenizer knows.
    ///
    /// # Errors
    /// [`ConstraintError::Vocabulary`] if the vocabulary is too large for llguidance.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self, ConstraintError> {
        let factory = llguidance::panic_utils::catch_unwind(AssertUnwindSafe(|| {
            let vocabulary: TokEnv = Arc::new(Vocabulary::new(tokenizer, vocab_size));
            ParserFactory::new_simple(&vocabulary)
        }));
        let mut factory = factory.map_err(|error| ConstraintError::Vocabulary {
            message: message_of(&error),
        })?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        let stop_ids = tokenizer.eos_ids().iter().copied();
        Ok(Self {
            factory,
            stop_ids: stop_ids.filter(|&id| (id as usize) < vocab_size).collect(),
            vocab_size,
        })
    }

    /// Compiles a constraint. The result begins at the start of an answer.
    ///
    /// # Errors
    /// [`ConstraintError::Rejected`] with llguidance's words if it refuses the specification, and
    /// other errors if the specification is too long, too deep, empty, or cannot be rolled back.
    pub fn compile(&self, spec: &ConstraintSpec) -> Result<Constraint, ConstraintError> {
        spec.check()?;
        let compile = || {
            llguidance::panic_utils::catch_unwind(AssertUnwindSafe(|| {
                let parser = self.factory.create_parser(spec.grammar())?;
                let stop_ids = Arc::clone(&self.stop_ids);
                Ok(Constraint::new(parser, stop_ids, self.vocab_size))
            }))
            .map_err(|error| message_of(&error))
        };
        let constraint = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("constraint".to_owned())
                .stack_size(COMPILE_STACK_BYTES)
                .spawn_scoped(scope, compile)
                .map_err(|error| format!("no thread to compile it: {error}"))?;
            // Panics were caught inside.
            thread
                .join()
                .unwrap_or_else(|_| Err("it was not compiled".to_owned()))
        });
        let constraint = constraint.map_err(|message| ConstraintError::Rejected {
            kind: spec.kind(),
            message,
        })?;
        let lexer = constraint.parser.parser.grammar().lexer_spec();
        if !lexer.can_rollback() {
            return Err(ConstraintError::NotReversible);
        }
        Ok(constraint)
    }
}
