//! A model with its layers on two GPUs: the same bits as on one, however many steps are under way
//! at a time.

use std::path::Path;

use anyhow::{Result, ensure};
use oxllama_backend::PAGE_TOKENS;
use oxllama_cuda::CudaDevice;
use oxllama_engine::{Engine, EngineParts, EngineSettings, JobStream};
use oxllama_format::ModelSource;
use oxllama_memory::{Bytes, DeviceInfo, GpuSplit, Inventory, Ledger, Policy};
use oxllama_model::{Decoder, LoadOptions, ModelRequest, ModelSpec, Runner, StepPlan, plan_model};
use oxllama_test_support::tokenizer_json;
use oxllama_text::Tokenizer;
use serde_json::json;

use crate::checks::Checks;
use crate::generator::job;
use crate::models::{feed, request};

/// Rows of a step: no more than what is computed with the same bits whatever the neighbours are.
const ROWS: u64 = 64;

const ONE_STEP: &str = "layers on two GPUs give the same bits";
const UNDER_WAY: &str = "layers on two GPUs: the same bits with several steps under way";
const JOBS: &str = "layers on two GPUs: jobs get the tokens that they get on one";

pub(crate) fn run(checks: &mut Checks<'_>, folder: &Path) -> Result<()> {
    let gpus = oxllama_cuda::gpus()?;
    let [_, second, ..] = &gpus[..] else {
        for name in [ONE_STEP, UNDER_WAY, JOBS] {
            checks.skip(name, "there is one GPU");
        }
        return Ok(());
    };
    let devices = [checks.device.clone(), CudaDevice::open(second)?];
    let path = folder.join("llama3");
    checks.check(ONE_STEP, || {
        on_one_and_two(&path, &devices, |mut model| {
            let mut found = feed(&mut model, &[1, 2, 3, 4, 5], 0, 0)?;
            for position in 5..40 {
                found.extend(feed(&mut model, &[token(position)], position, 0)?);
            }
            Ok(found)
        })
    });
    checks.check(UNDER_WAY, || {
        on_one_and_two(&path, &devices, |mut model| several_under_way(&mut model))
    });
    checks.check(JOBS, || on_one_and_two(&path, &devices, jobs));
    Ok(())
}

fn token(index: usize) -> u32 {
    index as u32 * 7 % 90
}

/// What `run` makes of the model of `path` on one device and on two, which must be the same.
fn on_one_and_two<T: PartialEq>(
    path: &Path,
    devices: &[CudaDevice; 2],
    run: impl Fn(Decoder<CudaDevice>) -> Result<Vec<T>>,
) -> Result<String> {
    let info = |device: &CudaDevice| {
        let info = device.info();
        DeviceInfo::new(info.id.clone(), info.name.clone(), Bytes::from_mib(64))
    };
    let inventory = Inventory::new(devices.iter().map(info).collect())?;
    let ledger = Ledger::new(&inventory);
    let source = ModelSource::open(path)?;
    let spec = ModelSpec::from_config(source.config())?;
    let mut found = Vec::new();
    let mut policy = Policy::Fill;
    for expected in [1, 2] {
        let request = ModelRequest {
            policy: policy.clone(),
            chunk_tokens: ROWS,
            logit_rows: ROWS,
            ..request(256, 8)
        };
        let plan = plan_model(&source, &spec, &devices[0], &inventory, &request)?;
        let used = plan.memory.devices.len();
        ensure!(used == expected, "{used} devices are used, not {expected}");
        // Too little for all of it, enough for most of it.
        let whole = &plan.memory.devices[0];
        let most = whole.total.saturating_sub(Bytes(whole.weights.get() / 3));
        policy = Policy::GpuSplit(GpuSplit(vec![most, whole.total]));
        let options = LoadOptions::new(&ledger);
        let model = Decoder::load(&source, spec.clone(), devices.to_vec(), &plan, &options)?;
        let stages = model.limits().stages;
        ensure!(stages == expected, "{stages} stages on {expected} devices");
        found.push(run(model)?);
    }
    for device in inventory.devices() {
        let entries = ledger.entries(&device.id);
        ensure!(entries.is_empty(), "{} still holds {entries:?}", device.id);
    }
    ensure!(found[0] == found[1], "the numbers differ");
    Ok(format!("{} values", found[0].len()))
}

/// Rows of one sequence, on the page of the same number; logits are wanted of the last or none.
fn submit(
    model: &mut dyn Runner,
    sequence: u32,
    positions: std::ops::Range<usize>,
    logit_rows: usize,
) -> Result<()> {
    let mut step = StepPlan {
        pages_per_sequence: positions.end.div_ceil(PAGE_TOKENS),
        ..StepPlan::default()
    };
    let first = positions.start;
    let tokens = positions.map(|position| token(position + 31 * sequence as usize));
    step.push_sequence(tokens, first, [sequence], logit_rows);
    Ok(model.submit(&step)?)
}

/// Prompts in chunks that are not waited for, and chunks of others while a decoding sequence's
/// logits are under way. Again and again on the same pages, so that rows of one step would be
/// found in another.
fn several_under_way(model: &mut dyn Runner) -> Result<Vec<f32>> {
    const ROUNDS: usize = 4;
    let chunk = ROWS as usize;
    let mut found = Vec::new();
    for _ in 0..ROUNDS {
        for sequence in 0..3 {
            for part in 0..3 {
                submit(model, sequence, part * chunk..(part + 1) * chunk, 0)?;
            }
        }
        submit(model, 0, 3 * chunk..200, 1)?;
        found.extend_from_slice(model.output()?.logits);
        for (place, position) in (200..212).enumerate() {
            submit(model, 0, position..position + 1, 1)?;
            let sequence = 3 + place as u32 % 4;
            let part = place / 4;
            submit(model, sequence, part * chunk..(part + 1) * chunk, 0)?;
            found.extend_from_slice(model.output()?.logits);
        }
        for sequence in 1..7 {
            submit(model, sequence, 3 * chunk..3 * chunk + 9, 1)?;
            found.extend_from_slice(model.output()?.logits);
        }
    }
    let (first, rest) = found.split_at(found.len() / ROUNDS);
    let is_same = |round: &[f32]| round == first;
    ensure!(
        rest.chunks_exact(first.len()).all(is_same),
        "the numbers differ from round to round"
    );
    Ok(found)
}

/// The tokens of jobs with prompts of up to three chunks, all at once.
fn jobs(model: Decoder<CudaDevice>) -> Result<Vec<Vec<u32>>> {
    let tokenizer = tokenizer_json(model.spec().vocab_size);
    let parts = EngineParts {
        tokenizer: Tokenizer::new(tokenizer.as_bytes(), None, &json!({}), None)?,
        runner: Box::new(model),
        draft: None,
    };
    let engine = Engine::start(parts, EngineSettings::default())?;
    let lengths = [190, 3, 70, 150, 64, 120, 1, 180];
    let streams: Result<Vec<JobStream>, _> = (0..)
        .zip(lengths)
        .map(|(index, prompt_tokens)| engine.submit(job(index, prompt_tokens, 16)))
        .collect();
    let ended = streams?.into_iter().map(JobStream::wait);
    Ok(ended.map(|completion| completion.token_ids).collect())
}
