//! A tiny model on devices of the fake driver.

use oxllama_backend::{DeviceMemory, PAGE_TOKENS};
use oxllama_cuda::{CudaDevice, CudaUnavailable, gpus};
use oxllama_fake_driver::Report;
use oxllama_format::{ModelSource, SyntheticShape};
use oxllama_memory::{
    Bytes, CacheFormat, DeviceId, DeviceInfo, GpuSplit, Inventory, Ledger, Policy,
};
use oxllama_model::{
    Decoder, LoadOptions, ModelError, ModelRequest, ModelSpec, Runner, StepPlan, plan_model,
};

/// A model of EXL2 linears with as many layers as said.
pub(crate) fn source(layers: usize) -> ModelSource {
    let shape = SyntheticShape {
        name: "tiny".to_owned(),
        hidden_size: 64,
        intermediate_size: 96,
        layers,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        vocab_size: 288,
        rope_theta: 1e4,
        bits_per_weight: 3.5,
        seed: 1,
    };
    ModelSource::synthetic(&shape).expect("a sane shape")
}

/// What may go wrong between a GPU and a token.
#[derive(Debug)]
pub(crate) enum Failure {
    Unavailable(CudaUnavailable),
    Model(ModelError),
}

impl From<CudaUnavailable> for Failure {
    fn from(error: CudaUnavailable) -> Self {
        Self::Unavailable(error)
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        Self::Model(error)
    }
}

/// Opens every GPU.
pub(crate) fn open() -> Result<Vec<CudaDevice>, CudaUnavailable> {
    gpus()?.iter().map(CudaDevice::open).collect()
}

/// Books over `devices`, of 64 MiB each.
pub(crate) fn books(devices: &[CudaDevice]) -> (Inventory, Ledger) {
    let info =
        |device: &CudaDevice| DeviceInfo::new(device.id().clone(), "fake", Bytes::from_mib(64));
    let infos = devices.iter().map(info).collect();
    let inventory = Inventory::new(infos).expect("ids differ");
    let ledger = Ledger::new(&inventory);
    (inventory, ledger)
}

/// Loads `source` on one thread, so that the order of calls is the same every time; with a
/// `split`, on as many devices as it has entries.
pub(crate) fn load(
    source: &ModelSource,
    devices: &[CudaDevice],
    books: &(Inventory, Ledger),
    split: Option<GpuSplit>,
) -> Result<Decoder<CudaDevice>, ModelError> {
    load_for(source, devices, books, split, 16)
}

/// The same for steps of up to so many tokens.
pub(crate) fn load_for(
    source: &ModelSource,
    devices: &[CudaDevice],
    (inventory, ledger): &(Inventory, Ledger),
    split: Option<GpuSplit>,
    chunk_tokens: u64,
) -> Result<Decoder<CudaDevice>, ModelError> {
    let spec = ModelSpec::from_config(source.config())?;
    let request = ModelRequest {
        context_tokens: Some(256),
        chunk_tokens,
        logit_rows: chunk_tokens,
        cache: CacheFormat::F16,
        policy: split.map_or(Policy::Fill, Policy::GpuSplit),
        excluded: inventory
            .devices()
            .iter()
            .map(|info| info.id.clone())
            .filter(|id| devices.iter().all(|device| device.id() != id))
            .collect(),
        ..ModelRequest::default()
    };
    let plan = plan_model(source, &spec, &devices[0], inventory, &request)?;
    let threads = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    threads.expect("a thread").install(|| {
        Decoder::load(
            source,
            spec,
            devices.to_vec(),
            &plan,
            &LoadOptions::new(ledger),
        )
    })
}

/// A prompt of three tokens.
pub(crate) fn prefill(model: &mut dyn Runner) -> Result<(), ModelError> {
    step(model, &[1, 2, 3], 0)
}

/// Four tokens, one at a time: the first as it comes, the second recorded, then replayed.
pub(crate) fn decode(model: &mut dyn Runner) -> Result<(), ModelError> {
    (3..7).try_for_each(|position| step(model, &[5], position))
}

/// Some tokens of one sequence, with the logits of all.
pub(crate) fn step(model: &mut dyn Runner, tokens: &[u32], first: usize) -> Result<(), ModelError> {
    let pages = (first + tokens.len()).div_ceil(PAGE_TOKENS);
    let mut plan = StepPlan {
        pages_per_sequence: pages,
        ..StepPlan::default()
    };
    plan.push_sequence(tokens.iter().copied(), first, 0..pages as u32, tokens.len());
    let logits = model.run(&plan)?.logits;
    assert_eq!(logits.len(), tokens.len() * 288);
    Ok(())
}

/// Nothing may be booked on any device.
pub(crate) fn assert_nothing_booked(ledger: &Ledger) {
    for device in ledger.inventory().devices() {
        let entries = ledger.entries(&device.id);
        assert!(entries.is_empty(), "{}: {entries:?}", device.id);
    }
}

/// Nothing was done that a driver refuses, nothing was forgotten, nothing was asked of a lost
/// device.
pub(crate) fn assert_clean(report: &Report, when: &str) {
    assert_eq!(report.misuse, [""; 0], "{when}");
    assert_eq!(report.count("leaked"), 0, "{when}");
    assert_eq!(report.calls_after_loss, [""; 0], "{when}");
}

pub(crate) fn cuda(index: u32) -> DeviceId {
    DeviceId::cuda(index)
}
