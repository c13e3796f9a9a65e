//! Loading and stepping a model in tests.

use std::path::{Path, PathBuf};

use oxllama_backend::reference::ReferenceDevice;
use oxllama_backend::{Device, PAGE_TOKENS};
use oxllama_cpu::{CpuDevice, CpuOptions};
use oxllama_format::ModelSource;
use oxllama_memory::{Bytes, CacheFormat, DeviceId, DeviceInfo, Inventory, Ledger};
use oxllama_model::{
    Decoder, LoadOptions, ModelError, ModelPlan, ModelRequest, ModelSpec, Runner, StepPlan,
    plan_model,
};

/// The workspace's root.
pub(crate) fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A path in the folder of larger test data; says so loudly and gives `None` where it is not.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("OXLLAMA_SHARED")
        .map_or_else(|| workspace_root().join("../shared"), PathBuf::from);
    let full = root.join(path);
    if full.exists() {
        return Some(full);
    }
    eprintln!("SKIPPED: {} not found; set OXLLAMA_SHARED", full.display());
    None
}

/// The demo model, SmolLM2-135M converted to fp16, where `oxllama pull smollm2-135m` keeps it;
/// says so loudly and gives `None` where it is not.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn demo_model() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = variable("OXLLAMA_CACHE")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&variable("XDG_CACHE_HOME")?).join("oxllama")))
        .or_else(|| Some(Path::new(&variable("HOME")?).join(".cache/oxllama")))?;
    let path = cache.join("models/smollm2-135m");
    if path.exists() {
        return Some(path);
    }
    eprintln!(
        "SKIPPED: {} not found; run `oxllama pull smollm2-135m`",
        path.display()
    );
    None
}

/// An inventory of `count` virtual devices of `each` bytes, and its books.
pub(crate) fn virtual_devices(count: u32, each: Bytes) -> (Inventory, Ledger) {
    let devices = (0..count)
        .map(|index| DeviceInfo::new(DeviceId::cpu(index), "virtual", each))
        .collect();
    let inventory = Inventory::new(devices).expect("distinct devices");
    let ledger = Ledger::new(&inventory);
    (inventory, ledger)
}

/// A request that is exact where the cache would round.
pub(crate) fn exact_request(context_tokens: u64) -> ModelRequest {
    ModelRequest {
        context_tokens: Some(context_tokens),
        logit_rows: 512,
        cache: CacheFormat::F32,
        ..ModelRequest::default()
    }
}

/// A loaded model with its plan and its books.
pub(crate) struct Loaded<D: Device = ReferenceDevice> {
    pub(crate) model: Decoder<D>,
    pub(crate) plan: ModelPlan,
    pub(crate) ledger: Ledger,
}

/// The fast backend's device of this name.
pub(crate) fn cpu_device(id: DeviceId) -> CpuDevice {
    CpuDevice::new(id, CpuOptions::default()).expect("threads")
}

/// Plans and loads on the scalar backend's devices of `inventory`.
pub(crate) fn load_on(
    path: &Path,
    request: &ModelRequest,
    inventory: &Inventory,
    ledger: Ledger,
) -> Result<Loaded, ModelError> {
    load_with(path, request, inventory, ledger, ReferenceDevice::new)
}

/// Plans and loads on devices of any backend, one for each of `inventory`.
pub(crate) fn load_with<D: Device>(
    path: &Path,
    request: &ModelRequest,
    inventory: &Inventory,
    ledger: Ledger,
    device: impl Fn(DeviceId) -> D,
) -> Result<Loaded<D>, ModelError> {
    load_source(
        &ModelSource::open(path)?,
        request,
        inventory,
        ledger,
        device,
    )
}

/// The same for a model that is open.
pub(crate) fn load_source<D: Device>(
    source: &ModelSource,
    request: &ModelRequest,
    inventory: &Inventory,
    ledger: Ledger,
    device: impl Fn(DeviceId) -> D,
) -> Result<Loaded<D>, ModelError> {
    let spec = ModelSpec::from_config(source.config())?;
    let infos = inventory.devices().iter();
    let devices: Vec<D> = infos.map(|info| device(info.id.clone())).collect();
    let plan = plan_model(source, &spec, &devices[0], inventory, request)?;
    let options = LoadOptions::new(&ledger);
    let model = Decoder::load(source, spec, devices, &plan, &options)?;
    Ok(Loaded {
        model,
        plan,
        ledger,
    })
}

/// Plans and loads on a single device with room to spare.
pub(crate) fn load<D: Device>(
    path: &Path,
    request: &ModelRequest,
    device: impl Fn(DeviceId) -> D,
) -> Loaded<D> {
    let (inventory, ledger) = virtual_devices(1, Bytes::from_gib(16));
    load_with(path, request, &inventory, ledger, device)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// One sequence that uses the first pages of the cache, in reverse order so that a page's
/// number never equals its place.
pub(crate) struct Sequence {
    length: u32,
    pages: Vec<u32>,
}

impl Sequence {
    pub(crate) fn new(model: &dyn Runner) -> Self {
        let pages = model.limits().pages_per_sequence as u32;
        Self {
            length: 0,
            pages: (0..pages).rev().collect(),
        }
    }

    /// Feeds `tokens` as one step and returns the logits of all of them,
    /// `[tokens, vocab_size]`.
    pub(crate) fn feed(&mut self, model: &mut dyn Runner, tokens: &[u32]) -> Vec<f32> {
        let step = self.step(tokens);
        self.length += tokens.len() as u32;
        model.run(&step).expect("a valid step").logits.to_vec()
    }

    fn step(&self, tokens: &[u32]) -> StepPlan {
        let rows = tokens.len() as u32;
        let used = (self.length + rows) as usize;
        StepPlan {
            token_ids: tokens.to_vec(),
            positions: (self.length..self.length + rows).collect(),
            row_sequences: vec![0; tokens.len()],
            page_tables: self.pages[..used.div_ceil(PAGE_TOKENS)].to_vec(),
            pages_per_sequence: used.div_ceil(PAGE_TOKENS),
            logit_rows: (0..rows).collect(),
            ..StepPlan::default()
        }
    }
}
