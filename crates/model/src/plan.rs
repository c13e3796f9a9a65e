//! From headers to a plan: every byte that a model takes, before one is read.

use oxllama_backend::quantised::GROUP;
use oxllama_backend::{Device, PAGE_TOKENS};
use oxllama_format::{GptqConfig, ModelSource};
use oxllama_memory::{
    Bytes, CacheFormat, DeviceId, DeviceInfo, DeviceRole, HostPlan, Inventory, LayerFootprint,
    ModelFootprint, Plan, PlanRequest, Policy, StepLimits, WorkspaceModel, plan,
};

use crate::stage::{StageShape, step_rows, to_usize};
use crate::weights::{LayerNorms, StoredHeadNorm, StoredLinear, StoredNorm, StoredWeights};
use crate::{ModelError, ModelSpec};

/// Bytes of a norm's weight on a device.
const NORM_ELEMENT_BYTES: u64 = 4;

/// Bounds of a request that no machine reaches; they keep sizes far from overflow.
const MAX_CHUNK_TOKENS: u64 = 1 << 20;
const MAX_BATCH: u64 = 1 << 16;
/// Pages are numbered in 32 bits.
const MAX_CACHE_TOKENS: u64 = (PAGE_TOKENS as u64) << 31;

/// Where the embedding goes, of which a step reads only a few rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum EmbeddingPlace {
    /// On the first device.
    #[default]
    Device,
    /// In this host's memory, from which the device reads rows in place. Devices whose memory is
    /// the host's hold it themselves all the same.
    Host(DeviceInfo),
    /// On the first device if everything fits there, else in this host's memory.
    WhereItFits(DeviceInfo),
}

/// What a model shall serve, and where.
#[derive(Debug, Clone)]
pub struct ModelRequest {
    /// Tokens of context of each sequence; `None` for the longest that fits, up to the
    /// model's maximum.
    pub context_tokens: Option<u64>,
    /// Tokens of the cache, all sequences together, rounded up to whole pages; `None` for
    /// `batch` sequences of full context. No sequence's context exceeds it.
    pub cache_tokens: Option<u64>,
    /// Sequences in one step.
    pub batch: u64,
    /// Tokens of one step, all sequences together.
    pub chunk_tokens: u64,
    /// Rows of one step whose logits may be asked for; at least `batch` are planned.
    pub logit_rows: u64,
    /// The format of the cache.
    pub cache: CacheFormat,
    /// Where the embedding goes.
    pub embedding: EmbeddingPlace,
    /// How layers are distributed.
    pub policy: Policy,
    /// The most to be used of single devices.
    pub caps: Vec<(DeviceId, Bytes)>,
    /// Devices not to be used.
    pub excluded: Vec<DeviceId>,
}

/// One sequence of the longest context that fits, chunks of 512 tokens, an fp16 cache.
impl Default for ModelRequest {
    fn default() -> Self {
        Self {
            context_tokens: None,
            cache_tokens: None,
            batch: 1,
            chunk_tokens: 512,
            logit_rows: 1,
            cache: CacheFormat::F16,
            embedding: EmbeddingPlace::Device,
            policy: Policy::Fill,
            caps: Vec::new(),
            excluded: Vec::new(),
        }
    }
}

/// What goes on which device, ready to be loaded.
#[derive(Debug, Clone)]
pub struct ModelPlan {
    /// Bytes by device and purpose.
    pub memory: Plan,
    /// Rows of one step whose logits may be asked for.
    pub logit_rows: usize,
}

impl ModelPlan {
    /// The largest step that is planned for.
    pub(crate) fn step_limits(&self) -> StepLimits {
        StepLimits {
            chunk_tokens: self.memory.chunk_tokens,
            batch: self.memory.batch,
            context_tokens: self.memory.context_tokens,
            cache_tokens: self.memory.cache_tokens,
        }
    }
}

/// What a model takes on a kind of device, read from its headers.
pub struct Footprint<'a, D> {
    spec: &'a ModelSpec,
    device: &'a D,
    head_width: usize,
    model: ModelFootprint,
    /// Of the embedding where the host holds it; `None` if it cannot.
    host_embedding: Option<Bytes>,
}

impl<'a, D: Device> Footprint<'a, D> {
    /// Reads the headers of `source` and checks them against `spec`. `device` is any device
    /// of the kind that is planned for: it knows how large its repacked weights are.
    ///
    /// # Errors
    /// A weight is missing, contradicts the configuration, or its header is malformed.
    pub fn read(
        source: &ModelSource,
        spec: &'a ModelSpec,
        device: &'a D,
    ) -> Result<Self, ModelError> {
        let weights = StoredWeights::find(source.tensors(), &source.gptq_config()?, spec)?;
        Ok(Self::of_weights(&weights, model_name(source), spec, device))
    }

    pub(crate) fn of_weights(
        weights: &StoredWeights,
        name: String,
        spec: &'a ModelSpec,
        device: &'a D,
    ) -> Self {
        let linear_bytes = |linear: &StoredLinear| device.linear_bytes(&linear.header);
        let layers = weights.layers.iter().map(|layer| {
            let linears = layer.linears.as_array();
            let bytes = linears
                .iter()
                .map(|linear| linear_bytes(linear))
                .fold(norm_bytes(&layer.norms, spec), Bytes::saturating_add);
            let elements = |linear: &&StoredLinear| {
                linear.header.in_features as u64 * linear.header.out_features as u64
            };
            LayerFootprint {
                weights: bytes,
                weight_elements: linears.iter().map(elements).sum(),
                kv_elements_per_token: 2 * spec.kv_width() as u64,
            }
        });
        let head = weights.head_linear();
        let model = ModelFootprint {
            name,
            embedding: linear_bytes(&weights.embedding),
            final_norm: row_norm_bytes(spec),
            head: linear_bytes(head),
            head_tied_to_embedding: weights.head.is_none(),
            layers: layers.collect(),
            max_context_tokens: spec.max_context_tokens() as u64,
            page_tokens: PAGE_TOKENS as u64,
            quantisable_cache: spec.head_dim.is_multiple_of(GROUP),
        };
        Self {
            spec,
            device,
            head_width: head.header.out_features,
            model,
            host_embedding: device.host_embedding_bytes(&weights.embedding.header),
        }
    }

    /// The parts of the model in bytes.
    pub fn model(&self) -> &ModelFootprint {
        &self.model
    }

    /// Bytes of activations, logits and the backend's scratch on a device of `role`.
    pub fn workspace(&self, logit_rows: usize, role: &DeviceRole, limits: &StepLimits) -> Bytes {
        let shape = self.shape(logit_rows, role, limits);
        let scratch = self.device.workspace_bytes(&shape.workspace);
        shape.activation_bytes().saturating_add(scratch)
    }

    fn shape(&self, logit_rows: usize, role: &DeviceRole, limits: &StepLimits) -> StageShape {
        StageShape::new(
            self.spec,
            self.head_width,
            logit_rows.max(to_usize(limits.batch)),
            role,
            limits,
        )
    }

    /// Places the model on the devices of `inventory`.
    ///
    /// # Errors
    /// [`ModelError::Plan`]: it does not fit, with what would;
    /// [`ModelError::HostMemory`]: the host has no room for the embedding that it is to hold;
    /// [`ModelError::UnquantisableCache`]; or the request makes no sense.
    pub fn plan(
        &self,
        inventory: &Inventory,
        request: &ModelRequest,
    ) -> Result<ModelPlan, ModelError> {
        check_request(request)?;
        check_cache_format(self.spec, request.cache)?;
        let on_devices = || self.plan_devices(&self.model, inventory, request);
        match (&request.embedding, self.host_embedding) {
            (EmbeddingPlace::Device, _) | (_, None) => on_devices(),
            (EmbeddingPlace::Host(host), Some(bytes)) => {
                self.plan_with_host(host, bytes, inventory, request)
            }
            (EmbeddingPlace::WhereItFits(host), Some(bytes)) => match on_devices() {
                // What keeps it off the devices is the better answer if the host does not help.
                Err(ModelError::Plan(error)) => self
                    .plan_with_host(host, bytes, inventory, request)
                    .map_err(|_| ModelError::Plan(error)),
                planned => planned,
            },
        }
    }

    /// With the embedding, which takes `bytes` there, on `host`.
    fn plan_with_host(
        &self,
        host: &DeviceInfo,
        bytes: Bytes,
        inventory: &Inventory,
        request: &ModelRequest,
    ) -> Result<ModelPlan, ModelError> {
        if bytes > host.available {
            return Err(ModelError::HostMemory {
                device: host.id.clone(),
                needed: bytes,
                available: host.available,
                total: host.capacity,
            });
        }
        let without = ModelFootprint {
            embedding: Bytes::ZERO,
            ..self.model.clone()
        };
        let mut plan = self.plan_devices(&without, inventory, request)?;
        plan.memory.host = Some(HostPlan {
            device: host.id.clone(),
            embedding: bytes,
        });
        Ok(plan)
    }

    /// Places `model`, this one or a part of it.
    fn plan_devices(
        &self,
        model: &ModelFootprint,
        inventory: &Inventory,
        request: &ModelRequest,
    ) -> Result<ModelPlan, ModelError> {
        let asked_logit_rows = to_usize(request.logit_rows);
        let steps = Steps {
            footprint: self,
            logit_rows: asked_logit_rows,
        };
        let memory = plan(
            inventory,
            &PlanRequest {
                footprint: model,
                workspace: &steps,
                context_tokens: request.context_tokens,
                cache_tokens: request.cache_tokens,
                batch: request.batch,
                chunk_tokens: request.chunk_tokens,
                cache: request.cache,
                policy: request.policy.clone(),
                caps: request.caps.clone(),
                excluded: request.excluded.clone(),
            },
        )?;
        let mut plan = ModelPlan {
            logit_rows: asked_logit_rows.max(to_usize(memory.batch)),
            memory,
        };
        plan.logit_rows = plan.logit_rows.min(step_rows(&plan.step_limits()));
        Ok(plan)
    }
}

/// What the steps of a model take besides weights and cache.
struct Steps<'f, 'a, D> {
    footprint: &'f Footprint<'a, D>,
    logit_rows: usize,
}

impl<D: Device> WorkspaceModel for Steps<'_, '_, D> {
    fn workspace(&self, role: &DeviceRole, limits: &StepLimits) -> Bytes {
        self.footprint.workspace(self.logit_rows, role, limits)
    }

    fn recordings(&self, role: &DeviceRole, limits: &StepLimits) -> Bytes {
        let shape = self.footprint.shape(self.logit_rows, role, limits);
        let device = self.footprint.device;
        device.recording_bytes(&shape.workspace, role.layers.len())
    }
}

/// Reads headers and places the model on the devices of `inventory`: [`Footprint::read`] and
/// [`Footprint::plan`] in one. `device` is any device of the kind that is planned for.
///
/// # Errors
/// As those two.
pub fn plan_model<D: Device>(
    source: &ModelSource,
    spec: &ModelSpec,
    device: &D,
    inventory: &Inventory,
    request: &ModelRequest,
) -> Result<ModelPlan, ModelError> {
    Footprint::read(source, spec, device)?.plan(inventory, request)
}

/// Finds the weights of a model for loading.
pub(crate) fn find_weights(
    source: &ModelSource,
    spec: &ModelSpec,
) -> Result<(StoredWeights, GptqConfig), ModelError> {
    let gptq = source.gptq_config()?;
    let weights = StoredWeights::find(source.tensors(), &gptq, spec)?;
    Ok((weights, gptq))
}

/// The name by which plans and the ledger know a model: its directory's or file's.
pub(crate) fn model_name(source: &ModelSource) -> String {
    let path = source.path();
    let full = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    match full.file_name() {
        Some(name) => name.to_string_lossy().into_owned(),
        None => full.to_string_lossy().into_owned(),
    }
}

fn check_request(request: &ModelRequest) -> Result<(), ModelError> {
    for (what, found, most) in [
        (
            "tokens in its largest step",
            request.chunk_tokens,
            MAX_CHUNK_TOKENS,
        ),
        ("sequences", request.batch, MAX_BATCH),
    ] {
        if !(1..=most).contains(&found) {
            return Err(ModelError::Request {
                what,
                found,
                expected: format!("1 to {most}"),
            });
        }
    }
    request.cache_tokens.map_or(Ok(()), check_cache_tokens)
}

/// Refuses formats in which the model's heads cannot be kept.
pub(crate) fn check_cache_format(spec: &ModelSpec, format: CacheFormat) -> Result<(), ModelError> {
    if format.is_quantised() && !spec.head_dim.is_multiple_of(GROUP) {
        return Err(ModelError::UnquantisableCache {
            format,
            head_dim: spec.head_dim,
            group: GROUP,
        });
    }
    Ok(())
}

/// Refuses a cache of no tokens, or of more than pages can be numbered.
pub(crate) fn check_cache_tokens(tokens: u64) -> Result<(), ModelError> {
    if (1..=MAX_CACHE_TOKENS).contains(&tokens) {
        return Ok(());
    }
    Err(ModelError::Request {
        what: "tokens in its cache",
        found: tokens,
        expected: format!("1 to {MAX_CACHE_TOKENS}"),
    })
}

/// Bytes of one norm over the row's width.
pub(crate) fn row_norm_bytes(spec: &ModelSpec) -> Bytes {
    Bytes(spec.hidden_size as u64 * NORM_ELEMENT_BYTES)
}

/// Bytes of the norm of `heads` heads.
pub(crate) fn head_norm_bytes(spec: &ModelSpec, heads: usize) -> Bytes {
    Bytes((heads * spec.head_dim) as u64 * NORM_ELEMENT_BYTES)
}

/// Bytes of all norms of a layer.
fn norm_bytes(norms: &LayerNorms<StoredNorm, StoredHeadNorm>, spec: &ModelSpec) -> Bytes {
    let rows = norms.rows().map(|_| row_norm_bytes(spec));
    let heads = norms.heads().map(|norm| head_norm_bytes(spec, norm.heads));
    rows.chain(heads).fold(Bytes::ZERO, Bytes::saturating_add)
}

#[cfg(test)]
mod tests {
    use oxllama_backend::reference::ReferenceDevice;
    use oxllama_format::SyntheticShape;

    use super::*;

    /// 3.5 GiB of layers at 4 bits and a half, 1,002 MiB of embedding, 380 of head.
    const SHAPE: &str = "llama3-8b:4.0";

    /// As a footprint on devices that can read an embedding which takes `on_host` there.
    fn with_footprint(on_host: Option<Bytes>, check: impl FnOnce(&Footprint<'_, ReferenceDevice>)) {
        let shape: SyntheticShape = SHAPE.parse().unwrap();
        let source = ModelSource::synthetic(&shape).unwrap();
        let spec = ModelSpec::from_config(source.config()).unwrap();
        let device = ReferenceDevice::new(DeviceId::cuda(0));
        let mut footprint = Footprint::read(&source, &spec, &device).unwrap();
        footprint.host_embedding = on_host;
        check(&footprint);
    }

    fn device(id: DeviceId, bytes: Bytes) -> DeviceInfo {
        DeviceInfo::new(id, "a device", bytes)
    }

    fn gpu(bytes: Bytes) -> Inventory {
        Inventory::of_one(device(DeviceId::cuda(0), bytes))
    }

    fn request(embedding: EmbeddingPlace) -> ModelRequest {
        ModelRequest {
            context_tokens: Some(256),
            embedding,
            ..ModelRequest::default()
        }
    }

    #[test]
    fn an_embedding_stays_on_the_host_where_it_is_asked_to_or_has_no_other_room() {
        let on_host = Bytes::from_mib(1002);
        let host = device(DeviceId::cpu(0), Bytes::from_gib(2));
        with_footprint(Some(on_host), |footprint| {
            let large = gpu(Bytes::from_gib(64));
            let plan = |place, gpu: &Inventory| footprint.plan(gpu, &request(place));
            let whole = plan(EmbeddingPlace::Device, &large).unwrap().memory;
            assert_eq!(whole.host, None);
            let split = plan(EmbeddingPlace::Host(host.clone()), &large).unwrap();
            let split = split.memory;
            let expected = HostPlan {
                device: host.id.clone(),
                embedding: on_host,
            };
            assert_eq!(split.host.as_ref(), Some(&expected));
            let embedding = footprint.model().embedding;
            assert_eq!(
                whole.totals.weights,
                split.totals.weights.saturating_add(embedding)
            );
            let text = split.to_string();
            assert!(
                text.contains("1002.00 MiB of cpu:0 hold the embedding"),
                "{text}"
            );

            let anywhere = || EmbeddingPlace::WhereItFits(host.clone());
            let large = plan(anywhere(), &large).unwrap().memory;
            assert_eq!(large, whole);
            let small = gpu(whole.totals.total.saturating_sub(Bytes(1)));
            let small = plan(anywhere(), &small).unwrap().memory;
            assert_eq!(small.host, Some(expected));
            let tiny = gpu(Bytes::from_gib(1));
            let error = plan(anywhere(), &tiny).unwrap_err();
            assert!(matches!(error, ModelError::Plan(_)), "{error}");
        });
    }

    #[test]
    fn a_host_without_room_is_named_and_one_that_is_the_device_is_not_asked() {
        let host = device(DeviceId::cpu(0), Bytes::from_gib(1));
        let on_host = EmbeddingPlace::Host(host.clone());
        let gpu = gpu(Bytes::from_gib(64));
        with_footprint(Some(Bytes::from_gib(2)), |footprint| {
            match footprint.plan(&gpu, &request(on_host.clone())) {
                Err(ModelError::HostMemory { device, needed, .. }) => {
                    assert_eq!((device, needed), (host.id.clone(), Bytes::from_gib(2)));
                }
                other => panic!("{other:?}"),
            }
        });
        with_footprint(None, |footprint| {
            let plan = footprint.plan(&gpu, &request(on_host)).unwrap();
            assert_eq!(plan.memory.host, None);
        });
    }
}
