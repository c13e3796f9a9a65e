//! What sharing a model is worth: tokens a second of many jobs against one, the start of a job
//! whose prompt is cached, and what a long prompt does to a job that runs.
//!
//! `cargo run --release --example measure -- MODEL_DIRECTORY`
#![allow(clippy::print_stdout, reason = "an example shows what it got")]

mod common;

use std::time::Instant;

use oxllama_engine::{Engine, Event, Job, SamplingSettings, Speculation};

const BATCH: usize = 8;

fn job(start: u32, prompt_tokens: u32, max_new_tokens: usize) -> Job {
    Job {
        sampling: SamplingSettings::greedy(),
        speculation: Speculation::Off,
        ..Job::new(
            (0..prompt_tokens)
                .map(|i| 1000 + start + i * 7 % 20_000)
                .collect(),
            max_new_tokens,
        )
    }
}

/// Tokens a second, prompts not counted, of `jobs` jobs at once.
fn tokens_per_second(engine: &Engine, jobs: usize) -> common::Result<f64> {
    let streams = (0..jobs)
        .map(|index| engine.submit(job(index as u32, 8, 128)))
        .collect::<Result<Vec<_>, _>>()?;
    let start = Instant::now();
    let tokens: usize = streams
        .into_iter()
        .map(|stream| stream.wait().token_ids.len())
        .sum();
    Ok(tokens as f64 / start.elapsed().as_secs_f64())
}

/// Seconds until the first token of a job with a prompt of 2,000 tokens.
fn first_token_s(engine: &Engine, start: u32) -> common::Result<f64> {
    let begin = Instant::now();
    let mut stream = engine.submit(job(start, 2000, 2))?;
    while !matches!(stream.next(), Some(Event::Token { .. }) | None) {}
    Ok(begin.elapsed().as_secs_f64())
}

/// The times between `tokens` tokens of a stream, in order of length.
fn gaps_s(stream: &mut impl Iterator<Item = Event>, tokens: usize) -> Vec<f64> {
    let mut last = Instant::now();
    let mut gaps = Vec::new();
    for event in stream {
        if let Event::Token { .. } = event {
            gaps.push(last.elapsed().as_secs_f64());
            last = Instant::now();
        }
        if gaps.len() > tokens {
            break;
        }
    }
    // The first began before the job did.
    gaps.remove(0);
    gaps.sort_by(f64::total_cmp);
    gaps
}

fn main() -> common::Result<()> {
    let model = common::path_argument(1, "a model directory")?;
    let engine = common::engine(&model, None)?;
    println!("step costs: {:?}", engine.stats()?.costs);

    for _ in 0..3 {
        let alone = tokens_per_second(&engine, 1)?;
        let together = tokens_per_second(&engine, BATCH)?;
        let ratio = together / alone;
        println!("1 job: {alone:.1} tokens/s, {BATCH} jobs: {together:.1}, ratio {ratio:.2}");
    }
    for start in [50_000, 90_000, 130_000].map(|start| start / 7) {
        let cold = first_token_s(&engine, start)?;
        let cached = first_token_s(&engine, start)?;
        let ratio = cold / cached;
        println!("first token of 2000: {cold:.3} s, cached {cached:.4} s, ratio {ratio:.1}");
    }
    for start in 0..3 {
        let mut running = engine.submit(job(start, 8, 3000))?;
        let quiet = gaps_s(&mut running, 100);
        let arriving = engine.submit(job(7000 + start * 11, 4096, 1))?;
        let busy = gaps_s(&mut running, 300);
        drop(arriving);
        let (median, slowest) = (quiet[quiet.len() / 2], busy[busy.len() * 99 / 100]);
        println!(
            "between tokens: quiet {:.1} ms; beside a prompt of 4096: median {:.1} ms ({:.2} x), \
             99th percentile {:.1} ms ({:.2} x)",
            median * 1e3,
            busy[busy.len() / 2] * 1e3,
            busy[busy.len() / 2] / median,
            slowest * 1e3,
            slowest / median
        );
    }
    Ok(())
}
