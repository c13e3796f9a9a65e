//! Models from a Hugging Face hub, kept in its own cache layout, so that models which Python
//! tools downloaded are found, and the other way round.

mod client;
mod layout;

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use client::{Client, RemoteFile};
use layout::{Blob, Layout};

pub(crate) use layout::{cache_directory, cached_snapshot};

/// The file that makes a directory a model; fetched last, so that it marks a whole snapshot.
const CONFIG: &str = "config.json";

/// `org/name`, perhaps `@revision` (a branch, tag or commit).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Repository {
    pub(crate) id: String,
    pub(crate) revision: String,
}

impl FromStr for Repository {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |part: &str| {
            is_plain(part)
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let is_id = id.split('/').count() == 2 && id.split('/').all(plain);
        if !is_id || !is_revision(revision) {
            bail!("{text:?} is not org/name or org/name@revision");
        }
        Ok(Self {
            id: id.to_owned(),
            revision: revision.to_owned(),
        })
    }
}

/// Whether `part` is safe as one component of a path.
fn is_plain(part: &str) -> bool {
    let mut components = Path::new(part).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(name)), None)
        if name == part)
        && !part.chars().any(|c| c.is_control() || "/\\:".contains(c))
}

/// Names of branches become paths, parts of addresses and messages.
fn is_revision(text: &str) -> bool {
    text.split('/').all(is_plain)
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.+=,/".contains(c))
}

/// Weights as safetensors and the small text files beside them, in the root alone: sub-folders
/// hold other formats' copies of the same weights.
fn is_wanted(file: &str) -> bool {
    let extension = Path::new(file)
        .extension()
        .and_then(|extension| extension.to_str());
    is_plain(file) && matches!(extension, Some("safetensors" | "json" | "jinja" | "txt"))
}

fn is_weights(file: &str) -> bool {
    Path::new(file)
        .extension()
        .is_some_and(|extension| extension == "safetensors")
}

/// Downloads what is missing of a model and returns its snapshot directory.
pub(crate) fn pull(repository: &Repository, offline: bool) -> Result<PathBuf> {
    let Repository { id, revision } = repository;
    if offline {
        let cache = cache_directory()?;
        return cached_snapshot(repository)?.with_context(|| {
            format!(
                "{id} at revision {revision} is not whole in the cache ({}) and offline mode is \
                 on: pull it once without --offline (or HF_HUB_OFFLINE)",
                cache.display()
            )
        });
    }
    let client = Client::new(repository)?;
    let listing = client.listing()?;
    let mut files: Vec<&str> = listing
        .files
        .iter()
        .map(String::as_str)
        .filter(|file| is_wanted(file))
        .collect();
    if !files.iter().any(|file| is_weights(file)) {
        bail!(
            "{id} at revision {revision} has no .safetensors file{}: oxllama loads EXL2, GPTQ and \
             FP16/BF16 safetensors (a GGUF file can be downloaded by hand and given as MODEL)",
            client.other_revisions()
        );
    }
    if !files.contains(&CONFIG) {
        bail!(
            "{id} at revision {revision} has no {CONFIG}{}: expected a model in the root of the \
             repository",
            client.other_revisions()
        );
    }
    files.sort_by_key(|file| *file == CONFIG);

    let layout = Layout::new(repository, &listing.commit)?;
    layout.prepare()?;
    for file in files {
        if !layout.has(file) {
            fetch(&client, &layout, &listing.commit, file)
                .with_context(|| format!("cannot fetch {file} of {id}"))?;
        }
    }
    // Last, so that an interrupted pull is not mistaken for a whole one.
    layout.write_reference(revision)?;
    Ok(layout.snapshot().to_path_buf())
}

/// Brings one file into `blobs`, unless another name for it did, and links it from the snapshot.
fn fetch(client: &Client<'_>, layout: &Layout, commit: &str, file: &str) -> Result<()> {
    let remote: RemoteFile = client.metadata(commit, file)?;
    let Blob {
        path,
        incomplete,
        lock,
    } = layout.blob(&remote.etag);
    if !path.exists() {
        let _lock = super::lock(&lock, file)?;
        // Whoever held the lock before may have brought it.
        if !path.exists() {
            client.download(&remote, file, &incomplete)?;
            layout.accept(&incomplete, &path)?;
        }
    }
    layout.link(&path, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_parsed() {
        let repository: Repository = "org/some-model_v1.5@4.0bpw".parse().unwrap();
        assert_eq!(
            (&*repository.id, &*repository.revision),
            ("org/some-model_v1.5", "4.0bpw")
        );
        assert_eq!("a/b".parse::<Repository>().unwrap().revision, "main");
        assert_eq!(
            "a/b@refs/pr/1".parse::<Repository>().unwrap().revision,
            "refs/pr/1"
        );
        for bad in [
            "",
            "a",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../x",
            "a b/c",
            "/a",
            "a/",
            "a/b@/x",
            "a/b@x//y",
            "a/b@x/.",
            "a/b@x?y",
            "a/b@\u{1b}[2J",
            "a/b@c@d",
        ] {
            assert!(bad.parse::<Repository>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_files_that_are_loaded_are_wanted() {
        for file in [
            "config.json",
            "output-00001-of-00002.safetensors",
            "chat_template.jinja",
        ] {
            assert!(is_wanted(file), "{file}");
        }
        for file in [
            "pytorch_model.bin",
            "README.md",
            "../x.json",
            "onnx/a.json",
            "/etc/a.json",
            "..",
            "a\\b.json",
            "c:x.json",
            "a\u{1b}.json",
            "./a.json",
            "a.json/",
            "",
        ] {
            assert!(!is_wanted(file), "{file}");
        }
    }
}
