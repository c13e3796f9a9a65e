//! Tiny models of every family, against the logits that transformers computed in f32.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use oxllama_backend::{Device, PAGE_TOKENS};
use oxllama_cuda::CudaDevice;
use oxllama_format::{ModelSource, SafetensorsDir, TensorSource};
use oxllama_memory::{Bytes, CacheFormat, DeviceId, DeviceInfo, Inventory, Ledger};
use oxllama_model::{
    Decoder, EmbeddingPlace, LoadOptions, ModelRequest, ModelSpec, Runner, StepPlan, plan_model,
};
use serde_json::Value;

use crate::checks::Checks;

/// Largest difference of a logit from transformers' in f32; logits spread over about 2, and
/// activations are rounded to fp16 in front of every linear.
const TOLERANCE: f32 = 3e-2;

/// Every tiny model of `folder` that has logits to compare with.
pub(crate) fn fixtures(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("cannot look into {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("config.json").exists())
        .collect();
    paths.sort();
    ensure!(
        paths.len() >= 10,
        "{} models in {}",
        paths.len(),
        folder.display()
    );
    Ok(paths)
}

/// A model's file name.
pub(crate) fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// What a check asks of a model that it loads.
pub(crate) fn request(context_tokens: u64, sequences: u64) -> ModelRequest {
    ModelRequest {
        context_tokens: Some(context_tokens),
        batch: sequences,
        logit_rows: 512,
        cache: CacheFormat::F16,
        ..ModelRequest::default()
    }
}

/// Plans and loads a model on one device.
pub(crate) fn load<D: Device + Clone>(
    path: &Path,
    request: &ModelRequest,
    device: &D,
    (inventory, ledger): &(Inventory, Ledger),
) -> Result<Decoder<D>> {
    let source = ModelSource::open(path)?;
    let spec = ModelSpec::from_config(source.config())?;
    let plan = plan_model(&source, &spec, device, inventory, request)?;
    let options = LoadOptions::new(ledger);
    let devices = vec![device.clone()];
    Ok(Decoder::load(&source, spec, devices, &plan, &options)?)
}

/// Runs `tokens` of one sequence from position `first` on, whose pages start at `first_page`, and
/// returns the logits of all of them.
pub(crate) fn feed(
    model: &mut dyn Runner,
    tokens: &[u32],
    first: usize,
    first_page: u32,
) -> Result<Vec<f32>> {
    let pages = (first + tokens.len()).div_ceil(PAGE_TOKENS);
    let mut step = StepPlan {
        pages_per_sequence: pages,
        ..StepPlan::default()
    };
    let own = first_page..first_page + pages as u32;
    step.push_sequence(tokens.iter().copied(), first, own, tokens.len());
    Ok(model.run(&step)?.logits.to_vec())
}

/// The largest difference of two rows of logits.
pub(crate) fn worst(found: &[f32], expected: &[f32]) -> f32 {
    let pairs = found.iter().zip(expected);
    let differences = pairs.map(|(a, b)| (a - b).abs());
    // A logit that is no number is no small difference.
    differences.fold(0.0, |worst: f32, x| if x <= worst { worst } else { x })
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    items.iter().filter_map(id).collect()
}

pub(crate) fn run(checks: &mut Checks<'_>, folder: &Path) -> Result<()> {
    for path in fixtures(folder)? {
        let (device, books) = (checks.device, checks.books()?);
        checks.check(&format!("model {}", name_of(&path)), || {
            let exact = against_transformers(&path, CacheFormat::F32, device, &books)?;
            let rounded = against_transformers(&path, CacheFormat::F16, device, &books)?;
            let largest = exact.max(rounded);
            ensure!(largest <= TOLERANCE, "logits differ by {largest:.2e}");
            Ok(format!(
                "logits within {exact:.1e} (f32 cache), {rounded:.1e} (f16)"
            ))
        });
    }
    let path = folder.join("llama3");
    let (device, books) = (checks.device, checks.books()?);
    checks.check(
        "decode is the same run to run and alone or among 31 others",
        || decode_alone_and_among_others(&path, device, &books),
    );
    checks.check("an embedding on the host gives the same bits", || {
        // The second one's head is its embedding, which is then in both places.
        let untied = embedding_on_the_host(&folder.join("llama2"), device, &books.0)?;
        let tied = embedding_on_the_host(&path, device, &books.0)?;
        Ok(format!("{untied}; tied {tied}"))
    });
    checks.check("recorded steps give the bits of launched ones", || {
        recorded_and_launched(&path, device, &books)
    });
    Ok(())
}

/// Runs a model with its embedding on the device and on the host: the same bits, and the books say
/// where it lies.
fn embedding_on_the_host(
    path: &Path,
    device: &CudaDevice,
    inventory: &Inventory,
) -> Result<String> {
    let host = DeviceInfo::new(DeviceId::cpu(0), "the host", Bytes::from_mib(64));
    let ledger = Ledger::with_host(inventory, &host);
    let used = |id: &DeviceId| ledger.usage(id).map(|usage| usage.used);
    let mut logits = Vec::new();
    let mut on_host = Bytes::ZERO;
    for place in [EmbeddingPlace::Device, EmbeddingPlace::Host(host.clone())] {
        let request = ModelRequest {
            embedding: place,
            ..request(256, 1)
        };
        let books = (inventory.clone(), ledger.clone());
        let mut model = load(path, &request, device, &books)?;
        on_host = used(&host.id).unwrap_or_default();
        let mut found = feed(&mut model, &[9, 8, 7, 6], 0, 0)?;
        for position in 4..12 {
            found.extend(feed(&mut model, &[position as u32], position, 0)?);
        }
        logits.push(found);
    }
    ensure!(logits[0] == logits[1], "the numbers differ");
    ensure!(!on_host.is_zero(), "the host holds nothing");
    let left = (used(&host.id), used(&device.info().id));
    let nothing = Some(Bytes::ZERO);
    ensure!(
        left == (nothing, nothing),
        "the books hold {left:?} afterwards"
    );
    Ok(format!("{on_host} on the host"))
}

/// Decodes a sequence with every kernel launched by itself, then with steps that are recorded and
/// replayed. Leaves the device as it was.
fn recorded_and_launched(
    path: &Path,
    device: &CudaDevice,
    books: &(Inventory, Ledger),
) -> Result<String> {
    const STEPS: usize = 24;
    let decode = || -> Result<Vec<f32>> {
        let mut model = load(path, &request(256, 1), device, books)?;
        let mut logits = feed(&mut model, &[3, 1, 4, 1, 5], 0, 0)?;
        for position in 5..5 + STEPS {
            let token = position as u32 * 7 % 90;
            logits.extend(feed(&mut model, &[token], position, 0)?);
        }
        Ok(logits)
    };
    let was_recorded = device.record_steps(false);
    let launched = decode();
    device.record_steps(true);
    let recorded = decode();
    device.record_steps(was_recorded);
    ensure!(launched? == recorded?, "the numbers differ");
    Ok(format!("{STEPS} steps"))
}

/// The largest error of any case, prompt at once and then token by token.
fn against_transformers<D: Device + Clone>(
    path: &Path,
    cache: CacheFormat,
    device: &D,
    books: &(Inventory, Ledger),
) -> Result<f32> {
    let cases: Value = serde_json::from_str(&std::fs::read_to_string(path.join("cases.json"))?)?;
    let tensors = SafetensorsDir::open(path)?;
    let mut largest = 0.0_f32;
    for case in cases["cases"].as_array().context("no cases")? {
        let name = case["name"].as_str().context("a case has no name")?;
        let context = case["planned_context"].as_u64().context("no context")?;
        let expected = |kind: &str| -> Result<Vec<f32>> {
            let tensor = tensors.read(&format!("{name}.{kind}_logits"))?;
            let (values, _) = tensor.bytes.as_chunks();
            Ok(values
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect())
        };
        let request = ModelRequest {
            cache,
            ..request(context, 1)
        };
        let mut model = load(path, &request, device, books)?;
        let (prompt, steps) = (ids(&case["prompt_ids"]), ids(&case["step_ids"]));
        let found = feed(&mut model, &prompt, 0, 0)?;
        largest = largest.max(worst(&found, &expected("prompt")?));
        let mut found = Vec::new();
        for (index, &token) in steps.iter().enumerate() {
            found.extend(feed(&mut model, &[token], prompt.len() + index, 0)?);
        }
        largest = largest.max(worst(&found, &expected("step")?));
    }
    Ok(largest)
}

/// Decodes a sequence three times alone and once among 31 others: all bits must be the same.
/// From the second step of a shape on, steps are replayed recordings.
fn decode_alone_and_among_others<D: Device + Clone>(
    path: &Path,
    device: &D,
    books: &(Inventory, Ledger),
) -> Result<String> {
    const OTHERS: u32 = 31;
    const STEPS: usize = 24;
    let mut model = load(path, &request(256, u64::from(OTHERS) + 1), device, books)?;
    let vocab_size = model.spec().vocab_size;
    let token = |sequence: u32, position: usize| {
        (sequence * 7919 + position as u32 * 104_729) % vocab_size as u32
    };
    let prompt = |sequence: u32| -> Vec<u32> {
        let length = 5 + sequence as usize % 11;
        (0..length)
            .map(|position| token(sequence, position))
            .collect()
    };
    let mut alone = Vec::new();
    for _ in 0..3 {
        let start = prompt(0);
        feed(&mut model, &start, 0, 0)?;
        let mut logits = Vec::new();
        for step in 0..STEPS {
            let position = start.len() + step;
            logits.extend(feed(&mut model, &[token(0, position)], position, 0)?);
        }
        alone.push(logits);
    }
    ensure!(
        alone[0] == alone[1] && alone[1] == alone[2],
        "three runs differ"
    );

    for sequence in 0..=OTHERS {
        feed(&mut model, &prompt(sequence), 0, sequence)?;
    }
    let mut among = Vec::new();
    let mut step = StepPlan::default();
    for index in 0..STEPS {
        step.clear();
        step.pages_per_sequence = 1;
        // The one that is looked at comes last in the step.
        for sequence in (0..=OTHERS).rev() {
            let position = prompt(sequence).len() + index;
            let tokens = [token(sequence, position)];
            step.push_sequence(tokens, position, [sequence], 1);
        }
        let logits = model.run(&step)?.logits;
        among.extend_from_slice(&logits[OTHERS as usize * vocab_size..]);
    }
    let differing = alone[0]
        .iter()
        .zip(&among)
        .filter(|(a, b)| a.to_bits() != b.to_bits());
    let differing = differing.count();
    ensure!(
        differing == 0,
        "{differing} of {} logits differ in their bits",
        among.len()
    );
    Ok(format!("{STEPS} steps"))
}
