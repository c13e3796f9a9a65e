//! Loading by plan: everything is reserved first, then each buffer is carved from its
//! purpose's reservation. A failure drops what was made and leaves the ledger as it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use oxllama_backend::{CacheShape, Device, HeadNorm, KvLayer, Norm, PAGE_TOKENS};
use oxllama_format::{
    GptqConfig, HostMemory, ModelSource, TensorSource, read_head_norm_f32, read_vector_f32,
};
use oxllama_memory::{Bytes, DevicePlan, DeviceReservations, DeviceRole, Ledger, Reservation};
use rayon::prelude::*;

use crate::decoder::{Decoder, Head, Layer, Stage};
use crate::lora::Adapters;
use crate::plan::{find_weights, head_norm_bytes, row_norm_bytes};
use crate::stage::{StageShape, step_rows, to_usize};
use crate::weights::{LayerLinears, StoredHeadNorm, StoredLinear, StoredNorm, StoredWeights};
use crate::{ModelError, ModelPlan, ModelSpec, NormSpec, RunnerLimits};

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights that are on their devices.
    pub done: Bytes,
    /// Bytes of all weights.
    pub total: Bytes,
}

/// How to load.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// The books of all devices.
    pub ledger: &'a Ledger,
    /// Called after each linear, from several threads.
    pub progress: Option<&'a (dyn Fn(LoadProgress) + Sync)>,
    /// What the host has left, checked before anything is loaded on its memory; `None` skips
    /// the check, for systems that do not tell.
    pub host_memory: Option<HostMemory>,
}

impl<'a> LoadOptions<'a> {
    /// Without progress, with what the host says of its memory now.
    pub fn new(ledger: &'a Ledger) -> Self {
        Self {
            ledger,
            progress: None,
            host_memory: HostMemory::read().ok(),
        }
    }
}

/// One linear to be loaded, with its room.
struct Job<'a, D> {
    device: &'a D,
    stored: &'a StoredLinear,
    reservation: Reservation,
    /// Whether it is the embedding and stays on the host.
    is_on_host: bool,
}

/// What all parts of a load share.
struct Loader<'a> {
    tensors: &'a dyn TensorSource,
    gptq: &'a GptqConfig,
    spec: &'a ModelSpec,
    plan: &'a ModelPlan,
}

impl<D: Device> Decoder<D> {
    /// Loads a model onto `devices` as `plan` says. Devices that the plan does not use are
    /// dropped; the order does not matter.
    ///
    /// # Errors
    /// The plan is for other devices or another model, memory is short, or a weight is
    /// malformed. The ledger is then as it was before.
    pub fn load(
        source: &ModelSource,
        spec: ModelSpec,
        devices: Vec<D>,
        plan: &ModelPlan,
        options: &LoadOptions<'_>,
    ) -> Result<Self, ModelError> {
        let (weights, gptq) = find_weights(source, &spec)?;
        let devices = devices_of_plan(devices, plan, &spec)?;
        check_host_memory(plan, options)?;
        let loader = Loader {
            tensors: source.tensors(),
            gptq: &gptq,
            spec: &spec,
            plan,
        };
        let host_room = plan.memory.reserve_host(options.ledger)?;
        let mut rooms = plan.memory.reserve(options.ledger)?;
        let linears = loader.load_linears(&weights, &devices, (host_room, &mut rooms), options)?;
        let stages = loader.build_stages(&weights, devices, rooms, linears)?;
        let limits = runner_limits(plan);
        let ropes = spec.ropes_for(limits.context_tokens);
        let head_width = weights.head_linear().header.out_features;
        let ledger = options.ledger.clone();
        let adapters = Adapters::new(ledger, plan.memory.model.clone(), stages.len(), &limits);
        Ok(Decoder::new(
            spec, limits, ropes, stages, head_width, adapters,
        ))
    }
}

impl Loader<'_> {
    /// Loads every linear of every device in parallel, in the order of [`device_linears`].
    fn load_linears<D: Device>(
        &self,
        weights: &StoredWeights,
        devices: &[D],
        (mut host_room, rooms): (Option<Reservation>, &mut [DeviceReservations]),
        options: &LoadOptions<'_>,
    ) -> Result<Vec<D::Linear>, ModelError> {
        let mut jobs = Vec::new();
        let mut total = Bytes::ZERO;
        let has_host = host_room.is_some();
        for ((device, plan), room) in devices.iter().zip(&self.plan.memory.devices).zip(rooms) {
            for (place, stored) in device_linears(weights, plan, has_host).enumerate() {
                // The embedding comes first on the device that uses it.
                let host_room = match (place, plan.holds_embedding) {
                    (0, true) => host_room.take(),
                    _ => None,
                };
                let is_on_host = host_room.is_some();
                let reservation = match host_room {
                    Some(room) => room,
                    None => {
                        let bytes = device.linear_bytes(&stored.header);
                        carve(&mut room.weights, bytes, || stored.label())?
                    }
                };
                total = total.saturating_add(reservation.bytes());
                jobs.push(Job {
                    device,
                    stored,
                    reservation,
                    is_on_host,
                });
            }
        }
        let done = AtomicU64::new(0);
        let load = |job: Job<'_, D>| {
            let bytes = job.reservation.bytes().get();
            let source = job.stored.read(self.tensors, self.gptq)?;
            let linear = if job.is_on_host {
                job.device.load_host_embedding(&source, job.reservation)?
            } else {
                job.device.load_linear(&source, job.reservation)?
            };
            if let Some(progress) = options.progress {
                let before = done.fetch_add(bytes, Ordering::Relaxed);
                progress(LoadProgress {
                    done: Bytes(before + bytes),
                    total,
                });
            }
            Ok(linear)
        };
        jobs.into_par_iter().map(load).collect()
    }

    /// Puts loaded linears, norms, caches and buffers together, device by device.
    fn build_stages<D: Device>(
        &self,
        weights: &StoredWeights,
        devices: Vec<D>,
        rooms: Vec<DeviceReservations>,
        linears: Vec<D::Linear>,
    ) -> Result<Vec<Stage<D>>, ModelError> {
        let mut linears = linears.into_iter().map(Arc::new);
        let parts = devices
            .into_iter()
            .zip(&self.plan.memory.devices)
            .zip(rooms);
        let mut stages = Vec::new();
        for ((device, plan), mut room) in parts {
            // `load_linears` made one linear for each that is asked for here.
            let mut next = || {
                linears.next().ok_or(ModelError::PlanMismatch {
                    what: "linears",
                    found: "fewer".to_owned(),
                    expected: "one for each weight".to_owned(),
                })
            };
            let embedding = plan.holds_embedding.then(&mut next).transpose()?;
            let mut layers = Vec::with_capacity(plan.layers.len());
            for index in plan.layers.clone() {
                let [query, key, value, output, gate, up, down] = [
                    next()?,
                    next()?,
                    next()?,
                    next()?,
                    next()?,
                    next()?,
                    next()?,
                ];
                let linears = LayerLinears {
                    query,
                    key,
                    value,
                    output,
                    gate,
                    up,
                    down,
                };
                layers.push(self.build_layer(weights, index, &device, &mut room, linears)?);
            }
            let has_host = self.plan.memory.host.is_some();
            let head = match (plan.holds_head, &weights.head, &embedding) {
                (false, _, _) => None,
                (true, None, Some(table)) if !has_host => Some(Arc::clone(table)),
                (true, _, _) => Some(next()?),
            };
            let head = match head {
                Some(linear) => Some(Head {
                    norm: self.row_norm(&weights.final_norm, &device, &mut room)?,
                    linear,
                }),
                None => None,
            };
            let shape = self.stage_shape(weights, plan);
            let activations = shape.activations.try_map(|bytes| {
                let reservation = carve(&mut room.workspace, bytes, || "activations".to_owned())?;
                Ok::<_, ModelError>(device.allocate(reservation)?)
            })?;
            let scratch = device.workspace_bytes(&shape.workspace);
            let scratch = carve(&mut room.workspace, scratch, || "scratch".to_owned())?;
            let mut workspace = device.create_workspace(&shape.workspace, scratch)?;
            device.record_within(room.recordings, &mut workspace)?;
            // Every device may be at a step of its own, and the host at the one after.
            device.allow_steps(self.plan.memory.devices.len() + 1, &mut workspace)?;
            stages.push(Stage {
                device,
                embedding,
                layers,
                head,
                activations,
                workspace,
            });
        }
        Ok(stages)
    }

    fn build_layer<D: Device>(
        &self,
        weights: &StoredWeights,
        index: usize,
        device: &D,
        room: &mut DeviceReservations,
        linears: LayerLinears<Arc<D::Linear>>,
    ) -> Result<Layer<D>, ModelError> {
        let norms = weights.layers[index].norms.try_map(
            room,
            |norm, room| self.row_norm(norm, device, room),
            |norm, room| self.head_norm(norm, device, room),
        )?;
        let shape = CacheShape {
            pages: runner_limits(self.plan).pages,
            kv_heads: self.spec.kv_heads,
            head_dim: self.spec.head_dim,
            format: self.plan.memory.cache,
        };
        let mut cache = |bytes| {
            let reservation = carve(&mut room.kv_cache, bytes, || {
                format!("the cache of layer {index}")
            })?;
            Ok::<_, ModelError>(device.allocate(reservation)?)
        };
        Ok(Layer {
            spec: self.spec.layers[index],
            linears,
            norms,
            cache: KvLayer {
                shape,
                keys: cache(shape.key_bytes())?,
                values: cache(shape.value_bytes())?,
            },
        })
    }

    fn row_norm<D: Device>(
        &self,
        stored: &StoredNorm,
        device: &D,
        room: &mut DeviceReservations,
    ) -> Result<Norm<D::Buffer>, ModelError> {
        let NormSpec {
            kind,
            epsilon,
            weight_offset,
        } = self.spec.norm;
        let width = self.spec.hidden_size;
        let values = read_vector_f32(self.tensors, &stored.name, width)?;
        let bytes = row_norm_bytes(self.spec);
        let weight = upload(&values, weight_offset, bytes, &stored.name, device, room)?;
        Ok(Norm {
            kind,
            weight,
            bias: None,
            epsilon,
            width,
        })
    }

    fn head_norm<D: Device>(
        &self,
        stored: &StoredHeadNorm,
        device: &D,
        room: &mut DeviceReservations,
    ) -> Result<HeadNorm<D::Buffer>, ModelError> {
        let NormSpec {
            kind,
            epsilon,
            weight_offset,
        } = self.spec.head_norm.unwrap_or(self.spec.norm);
        let (heads, head_dim) = (stored.heads, self.spec.head_dim);
        let values = read_head_norm_f32(self.tensors, &stored.name, heads, head_dim)?;
        let bytes = head_norm_bytes(self.spec, heads);
        let weight = upload(&values, weight_offset, bytes, &stored.name, device, room)?;
        Ok(HeadNorm {
            kind,
            weight,
            epsilon,
        })
    }

    fn stage_shape(&self, weights: &StoredWeights, plan: &DevicePlan) -> StageShape {
        let role = DeviceRole {
            first: plan.holds_embedding,
            last: plan.holds_head,
            layers: plan.layers.clone(),
        };
        StageShape::new(
            self.spec,
            weights.head_linear().header.out_features,
            self.plan.logit_rows,
            &role,
            &self.plan.step_limits(),
        )
    }
}

/// The linears that a device uses: the embedding, its layers', the head unless the device holds
/// an embedding that is the head.
fn device_linears<'w>(
    weights: &'w StoredWeights,
    plan: &DevicePlan,
    has_host: bool,
) -> impl Iterator<Item = &'w StoredLinear> {
    let embedding = plan.holds_embedding.then_some(&weights.embedding);
    let layers = weights.layers[plan.layers.clone()].iter();
    let head = match &weights.head {
        Some(head) => plan.holds_head.then_some(head),
        None if plan.holds_embedding && !has_host => None,
        None => plan.holds_head.then_some(&weights.embedding),
    };
    embedding
        .into_iter()
        .chain(layers.flat_map(|layer| layer.linears.as_array()))
        .chain(head)
}

/// `devices` in the plan's order, after checking that the plan is for them and for `spec`.
fn devices_of_plan<D: Device>(
    mut devices: Vec<D>,
    plan: &ModelPlan,
    spec: &ModelSpec,
) -> Result<Vec<D>, ModelError> {
    let parts = &plan.memory.devices;
    let mismatch = |what, found: String, expected: String| ModelError::PlanMismatch {
        what,
        found,
        expected,
    };
    let mut covered = 0;
    for part in parts {
        if part.layers.start != covered || part.layers.end < covered {
            return Err(mismatch(
                "first layer of a device",
                covered.to_string(),
                part.layers.start.to_string(),
            ));
        }
        covered = part.layers.end;
    }
    if covered != spec.layers.len() {
        let found = spec.layers.len().to_string();
        return Err(mismatch("layers", found, covered.to_string()));
    }
    let at_ends = |holds: fn(&DevicePlan) -> bool, end: usize| {
        parts
            .iter()
            .enumerate()
            .all(|(index, part)| holds(part) == (index == end))
    };
    if !at_ends(|part| part.holds_embedding, 0)
        || !at_ends(|part| part.holds_head, parts.len().wrapping_sub(1))
    {
        return Err(mismatch(
            "places of embedding and head",
            "others".to_owned(),
            "the first and the last device".to_owned(),
        ));
    }
    let mut ordered = Vec::with_capacity(parts.len());
    for part in parts {
        let Some(index) = devices
            .iter()
            .position(|device| *device.id() == part.device)
        else {
            let given: Vec<_> = devices
                .iter()
                .map(|device| device.id().to_string())
                .collect();
            return Err(mismatch(
                "devices",
                given.join(", "),
                part.device.to_string(),
            ));
        };
        ordered.push(devices.swap_remove(index));
    }
    Ok(ordered)
}

/// Whether the host has what the plan takes of its memory, at this moment.
fn check_host_memory(plan: &ModelPlan, options: &LoadOptions<'_>) -> Result<(), ModelError> {
    let Some(memory) = options.host_memory else {
        return Ok(());
    };
    let on_host: Vec<&DevicePlan> = plan
        .memory
        .devices
        .iter()
        .filter(|part| part.device.kind() == "cpu")
        .collect();
    let host = plan.memory.host.as_ref();
    let needed = on_host
        .iter()
        .map(|part| part.total)
        .chain(host.map(|host| host.embedding))
        .fold(Bytes::ZERO, Bytes::saturating_add);
    let parts = on_host.iter().map(|part| &part.device);
    match parts.chain(host.map(|host| &host.device)).next() {
        Some(device) if needed.get() > memory.available_bytes => Err(ModelError::HostMemory {
            device: device.clone(),
            needed,
            available: Bytes(memory.available_bytes),
            total: Bytes(memory.total_bytes),
        }),
        _ => Ok(()),
    }
}

/// The steps that a plan is for.
fn runner_limits(plan: &ModelPlan) -> RunnerLimits {
    let limits = plan.step_limits();
    let max_sequences = to_usize(limits.batch);
    let context_tokens = to_usize(limits.context_tokens);
    let pages_per_sequence = context_tokens.div_ceil(PAGE_TOKENS);
    RunnerLimits {
        max_rows: step_rows(&limits),
        max_sequences,
        max_logit_rows: plan.logit_rows,
        pages: to_usize(limits.cache_tokens) / PAGE_TOKENS,
        pages_per_sequence,
        context_tokens,
        // Known once the devices are.
        draws: None,
        stages: 1,
    }
}

/// `bytes` of a purpose's reservation for one buffer.
pub(crate) fn carve(
    room: &mut Reservation,
    bytes: Bytes,
    what: impl FnOnce() -> String,
) -> Result<Reservation, ModelError> {
    room.split(bytes)
        .map_err(|source| ModelError::PlanTooSmall {
            device: room.device().clone(),
            purpose: room.purpose(),
            what: what(),
            source: Box::new(source),
        })
}

/// A buffer of the weights' room filled with `values + offset`.
fn upload<D: Device>(
    values: &[f32],
    offset: f32,
    bytes: Bytes,
    name: &str,
    device: &D,
    room: &mut DeviceReservations,
) -> Result<D::Buffer, ModelError> {
    let mut buffer = device.allocate(carve(&mut room.weights, bytes, || name.to_owned())?)?;
    let stored: Vec<u8> = values
        .iter()
        .flat_map(|value| (value + offset).to_ne_bytes())
        .collect();
    device.upload(&stored, &mut buffer)?;
    Ok(buffer)
}
