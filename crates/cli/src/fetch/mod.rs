//! Getting models onto this machine.

pub(crate) mod demo;
pub(crate) mod hub;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result};

use crate::output;

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

fn make_directory(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).map_err(|error| write_error(error, directory))
}

/// Holds `path` as a lock until the answer is dropped, so that two processes do not fetch the
/// same thing. The file stays: removing it would let two holders in.
fn lock(path: &Path, what: &str) -> Result<File> {
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|error| write_error(error, path))?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => {
            output::note(format_args!(
                "waiting for another process that fetches {what}"
            ));
            file.lock()
                .with_context(|| format!("cannot lock {}", path.display()))?;
        }
        // Some network file systems have no locks; whoever works alone needs none.
        Ok(()) | Err(fs::TryLockError::Error(_)) => {}
    }
    Ok(file)
}

/// What a failed write means to the user.
fn write_error(error: io::Error, path: &Path) -> Error {
    let help = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full: free some space or name a cache on another disk (HF_HUB_CACHE, \
             OXLLAMA_CACHE), then repeat: what is there already is kept"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "it may not be written: name a cache of your own (HF_HUB_CACHE, OXLLAMA_CACHE)"
        }
        _ => "check the disk",
    };
    Error::new(error).context(format!("cannot write {}: {help}", path.display()))
}
