//! The file of jobs.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

/// A job as it stands in the file.
#[derive(Debug)]
pub(super) struct Line {
    /// Counted from 1.
    pub(super) number: usize,
    pub(super) custom_id: String,
    pub(super) fields: Map<String, Value>,
}

impl Line {
    fn priority(&self) -> i64 {
        let priority = self.fields.get("priority");
        priority.and_then(Value::as_i64).unwrap_or(0)
    }

    /// Whether the job needs a second sequence.
    pub(super) fn is_guided(&self) -> bool {
        let negative = self.fields.get("negative_prompt");
        negative.is_some_and(|prompt| !prompt.is_null())
    }

    /// The answers asked for, if that is a number at all.
    pub(super) fn choices(&self) -> Option<u64> {
        self.fields.get("n").and_then(Value::as_u64)
    }

    pub(super) fn has_seed(&self) -> bool {
        self.fields.get("seed").is_some_and(|seed| !seed.is_null())
    }
}

/// Puts jobs into the order in which they are submitted: those of a higher priority first, those
/// of one priority as they stand in the file.
pub(super) fn order(lines: &mut [Line]) {
    lines.sort_by_key(|line| std::cmp::Reverse(line.priority()));
}

/// Reads the jobs of a file; `-` is standard input.
///
/// # Errors
/// A line that is no job, or two with the same id.
pub(super) fn read(path: &Path) -> Result<Vec<Line>> {
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        fs::read(path)
    };
    let bytes = bytes.with_context(|| format!("cannot read the jobs in {}", path.display()))?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);

    let mut lines: Vec<Line> = Vec::new();
    let mut seen: HashMap<String, usize> = HashMap::new();
    for (number, line) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let line =
            parse(line, number).with_context(|| format!("{}, line {number}", path.display()))?;
        if let Some(first) = seen.insert(line.custom_id.clone(), number) {
            bail!(
                "{}: lines {first} and {number} both have the custom_id {:?}: give each job one \
                 of its own",
                path.display(),
                line.custom_id
            );
        }
        lines.push(line);
    }
    if lines.is_empty() {
        bail!(
            "{} holds no job: expected one JSON object a line, such as {{\"custom_id\": \"a\", \
             \"prompt\": \"Once upon a time\"}}",
            path.display()
        );
    }
    Ok(lines)
}

fn parse(line: &[u8], number: usize) -> Result<Line> {
    let text = std::str::from_utf8(line).map_err(|error| {
        anyhow::anyhow!("not UTF-8 (byte {} of the line)", error.valid_up_to() + 1)
    })?;
    let fields = match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => fields,
        Ok(other) => bail!(
            "found {}, expected a JSON object with custom_id and prompt or messages",
            kind(&other)
        ),
        Err(error) => bail!(
            "found {}, which is not JSON at column {}: expected one whole object a line",
            shortened(text.trim()),
            error.column()
        ),
    };
    let custom_id = match fields.get("custom_id") {
        Some(Value::String(id)) if !id.is_empty() => id.clone(),
        Some(other) => bail!("custom_id is {other}, expected a text that is not empty"),
        None => {
            bail!("found no custom_id, expected a text that names the job: \"custom_id\": \"a\"")
        }
    };
    Ok(Line {
        number,
        custom_id,
        fields,
    })
}

/// A value's type in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A user's text, quoted and cut to what a message can bear.
pub(super) fn shortened(text: &str) -> String {
    const LONGEST_CHARS: usize = 60;
    match text.char_indices().nth(LONGEST_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_of_high_priority_come_first() {
        let line = |(index, priority): (usize, &str)| {
            let text = format!("{{\"custom_id\": \"job-{index}\", \"prompt\": \"a\"{priority}}}");
            parse(text.as_bytes(), index + 1).unwrap()
        };
        let priorities = ["", "", ", \"priority\": 5", ""];
        let mut lines: Vec<Line> = priorities.into_iter().enumerate().map(line).collect();
        order(&mut lines);
        let ids: Vec<&str> = lines.iter().map(|line| line.custom_id.as_str()).collect();
        assert_eq!(ids, ["job-2", "job-0", "job-1", "job-3"]);
    }
}
