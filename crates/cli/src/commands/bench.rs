//! `oxllama bench`

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use oxllama_backend::PAGE_TOKENS;
use oxllama_cpu::{SpinPool, measure_read_bandwidth};
use oxllama_memory::Bytes;
use oxllama_model::{Runner, StepPlan, inspect};
use serde::Serialize;

use crate::args::{BenchArgs, DeviceKind, PlacementArgs};
use crate::output;
use crate::session::{self, Host, StepSize};

/// What the bandwidth is measured over: far more than any cache.
const BANDWIDTH_BYTES: usize = 1 << 30;

/// What each sequence of a batch starts with.
const BATCH_PROMPT_TOKENS: usize = 8;

#[derive(Serialize)]
struct Report {
    model: String,
    threads: usize,
    /// Weights that a decode step reads.
    bytes_per_token: Bytes,
    read_bandwidth_gb_per_s: f64,
    /// What reading those bytes at that bandwidth allows.
    floor_tokens_per_s: f64,
    prefill_tokens: usize,
    prefill_tokens_per_s: f64,
    decode_tokens: usize,
    decode_tokens_per_s: f64,
    /// Of the floor.
    decode_share: f64,
    /// Decoding several sequences at a time; the first line is one alone. Empty unless asked for.
    batches: Vec<BatchReport>,
    load_s: f64,
}

#[derive(Serialize)]
struct BatchReport {
    sequences: usize,
    /// Of all sequences together.
    tokens_per_s: f64,
    /// Times one sequence alone, measured in the same way.
    speedup: f64,
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    if args.prefill == 0 || args.decode == 0 || args.repeat == 0 {
        bail!("--prefill, --decode and --repeat must be at least 1");
    }
    if args.batch.contains(&0) {
        bail!("--batch must be numbers of sequences from 1 on");
    }
    let mut batches = args.batch.clone();
    if !batches.is_empty() {
        batches.push(1);
        batches.sort_unstable();
        batches.dedup();
    }
    let largest_batch = batches.last().copied().unwrap_or(1);
    let context = args.prefill.max(BATCH_PROMPT_TOKENS + args.decode + 1) as u64;
    let placement = &args.model.placement;
    let placement = &PlacementArgs {
        context: Some(placement.context.unwrap_or(context)),
        ..placement.clone()
    };
    let start = Instant::now();
    let opened = session::open(&args.model.model, Some(placement))?;
    let host = Host::new(placement)?;
    let size = StepSize {
        batch: largest_batch as u64,
        logit_rows: largest_batch as u64,
        ..StepSize::ONE_JOB
    };
    let plan = session::plan(&opened, &host, placement, size)?;
    let mut runner = session::load(&opened, &host, placement, &plan)?;
    let load_s = start.elapsed().as_secs_f64();

    let threads = match placement.device {
        DeviceKind::Cpu => placement.threads.unwrap_or_else(SpinPool::default_threads),
        DeviceKind::Reference => 1,
    };
    let mut best_of_batches = vec![0.0_f64; batches.len()];
    // All are measured in turns, so that a neighbour's load falls on all of them.
    let mut best = Best::default();
    for _ in 0..args.repeat {
        best.bandwidth = best
            .bandwidth
            .max(measure_read_bandwidth(threads, BANDWIDTH_BYTES)?);
        best.prefill = best.prefill.max(prefill(runner.as_mut(), args.prefill)?);
        best.decode = best.decode.max(decode(runner.as_mut(), args.decode)?);
        for (best, &sequences) in best_of_batches.iter_mut().zip(&batches) {
            *best = best.max(decode_batch(runner.as_mut(), sequences, args.decode)?);
        }
    }
    let alone = best_of_batches.first().copied().unwrap_or_default();
    let batches = batches.iter().zip(&best_of_batches);
    let batches = batches.map(|(&sequences, &tokens_per_s)| BatchReport {
        sequences,
        tokens_per_s,
        speedup: tokens_per_s / alone,
    });
    let bytes_per_token = Bytes(inspect(&opened.source, &opened.spec)?.bytes_per_token);
    let floor = best.bandwidth / bytes_per_token.get() as f64;
    let report = Report {
        model: plan.memory.model.clone(),
        threads,
        bytes_per_token,
        read_bandwidth_gb_per_s: best.bandwidth / 1e9,
        floor_tokens_per_s: floor,
        prefill_tokens: args.prefill,
        prefill_tokens_per_s: best.prefill,
        decode_tokens: args.decode,
        decode_tokens_per_s: best.decode,
        decode_share: best.decode / floor,
        batches: batches.collect(),
        load_s,
    };
    print(&report, args.json)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Default)]
struct Best {
    /// Bytes a second.
    bandwidth: f64,
    /// Tokens a second.
    prefill: f64,
    decode: f64,
}

fn print(report: &Report, json: bool) -> Result<()> {
    if json {
        return output::json(report);
    }
    let Report {
        model,
        threads,
        load_s,
        ..
    } = report;
    output::line(format_args!(
        "{model}, {threads} threads, loaded in {load_s:.3} s"
    ))?;
    output::line(format_args!(
        "memory    reads {:.1} GB/s; a token reads {}: at most {:.0} tokens/s",
        report.read_bandwidth_gb_per_s, report.bytes_per_token, report.floor_tokens_per_s
    ))?;
    output::line(format_args!(
        "prefill   {:8.1} tokens/s ({} tokens)",
        report.prefill_tokens_per_s, report.prefill_tokens
    ))?;
    output::line(format_args!(
        "decode    {:8.1} tokens/s ({} tokens from an empty context), {:.0}% of what the \
         memory allows",
        report.decode_tokens_per_s,
        report.decode_tokens,
        100.0 * report.decode_share
    ))?;
    for batch in &report.batches {
        output::line(format_args!(
            "batch {:3} {:8.1} tokens/s, {:.2} times one sequence's",
            batch.sequences, batch.tokens_per_s, batch.speedup
        ))?;
    }
    Ok(())
}

/// Tokens a second of bringing `tokens` tokens into an empty cache.
fn prefill(runner: &mut dyn Runner, tokens: usize) -> Result<f64> {
    let mut step = StepPlan::default();
    let start = Instant::now();
    let max_rows = runner.limits().max_rows;
    for first in (0..tokens).step_by(max_rows) {
        let end = (first + max_rows).min(tokens);
        begin(&mut step, end);
        let logit_rows = usize::from(end == tokens);
        push_rows(&mut step, runner, (0, 0), first..end, logit_rows);
        runner.run(&step)?;
    }
    Ok(tokens as f64 / start.elapsed().as_secs_f64())
}

/// Tokens a second of single steps from an empty cache. The first step, which touches
/// memory for the first time in a fresh process, is not counted.
fn decode(runner: &mut dyn Runner, tokens: usize) -> Result<f64> {
    decode_from(runner, 1, 0, tokens)
}

/// Tokens a second, all sequences together, of steps with one row and its logits for each of
/// `sequences` sequences, after prompts of [`BATCH_PROMPT_TOKENS`]. The first step is not
/// counted.
fn decode_batch(runner: &mut dyn Runner, sequences: usize, tokens: usize) -> Result<f64> {
    let pages = (BATCH_PROMPT_TOKENS + tokens + 1).div_ceil(PAGE_TOKENS);
    let mut step = StepPlan::default();
    for sequence in 0..sequences {
        begin(&mut step, BATCH_PROMPT_TOKENS);
        let own = (sequence, sequence * pages);
        push_rows(&mut step, runner, own, 0..BATCH_PROMPT_TOKENS, 0);
        runner.run(&step)?;
    }
    decode_from(runner, sequences, BATCH_PROMPT_TOKENS, tokens)
}

/// Tokens a second of `tokens` steps of each of `sequences` sequences from position `first` on,
/// after one that is not counted.
fn decode_from(
    runner: &mut dyn Runner,
    sequences: usize,
    first: usize,
    tokens: usize,
) -> Result<f64> {
    let pages = (first + tokens + 1).div_ceil(PAGE_TOKENS);
    let mut step = StepPlan::default();
    let mut start = Instant::now();
    for position in first..=first + tokens {
        if position == first + 1 {
            start = Instant::now();
        }
        begin(&mut step, position + 1);
        for sequence in 0..sequences {
            let own = (sequence, sequence * pages);
            push_rows(&mut step, runner, own, position..position + 1, 1);
        }
        runner.run(&step)?;
    }
    Ok((sequences * tokens) as f64 / start.elapsed().as_secs_f64())
}

/// Empties `step` for sequences of up to `tokens` tokens.
fn begin(step: &mut StepPlan, tokens: usize) {
    step.clear();
    step.pages_per_sequence = tokens.div_ceil(PAGE_TOKENS);
}

/// Adds the rows of a sequence, on pages from `first_page` on, at `positions`, with tokens that
/// differ from row to row; the last `logit_rows` of them with logits.
fn push_rows(
    step: &mut StepPlan,
    runner: &dyn Runner,
    (sequence, first_page): (usize, usize),
    positions: std::ops::Range<usize>,
    logit_rows: usize,
) {
    let vocab_size = runner.spec().vocab_size;
    let pages = first_page as u32..(first_page + step.pages_per_sequence) as u32;
    let first = positions.start;
    let tokens = positions.map(|position| spread(sequence + position, vocab_size));
    step.push_sequence(tokens, first, pages, logit_rows);
}

/// A token for `index`: Knuth's multiplicative hash spreads them over the vocabulary.
fn spread(index: usize, vocab_size: usize) -> u32 {
    (index as u32).wrapping_mul(2_654_435_761) % vocab_size as u32
}
