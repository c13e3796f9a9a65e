//! Control-C ends an answer, not the program; a second one ends the program.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static INSTALLED: OnceLock<()> = OnceLock::new();

/// The exit code that shells expect of a program ended by SIGINT.
pub(crate) const EXIT_INTERRUPTED: u8 = 130;

/// Whether the user has asked to stop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Interrupt(());

/// Installs the handler at the first call.
pub(crate) fn flag() -> Result<Interrupt> {
    if INSTALLED.set(()).is_ok() {
        ctrlc::set_handler(|| {
            if INTERRUPTED.swap(true, Ordering::Relaxed) {
                std::process::exit(EXIT_INTERRUPTED.into());
            }
        })
        .context("cannot install the handler for Control-C")?;
    }
    Ok(Interrupt(()))
}

impl Interrupt {
    pub(crate) fn is_set(self) -> bool {
        INTERRUPTED.load(Ordering::Relaxed)
    }

    /// Before the next answer.
    pub(crate) fn clear(self) {
        INTERRUPTED.store(false, Ordering::Relaxed);
    }
}
