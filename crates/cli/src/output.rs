//! What reaches the terminal.

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Writes to standard output and flushes, so that streamed text appears at once.
pub(crate) fn text(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes a line to standard output.
pub(crate) fn line(line: impl std::fmt::Display) -> Result<()> {
    text(&format!("{line}\n"))
}

/// Prints one JSON object.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<()> {
    line(serde_json::to_string_pretty(value)?)
}

/// A note to the user on standard error. When nobody reads that, the note is dropped.
pub(crate) fn note(note: impl std::fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{note}");
}

/// An error with its causes, on standard error.
pub(crate) fn error(error: &anyhow::Error) {
    note(format_args!("oxllama: {}", message(error)));
}

/// An error with its causes in one line.
pub(crate) fn message(error: &anyhow::Error) -> String {
    // A typed error's own message often ends with its source's: print each text once.
    let mut message = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if !message.contains(&cause) {
            if !message.is_empty() {
                message.push_str(": ");
            }
            message.push_str(&cause);
        }
    }
    message
}

/// A number of things: `1 job`, `2 jobs`.
pub(crate) fn count(number: usize, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    }
}

/// Whether the reader of our output went away (`oxllama … | head`), which is no error.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// A bar that counts bytes on standard error; invisible when that is not a terminal.
pub(crate) fn byte_bar(what: &str, total_bytes: u64) -> ProgressBar {
    let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    bar(template, total_bytes).with_message(what.to_owned())
}

/// The same for jobs.
pub(crate) fn job_bar(total_jobs: u64) -> ProgressBar {
    bar("[{bar:30}] {pos}/{len} jobs{msg} {eta}", total_jobs)
}

fn bar(template: &str, length: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).map_or_else(
        |_| ProgressStyle::default_bar(),
        |style| style.progress_chars("=> "),
    );
    ProgressBar::new(length).with_style(style)
}
