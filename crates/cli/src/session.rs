//! From the command line's words to a loaded model.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_cpu::{CpuDevice, SpinPool};
use oxllama_format::{HostMemory, ModelSource};
use oxllama_memory::{
    Bytes, CacheFormat, DeviceId, DeviceInfo, GpuSplit, Inventory, Ledger, Policy,
};
use oxllama_model::{
    Decoder, LoadOptions, ModelError, ModelPlan, ModelRequest, ModelSpec, RopeOverrides, Runner,
    plan_model,
};
use oxllama_text::Tokenizer;

use crate::args::{CacheKind, DeviceKind, PlacementArgs, PolicyKind};
use crate::{output, resolve};

/// Sequences, rows and logits that a command needs at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepSize {
    pub(crate) batch: u64,
    pub(crate) chunk_tokens: u64,
    pub(crate) logit_rows: u64,
}

impl StepSize {
    /// One job: chunks of 512 tokens, the logits of the last.
    pub(crate) const ONE_JOB: Self = Self {
        batch: 1,
        chunk_tokens: 512,
        logit_rows: 1,
    };
}

/// The devices that the placement options describe, and the books over them.
pub(crate) struct Host {
    pub(crate) inventory: Inventory,
    pub(crate) ledger: Ledger,
    pool: Arc<SpinPool>,
}

impl Host {
    pub(crate) fn new(placement: &PlacementArgs) -> Result<Self> {
        let threads = placement.threads.unwrap_or_else(SpinPool::default_threads);
        let pool = SpinPool::new(threads).context("cannot start the worker threads")?;
        let inventory = inventory(placement)?;
        Ok(Self {
            ledger: Ledger::new(&inventory),
            inventory,
            pool: Arc::new(pool),
        })
    }

    fn cpu_devices(&self) -> Vec<CpuDevice> {
        let device =
            |info: &DeviceInfo| CpuDevice::with_pool(info.id.clone(), None, Arc::clone(&self.pool));
        self.inventory.devices().iter().map(device).collect()
    }

    fn reference_devices(&self) -> Vec<ReferenceDevice> {
        let device = |info: &DeviceInfo| ReferenceDevice::new(info.id.clone());
        self.inventory.devices().iter().map(device).collect()
    }
}

/// One device for the whole CPU, or the virtual ones asked for.
///
/// A split for several devices describes GPUs; on a machine without them it is planned (and
/// run) on virtual devices of those sizes.
fn inventory(placement: &PlacementArgs) -> Result<Inventory> {
    let split_sizes = match &placement.gpu_split {
        Some(GpuSplit(sizes)) if sizes.len() > 1 => Some(sizes),
        _ => None,
    };
    let sizes = placement
        .virtual_devices
        .as_ref()
        .map(|devices| &devices.0)
        .or(split_sizes);
    let devices = match sizes {
        Some(sizes) => (0u32..)
            .zip(sizes)
            .map(|(index, &size)| {
                DeviceInfo::new(
                    DeviceId::cpu(index),
                    format!("virtual device {index}"),
                    size,
                )
            })
            .collect(),
        None => {
            let host = HostMemory::read()?;
            let mut cpu = DeviceInfo::new(DeviceId::cpu(0), cpu_name(), Bytes(host.total_bytes));
            cpu.available = Bytes(host.available_bytes.min(host.total_bytes));
            vec![cpu]
        }
    };
    Ok(Inventory::new(devices)?)
}

/// What the processor calls itself.
pub(crate) fn cpu_name() -> String {
    let information = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = information
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| "CPU".to_owned(), |(_, name)| name.trim().to_owned())
}

/// A model's files and what they say of it.
pub(crate) struct Opened {
    pub(crate) source: ModelSource,
    pub(crate) spec: ModelSpec,
}

pub(crate) fn open(model: &str, placement: Option<&PlacementArgs>) -> Result<Opened> {
    open_source(ModelSource::open(&resolve::model_path(model)?)?, placement)
}

pub(crate) fn open_source(
    source: ModelSource,
    placement: Option<&PlacementArgs>,
) -> Result<Opened> {
    let mut spec =
        ModelSpec::from_config(source.config()).with_context(|| cannot_load(source.path()))?;
    if let Some(placement) = placement {
        spec = spec
            .with_rope_overrides(RopeOverrides {
                scale: placement.rope_scale,
                alpha: placement.rope_alpha,
                ..RopeOverrides::default()
            })
            .context("--rope-scale and --rope-alpha do not fit the model")?;
    }
    Ok(Opened { source, spec })
}

pub(crate) fn request(placement: &PlacementArgs, size: StepSize) -> ModelRequest {
    let chunk_tokens = placement.chunk.unwrap_or(size.chunk_tokens);
    ModelRequest {
        context_tokens: placement.context,
        cache_tokens: placement.cache_tokens,
        batch: size.batch,
        chunk_tokens,
        logit_rows: size.logit_rows.min(chunk_tokens),
        cache: match placement.cache {
            CacheKind::Fp16 => CacheFormat::F16,
            CacheKind::Fp32 => CacheFormat::F32,
            CacheKind::Q8 => CacheFormat::Q8,
            CacheKind::Q6 => CacheFormat::Q6,
            CacheKind::Q4 => CacheFormat::Q4,
        },
        policy: match (&placement.gpu_split, placement.policy) {
            (Some(split), _) => Policy::GpuSplit(split.clone()),
            (None, PolicyKind::Fill) => Policy::Fill,
            (None, PolicyKind::Balanced) => Policy::Balanced,
        },
        caps: placement
            .cap
            .iter()
            .map(|cap| (cap.device.clone(), cap.limit))
            .collect(),
        excluded: Vec::new(),
    }
}

/// Where `opened` would go on `host`.
pub(crate) fn plan(
    opened: &Opened,
    host: &Host,
    placement: &PlacementArgs,
    size: StepSize,
) -> Result<ModelPlan> {
    let Opened { source, spec } = opened;
    let request = request(placement, size);
    let inventory = host.ledger.inventory();
    let plan = match placement.device {
        DeviceKind::Cpu => plan_model(source, spec, &host.cpu_devices()[0], &inventory, &request),
        DeviceKind::Reference => plan_model(
            source,
            spec,
            &host.reference_devices()[0],
            &inventory,
            &request,
        ),
    };
    plan.map_err(|error| name_files(error, source))
}

/// Errors about what several files say together name only tensors: adds where those are.
pub(crate) fn name_files(error: ModelError, source: &ModelSource) -> anyhow::Error {
    let is_about_files = matches!(
        error,
        ModelError::Contradiction { .. }
            | ModelError::MissingWeight { .. }
            | ModelError::UnexpectedWeight { .. }
    );
    let error = anyhow::Error::new(error);
    if is_about_files {
        error.context(cannot_load(source.path()))
    } else {
        error
    }
}

fn cannot_load(path: &Path) -> String {
    format!("cannot load {}", path.display())
}

/// Loads `opened` as `plan` says.
pub(crate) fn load(
    opened: &Opened,
    host: &Host,
    placement: &PlacementArgs,
    plan: &ModelPlan,
) -> Result<Box<dyn Runner>> {
    match placement.device {
        DeviceKind::Cpu => load_on(opened, host, host.cpu_devices(), plan),
        DeviceKind::Reference => load_on(opened, host, host.reference_devices(), plan),
    }
}

fn load_on<D: Device>(
    opened: &Opened,
    host: &Host,
    devices: Vec<D>,
    plan: &ModelPlan,
) -> Result<Box<dyn Runner>> {
    let bar = output::byte_bar("loading", 0);
    let progress = |progress: oxllama_model::LoadProgress| {
        bar.set_length(progress.total.get());
        bar.set_position(progress.done.get());
    };
    let options = LoadOptions {
        progress: Some(&progress),
        ..LoadOptions::new(&host.ledger)
    };
    let decoder = Decoder::load(&opened.source, opened.spec.clone(), devices, plan, &options);
    bar.finish_and_clear();
    Ok(Box::new(decoder?))
}

pub(crate) fn tokenizer(source: &ModelSource) -> Result<Tokenizer> {
    Tokenizer::new(
        &source.tokenizer_json()?,
        source.tokenizer_config(),
        source.config(),
        source.generation_config(),
    )
    .with_context(|| cannot_load(source.path()))
}
