//! From a job's fields to a job.

use anyhow::{Context, Result, anyhow, bail};
use oxllama_engine::{ConstraintSpec, Guidance, Job, SettingsError};
use oxllama_text::Message;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::input::{kind, shortened};
use super::names;
use crate::args::MOST_CHOICES;
use crate::jobs::{Prompts, Request};

/// What holds where a job's fields say nothing.
pub(super) struct Defaults<'a> {
    /// A job without a prompt.
    pub(super) template: &'a Job,
    pub(super) choices: usize,
    pub(super) cfg_scale: f32,
    pub(super) prompts: &'a Prompts<'a>,
}

/// Fields that count only together with others.
#[derive(Default)]
struct Pending<'a> {
    prompt: Option<&'a Value>,
    messages: Option<&'a Value>,
    negative_prompt: Option<&'a Value>,
    cfg_scale: Option<f32>,
    logprobs: Option<&'a Value>,
    top_logprobs: Option<usize>,
    /// The field that sets the constraint.
    constrained_by: Option<&'a str>,
    choices: Option<usize>,
}

impl Defaults<'_> {
    /// The job that `fields` describe. `null` is as good as no field.
    ///
    /// # Errors
    /// A field is unknown, has a value of the wrong type or contradicts another, or the prompt
    /// cannot be encoded.
    pub(super) fn request(&self, fields: &Map<String, Value>) -> Result<Request> {
        let mut job = self.template.clone();
        let mut pending = Pending::default();
        for (name, value) in fields {
            if !value.is_null() {
                set(&mut job, &mut pending, name, value)?;
            }
        }
        job.prompt_ids = self.prompt_ids(&pending)?;
        self.set_guidance(&mut job, &pending)?;
        if let Some(logprobs) = logprobs(&pending)? {
            job.logprobs = logprobs;
        }
        Ok(Request {
            job,
            choices: pending.choices.unwrap_or(self.choices),
        })
    }

    fn prompt_ids(&self, pending: &Pending<'_>) -> Result<Vec<u32>> {
        match (pending.prompt, pending.messages) {
            (Some(prompt), None) => self.encode("prompt", prompt),
            (None, Some(messages)) => {
                let messages: Vec<Message> = Vec::deserialize(messages).map_err(|error| {
                    anyhow!(
                        "messages: {error}; expected a list such as [{{\"role\": \"user\", \
                             \"content\": \"Hello\"}}]"
                    )
                })?;
                if messages.is_empty() {
                    bail!("messages is an empty list, expected at least one message");
                }
                self.prompts.messages(messages)
            }
            (Some(_), Some(_)) => bail!("found both prompt and messages, expected one of them"),
            (None, None) => bail!("found neither prompt nor messages, expected one of them"),
        }
    }

    /// A text, or a list of token ids as it stands.
    fn encode(&self, name: &str, prompt: &Value) -> Result<Vec<u32>> {
        match prompt {
            Value::String(text) => self.prompts.prompt(text),
            other => {
                token_ids(other).ok_or_else(|| wrong(name, other, "a text, or a list of token ids"))
            }
        }
    }

    fn set_guidance(&self, job: &mut Job, pending: &Pending<'_>) -> Result<()> {
        if let Some(prompt) = pending.negative_prompt {
            job.guidance = Some(Guidance {
                negative_ids: self.encode("negative_prompt", prompt)?,
                scale: self.cfg_scale,
            });
        }
        match (&mut job.guidance, pending.cfg_scale) {
            (Some(guidance), Some(scale)) => guidance.scale = scale,
            (None, Some(_)) => bail!("found cfg_scale without negative_prompt"),
            (_, None) => {}
        }
        Ok(())
    }
}

/// Sets one field, or notes it for later.
fn set<'a>(
    job: &mut Job,
    pending: &mut Pending<'a>,
    name: &'a str,
    value: &'a Value,
) -> Result<()> {
    match name {
        "custom_id" => {}
        "prompt" => pending.prompt = Some(value),
        "messages" => pending.messages = Some(value),
        "max_tokens" | "max_completion_tokens" => job.max_new_tokens = count(name, value)?,
        "min_tokens" => job.min_new_tokens = count(name, value)?,
        "seed" => {
            let signed = || value.as_i64().map(i64::cast_unsigned);
            let seed = value.as_u64().or_else(signed);
            job.seed = seed.ok_or_else(|| wrong(name, value, "a whole number"))?;
        }
        "stop" => job.stop_strings = texts(name, value)?,
        "banned_strings" => job.banned_strings = texts(name, value)?,
        "stop_token_ids" => {
            let ids = token_ids(value).ok_or_else(|| wrong(name, value, "a list of token ids"))?;
            job.stop_token_ids.extend(ids);
        }
        "n" => {
            let choices = count(name, value)?;
            if !(1..=MOST_CHOICES as usize).contains(&choices) {
                bail!("n is {choices}, expected 1 to {MOST_CHOICES}");
            }
            pending.choices = Some(choices);
        }
        "logprobs" => pending.logprobs = Some(value),
        "top_logprobs" => pending.top_logprobs = Some(count(name, value)?),
        "token_healing" => {
            let heals = value.as_bool();
            job.token_healing = heals.ok_or_else(|| wrong(name, value, "true or false"))?;
        }
        "priority" => {
            let priority = value
                .as_i64()
                .and_then(|priority| i32::try_from(priority).ok());
            job.priority = priority.ok_or_else(|| wrong(name, value, "a whole number"))?;
        }
        "negative_prompt" => pending.negative_prompt = Some(value),
        "cfg_scale" => {
            let scale = value
                .as_f64()
                .ok_or_else(|| wrong(name, value, "a number"))?;
            pending.cfg_scale = Some(scale as f32);
        }
        "response_format" | "guided_json" | "guided_regex" | "guided_grammar" | "guided_choice" => {
            if let Some(other) = pending.constrained_by.replace(name) {
                bail!("found both {other} and {name}, expected one of them");
            }
            job.constraint = constraint(name, value)?;
        }
        _ => job.sampling.set(name, value).map_err(|error| match error {
            SettingsError::Unknown { .. } => anyhow!(names::unknown(name)),
            SettingsError::Invalid { .. } => error.into(),
        })?,
    }
    Ok(())
}

fn constraint(name: &str, value: &Value) -> Result<Option<ConstraintSpec>> {
    Ok(Some(match name {
        "guided_json" => ConstraintSpec::JsonSchema(schema(name, value)?),
        "guided_regex" => ConstraintSpec::Regex(text(name, value)?),
        "guided_grammar" => ConstraintSpec::Lark(text(name, value)?),
        "guided_choice" => ConstraintSpec::Choice(texts(name, value)?),
        _ => return response_format(value),
    }))
}

/// OpenAI's way to ask for JSON.
fn response_format(value: &Value) -> Result<Option<ConstraintSpec>> {
    let kind = value.get("type").and_then(Value::as_str);
    match kind {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(ConstraintSpec::Json)),
        Some("json_schema") => {
            let found = value.pointer("/json_schema/schema").context(
                "response_format has no schema, expected {\"type\": \"json_schema\", \
                 \"json_schema\": {\"schema\": …}}",
            )?;
            let schema = schema("response_format's schema", found)?;
            Ok(Some(ConstraintSpec::JsonSchema(schema)))
        }
        _ => Err(wrong(
            "response_format",
            value,
            "{\"type\": \"text\"}, {\"type\": \"json_object\"} or {\"type\": \"json_schema\", \
             \"json_schema\": {\"schema\": …}}",
        )),
    }
}

fn schema(name: &str, value: &Value) -> Result<Value> {
    match value {
        Value::Object(_) | Value::Bool(_) => Ok(value.clone()),
        // As some programs send it.
        Value::String(text) => serde_json::from_str(text)
            .map_err(|error| anyhow!("{name} is a text that is not JSON: {error}")),
        _ => Err(wrong(name, value, "a JSON schema")),
    }
}

/// What the fields say of log probabilities: of OpenAI's chats a flag and a number, of its
/// completions one number.
fn logprobs(pending: &Pending<'_>) -> Result<Option<Option<usize>>> {
    let most_likely = pending.top_logprobs;
    Ok(match pending.logprobs {
        None => most_likely.map(Some),
        Some(Value::Bool(true)) => Some(Some(most_likely.unwrap_or(0))),
        Some(Value::Bool(false)) if most_likely.is_some() => {
            bail!("found top_logprobs, but logprobs is false")
        }
        Some(Value::Bool(false)) => Some(None),
        Some(number) => match (number.as_u64(), most_likely) {
            (Some(_), Some(_)) => bail!("found top_logprobs and a number for logprobs: give one"),
            (Some(number), None) => Some(Some(usize::try_from(number)?)),
            (None, _) => return Err(wrong("logprobs", number, "true, false or a number")),
        },
    })
}

fn count(name: &str, value: &Value) -> Result<usize> {
    let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
    count.ok_or_else(|| wrong(name, value, "a whole number from 0"))
}

fn text(name: &str, value: &Value) -> Result<String> {
    let text = value.as_str().map(str::to_owned);
    text.ok_or_else(|| wrong(name, value, "a text"))
}

/// A text or a list of them.
fn texts(name: &str, value: &Value) -> Result<Vec<String>> {
    let texts = match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(list) => list
            .iter()
            .map(|text| text.as_str().map(str::to_owned))
            .collect(),
        _ => None,
    };
    texts.ok_or_else(|| wrong(name, value, "a text or a list of texts"))
}

fn token_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
    value.as_array()?.iter().map(id).collect()
}

fn wrong(name: &str, value: &Value, expected: &str) -> anyhow::Error {
    let found = match value {
        Value::Array(_) | Value::Object(_) => format!("{} ", kind(value)),
        _ => String::new(),
    };
    let text = match value {
        Value::String(text) => shortened(text),
        other => shortened(&other.to_string()).trim_matches('"').to_owned(),
    };
    anyhow!("{name} is {found}{text}, expected {expected}")
}
