//! From the command line's words to a loaded model.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_cpu::{CpuDevice, SpinPool};
use oxllama_cuda::{CudaDevice, CudaUnavailable, GpuInfo};
use oxllama_format::{HostMemory, ModelSource};
use oxllama_memory::{
    Bytes, CacheFormat, DeviceId, DeviceInfo, GpuSplit, Inventory, Ledger, Policy,
};
use oxllama_model::{
    Decoder, EmbeddingPlace, LoadOptions, ModelError, ModelPlan, ModelRequest, ModelSpec,
    RopeOverrides, Runner, plan_model,
};
use oxllama_text::Tokenizer;

use crate::args::{CacheKind, DeviceKind, EmbeddingKind, PlacementArgs, PolicyKind};
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
    pub(crate) ledger: Ledger,
    pub(crate) devices: Devices,
}

/// The devices of a [`Host`], all of one backend, in the order of its inventory.
pub(crate) enum Devices {
    Cpu(Vec<CpuDevice>),
    Reference(Vec<ReferenceDevice>),
    Cuda(Vec<CudaDevice>),
}

impl Host {
    pub(crate) fn new(placement: &PlacementArgs) -> Result<Self> {
        let gpus = match placement.device {
            DeviceKind::Cpu | DeviceKind::Reference => None,
            DeviceKind::Cuda => Some(open_gpus(oxllama_cuda::gpus())?),
            // Virtual devices are made of the CPU.
            DeviceKind::Auto if placement.virtual_devices.is_some() => None,
            DeviceKind::Auto => gpus_if_any(),
        };
        if let Some((inventory, devices)) = gpus {
            return Ok(Self {
                ledger: Ledger::with_host(&inventory, &host_info()?),
                devices: Devices::Cuda(devices),
            });
        }
        let inventory = cpu_inventory(placement)?;
        Ok(Self {
            ledger: Ledger::new(&inventory),
            devices: Devices::on_cpu(placement, &inventory)?,
        })
    }
}

impl Host {
    /// The host's memory as it is now, with what its account in the books still has.
    fn memory(&self) -> Result<DeviceInfo> {
        let mut info = host_info()?;
        if let Some(usage) = self.ledger.usage(&info.id) {
            info.available = info.available.min(usage.available);
        }
        Ok(info)
    }
}

impl Devices {
    fn on_cpu(placement: &PlacementArgs, inventory: &Inventory) -> Result<Self> {
        let infos = inventory.devices().iter();
        if placement.device == DeviceKind::Reference {
            let devices = infos.map(|info| ReferenceDevice::new(info.id.clone()));
            return Ok(Self::Reference(devices.collect()));
        }
        let threads = placement.threads.unwrap_or_else(SpinPool::default_threads);
        let pool = SpinPool::new(threads).context("cannot start the worker threads")?;
        let pool = Arc::new(pool);
        let devices =
            infos.map(|info| CpuDevice::with_pool(info.id.clone(), None, Arc::clone(&pool)));
        Ok(Self::Cpu(devices.collect()))
    }
}

/// Memory of a GPU that plans leave alone: what the driver takes for libraries and its own queues
/// after a device has been opened, and what it leaves unused of the pieces that it takes.
const DRIVER_RESERVE: Bytes = Bytes::from_mib(256);

/// Every GPU of those that were found that kernels are written for.
fn open_gpus(found: Result<Vec<GpuInfo>, CudaUnavailable>) -> Result<(Inventory, Vec<CudaDevice>)> {
    const WITHOUT: &str = "cannot use a GPU (--device cpu does without)";
    let gpus = found.context(WITHOUT)?;
    let mut devices = Vec::new();
    let mut infos = Vec::new();
    let mut refused = None;
    for gpu in gpus {
        let opened = CudaDevice::open(&gpu).map_err(anyhow::Error::new);
        let opened = opened.and_then(|device| Ok((device.free_memory()?, device)));
        match opened {
            Ok((free, device)) => {
                let mut info = DeviceInfo::new(gpu.id.clone(), gpu.name.clone(), gpu.memory);
                info.available = free.saturating_sub(DRIVER_RESERVE);
                infos.push(info);
                devices.push(device);
            }
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) if devices.is_empty() => Err(error.context(WITHOUT)),
        _ => Ok((Inventory::new(infos)?, devices)),
    }
}

/// As [`open_gpus`] where there is a GPU at all; why one that is there is not used is told.
fn gpus_if_any() -> Option<(Inventory, Vec<CudaDevice>)> {
    let found = oxllama_cuda::gpus();
    if let Err(CudaUnavailable::NoDriver | CudaUnavailable::NoDevice { .. }) = found {
        return None;
    }
    match open_gpus(found) {
        Ok(opened) => Some(opened),
        Err(error) => {
            output::note(format_args!("running on the CPU: {error:#}"));
            None
        }
    }
}

/// One device for the whole CPU, or the virtual ones asked for.
///
/// A split for several devices describes GPUs; on a machine without them it is planned (and
/// run) on virtual devices of those sizes.
fn cpu_inventory(placement: &PlacementArgs) -> Result<Inventory> {
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
        None => vec![host_info()?],
    };
    Ok(Inventory::new(devices)?)
}

/// The processor with all of its memory.
fn host_info() -> Result<DeviceInfo> {
    let host = HostMemory::read()?;
    let mut cpu = DeviceInfo::new(DeviceId::cpu(0), cpu_name(), Bytes(host.total_bytes));
    cpu.available = Bytes(host.available_bytes.min(host.total_bytes));
    Ok(cpu)
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

fn request(host: &Host, placement: &PlacementArgs, size: StepSize) -> Result<ModelRequest> {
    let chunk_tokens = placement.chunk.unwrap_or(size.chunk_tokens);
    Ok(ModelRequest {
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
        embedding: match placement.embedding {
            EmbeddingKind::Device => EmbeddingPlace::Device,
            EmbeddingKind::Auto => EmbeddingPlace::WhereItFits(host.memory()?),
            EmbeddingKind::Host => EmbeddingPlace::Host(host.memory()?),
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
    })
}

/// Where `opened` would go on `host`.
pub(crate) fn plan(
    opened: &Opened,
    host: &Host,
    placement: &PlacementArgs,
    size: StepSize,
) -> Result<ModelPlan> {
    let Opened { source, spec } = opened;
    let request = request(host, placement, size)?;
    let inventory = host.ledger.inventory();
    let plan = match &host.devices {
        Devices::Cpu(devices) => plan_model(source, spec, &devices[0], &inventory, &request),
        Devices::Reference(devices) => plan_model(source, spec, &devices[0], &inventory, &request),
        Devices::Cuda(devices) => plan_model(source, spec, &devices[0], &inventory, &request),
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
pub(crate) fn load(opened: &Opened, host: &Host, plan: &ModelPlan) -> Result<Box<dyn Runner>> {
    match &host.devices {
        Devices::Cpu(devices) => load_on(opened, host, devices.clone(), plan),
        Devices::Reference(devices) => load_on(opened, host, devices.clone(), plan),
        Devices::Cuda(devices) => load_on(opened, host, devices.clone(), plan),
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
