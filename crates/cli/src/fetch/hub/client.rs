//! Talking to a hub.
//!
//! The hub answers `resolve/{commit}/{file}` for a small file with its content and for a large
//! one with a redirect to storage elsewhere. Its own answer names the content: `X-Linked-Etag`
//! (a large file's SHA-256) or `ETag` (a small file's git id). Redirects are followed here and
//! not by the HTTP library, because the token is for the hub alone.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, IsTerminal, Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use indicatif::BinaryBytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use ureq::http::uri::Scheme;
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

use super::layout::{home, variable};
use super::{Repository, is_revision};
use crate::fetch::write_error;
use crate::output;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Redirects that are followed before giving up.
const MAX_REDIRECTS: usize = 8;
/// Bytes of an answer in JSON; a listing of ten thousand files has about one million.
const MAX_JSON_BYTES: u64 = 16 << 20;
/// Bytes of a file whose size the hub does not say; it says that of all large files.
const MAX_UNSIZED_BYTES: u64 = 64 << 20;
/// Transfers in a row that may break off without bringing `PROGRESS_BYTES`.
const MAX_FAILURES: u32 = 4;
const PROGRESS_BYTES: u64 = 1 << 20;
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// For a connection, for an answer to begin, and between two pieces of it.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// For all of an answer that is small.
const SMALL_ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// A hub, seen from one repository.
pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: String,
    origin: Uri,
    token: Option<String>,
    repository: &'a Repository,
}

/// What a revision holds.
pub(super) struct Listing {
    /// A plain name, fit for a path.
    pub(super) commit: String,
    /// As the hub says them: any text.
    pub(super) files: Vec<String>,
}

/// One file on the hub.
pub(super) struct RemoteFile {
    /// Where it is, after renames.
    url: String,
    /// Names the content and is fit for a path; of 64 digits it is the SHA-256.
    pub(super) etag: String,
    size_bytes: Option<u64>,
}

impl RemoteFile {
    /// Whether the etag is the content's SHA-256. What is not checked is not gone on from.
    fn is_verified(&self) -> bool {
        self.etag.len() == 64
    }
}

/// The hub's answer to `api/models/{id}/revision/{revision}`.
#[derive(Deserialize)]
struct ModelInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The hub's answer to `api/models/{id}/refs`.
#[derive(Deserialize)]
struct References {
    branches: Vec<Branch>,
}

#[derive(Deserialize)]
struct Branch {
    name: String,
}

/// A transfer that did not end well.
enum Failure {
    /// Another try may do better.
    Broken(Error),
    Final(Error),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Question {
    /// What the hub itself says of a file.
    Head,
    /// A small answer.
    Json,
    /// A file's content.
    Content { from_byte: u64 },
}

impl<'a> Client<'a> {
    pub(super) fn new(repository: &'a Repository) -> Result<Self> {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let origin = endpoint.parse::<Uri>().ok().filter(|uri| {
            uri.host().is_some()
                && uri.query().is_none()
                && [Some(&Scheme::HTTP), Some(&Scheme::HTTPS)].contains(&uri.scheme())
        });
        let origin = origin.with_context(|| {
            format!("HF_ENDPOINT is {endpoint:?}: expected an address such as {DEFAULT_ENDPOINT}")
        })?;
        let config = Agent::config_builder()
            // Statuses are looked at here, to say what each means to the user.
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            // Sizes and ranges are those of the files themselves.
            .accept_encoding("identity")
            .user_agent(concat!("oxllama/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(STALL_TIMEOUT))
            .timeout_connect(Some(STALL_TIMEOUT))
            .timeout_recv_response(Some(STALL_TIMEOUT))
            .timeout_per_read(Some(STALL_TIMEOUT))
            .build();
        Ok(Self {
            agent: config.into(),
            endpoint,
            origin,
            token: token()?,
            repository,
        })
    }

    /// Sends a request, with the token where it belongs, and follows redirects (a `Head` only
    /// those within the hub). Answers the last address too.
    fn send(&self, question: Question, url: &str) -> Result<(Response<Body>, String), ureq::Error> {
        let mut url = url.to_owned();
        for _ in 0..MAX_REDIRECTS {
            let mut request = match question {
                Question::Head => self.agent.head(&url),
                Question::Json | Question::Content { .. } => self.agent.get(&url),
            };
            if let Question::Content {
                from_byte: from_byte @ 1..,
            } = question
            {
                request = request.header("Range", format!("bytes={from_byte}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| self.is_hub(&url)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = match question {
                Question::Content { .. } => request.call()?,
                Question::Head | Question::Json => request
                    .config()
                    .timeout_global(Some(SMALL_ANSWER_TIMEOUT))
                    .build()
                    .call()?,
            };
            let target = match header(&response, "location") {
                Some(location) if response.status().is_redirection() => resolve(&url, location),
                _ => return Ok((response, url)),
            };
            if question == Question::Head && !self.is_hub(&target) {
                return Ok((response, url));
            }
            url = target;
        }
        Err(ureq::Error::TooManyRedirects)
    }

    /// Whether `url` is at the endpoint's own scheme, host and port.
    fn is_hub(&self, url: &str) -> bool {
        url.parse::<Uri>().is_ok_and(|url| {
            url.scheme() == self.origin.scheme()
                && url
                    .authority()
                    .map(|authority| authority.as_str().to_ascii_lowercase())
                    == self
                        .origin
                        .authority()
                        .map(|hub| hub.as_str().to_ascii_lowercase())
        })
    }

    /// What the revision holds.
    pub(super) fn listing(&self) -> Result<Listing> {
        let Repository { id, revision } = self.repository;
        let url = format!(
            "{}/api/models/{id}/revision/{}",
            self.endpoint,
            encode(revision)
        );
        let info: ModelInfo = self.json(&url)?;
        if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            bail!("{url} answered without a commit: is it a hub?");
        }
        let files = info
            .siblings
            .into_iter()
            .map(|sibling| sibling.rfilename)
            .collect();
        Ok(Listing {
            commit: info.sha,
            files,
        })
    }

    /// The repository's other branches as a part of a message, empty if there are none.
    pub(super) fn other_revisions(&self) -> String {
        const MAX_SHOWN: usize = 24;
        let Repository { id, revision } = self.repository;
        let url = format!("{}/api/models/{id}/refs", self.endpoint);
        // Only a help: whoever has no branches has another error to read.
        let branches = self
            .json::<References>(&url)
            .map_or(Vec::new(), |refs| refs.branches);
        let mut names: Vec<String> = branches
            .into_iter()
            .map(|branch| branch.name)
            .filter(|name| name != revision && is_revision(name))
            .collect();
        names.sort();
        if names.is_empty() {
            return String::new();
        }
        let more = if names.len() > MAX_SHOWN { ", …" } else { "" };
        names.truncate(MAX_SHOWN);
        format!(
            "; other revisions: {}{more} (pull {id}@{})",
            names.join(", "),
            names[0]
        )
    }

    fn json<T: DeserializeOwned>(&self, url: &str) -> Result<T> {
        let (mut response, _) = self
            .send(Question::Json, url)
            .map_err(|error| no_answer(error, url))?;
        self.check_status(&response, url)?;
        let body = response
            .body_mut()
            .with_config()
            .limit(MAX_JSON_BYTES)
            .reader();
        serde_json::from_reader(BufReader::new(body)).with_context(|| {
            format!("{url} did not answer with the JSON of a hub: check HF_ENDPOINT")
        })
    }

    /// Asks for a file's identity without its content.
    pub(super) fn metadata(&self, commit: &str, file: &str) -> Result<RemoteFile> {
        let id = &self.repository.id;
        let url = format!("{}/{id}/resolve/{commit}/{}", self.endpoint, encode(file));
        let (response, url) = self
            .send(Question::Head, &url)
            .map_err(|error| no_answer(error, &url))?;
        let redirects = response.status().is_redirection();
        if !redirects {
            self.check_status(&response, &url)?;
        }
        let etag = header(&response, "x-linked-etag").or_else(|| header(&response, "etag"));
        let etag = etag.and_then(plain_tag).with_context(|| {
            format!("{url} answered without an ETag that names the content: is it a hub?")
        })?;
        // The length of a redirect is its own.
        let size = header(&response, "x-linked-size")
            .or_else(|| header(&response, "content-length").filter(|_| !redirects));
        Ok(RemoteFile {
            etag,
            size_bytes: size.and_then(|size| size.parse().ok()),
            url,
        })
    }

    /// Brings all of a file into `incomplete`, going on from what is there, and checks it.
    pub(super) fn download(
        &self,
        remote: &RemoteFile,
        name: &str,
        incomplete: &Path,
    ) -> Result<()> {
        let mut failures = 0;
        loop {
            let before = length(incomplete);
            let error = match self.transfer(remote, name, incomplete) {
                Ok(()) => return verify(incomplete, remote, name),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Broken(error)) => error,
            };
            if length(incomplete) >= before.saturating_add(PROGRESS_BYTES) {
                failures = 0;
            }
            failures += 1;
            if failures == MAX_FAILURES {
                return Err(error.context(format!(
                    "the download broke off {failures} times; pull again to go on from {}",
                    BinaryBytes(length(incomplete))
                )));
            }
            std::thread::sleep(RETRY_PAUSE * failures);
        }
    }

    /// Appends to `incomplete` what is still missing, in one request.
    fn transfer(&self, remote: &RemoteFile, name: &str, incomplete: &Path) -> Result<(), Failure> {
        let restart =
            || fs::remove_file(incomplete).map_err(|error| write_error(error, incomplete));
        let mut have = length(incomplete);
        let is_start = remote.size_bytes.is_some_and(|size| have <= size);
        if have > 0 && !(is_start && remote.is_verified()) {
            restart().map_err(Failure::Final)?;
            have = 0;
        }
        if have > 0 && remote.size_bytes == Some(have) {
            return Ok(());
        }
        let url = &remote.url;
        let (mut response, _) = self
            .send(Question::Content { from_byte: have }, url)
            .map_err(|error| Failure::Broken(no_answer(error, url)))?;
        let status = response.status().as_u16();
        if matches!(status, 408 | 429 | 500..=599) {
            return Err(Failure::Broken(Error::msg(format!(
                "{url} answered {status}"
            ))));
        }
        self.check_status(&response, url).map_err(Failure::Final)?;
        // A server that knows no ranges sends the whole file again.
        let resumes = status == 206;
        let start = if resumes { have } else { 0 };
        let range = header(&response, "content-range").unwrap_or_default();
        if resumes && !range.starts_with(&format!("bytes {have}-")) {
            let error = format!("{url} sent {range:?} when asked for the bytes from {have} on");
            return Err(Failure::Final(Error::msg(error)));
        }
        let mut out = OpenOptions::new()
            .create(true)
            .write(true)
            .append(resumes)
            .truncate(!resumes)
            .open(incomplete)
            .map_err(|error| Failure::Final(write_error(error, incomplete)))?;
        announce(name, remote.size_bytes, start);
        let bar = output::byte_bar(name, remote.size_bytes.unwrap_or(0));
        bar.set_position(start);
        // One byte over the size is enough to see that there is too much.
        let limit = remote.size_bytes.unwrap_or(MAX_UNSIZED_BYTES) - start;
        let body = response
            .body_mut()
            .as_reader()
            .take(limit.saturating_add(1));
        let copied = copy(&mut bar.wrap_read(body), &mut out, incomplete);
        bar.finish_and_clear();
        let received = copied?;
        if received > limit {
            // Not to be gone on from.
            restart().map_err(Failure::Final)?;
            let error = format!("{url} sent more than the {limit} bytes that were expected");
            return Err(Failure::Final(Error::msg(error)));
        }
        if remote.size_bytes.is_some() && received < limit {
            let error = format!("{url} sent {received} of {limit} bytes");
            return Err(Failure::Broken(Error::msg(error)));
        }
        Ok(())
    }

    /// What a status other than success means to the user.
    fn check_status(&self, response: &Response<Body>, url: &str) -> Result<()> {
        let status = response.status();
        let Repository { id, revision } = self.repository;
        let page = format!("{}/{id}", self.endpoint);
        match (status.as_u16(), header(response, "x-error-code")) {
            (200..=299, _) => Ok(()),
            (401 | 403, Some("GatedRepo")) => bail!(
                "{id} is gated ({status}): accept its terms at {page}, then set HF_TOKEN to a \
                 token that may read it"
            ),
            (401 | 403, _) if self.token.is_some() => bail!(
                "{id}: access refused ({status}): the model does not exist, or the token (HF_TOKEN \
                 or the one in HF_HOME) may not read it; a gated model's terms are accepted at \
                 {page}"
            ),
            (401 | 403, _) => bail!(
                "{id}: access refused ({status}): the model does not exist, or is private or \
                 gated; check the spelling, or set HF_TOKEN to a token that may read it"
            ),
            (404, Some("RevisionNotFound")) => {
                bail!("{id} has no revision {revision}{}", self.other_revisions())
            }
            (404, _) => {
                bail!("{id} at revision {revision} was not found: check the spelling ({url})")
            }
            _ => bail!("{url} answered {status}: try again later, or check HF_ENDPOINT"),
        }
    }
}

/// The user's token, looked for where Hugging Face's tools do.
fn token() -> Result<Option<String>> {
    let is_true = |value: String| ["1", "on", "yes", "true"].contains(&&*value.to_lowercase());
    if variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(is_true) {
        return Ok(None);
    }
    let given = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
    let token = match given {
        Some(token) => token,
        None => {
            let path = match variable("HF_TOKEN_PATH") {
                Some(path) => path.into(),
                None => home()?.join("token"),
            };
            fs::read_to_string(path).unwrap_or_default()
        }
    };
    let token = token.trim();
    if !token.chars().all(|c| c.is_ascii_graphic()) {
        bail!("the token (HF_TOKEN, or the file in HF_HOME) is not one line of plain letters");
    }
    Ok((!token.is_empty()).then(|| token.to_owned()))
}

fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

fn no_answer(error: ureq::Error, url: impl Display) -> Error {
    Error::new(error).context(format!(
        "cannot reach {url}: check the network or HF_ENDPOINT; --offline uses what is in the cache"
    ))
}

/// Where a redirect from `url` to `location` leads.
fn resolve(url: &str, location: &str) -> String {
    let base = url.split_once("://");
    match base {
        Some((scheme, _)) if location.starts_with("//") => format!("{scheme}:{location}"),
        Some((scheme, rest)) if location.starts_with('/') => {
            let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
            format!("{scheme}://{host}{location}")
        }
        _ => location.to_owned(),
    }
}

/// Percent-encodes a name as one part of a path.
fn encode(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    name.bytes().fold(String::new(), |mut encoded, byte| {
        match plain(byte) {
            true => encoded.push(byte.into()),
            false => encoded.push_str(&format!("%{byte:02X}")),
        }
        encoded
    })
}

/// An etag without quotes and weakness mark, if it can be a file name.
fn plain_tag(tag: &str) -> Option<String> {
    let tag = tag.trim_start_matches("W/").trim_matches('"');
    let is_plain = (1..=128).contains(&tag.len())
        && tag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    is_plain.then(|| tag.to_owned())
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Without a terminal there is no bar: then each file is a line.
fn announce(name: &str, size_bytes: Option<u64>, start: u64) {
    if io::stderr().is_terminal() {
        return;
    }
    let size = size_bytes.map_or(String::new(), |size| format!(" ({})", BinaryBytes(size)));
    match start {
        0 => output::note(format_args!("fetching {name}{size}")),
        _ => output::note(format_args!(
            "fetching {name}{size}, going on from {}",
            BinaryBytes(start)
        )),
    }
}

/// Copies to the end and answers the count of bytes; tells trouble with the network, which may
/// pass, from trouble with the disk.
fn copy(from: &mut impl Read, to: &mut File, path: &Path) -> Result<u64, Failure> {
    let mut buffer = vec![0; 1 << 18];
    let mut copied = 0;
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(Failure::Broken(
                    Error::new(error).context("the connection broke"),
                ));
            }
        };
        to.write_all(&buffer[..read])
            .map_err(|error| Failure::Final(write_error(error, path)))?;
        copied += read as u64;
    }
}

/// Checks the content against its SHA-256, if the hub said that.
fn verify(path: &Path, remote: &RemoteFile, name: &str) -> Result<()> {
    if !remote.is_verified() {
        return Ok(());
    }
    let mut hasher = Sha256::new();
    let bar = output::byte_bar(&format!("checking {name}"), length(path));
    let mut file = bar.wrap_read(File::open(path)?);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    bar.finish_and_clear();
    let digest: String = hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if digest != remote.etag {
        fs::remove_file(path).map_err(|error| write_error(error, path))?;
        bail!(
            "its SHA-256 is {digest}, expected {}: it was damaged on the way and is removed; pull \
             again",
            remote.etag
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_become_names_of_files_or_nothing() {
        assert_eq!(plain_tag("\"abc-1\"").as_deref(), Some("abc-1"));
        assert_eq!(plain_tag("W/\"abc\"").as_deref(), Some("abc"));
        for bad in [
            "",
            "\"\"",
            "\"../x\"",
            "a/b",
            "a.incomplete",
            "a b",
            &"a".repeat(129),
        ] {
            assert_eq!(plain_tag(bad), None, "{bad}");
        }
    }

    #[test]
    fn redirects_lead_on_from_their_page() {
        let base = "http://hub:81/a/b?c";
        for (location, expected) in [
            ("/x?y", "http://hub:81/x?y"),
            ("//other/x", "http://other/x"),
            ("https://other/x", "https://other/x"),
        ] {
            assert_eq!(resolve(base, location), expected);
        }
    }

    #[test]
    fn names_are_encoded_as_one_part() {
        assert_eq!(encode("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(encode("a b+ü.json"), "a%20b%2B%C3%BC.json");
    }
}
