//! `oxllama generate`

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use oxllama_engine::{Completion, Guidance, Job};

use crate::args::GenerateArgs;
use crate::batch;
use crate::jobs::{
    Answer, MOST_IN_FLIGHT, News, Outcome, Prompts, Request, Together, Wishes, failure, follow,
    summary,
};
use crate::serving::Serving;
use crate::{interrupt, output, sampling};

/// Answers at a time unless the user says otherwise.
const AT_A_TIME: u64 = 8;

/// How strongly a negative prompt counts unless the user says otherwise.
const CFG_SCALE: f32 = 1.5;

pub(crate) fn run(args: GenerateArgs) -> Result<ExitCode> {
    let wishes = Wishes::new(&args.sampling, &args.answer, args.max_tokens)?;
    if let (Some(input), Some(output)) = (&args.input, &args.output) {
        return batch::run(&args, &wishes, input, output);
    }
    let prompts = read_prompts(&args.prompt)?;
    let answers = prompts.len() as u64 * u64::from(args.choices);
    let serving = start(&args, answers, args.negative_prompt.is_some())?;
    let encoder = encoder(&args, &serving)?;
    let template = template(&args, &wishes, &serving, &encoder)?;
    if let ([prompt], 1) = (&prompts[..], args.choices) {
        let prompt_ids = encoder.prompt(prompt)?;
        let job = Job {
            prompt_ids,
            ..template
        };
        return one(&args, &serving, job);
    }
    let requests = prompts.iter().map(|prompt| {
        let job = Job {
            prompt_ids: encoder.prompt(prompt)?,
            seed: sampling::seed(&args.sampling),
            ..template.clone()
        };
        let choices = usize::from(args.choices);
        Ok(Request { job, choices })
    });
    Several::new(&args, &serving, prompts.len()).run(requests)
}

/// Loads the model for `answers` answers, which take two sequences each if any is guided.
pub(crate) fn start(args: &GenerateArgs, answers: u64, is_guided: bool) -> Result<Serving> {
    let at_a_time = args.batch.unwrap_or(answers.clamp(1, AT_A_TIME));
    let sequences = if is_guided { 2 * at_a_time } else { at_a_time };
    Serving::start(&args.model, &args.engine, sequences)
}

pub(crate) fn encoder<'a>(args: &GenerateArgs, serving: &'a Serving) -> Result<Prompts<'a>> {
    Prompts::new(
        serving.engine.tokenizer(),
        &serving.opened.source,
        args.chat,
        args.system.clone(),
    )
}

/// What the options ask of every job.
pub(crate) fn template(
    args: &GenerateArgs,
    wishes: &Wishes<'_>,
    serving: &Serving,
    encoder: &Prompts<'_>,
) -> Result<Job> {
    let guidance = match &args.negative_prompt {
        Some(prompt) => Some(Guidance {
            negative_ids: encoder
                .prompt(prompt)
                .context("cannot use the negative prompt")?,
            scale: cfg_scale(args),
        }),
        None => None,
    };
    Ok(Job {
        guidance,
        logprobs: args.logprobs,
        token_healing: args.heal,
        ..wishes.template(serving)?
    })
}

/// The scale of a guided job that does not say.
pub(crate) fn cfg_scale(args: &GenerateArgs) -> f32 {
    args.cfg_scale.unwrap_or(CFG_SCALE)
}

fn read_prompts(arguments: &[String]) -> Result<Vec<String>> {
    if arguments.iter().filter(|prompt| *prompt == "-").count() > 1 {
        bail!("--prompt - was given twice, but standard input can be read only once");
    }
    arguments
        .iter()
        .map(|argument| match argument.as_str() {
            "-" => read_standard_input(),
            prompt => Ok(prompt.to_owned()),
        })
        .collect()
}

fn read_standard_input() -> Result<String> {
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

/// One answer, streamed as it comes.
fn one(args: &GenerateArgs, serving: &Serving, job: Job) -> Result<ExitCode> {
    let interrupt = interrupt::flag()?;
    let prompt_ids = job.prompt_ids.clone();
    let stream = serving.engine.submit(job)?;
    let on_text = |text: &str| match args.json {
        true => Ok(()),
        false => output::text(text),
    };
    let completion = follow(stream, interrupt, on_text, |stream| {
        serving.engine.shutdown();
        Some(stream)
    })?;
    if args.json {
        output::json(&Answer::new(&completion, &prompt_ids, serving.load_s))?;
    } else {
        output::line("")?;
        output::note(format_args!(
            "{} loaded in {:.3} s",
            summary(&completion),
            serving.load_s
        ));
    }
    failure(&completion)?;
    Ok(ExitCode::SUCCESS)
}

/// Several answers, printed in the order of their prompts.
struct Several<'a> {
    args: &'a GenerateArgs,
    serving: &'a Serving,
    prompts: usize,
    /// Those that ended before an earlier prompt's.
    waiting: BTreeMap<usize, (Vec<u32>, Result<Vec<Completion>>)>,
    /// For `--json`, printed at the end.
    objects: Vec<serde_json::Value>,
    printed: usize,
    failed: usize,
    prompt_tokens: usize,
    generated_tokens: usize,
}

impl<'a> Several<'a> {
    fn new(args: &'a GenerateArgs, serving: &'a Serving, prompts: usize) -> Self {
        Self {
            args,
            serving,
            prompts,
            waiting: BTreeMap::new(),
            objects: Vec::new(),
            printed: 0,
            failed: 0,
            prompt_tokens: 0,
            generated_tokens: 0,
        }
    }

    fn run(mut self, requests: impl Iterator<Item = Result<Request>>) -> Result<ExitCode> {
        let start = Instant::now();
        let together = Together {
            engine: &self.serving.engine,
            in_flight: MOST_IN_FLIGHT,
            interrupt: interrupt::flag()?,
        };
        together.run(requests, |news| self.hear(news))?;
        if self.args.json {
            // One prompt with several choices is one object still.
            match &self.objects[..] {
                [object] if self.prompts == 1 => output::json(object)?,
                objects => output::json(&objects)?,
            }
        } else {
            let run_s = start.elapsed().as_secs_f64();
            output::note(format_args!(
                "[{} with {} tokens, {} new, together in {run_s:.3} s ({:.1} tokens/s)] loaded \
                 in {:.3} s",
                output::count(self.prompts, "prompt"),
                self.prompt_tokens,
                self.generated_tokens,
                self.generated_tokens as f64 / run_s,
                self.serving.load_s
            ));
        }
        Ok(match self.failed {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    }

    fn hear(&mut self, news: News) -> Result<()> {
        let News::Ended {
            place,
            prompt_ids,
            completions,
        } = news
        else {
            return Ok(());
        };
        self.waiting.insert(place, (prompt_ids, completions));
        while let Some((prompt_ids, completions)) = self.waiting.remove(&self.printed) {
            self.printed += 1;
            self.print(&prompt_ids, completions)?;
        }
        Ok(())
    }

    /// Prints the answers to prompt number `self.printed`.
    fn print(&mut self, prompt_ids: &[u32], completions: Result<Vec<Completion>>) -> Result<()> {
        let number = self.printed;
        let outcome = match &completions {
            Ok(completions) => Outcome::new(completions, prompt_ids, self.serving.load_s),
            Err(error) => {
                self.failed += 1;
                output::note(format_args!(
                    "oxllama: prompt {number}: {}",
                    output::message(error)
                ));
                Outcome::failed(error)
            }
        };
        if self.args.json {
            self.objects.push(serde_json::to_value(&outcome)?);
        }
        for (choice, completion) in completions.iter().flatten().enumerate() {
            self.generated_tokens += completion.usage.generated_tokens;
            if choice == 0 {
                self.prompt_tokens += prompt_ids.len();
            }
            if self.args.json {
                continue;
            }
            let header = match self.args.choices {
                1 => format!("=== prompt {number} ==="),
                _ => format!("=== prompt {number}, choice {} ===", choice + 1),
            };
            output::text(&format!("{header}\n{}\n", completion.text))?;
        }
        Ok(())
    }
}
