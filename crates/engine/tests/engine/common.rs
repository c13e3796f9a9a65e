//! A tiny Llama with random weights on the CPU backend, and engines over it.

use std::path::{Path, PathBuf};

use oxllama_cpu::{CpuDevice, CpuOptions};
use oxllama_engine::{
    Completion, Engine, EngineParts, EngineSettings, Event, Job, SamplingSettings,
};
use oxllama_format::ModelSource;
use oxllama_memory::{Bytes, CacheFormat, DeviceId, DeviceInfo, Inventory, Ledger};
use oxllama_model::{Decoder, LoadOptions, ModelRequest, ModelSpec, Runner, plan_model};
use oxllama_test_support::tokenizer_json;
use oxllama_text::Tokenizer;
use serde_json::json;

/// What a model is loaded for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) context_tokens: u64,
    pub(crate) cache_tokens: Option<u64>,
    pub(crate) batch: u64,
    pub(crate) chunk_tokens: u64,
    pub(crate) logit_rows: u64,
    pub(crate) cache: CacheFormat,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            context_tokens: 64,
            cache_tokens: None,
            batch: 4,
            chunk_tokens: 64,
            logit_rows: 32,
            cache: CacheFormat::F16,
        }
    }
}

/// Room for answers that rewind, loop, or guess.
pub(crate) const SHAPE: Shape = Shape {
    context_tokens: 512,
    cache_tokens: None,
    batch: 4,
    chunk_tokens: 64,
    logit_rows: 32,
    cache: CacheFormat::F16,
};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/models")
        .join(name)
}

/// Loads a fixture as if it had been made for 4,096 tokens of context.
pub(crate) fn load(model: &str, shape: Shape) -> (Box<dyn Runner>, Ledger) {
    let source = ModelSource::open(&fixture(model)).unwrap();
    let mut config = source.config().clone();
    config["max_position_embeddings"] = json!(4096);
    let spec = ModelSpec::from_config(&config).unwrap();
    let options = CpuOptions {
        // Tests run side by side: more threads than cores would wait for each other.
        threads: Some(1),
        ..CpuOptions::default()
    };
    let device = CpuDevice::new(DeviceId::cpu(0), options).unwrap();
    let info = DeviceInfo::new(DeviceId::cpu(0), "test", Bytes::from_mib(512));
    let inventory = Inventory::new(vec![info]).unwrap();
    let request = ModelRequest {
        context_tokens: Some(shape.context_tokens),
        cache_tokens: shape.cache_tokens,
        batch: shape.batch,
        chunk_tokens: shape.chunk_tokens,
        logit_rows: shape.logit_rows,
        cache: shape.cache,
        ..ModelRequest::default()
    };
    let plan = plan_model(&source, &spec, &device, &inventory, &request).unwrap();
    let ledger = Ledger::new(&inventory);
    let options = LoadOptions::new(&ledger);
    let decoder = Decoder::load(&source, spec, vec![device], &plan, &options).unwrap();
    (Box::new(decoder), ledger)
}

/// A tokenizer of one printable character a token.
pub(crate) fn tokenizer(vocab_size: usize) -> Tokenizer {
    let file = tokenizer_json(vocab_size);
    Tokenizer::new(file.as_bytes(), None, &json!({}), None).unwrap()
}

/// Tests measure nothing.
pub(crate) fn settings() -> EngineSettings {
    EngineSettings {
        latency_factor: None,
        ..EngineSettings::default()
    }
}

pub(crate) fn engine_with(
    runner: Box<dyn Runner>,
    draft: Option<Box<dyn Runner>>,
    settings: EngineSettings,
) -> Engine {
    let tokenizer = tokenizer(runner.spec().vocab_size);
    let parts = EngineParts {
        runner,
        draft,
        tokenizer,
    };
    Engine::start(parts, settings).unwrap()
}

pub(crate) fn engine(shape: Shape) -> Engine {
    engine_with(load("llama2", shape).0, None, settings())
}

pub(crate) const PROMPT: [u32; 20] = [
    3, 14, 15, 92, 6, 5, 35, 8, 9, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 2,
];

pub(crate) fn greedy(prompt_ids: &[u32], max_new_tokens: usize) -> Job {
    Job {
        sampling: SamplingSettings::greedy(),
        ..Job::new(prompt_ids.to_vec(), max_new_tokens)
    }
}

/// A job that draws from nearly everything, so that any change of a logit shows.
pub(crate) fn sampled(prompt_ids: &[u32], max_new_tokens: usize, seed: u64) -> Job {
    Job {
        sampling: SamplingSettings {
            temperature: 1.2,
            top_k: 0,
            top_p: 0.98,
            ..SamplingSettings::default()
        },
        seed,
        ..Job::new(prompt_ids.to_vec(), max_new_tokens)
    }
}

/// Runs jobs together, each to its end.
pub(crate) fn run_all(engine: &Engine, jobs: &[Job]) -> Vec<Completion> {
    let streams: Vec<_> = jobs
        .iter()
        .map(|job| engine.submit(job.clone()).unwrap())
        .collect();
    streams.into_iter().map(|stream| stream.wait()).collect()
}

/// Runs a job to its end and checks that the events add up.
pub(crate) fn run(engine: &Engine, job: Job) -> Completion {
    let mut finished = 0;
    let completion = engine.submit(job).unwrap().wait_with(|event| {
        assert_eq!(finished, 0, "an event after the last");
        finished += usize::from(matches!(event, Event::Finished { .. }));
    });
    assert_eq!(finished, 1);
    assert_eq!(
        completion.token_ids.len(),
        completion.usage.generated_tokens
    );
    completion
}

pub(crate) fn run_alone(shape: Shape, job: Job) -> Completion {
    run(&engine(shape), job)
}

/// A prompt of `length` tokens that begins like every other with the same `family`.
pub(crate) fn prompt(family: u32, own: u32, shared: usize, length: usize) -> Vec<u32> {
    let shared_ids = (0..shared as u32).map(|i| (family * 31 + i * 7) % 90);
    let own_ids = (shared as u32..length as u32).map(|i| (own * 13 + i * 5) % 90);
    shared_ids.chain(own_ids).collect()
}
