//! `oxllama generate --input jobs.jsonl --output answers.jsonl`: a file of jobs.
//!
//! What is wrong with the files is refused before a model is loaded. What is wrong with a job
//! is its answer, and the others run.

mod fields;
mod input;
mod names;
mod output;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use indicatif::ProgressBar;
use oxllama_engine::{Completion, FinishReason};

use crate::args::{GenerateArgs, MOST_CHOICES};
use crate::commands::generate::{cfg_scale, encoder, start, template};
use crate::interrupt::{self, EXIT_INTERRUPTED};
use crate::jobs::{MOST_IN_FLIGHT, News, Outcome, Request, Together, Wishes};
use crate::output as terminal;
use crate::sampling;
use crate::serving::Serving;
use fields::Defaults;
use input::Line;
use output::Answers;

/// Answers in flight for each that runs: enough that none waits to be submitted.
const IN_FLIGHT_TIMES: usize = 4;

pub(crate) fn run(
    args: &GenerateArgs,
    wishes: &Wishes<'_>,
    input: &Path,
    output: &Path,
) -> Result<ExitCode> {
    let mut lines = input::read(input)?;
    if is_same_file(input, output) {
        bail!(
            "{} is both --input and --output: give the answers a file of their own",
            output.display()
        );
    }
    let (answers, answered) = Answers::open(output)?;
    let total = lines.len();
    lines.retain(|line| !answered.contains(&line.custom_id));
    let before = total - lines.len();
    if lines.is_empty() {
        terminal::note(format_args!(
            "[nothing to do: {} answered in {} already]",
            terminal::count(total, "job"),
            output.display()
        ));
        return Ok(ExitCode::SUCCESS);
    }
    input::order(&mut lines);

    let is_guided = args.negative_prompt.is_some() || lines.iter().any(Line::is_guided);
    let choices = |line: &Line| {
        let choices = line.choices().unwrap_or(u64::from(args.choices));
        choices.min(MOST_CHOICES.cast_unsigned())
    };
    let serving = start(args, lines.iter().map(choices).sum(), is_guided)?;
    let encoder = encoder(args, &serving)?;
    let template = template(args, wishes, &serving, &encoder)?;
    let defaults = Defaults {
        template: &template,
        choices: usize::from(args.choices),
        cfg_scale: cfg_scale(args),
        prompts: &encoder,
    };
    let requests = lines.iter().map(|line| -> Result<Request> {
        let mut request = defaults.request(&line.fields)?;
        if args.sampling.seed.is_none() && !line.has_seed() {
            request.job.seed = sampling::seed(&args.sampling);
        }
        Ok(request)
    });
    let at_a_time = serving.plan.memory.batch as usize;
    let interrupt = interrupt::flag()?;
    let together = Together {
        engine: &serving.engine,
        in_flight: (IN_FLIGHT_TIMES * at_a_time).min(MOST_IN_FLIGHT),
        interrupt,
    };
    let mut run = Run::new(&lines, &serving, answers);
    let result = together.run(requests, |news| run.hear(news));
    run.bar.finish_and_clear();
    result?;
    run.summarise(before, output);
    Ok(if interrupt.is_set() {
        ExitCode::from(EXIT_INTERRUPTED)
    } else if run.failed > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn is_same_file(input: &Path, output: &Path) -> bool {
    match (input.canonicalize(), output.canonicalize()) {
        (Ok(input), Ok(output)) => input == output,
        _ => false,
    }
}

/// How far a file of jobs has come.
struct Run<'a> {
    lines: &'a [Line],
    serving: &'a Serving,
    answers: Answers,
    bar: ProgressBar,
    start: Instant,
    done: usize,
    failed: usize,
    first_failure: Option<String>,
    prompt_tokens: usize,
    /// Of jobs that have ended.
    generated_tokens: usize,
    /// Of all jobs.
    seen_tokens: usize,
}

impl<'a> Run<'a> {
    fn new(lines: &'a [Line], serving: &'a Serving, answers: Answers) -> Self {
        Self {
            lines,
            serving,
            answers,
            bar: terminal::job_bar(lines.len() as u64),
            start: Instant::now(),
            done: 0,
            failed: 0,
            first_failure: None,
            prompt_tokens: 0,
            generated_tokens: 0,
            seen_tokens: 0,
        }
    }

    fn hear(&mut self, news: News) -> Result<()> {
        match news {
            News::Tokens(tokens) => self.seen_tokens += tokens,
            News::Ended {
                place,
                prompt_ids,
                completions,
            } => self.end(&self.lines[place], &prompt_ids, &completions)?,
        }
        let failed = match self.failed {
            0 => String::new(),
            failed => format!(", {failed} failed"),
        };
        let rate = self.seen_tokens as f64 / self.start.elapsed().as_secs_f64();
        self.bar
            .set_message(format!("{failed}, {rate:.1} tokens/s"));
        self.bar.set_position((self.done + self.failed) as u64);
        Ok(())
    }

    fn end(
        &mut self,
        line: &Line,
        prompt_ids: &[u32],
        completions: &Result<Vec<Completion>>,
    ) -> Result<()> {
        let outcome = match completions {
            Ok(completions) => {
                let is_cancelled =
                    |completion: &Completion| completion.finish_reason == FinishReason::Cancelled;
                if completions.iter().any(is_cancelled) {
                    // Not whole: the next run does it.
                    return Ok(());
                }
                self.done += 1;
                self.prompt_tokens += prompt_ids.len();
                let tokens = completions.iter().map(|c| c.usage.generated_tokens);
                self.generated_tokens += tokens.sum::<usize>();
                Outcome::new(completions, prompt_ids, self.serving.load_s)
            }
            Err(error) => {
                self.failed += 1;
                self.first_failure.get_or_insert_with(|| {
                    format!(
                        "{} (line {}): {}",
                        line.custom_id,
                        line.number,
                        terminal::message(error)
                    )
                });
                Outcome::failed(error)
            }
        };
        self.answers.write(&line.custom_id, &outcome)
    }

    fn summarise(&self, before: usize, output: &Path) {
        let Self { done, failed, .. } = self;
        let run_s = self.start.elapsed().as_secs_f64();
        let earlier = match before {
            0 => String::new(),
            before => format!(", {before} done before"),
        };
        let left = match self.lines.len() - done - failed {
            0 => String::new(),
            left => format!(", {left} left: the same command goes on with them"),
        };
        let jobs = terminal::count(*done, "job");
        terminal::note(format_args!(
            "[{jobs} done, {failed} failed{earlier}{left}; {} prompt tokens, {} new in \
             {run_s:.3} s ({:.1} tokens/s)] loaded in {:.3} s",
            self.prompt_tokens,
            self.generated_tokens,
            self.generated_tokens as f64 / run_s,
            self.serving.load_s
        ));
        if let Some(first) = &self.first_failure {
            terminal::note(format_args!(
                "oxllama: {} failed: {} says why, and the same command tries again. The first, \
                 {first}",
                terminal::count(*failed, "job"),
                output.display()
            ));
        }
    }
}
