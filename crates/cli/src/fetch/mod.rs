//! Getting models onto this machine.

pub(crate) mod demo;
pub(crate) mod hub;

use std::path::PathBuf;

use anyhow::{Context, Result};

/// The user's cache directory for `application`, by the XDG rules.
fn user_cache(application: &str) -> Result<PathBuf> {
    let from = |variable| std::env::var_os(variable).filter(|value| !value.is_empty());
    let base = match from("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(from("HOME").context(
            "neither XDG_CACHE_HOME nor HOME is set, so there is no place for downloaded models",
        )?)
        .join(".cache"),
    };
    Ok(base.join(application))
}
