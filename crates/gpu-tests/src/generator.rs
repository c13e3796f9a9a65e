//! The engine over a tiny model on the GPU: many random jobs, some of which are dropped, on
//! a cache that is too small for all of them.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use oxllama_backend::Device;
use oxllama_cuda::{CudaDevice, Monitor};
use oxllama_engine::{
    Completion, Engine, EngineParts, EngineSettings, FinishReason, Job, JobStream, SamplingSettings,
};
use oxllama_format::ModelSource;
use oxllama_memory::{Bytes, CacheFormat, Inventory, Ledger};
use oxllama_model::{Decoder, LoadOptions, ModelRequest, ModelSpec, Runner, plan_model};
use oxllama_test_support::tokenizer_json;
use oxllama_text::Tokenizer;
use serde_json::json;

use crate::checks::Checks;
use crate::loading::open_files;

/// Jobs of the long run.
const JOBS: u64 = 20_000;

/// How often they are run at most.
const MOST_ROUNDS: usize = 4;

/// Jobs in flight at a time.
const IN_FLIGHT: usize = 32;

pub(crate) fn run(checks: &mut Checks<'_>, folder: &Path) -> Result<()> {
    let path = folder.join("llama2");
    let (device, books) = (checks.device, checks.books()?);
    checks.check("generator: 32 jobs alone, together and cached", || {
        let engine = engine(&path, device, &books, None)?;
        same_alone_and_together(&engine)
    });
    checks.check("generator: 20,000 random jobs leave nothing behind", || {
        leaves_nothing(&path, device, &books)
    });
    Ok(())
}

/// What is taken of the machine.
#[derive(Debug, PartialEq, Eq)]
struct Taken {
    /// Of the device, by the driver.
    free: Bytes,
    /// Of the device, by NVML.
    used: Option<Bytes>,
    files: usize,
}

impl Taken {
    fn now(device: &CudaDevice, monitor: Option<&Monitor>) -> Result<Self> {
        let used = monitor.and_then(|monitor| monitor.state(device.info()).used);
        Ok(Self {
            free: device.free_memory()?,
            used,
            files: open_files()?,
        })
    }
}

/// Runs [`JOBS`] jobs over and over on an engine of their own until they leave as much as they
/// found.
///
/// The driver keeps what it once took for kernels and for recorded steps, in pieces of 2 MiB, and
/// which steps are recorded at once depends on when jobs arrive: so the first jobs may take
/// something for good, and seldom the second. What leaks is taken every time.
fn leaves_nothing(path: &Path, device: &CudaDevice, books: &(Inventory, Ledger)) -> Result<String> {
    let monitor = Monitor::open();
    let used = || books.1.usage(&device.info().id).map(|usage| usage.used);
    let mut story = Vec::new();
    let mut round = || {
        let engine = engine(path, device, books, Some(24 * 256))?;
        let summary = churn(&engine)?;
        let recorded = device.recorded_steps();
        drop(engine);
        ensure!(used() == Some(Bytes::ZERO), "the books hold {:?}", used());
        let kept = device.recorded_steps();
        ensure!(kept.recordings == 0, "recordings are left: {kept:?}");
        let taken = Taken::now(device, monitor.as_ref())?;
        story.push(format!("{taken:?} after {summary}, {recorded:?}"));
        Ok(taken)
    };
    let mut before = round()?;
    for number in 2..=MOST_ROUNDS {
        let after = round()?;
        if before == after {
            let summary = story.pop().unwrap_or_default();
            return Ok(format!("round {number} as the one before: {summary}"));
        }
        before = after;
    }
    // Whether it is the recorded steps.
    let was_recorded = device.record_steps(false);
    let launched = [round(), round()];
    device.record_steps(was_recorded);
    let [Ok(_), Ok(_)] = launched else {
        bail!("{launched:?}");
    };
    bail!("the last two without recorded steps: {}", story.join("; "))
}

/// An engine for 32 sequences of up to 512 tokens.
fn engine<D: Device + Clone>(
    path: &Path,
    device: &D,
    (inventory, ledger): &(Inventory, Ledger),
    cache_tokens: Option<u64>,
) -> Result<Engine> {
    let source = ModelSource::open(path)?;
    let mut config = source.config().clone();
    config["max_position_embeddings"] = json!(4096);
    let spec = ModelSpec::from_config(&config)?;
    let request = ModelRequest {
        context_tokens: Some(512),
        cache_tokens,
        batch: IN_FLIGHT as u64,
        chunk_tokens: 128,
        logit_rows: IN_FLIGHT as u64,
        cache: CacheFormat::F16,
        ..ModelRequest::default()
    };
    let plan = plan_model(&source, &spec, device, inventory, &request)?;
    let options = LoadOptions::new(ledger);
    let devices = vec![device.clone()];
    let runner: Box<dyn Runner> = Box::new(Decoder::load(&source, spec, devices, &plan, &options)?);
    let tokenizer = tokenizer_json(runner.spec().vocab_size);
    let parts = EngineParts {
        tokenizer: Tokenizer::new(tokenizer.as_bytes(), None, &json!({}), None)?,
        runner,
        draft: None,
    };
    Ok(Engine::start(parts, EngineSettings::default())?)
}

/// Numbers without a pattern (the finaliser of MurmurHash3 over a counter).
fn random(counter: u64) -> u64 {
    let mut x = counter.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    x = (x ^ (x >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    x ^ (x >> 33)
}

/// A job that draws from nearly everything, so that any change of a logit shows. Prompts of
/// one family share their beginning.
pub(crate) fn job(index: u64, prompt_tokens: usize, new_tokens: usize) -> Job {
    let family = index % 4;
    let own_from = prompt_tokens / 2;
    let token = |place: usize| {
        let seed = if place < own_from {
            family
        } else {
            100 + index
        };
        (random(seed * 4096 + place as u64) % 90) as u32
    };
    Job {
        sampling: SamplingSettings {
            temperature: 1.2,
            top_k: 0,
            top_p: 1.0,
            ..SamplingSettings::default()
        },
        seed: index,
        ..Job::new((0..prompt_tokens).map(token).collect(), new_tokens)
    }
}

/// Whole steps of few rows each, so that every row is one of a decode step: the same bits are
/// promised for those.
fn same_alone_and_together(engine: &Engine) -> Result<String> {
    let jobs: Vec<Job> = (0..IN_FLIGHT as u64)
        .map(|index| job(index, 2, 40))
        .collect();
    let mut alone = Vec::new();
    for job in &jobs {
        alone.push(engine.submit(job.clone())?.wait());
    }
    for round in ["among 31 others", "with everything cached"] {
        let streams: Result<Vec<JobStream>, _> =
            jobs.iter().map(|job| engine.submit(job.clone())).collect();
        let together: Vec<Completion> = streams?.into_iter().map(JobStream::wait).collect();
        for (index, (found, expected)) in together.iter().zip(&alone).enumerate() {
            ensure!(
                found.token_ids == expected.token_ids,
                "job {index} {round}: {:?}, alone {:?}",
                found.token_ids,
                expected.token_ids
            );
        }
    }
    Ok(format!("{} tokens each", alone[0].token_ids.len()))
}

/// Runs [`JOBS`] random jobs, drops every seventh before its end, and looks at what is left.
fn churn(engine: &Engine) -> Result<String> {
    let mut in_flight: Vec<(u64, JobStream)> = Vec::new();
    let (mut tokens, mut dropped) = (0, 0);
    for index in 0..JOBS {
        let length = 1 + random(index) as usize % 160;
        let new_tokens = 1 + random(JOBS + index) as usize % 12;
        let stream = engine.submit(job(index, length, new_tokens))?;
        in_flight.push((index, stream));
        if in_flight.len() < 2 * IN_FLIGHT {
            continue;
        }
        let (index, stream) = in_flight.remove(0);
        if index % 7 == 0 {
            dropped += 1;
            continue;
        }
        tokens += finished(index, stream)?;
    }
    for (index, stream) in in_flight {
        tokens += finished(index, stream)?;
    }
    engine.drain();
    let stats = engine.stats()?;
    ensure!(
        stats.held_pages == 0,
        "{} pages are still held",
        stats.held_pages
    );
    Ok(format!(
        "{tokens} tokens in {} steps, {dropped} dropped, {} preemptions",
        stats.steps, stats.preemptions
    ))
}

fn finished(index: u64, stream: JobStream) -> Result<usize> {
    let completion = stream.wait();
    ensure!(
        completion.finish_reason == FinishReason::Length,
        "job {index} ended with {:?}: {:?}",
        completion.finish_reason,
        completion.error
    );
    Ok(completion.token_ids.len())
}
