//! Jobs that are to start together.

use crate::Engine;
use crate::engine::{Command, Inbox, Shared};

/// Keeps an engine from being told anything new; see [`Engine::hold`].
#[must_use = "the engine is held until this is dropped"]
pub struct Hold<'a> {
    shared: &'a Shared,
}

impl Engine {
    /// Keeps what is submitted from here on back until the value is dropped, when all of it
    /// comes at once, in its order. What runs goes on.
    ///
    /// How jobs share steps then does not depend on how fast they were submitted, nor do the
    /// bits of a device whose sums depend on the size of a step. Whatever asks the engine for
    /// an answer waits meanwhile, so the thread that holds must not.
    pub fn hold(&self) -> Hold<'_> {
        let shared = self.shared();
        shared.lock().holds += 1;
        Hold { shared }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.shared.lock().holds -= 1;
        self.shared.notify();
    }
}

impl Inbox {
    /// Whether there is something to do that is not held back.
    pub(crate) fn is_due(&self) -> bool {
        self.holds == 0 && !self.commands.is_empty()
    }

    /// Takes what is not held back.
    pub(crate) fn take_due(&mut self) -> Vec<Command> {
        if self.is_due() {
            std::mem::take(&mut self.commands)
        } else {
            Vec::new()
        }
    }
}
