//! `oxllama generate`

use std::io::{self, Read};
use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use oxllama_engine::{Completion, EngineError, Event, Generator, Job, TokenLogprob};
use oxllama_text::{ChatOptions, ChatTemplate, EncodeOptions, Message};
use serde::Serialize;

use crate::args::GenerateArgs;
use crate::session::{Session, StepSize};
use crate::{interrupt, output, sampling};

pub(crate) fn run(args: GenerateArgs) -> Result<ExitCode> {
    let prompt = read_prompt(&args.prompt)?;
    sampling::check(&args.sampling)?;
    let mut session = Session::start(&args.model, StepSize::ONE_JOB)?;
    let prompt_ids = encode(&args, &prompt, &session)?;
    let job = Job {
        prompt_ids,
        max_new_tokens: args.max_tokens,
        sampling: sampling::settings(&args.sampling, session.opened.source.generation_config())?,
        seed: sampling::seed(&args.sampling),
        stop_token_ids: session.tokenizer.eos_ids().to_vec(),
        stop_strings: args.sampling.stop,
        logprobs: args.logprobs,
    };
    let interrupted = interrupt::flag()?;
    let mut generator = Generator::new(session.runner.as_mut(), &session.tokenizer);
    let mut write_error = None;
    let (completion, error) = generator.run(&job, &mut |event| {
        if let (Event::Text(text), false) = (event, args.json)
            && let Err(error) = output::text(text)
        {
            write_error = Some(error);
            return ControlFlow::Break(());
        }
        if interrupted.is_set() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    if let Some(error) = write_error {
        return Err(error);
    }
    if args.json {
        output::json(&Answer::new(&completion, &job, session.load_s))?;
    } else {
        output::line("")?;
        output::note(format_args!(
            "{} loaded in {:.3} s",
            summary(&completion),
            session.load_s
        ));
    }
    match error {
        Some(error) => Err(EngineError::into(error)),
        None => Ok(ExitCode::SUCCESS),
    }
}

fn read_prompt(argument: &str) -> Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut bytes = Vec::new();
    io::stdin()
        .read_to_end(&mut bytes)
        .context("cannot read the prompt from standard input")?;
    match String::from_utf8(bytes) {
        Ok(prompt) => Ok(prompt),
        Err(error) => bail!(
            "the prompt on standard input is not UTF-8 (byte {}): convert it first",
            error.utf8_error().valid_up_to()
        ),
    }
}

fn encode(args: &GenerateArgs, prompt: &str, session: &Session) -> Result<Vec<u32>> {
    let tokenizer = &session.tokenizer;
    if !args.chat && args.system.is_none() {
        return Ok(tokenizer.encode(prompt, EncodeOptions::PROMPT)?);
    }
    let template = ChatTemplate::from_config(
        session
            .opened
            .source
            .tokenizer_config()
            .unwrap_or(&serde_json::Value::Null),
    )?;
    let system = args
        .system
        .as_ref()
        .map(|system| Message::new("system", system));
    let messages: Vec<Message> = system
        .into_iter()
        .chain([Message::new("user", prompt)])
        .collect();
    let options = ChatOptions {
        add_generation_prompt: true,
        ..ChatOptions::default()
    };
    let rendered = template.render(&messages, &options)?;
    Ok(tokenizer.encode(&rendered, EncodeOptions::CHAT)?)
}

/// One line about where the time went.
pub(crate) fn summary(completion: &Completion) -> String {
    let timings = &completion.timings;
    let rate = timings
        .decode_tokens_per_second()
        .map_or_else(String::new, |rate| format!(" ({rate:.1} tokens/s)"));
    format!(
        "[{} prompt tokens in {:.3} s, {} new in {:.3} s{rate}]",
        timings.prompt_tokens, timings.prefill_s, timings.generated_tokens, timings.decode_s,
    )
}

/// The object that `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    text: &'a str,
    token_ids: &'a [u32],
    prompt_token_ids: &'a [u32],
    finish_reason: oxllama_engine::FinishReason,
    logprobs: Option<&'a [TokenLogprob]>,
    timings: AnswerTimings,
}

#[derive(Serialize)]
struct AnswerTimings {
    load_s: f64,
    prompt_tokens: usize,
    prefill_s: f64,
    generated_tokens: usize,
    decode_s: f64,
}

impl<'a> Answer<'a> {
    fn new(completion: &'a Completion, job: &'a Job, load_s: f64) -> Self {
        let timings = &completion.timings;
        Self {
            text: &completion.text,
            token_ids: &completion.token_ids,
            prompt_token_ids: &job.prompt_ids,
            finish_reason: completion.finish_reason,
            logprobs: completion.logprobs.as_deref(),
            timings: AnswerTimings {
                load_s,
                prompt_tokens: timings.prompt_tokens,
                prefill_s: timings.prefill_s,
                generated_tokens: timings.generated_tokens,
                decode_s: timings.decode_s,
            },
        }
    }
}
