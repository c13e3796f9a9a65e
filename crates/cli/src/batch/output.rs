//! The file of answers, which is also the record of what is done.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use super::input::shortened;
use crate::jobs::Outcome;

/// How every line begins.
const LINE_START: &[u8] = b"{\"custom_id\":";

/// The file of answers, open for more.
pub(super) struct Answers {
    path: PathBuf,
    file: File,
    /// The file that `file` has replaced: its lock holds off whoever opened it before.
    _replaced: Option<File>,
}

#[derive(Serialize)]
struct AnswerLine<'a> {
    custom_id: &'a str,
    #[serde(flatten)]
    outcome: &'a Outcome<'a>,
}

/// What a file of answers holds.
#[derive(Default)]
struct Found {
    answered: HashSet<String>,
    /// Its whole lines, but for those of failed jobs.
    kept: Vec<u8>,
}

impl Answers {
    /// Opens the file and says which jobs are answered in it. An unfinished last line, which a
    /// crash may have left, and the lines of failed jobs are taken out.
    ///
    /// # Errors
    /// The file cannot be written, is being written, or holds something else than answers.
    pub(super) fn open(path: &Path) -> Result<(Self, HashSet<String>)> {
        let cannot_write = || format!("cannot write the answers to {}", path.display());
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        let is_special = fs::metadata(path).is_ok_and(|data| !data.is_file() && !data.is_dir());
        if is_special {
            // A pipe or a terminal remembers nothing.
            let file = options.open(path).with_context(cannot_write)?;
            return Ok((Self::new(path, file, None), HashSet::new()));
        }
        let mut file = options.read(true).open(path).with_context(cannot_write)?;
        lock(&file, path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .with_context(|| format!("cannot read the answers in {}", path.display()))?;
        let found = read(&bytes, path)?;
        if found.kept.len() == bytes.len() {
            return Ok((Self::new(path, file, None), found.answered));
        }
        let new = replace(path, &found.kept).with_context(cannot_write)?;
        Ok((Self::new(path, new, Some(file)), found.answered))
    }

    fn new(path: &Path, file: File, replaced: Option<File>) -> Self {
        Self {
            path: path.to_path_buf(),
            file,
            _replaced: replaced,
        }
    }

    /// Adds a line, whole.
    pub(super) fn write(&mut self, custom_id: &str, outcome: &Outcome<'_>) -> Result<()> {
        let mut line = serde_json::to_vec(&AnswerLine { custom_id, outcome })?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .with_context(|| format!("cannot write the answers to {}", self.path.display()))
    }
}

fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => bail!(
            "{} is being written by another process: wait until it ends, or give another \
             --output",
            path.display()
        ),
        // A file system without locks must do without.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// Puts a file with `bytes` in the place of `path`, so that a crash leaves the one or the other.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<File> {
    // A symbolic link stays one.
    let path = path.canonicalize()?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = write_new(&temporary, bytes, &path);
    if written.is_err() {
        // The error is what matters.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write_new(temporary: &Path, bytes: &[u8], path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    let mut file = options.append(true).create_new(true).open(temporary)?;
    file.set_permissions(fs::metadata(path)?.permissions())?;
    file.write_all(bytes)?;
    file.sync_all()?;
    // Nobody else knows it: a file system without locks is the only reason to fail.
    let _ = file.try_lock();
    fs::rename(temporary, path)?;
    Ok(file)
}

fn read(bytes: &[u8], path: &Path) -> Result<Found> {
    let mut found = Found::default();
    for (number, line) in (1..).zip(bytes.split_inclusive(|&byte| byte == b'\n')) {
        let refuse = |what: String| {
            anyhow::anyhow!(
                "{}, line {number}: found {what}, expected the answers of an earlier run: give \
                 another --output",
                path.display()
            )
        };
        let is_whole = line.ends_with(b"\n");
        if !is_whole && (line.starts_with(LINE_START) || LINE_START.starts_with(line)) {
            return Ok(found);
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let text = String::from_utf8_lossy(line);
        let answer: Option<Value> = serde_json::from_slice(line).ok();
        let custom_id = answer
            .as_ref()
            .and_then(|answer| answer["custom_id"].as_str());
        let (Some(answer), Some(custom_id), true) = (&answer, custom_id, is_whole) else {
            return Err(refuse(shortened(text.trim())));
        };
        if answer.get("error").is_some() {
            continue;
        }
        if answer.get("text").is_none() && answer.get("choices").is_none() {
            return Err(refuse(shortened(text.trim())));
        }
        found.answered.insert(custom_id.to_owned());
        found.kept.extend_from_slice(line);
    }
    Ok(found)
}
