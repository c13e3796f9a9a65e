//! Stop strings over streamed text.

use std::sync::Arc;

use crate::automaton::{Automaton, check_strings};
use crate::error::TextError;

/// What [`StopMatcher::push`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopStep {
    /// Text that is now certain to come before any stop string.
    pub text: String,
    /// The stop string that ended the text, as position in the list given. Nothing comes after.
    pub matched: Option<usize>,
}

/// Cuts streamed text at the first stop string.
///
/// The stop string that is complete first counts; among those complete at the same byte, the
/// longest. The text before it is passed on, the stop string itself and all after it are not.
/// What could still become a stop string is held back, never more. The result does not depend on
/// how the text is cut into pieces. The work for a byte does not grow with the number of stop
/// strings.
#[derive(Clone)]
pub struct StopMatcher {
    automaton: Arc<Automaton>,
    state: u32,
    /// Text not passed on: its length is the depth of `state`.
    held: String,
    matched: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings; none at all is allowed.
    ///
    /// # Errors
    /// If a stop string is empty or has more than 4,096 bytes, or if there are more than 1,024 or
    /// they have more than 1 MiB together.
    pub fn new<S: AsRef<str>>(stop_strings: &[S]) -> Result<Self, TextError> {
        check_strings("stop", stop_strings)?;
        let bytes: Vec<&str> = stop_strings.iter().map(AsRef::as_ref).collect();
        Ok(Self {
            automaton: Arc::new(Automaton::new(&bytes)),
            state: 0,
            held: String::new(),
            matched: None,
        })
    }

    /// Takes the next piece of text. After a match everything is swallowed.
    pub fn push(&mut self, piece: &str) -> StopStep {
        if self.matched.is_some() {
            return StopStep {
                text: String::new(),
                matched: self.matched,
            };
        }
        let held_before = self.held.len();
        self.held.push_str(piece);
        for (offset, byte) in piece.bytes().enumerate() {
            self.state = self.automaton.step(self.state, byte);
            if let Some(stop) = self.automaton.matched(self.state) {
                // A stop string is whole characters, so it starts at one.
                self.held
                    .truncate(held_before + offset + 1 - stop.bytes as usize);
                self.matched = Some(stop.index as usize);
                return StopStep {
                    text: std::mem::take(&mut self.held),
                    matched: self.matched,
                };
            }
        }
        let keep = self.automaton.depth(self.state);
        let kept = self.held.split_off(self.held.len() - keep);
        StopStep {
            text: std::mem::replace(&mut self.held, kept),
            matched: None,
        }
    }

    /// Ends the text and returns what was held back (nothing after a match). The matcher then
    /// stands at the start of a new text.
    pub fn finish(&mut self) -> String {
        self.state = 0;
        self.matched = None;
        std::mem::take(&mut self.held)
    }
}
