//! `oxllama bench`

mod ceilings;
mod measure;
mod report;
mod work;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use oxllama_format::ModelSource;
use oxllama_memory::Bytes;
use oxllama_model::{Runner, RunnerLimits, inspect};

use crate::args::{BenchArgs, PlacementArgs};
use crate::session::{self, Devices, Host, Opened, StepSize};
use ceilings::Ceilings;
use measure::DecodeCase;
use report::{Decode, Prefill, Report};

/// What each sequence of a batch starts with.
const PROMPT_TOKENS: usize = 8;

/// Tokens measured of one sequence alone, and of each of several.
const TOKENS_ALONE: usize = 128;
const TOKENS_TOGETHER: usize = 64;

/// The largest step that a long prompt makes for itself.
const LARGEST_CHUNK_TOKENS: usize = 2048;

/// What is measured unless something else is asked for.
struct Defaults {
    batches: &'static [usize],
    prefills: &'static [usize],
}

/// A CPU takes minutes for what a GPU does in a second.
const ON_CPU: Defaults = Defaults {
    batches: &[1],
    prefills: &[512],
};

const ON_GPU: Defaults = Defaults {
    batches: &[1, 2, 4, 8, 16, 32],
    prefills: &[512, 2048],
};

/// What is measured, in ascending order.
struct Cases {
    prefills: Vec<usize>,
    /// One sequence alone from a short prompt comes first.
    decodes: Vec<DecodeCase>,
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    check(args)?;
    let start = Instant::now();
    let host = Host::new(&args.placement)?;
    let open_s = start.elapsed().as_secs_f64();
    let defaults = match &host.devices {
        Devices::Cuda(_) => &ON_GPU,
        Devices::Cpu(_) | Devices::Reference(_) => &ON_CPU,
    };
    let cases = Cases::new(args, defaults)?;
    let (placement, size) = cases.plan_for(&args.placement);
    let start = Instant::now();
    let opened = open(args, &placement)?;
    let plan = session::plan(&opened, &host, &placement, size)?;
    let mut runner = session::load(&opened, &host, &plan)?;
    let load_s = start.elapsed().as_secs_f64();
    let best = Best::measure(runner.as_mut(), (&host, &placement), &cases, args.repeat)?;

    let weight_bytes = Bytes(inspect(&opened.source, &opened.spec)?.bytes_per_token);
    let kv_bytes = |case| work::kv_bytes_per_step(&opened.spec, plan.memory.cache, case);
    let flops = |tokens| work::prefill_flops(&opened.spec, tokens);
    let report = Report {
        model: plan.memory.model.clone(),
        device: best.ceilings.device.clone(),
        devices: plan.memory.devices.len(),
        threads: best.ceilings.threads,
        cache: plan.memory.cache.to_string(),
        synthetic: args.synthetic.is_some(),
        open_s,
        load_s,
        weight_bytes,
        read_bandwidth_gb_per_s: best.ceilings.read_bytes_per_s / 1e9,
        arithmetic_tflops: best.ceilings.flops_per_s.map(|rate| rate / 1e12),
        draws_on_device: measure::draws_on_device(runner.as_ref()),
        decode: best.decode_reports(&cases, weight_bytes, kv_bytes),
        prefill: best.prefill_reports(&cases, runner.limits(), flops),
    };
    report.print(args.json)?;
    Ok(ExitCode::SUCCESS)
}

fn check(args: &BenchArgs) -> Result<()> {
    if args.prefill.contains(&0) || args.decode == Some(0) || args.repeat == 0 {
        bail!("--prefill, --decode and --repeat must be at least 1");
    }
    if args.batch.contains(&0) {
        bail!("--batch must be numbers of sequences from 1 on");
    }
    Ok(())
}

fn open(args: &BenchArgs, placement: &PlacementArgs) -> Result<Opened> {
    match (&args.synthetic, &args.model) {
        (Some(shape), _) => session::open_source(ModelSource::synthetic(shape)?, Some(placement)),
        (None, Some(model)) => session::open(model, Some(placement)),
        (None, None) => bail!("expected a model, or --synthetic SHAPE:BPW"),
    }
}

impl Cases {
    fn new(args: &BenchArgs, defaults: &Defaults) -> Result<Self> {
        let mut batches = or_default(&args.batch, defaults.batches);
        // What the others are compared with.
        batches.insert(0, 1);
        let mut decodes: Vec<DecodeCase> = ascending(batches)
            .into_iter()
            .map(|sequences| DecodeCase {
                sequences,
                first: PROMPT_TOKENS,
                tokens: args.decode.unwrap_or(match sequences {
                    1 => TOKENS_ALONE,
                    _ => TOKENS_TOGETHER,
                }),
            })
            .collect();
        let tokens = args.decode.unwrap_or(TOKENS_ALONE);
        for depth in ascending(args.depth.clone()) {
            // One more is decoded before the measurement starts.
            let Some(first @ 1..) = depth.checked_sub(tokens.saturating_add(1)) else {
                bail!(
                    "--depth {depth} is too little: expected at least {}, for a prompt, one step \
                     to warm up and the {tokens} tokens of --decode",
                    tokens.saturating_add(2)
                );
            };
            decodes.push(DecodeCase {
                sequences: 1,
                first,
                tokens,
            });
        }
        Ok(Self {
            prefills: ascending(or_default(&args.prefill, defaults.prefills)),
            decodes,
        })
    }

    /// Room for the largest case, in a context, a cache and steps of `placement`'s choice where it
    /// has one.
    fn plan_for(&self, placement: &PlacementArgs) -> (PlacementArgs, StepSize) {
        let longest_prefill = self.prefills.iter().copied().max().unwrap_or(1);
        let contexts = self.decodes.iter().map(DecodeCase::context_tokens);
        let context = contexts.fold(longest_prefill, usize::max) as u64;
        let context = placement.context.unwrap_or(context);
        let caches = self.decodes.iter().map(DecodeCase::cache_tokens);
        let cache = caches.fold(longest_prefill, usize::max) as u64;
        let cache = placement.cache_tokens.unwrap_or(cache.max(context));
        let batches = self.decodes.iter().map(|case| case.sequences);
        let largest_batch = batches.fold(1, usize::max) as u64;
        let chunk = longest_prefill.min(LARGEST_CHUNK_TOKENS) as u64;
        let size = StepSize {
            batch: largest_batch,
            chunk_tokens: chunk.max(StepSize::ONE_JOB.chunk_tokens),
            logit_rows: largest_batch,
        };
        let placement = PlacementArgs {
            context: Some(context),
            cache_tokens: Some(cache),
            ..placement.clone()
        };
        (placement, size)
    }
}

fn or_default(asked: &[usize], default: &[usize]) -> Vec<usize> {
    if asked.is_empty() { default } else { asked }.to_vec()
}

/// Each number once, the smallest first.
fn ascending(mut numbers: Vec<usize>) -> Vec<usize> {
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// The best of several runs.
struct Best {
    ceilings: Ceilings,
    /// Tokens a second of each case.
    prefills: Vec<f64>,
    decodes: Vec<f64>,
}

impl Best {
    /// All cases are measured in turns, so that a neighbour's load falls on all of them.
    fn measure(
        runner: &mut dyn Runner,
        (host, placement): (&Host, &PlacementArgs),
        cases: &Cases,
        repeat: usize,
    ) -> Result<Self> {
        let mut best = Self {
            ceilings: Ceilings::measure(host, placement)?,
            prefills: vec![0.0; cases.prefills.len()],
            decodes: vec![0.0; cases.decodes.len()],
        };
        for round in 0..repeat {
            if round > 0 {
                best.ceilings = best.ceilings.best(Ceilings::measure(host, placement)?);
            }
            for (best, &tokens) in best.prefills.iter_mut().zip(&cases.prefills) {
                let run = || measure::prefill(runner, tokens);
                *best = best.max(measure::best_at_speed(run)?);
            }
            for (best, &case) in best.decodes.iter_mut().zip(&cases.decodes) {
                let run = || measure::decode(runner, case);
                *best = best.max(measure::best_at_speed(run)?);
            }
        }
        Ok(best)
    }

    /// Each decode case with its floor, where a step reads `weight_bytes` and its case's
    /// `kv_bytes`.
    fn decode_reports(
        &self,
        cases: &Cases,
        weight_bytes: Bytes,
        kv_bytes: impl Fn(DecodeCase) -> f64,
    ) -> Vec<Decode> {
        let report = |(&case, &tokens_per_s): (&DecodeCase, &f64)| {
            let kv_bytes = kv_bytes(case);
            let sequences = case.sequences as f64;
            let step_bytes = weight_bytes.get() as f64 + kv_bytes;
            let floor_tokens_per_s = sequences * self.ceilings.read_bytes_per_s / step_bytes;
            Decode {
                sequences: case.sequences,
                context_tokens: case.context_tokens(),
                tokens: case.tokens,
                tokens_per_s,
                step_ms: 1e3 * sequences / tokens_per_s,
                kv_bytes_per_step: Bytes(kv_bytes as u64),
                floor_tokens_per_s,
                share: tokens_per_s / floor_tokens_per_s,
                speedup: tokens_per_s / self.decodes[0],
            }
        };
        cases
            .decodes
            .iter()
            .zip(&self.decodes)
            .map(report)
            .collect()
    }

    /// Each prefill with its share of the arithmetic of all devices that work at a time.
    fn prefill_reports(
        &self,
        cases: &Cases,
        limits: &RunnerLimits,
        flops: impl Fn(usize) -> f64,
    ) -> Vec<Prefill> {
        let report = |(&tokens, &tokens_per_s): (&usize, &f64)| Prefill {
            tokens,
            chunk_tokens: measure::chunk_tokens(limits, tokens).min(tokens),
            tokens_per_s,
            share: self.ceilings.flops_per_s.map(|ceiling| {
                let prompts_per_s = tokens_per_s / tokens as f64;
                flops(tokens) * prompts_per_s / (ceiling * limits.stages as f64)
            }),
        };
        cases
            .prefills
            .iter()
            .zip(&self.prefills)
            .map(report)
            .collect()
    }
}

#[cfg(test)]
mod tests;
