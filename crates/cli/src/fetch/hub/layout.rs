//! The cache's layout, which is Hugging Face's.
//!
//! `{cache}/models--{org}--{name}/` holds `blobs/{etag}`, `refs/{revision}` (a file with the
//! commit) and `snapshots/{commit}/{file}`, links into `blobs`. A download in progress is
//! `blobs/{etag}.incomplete`, and its lock `{cache}/.locks/models--{org}--{name}/{etag}.lock`.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{CONFIG, Repository, is_plain, is_weights};
use crate::fetch::{make_directory, user_cache, write_error};

/// A variable of the environment that is set to something.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Hugging Face's own directory: `HF_HOME`, else in the user's cache.
pub(super) fn home() -> Result<PathBuf> {
    match variable("HF_HOME") {
        Some(home) => Ok(home.into()),
        None => user_cache("huggingface"),
    }
}

/// `HF_HUB_CACHE`, else `hub` in [`home`], as Hugging Face's tools do.
pub(crate) fn cache_directory() -> Result<PathBuf> {
    match variable("HF_HUB_CACHE") {
        Some(cache) => Ok(cache.into()),
        None => Ok(home()?.join("hub")),
    }
}

/// The snapshot's directory, if the cache holds it whole.
pub(crate) fn cached_snapshot(repository: &Repository) -> Result<Option<PathBuf>> {
    let directory = cache_directory()?.join(folder_name(repository));
    let reference = directory.join("refs").join(&repository.revision);
    let commit = match fs::read_to_string(&reference) {
        Ok(commit) => commit.trim().to_owned(),
        Err(_) => repository.revision.clone(),
    };
    let snapshot = directory.join("snapshots").join(&commit);
    Ok((is_plain(&commit) && is_whole(&snapshot)).then_some(snapshot))
}

/// Whether a snapshot has its configuration and weights. Python tools may have fetched single
/// files, so of weights named `…-00001-of-00003.safetensors` each must be there.
fn is_whole(snapshot: &Path) -> bool {
    let Ok(entries) = fs::read_dir(snapshot) else {
        return false;
    };
    // `exists` follows links: one into a removed blob does not count.
    let names: HashSet<String> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.exists())
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    let has_siblings = |name: &str| {
        let Some((stem, count)) = name.trim_end_matches(".safetensors").rsplit_once("-of-") else {
            return true;
        };
        let (Ok(total), Some((stem, _))) = (count.parse::<usize>(), stem.rsplit_once('-')) else {
            return true;
        };
        let (start, end) = (format!("{stem}-"), format!("-of-{count}.safetensors"));
        names
            .iter()
            .filter(|name| name.starts_with(&start) && name.ends_with(&end))
            .count()
            >= total
    };
    names.contains(CONFIG)
        && names.iter().any(|name| is_weights(name))
        && names
            .iter()
            .filter(|name| is_weights(name))
            .all(|name| has_siblings(name))
}

fn folder_name(repository: &Repository) -> String {
    format!("models--{}", repository.id.replace('/', "--"))
}

/// Where one snapshot's files go.
pub(super) struct Layout {
    locks: PathBuf,
    directory: PathBuf,
    commit: String,
    snapshot: PathBuf,
}

/// The paths of one content.
pub(super) struct Blob {
    pub(super) path: PathBuf,
    pub(super) incomplete: PathBuf,
    pub(super) lock: PathBuf,
}

impl Layout {
    pub(super) fn new(repository: &Repository, commit: &str) -> Result<Self> {
        let cache = cache_directory()?;
        let name = folder_name(repository);
        let directory = cache.join(&name);
        Ok(Self {
            locks: cache.join(".locks").join(name),
            snapshot: directory.join("snapshots").join(commit),
            commit: commit.to_owned(),
            directory,
        })
    }

    pub(super) fn prepare(&self) -> Result<()> {
        make_directory(&self.snapshot)?;
        make_directory(&self.directory.join("blobs"))
    }

    pub(super) fn snapshot(&self) -> &Path {
        &self.snapshot
    }

    /// Whether the snapshot has the file's content.
    pub(super) fn has(&self, file: &str) -> bool {
        self.snapshot.join(file).exists()
    }

    pub(super) fn blob(&self, etag: &str) -> Blob {
        let blobs = self.directory.join("blobs");
        Blob {
            path: blobs.join(etag),
            incomplete: blobs.join(format!("{etag}.incomplete")),
            lock: self.locks.join(format!("{etag}.lock")),
        }
    }

    /// Gives a finished download its final name.
    pub(super) fn accept(&self, incomplete: &Path, blob: &Path) -> Result<()> {
        fs::rename(incomplete, blob).map_err(|error| write_error(error, blob))
    }

    /// Makes the content known under the file's name.
    pub(super) fn link(&self, blob: &Path, file: &str) -> Result<()> {
        let link = self.snapshot.join(file);
        if link.exists() {
            return Ok(());
        }
        // A link whose blob was removed is in the way.
        let _ = fs::remove_file(&link);
        #[cfg(unix)]
        {
            let name = blob.file_name().context("a blob has a name")?;
            let target = Path::new("../../blobs").join(name);
            // Another pull may have made it meanwhile.
            if std::os::unix::fs::symlink(target, &link).is_ok() || link.exists() {
                return Ok(());
            }
        }
        // No links on this file system: Hugging Face's tools copy then, too.
        fs::copy(blob, &link)
            .map(drop)
            .map_err(|error| write_error(error, &link))
    }

    /// Remembers which commit `revision` is.
    pub(super) fn write_reference(&self, revision: &str) -> Result<()> {
        if revision == self.commit {
            return Ok(());
        }
        let reference = self.directory.join("refs").join(revision);
        if let Some(parent) = reference.parent() {
            make_directory(parent)?;
        }
        fs::write(&reference, &self.commit).map_err(|error| write_error(error, &reference))
    }
}
