//! A Hugging Face hub's files, in its own cache layout, so that models which Python tools
//! downloaded are found, and the other way round.
//!
//! `{cache}/models--{org}--{name}/` holds `blobs/{etag}`, `refs/{revision}` (a file with the
//! commit) and `snapshots/{commit}/{file}`, links into `blobs`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use crate::output;

/// Renames that are followed before giving up.
const MAX_RELATIVE_REDIRECTS: usize = 5;

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
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let is_id = id.split('/').count() == 2 && id.split('/').all(plain);
        if !is_id || !revision.split('/').all(plain) {
            bail!("{text:?} is not org/name or org/name@revision");
        }
        Ok(Self { id: id.to_owned(), revision: revision.to_owned() })
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// `HF_HUB_CACHE`, else `HF_HOME/hub`, else the user's cache, as Hugging Face's tools do.
pub(crate) fn cache_directory() -> Result<PathBuf> {
    if let Some(cache) = variable("HF_HUB_CACHE") {
        return Ok(cache.into());
    }
    match variable("HF_HOME") {
        Some(home) => Ok(Path::new(&home).join("hub")),
        None => Ok(super::user_cache("huggingface")?.join("hub")),
    }
}

fn repository_directory(repository: &Repository) -> Result<PathBuf> {
    Ok(cache_directory()?.join(format!("models--{}", repository.id.replace('/', "--"))))
}

/// The snapshot's directory, if the cache holds one with a config.json.
pub(crate) fn cached_snapshot(repository: &Repository) -> Result<Option<PathBuf>> {
    let directory = repository_directory(repository)?;
    let reference = directory.join("refs").join(&repository.revision);
    let commit = match fs::read_to_string(&reference) {
        Ok(commit) => commit.trim().to_owned(),
        Err(_) => repository.revision.clone(),
    };
    let snapshot = directory.join("snapshots").join(commit);
    Ok(snapshot.join("config.json").exists().then_some(snapshot))
}

/// Downloads what is missing of a model and returns its snapshot directory.
pub(crate) fn pull(repository: &Repository, offline: bool) -> Result<PathBuf> {
    if offline {
        return cached_snapshot(repository)?.with_context(|| {
            format!(
                "{} at {} is not in {} and offline mode is on: pull once without --offline \
                 (or HF_HUB_OFFLINE)",
                repository.id,
                repository.revision,
                cache_directory().map(|path| path.display().to_string()).unwrap_or_default()
            )
        });
    }
    let client = Client::new();
    let listing = client.listing(repository)?;
    let directory = repository_directory(repository)?;
    let snapshot = directory.join("snapshots").join(&listing.commit);
    fs::create_dir_all(&snapshot)?;
    fs::create_dir_all(directory.join("blobs"))?;
    for file in listing.files.iter().filter(|file| is_wanted(file)) {
        client
            .fetch(repository, &listing.commit, file, &directory, &snapshot)
            .with_context(|| format!("fetching {file} of {}", repository.id))?;
    }
    // Last, so that an interrupted pull is not mistaken for a whole one.
    let reference = directory.join("refs").join(&repository.revision);
    if let Some(parent) = reference.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(reference, &listing.commit)?;
    Ok(snapshot)
}

/// Weights as safetensors and the small text files beside them.
fn is_wanted(file: &str) -> bool {
    let is_plain = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
    let extension = Path::new(file).extension().and_then(|extension| extension.to_str());
    // Only the root: sub-folders hold other formats' copies of the same weights.
    is_plain
        && !file.contains('/')
        && matches!(extension, Some("safetensors" | "json" | "jinja" | "txt"))
}

struct Listing {
    commit: String,
    files: Vec<String>,
}

struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Client {
    fn new() -> Self {
        // Statuses are looked at here, to say what each means to the user.
        let config = Agent::config_builder().http_status_as_error(false).build();
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Self {
            agent: config.into(),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: variable("HF_TOKEN"),
        }
    }

    fn get(&self, url: &str, from_byte: u64) -> Result<Response<Body>> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from_byte > 0 {
            request = request.header("Range", format!("bytes={from_byte}-"));
        }
        request.call().with_context(|| {
            format!(
                "cannot reach {url}: check the network or HF_ENDPOINT; --offline uses what is \
                 in the cache"
            )
        })
    }

    fn listing(&self, repository: &Repository) -> Result<Listing> {
        let Repository { id, revision } = repository;
        let revision = revision.replace('/', "%2F");
        let url = format!("{}/api/models/{id}/revision/{revision}", self.endpoint);
        let mut response = self.get(&url, 0)?;
        check_status(response.status(), repository, &url, self.token.is_some())?;
        let answer: Value = serde_json::from_reader(response.body_mut().as_reader())
            .with_context(|| format!("{url} did not answer with JSON"))?;
        let commit = answer["sha"].as_str().filter(|sha| {
            !sha.is_empty() && sha.chars().all(|c| c.is_ascii_alphanumeric())
        });
        let files = answer["siblings"].as_array().map(|siblings| {
            let names = siblings.iter().filter_map(|sibling| sibling["rfilename"].as_str());
            names.map(str::to_owned).collect::<Vec<_>>()
        });
        let (Some(commit), Some(files)) = (commit, files) else {
            bail!("{url} answered without a commit and a list of files: is it a hub?");
        };
        if !files.iter().any(|file| file.ends_with(".safetensors") && is_wanted(file)) {
            bail!(
                "{id} has no .safetensors file: oxllama loads EXL2, GPTQ and FP16/BF16 \
                 safetensors (a GGUF file can be downloaded by hand and given as MODEL)"
            );
        }
        Ok(Listing { commit: commit.to_owned(), files })
    }

    /// Brings one file into `blobs` and links it from the snapshot.
    fn fetch(
        &self,
        repository: &Repository,
        commit: &str,
        file: &str,
        directory: &Path,
        snapshot: &Path,
    ) -> Result<()> {
        let link = snapshot.join(file);
        if link.exists() {
            return Ok(());
        }
        let url = format!("{}/{}/resolve/{commit}/{file}", self.endpoint, repository.id);
        let remote = self.metadata(repository, url)?;
        let blob = directory.join("blobs").join(&remote.etag);
        if !blob.exists() {
            let incomplete = blob.with_extension("incomplete");
            self.download(repository, &remote, &incomplete, file)?;
            verify(&incomplete, &remote)?;
            fs::rename(&incomplete, &blob)?;
        }
        link_or_copy(&blob, &link)
    }

    /// Asks for a file's identity without its content. Large files are answered with a
    /// redirect to storage, and only the hub's own answer carries the file's etag.
    fn metadata(&self, repository: &Repository, mut url: String) -> Result<RemoteFile> {
        for _ in 0..MAX_RELATIVE_REDIRECTS {
            let mut request = self.agent.head(&url).config().max_redirects(0).build();
            if let Some(token) = &self.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().with_context(|| format!("cannot reach {url}"))?;
            let header = |name| response.headers().get(name)?.to_str().ok();
            // A renamed repository redirects within the hub.
            if let Some(path) = header("location").filter(|target| target.starts_with('/'))
                && response.status().is_redirection()
            {
                url = format!("{}{path}", self.endpoint);
                continue;
            }
            if !response.status().is_redirection() {
                check_status(response.status(), repository, &url, self.token.is_some())?;
            }
            let etag = header("x-linked-etag").or_else(|| header("etag")).and_then(plain_tag);
            let size = header("x-linked-size").or_else(|| header("content-length"));
            let etag = etag.with_context(|| format!("{url} has no ETag: is it a hub?"))?;
            return Ok(RemoteFile { etag, size: size.and_then(|size| size.parse().ok()), url });
        }
        bail!("{url} redirects in circles")
    }

    /// Appends to `incomplete` what is still missing.
    fn download(
        &self,
        repository: &Repository,
        remote: &RemoteFile,
        incomplete: &Path,
        file: &str,
    ) -> Result<()> {
        let url = &remote.url;
        let mut have = fs::metadata(incomplete).map_or(0, |metadata| metadata.len());
        if remote.size.is_some_and(|size| have >= size) {
            // Whole already (then its checks follow), or longer than it should be.
            if remote.size == Some(have) {
                return Ok(());
            }
            fs::remove_file(incomplete)?;
            have = 0;
        }
        let mut response = self.get(url, have)?;
        check_status(response.status(), repository, url, self.token.is_some())?;
        // A server that knows no ranges sends the whole file again.
        let resumes = response.status() == StatusCode::PARTIAL_CONTENT;
        let mut out = OpenOptions::new()
            .create(true)
            .write(true)
            .append(resumes)
            .truncate(!resumes)
            .open(incomplete)?;
        let bar = output::byte_bar(file, remote.size.unwrap_or(0));
        bar.set_position(if resumes { have } else { 0 });
        let copied = io::copy(&mut bar.wrap_read(response.body_mut().as_reader()), &mut out);
        bar.finish_and_clear();
        copied.with_context(|| {
            format!("the download broke off; pull again to go on from where it stopped ({url})")
        })?;
        Ok(())
    }
}

/// One file on the hub.
struct RemoteFile {
    /// Where it is, after renames.
    url: String,
    /// Names the content; for large files its SHA-256.
    etag: String,
    /// Bytes, if the hub says.
    size: Option<u64>,
}

/// An etag without quotes and weakness mark, if it can be a file name.
fn plain_tag(tag: &str) -> Option<String> {
    let tag = tag.trim_start_matches("W/").trim_matches('"');
    let is_plain = !tag.is_empty() && tag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    is_plain.then(|| tag.to_owned())
}

fn check_status(
    status: StatusCode,
    repository: &Repository,
    url: &str,
    has_token: bool,
) -> Result<()> {
    let Repository { id, revision } = repository;
    match status.as_u16() {
        200..=299 => Ok(()),
        401 | 403 if has_token => bail!(
            "{id}: access refused ({status}): the token in HF_TOKEN may not read it (a gated \
             model's terms are accepted on its page)"
        ),
        401 | 403 => bail!(
            "{id}: access refused ({status}): the model does not exist, or is private or gated; \
             set HF_TOKEN to a token that may read it"
        ),
        404 => bail!("{id} at revision {revision} was not found: check the spelling ({url})"),
        _ => bail!("{url} answered {status}; try again later"),
    }
}

/// A size that differs is a broken transfer; a 64-digit etag is the content's SHA-256.
fn verify(path: &Path, remote: &RemoteFile) -> Result<()> {
    let found = fs::metadata(path)?.len();
    if let Some(expected) = remote.size
        && found != expected
    {
        bail!("received {found} bytes of {expected}; pull again to go on from there");
    }
    if remote.etag.len() == 64 {
        let mut hasher = Sha256::new();
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
        }
        let digest: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if digest != remote.etag {
            fs::remove_file(path)?;
            bail!("its SHA-256 is {digest}, expected {}: it was damaged; pull again", remote.etag);
        }
    }
    Ok(())
}

fn link_or_copy(blob: &Path, link: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        let name = blob.file_name().context("a blob has a name")?;
        let target = Path::new("../../blobs").join(name);
        if std::os::unix::fs::symlink(target, link).is_ok() {
            return Ok(());
        }
    }
    fs::copy(blob, link)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_parsed() {
        let repository: Repository = "org/some-model_v1.5@4.0bpw".parse().unwrap();
        assert_eq!((&*repository.id, &*repository.revision), ("org/some-model_v1.5", "4.0bpw"));
        assert_eq!("a/b".parse::<Repository>().unwrap().revision, "main");
        for bad in ["", "a", "a/b/c", "../b", "a/..", "a/b@", "a/b@../x", "a b/c", "/a", "a/"] {
            assert!(bad.parse::<Repository>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_files_that_are_loaded_are_wanted() {
        for file in ["config.json", "output-00001-of-00002.safetensors", "chat_template.jinja"] {
            assert!(is_wanted(file), "{file}");
        }
        for file in ["pytorch_model.bin", "README.md", "../x.json", "onnx/a.json", "/etc/a.json"] {
            assert!(!is_wanted(file), "{file}");
        }
    }
}
