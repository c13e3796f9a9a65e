//! From options to jobs, and from completions to what is printed.

mod answer;
mod prompt;
mod together;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use oxllama_engine::{Completion, ConstraintSpec, Event, Job, JobStream};
use oxllama_text::{BannedMatcher, StopMatcher};

pub(crate) use answer::{Answer, Outcome, failure, summary};
pub(crate) use prompt::Prompts;
pub(crate) use together::{News, Together};

use crate::args::{AnswerArgs, ConstraintArgs};
use crate::interrupt::Interrupt;
use crate::sampling::{self, SamplingArgs};
use crate::serving::Serving;

/// Answers that a command submits before others have ended, but for the choices of the last
/// prompt: enough for any number of sequences at a time to be kept busy.
pub(crate) const MOST_IN_FLIGHT: usize = 1 << 13;

/// One prompt and the number of answers wanted.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) job: Job,
    pub(crate) choices: usize,
}

/// What the options ask of every job.
pub(crate) struct Wishes<'a> {
    pub(crate) sampling: &'a SamplingArgs,
    pub(crate) answer: &'a AnswerArgs,
    pub(crate) max_new_tokens: usize,
    constraint: Option<ConstraintSpec>,
}

impl<'a> Wishes<'a> {
    /// Reads the files that options name, and refuses what no model could do, before one is
    /// loaded for it.
    pub(crate) fn new(
        sampling: &'a SamplingArgs,
        answer: &'a AnswerArgs,
        max_new_tokens: usize,
    ) -> Result<Self> {
        sampling::check(sampling)?;
        StopMatcher::new(&sampling.stop)?;
        BannedMatcher::new(&answer.ban)?;
        Ok(Self {
            sampling,
            answer,
            max_new_tokens,
            constraint: constraint(&answer.constraint)?,
        })
    }

    /// A job without a prompt, for all others to be made from.
    pub(crate) fn template(&self, serving: &Serving) -> Result<Job> {
        let source = &serving.opened.source;
        Ok(Job {
            min_new_tokens: self.answer.min_tokens,
            sampling: sampling::settings(self.sampling, source.generation_config())?,
            seed: sampling::seed(self.sampling),
            stop_token_ids: serving.engine.tokenizer().eos_ids().to_vec(),
            stop_strings: self.sampling.stop.clone(),
            banned_strings: self.answer.ban.clone(),
            constraint: self.constraint.clone(),
            adapter: serving.adapter,
            speculation: serving.speculation,
            ..Job::new(Vec::new(), self.max_new_tokens)
        })
    }
}

fn constraint(args: &ConstraintArgs) -> Result<Option<ConstraintSpec>> {
    if let Some(path) = &args.json_schema {
        let schema = serde_json::from_str(&read(path)?)
            .with_context(|| format!("{} is not JSON", path.display()))?;
        return Ok(Some(ConstraintSpec::JsonSchema(schema)));
    }
    if let Some(path) = &args.grammar {
        return Ok(Some(ConstraintSpec::Lark(read(path)?)));
    }
    if let Some(regex) = &args.regex {
        return Ok(Some(ConstraintSpec::Regex(regex.clone())));
    }
    let choices = &args.choice;
    Ok((!choices.is_empty()).then(|| ConstraintSpec::Choice(choices.clone())))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .with_context(|| format!("cannot read {} as UTF-8 text", path.display()))
}

/// Reads a job's events until it ends or the user interrupts: then `on_interrupt` is called,
/// and what it returns, the rest of the stream or nothing, is read.
pub(crate) fn follow(
    stream: JobStream,
    interrupt: Interrupt,
    mut on_text: impl FnMut(&str) -> Result<()>,
    on_interrupt: impl FnOnce(JobStream) -> Option<JobStream>,
) -> Result<Completion> {
    let mut collected = oxllama_engine::Collected::default();
    let mut stream = Some(stream);
    let mut on_interrupt = Some(on_interrupt);
    while let Some(event) = stream.as_mut().and_then(JobStream::next) {
        if let Event::Token { text, .. } = &event {
            on_text(text)?;
        }
        collected.add(event);
        if interrupt.is_set()
            && let Some(on_interrupt) = on_interrupt.take()
        {
            stream = stream.and_then(on_interrupt);
        }
    }
    Ok(collected.finish())
}
