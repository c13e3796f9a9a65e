//! Which linears of a loaded model an adapter changes, and loading what it adds to them.

use std::ops::Range;

use oxllama_backend::Device;
use oxllama_format::{AdapterModule, AdapterSource, LinearHeader};
use oxllama_memory::Reservation;
use rayon::prelude::*;

use super::{Delta, Slot};
use crate::decoder::Stage;
use crate::load::carve;
use crate::weights::LayerLinears;
use crate::{ModelError, ModelSpec};

/// The names that adapters may give to a layer's linears, with what they stand for: fused
/// ones, which the decoder keeps apart, for several.
const MODULES: [(&str, &[Slot]); 9] = [
    ("self_attn.q_proj", &[Slot::Query]),
    ("self_attn.k_proj", &[Slot::Key]),
    ("self_attn.v_proj", &[Slot::Value]),
    ("self_attn.o_proj", &[Slot::Output]),
    ("mlp.gate_proj", &[Slot::Gate]),
    ("mlp.up_proj", &[Slot::Up]),
    ("mlp.down_proj", &[Slot::Down]),
    ("self_attn.qkv_proj", &[Slot::Query, Slot::Key, Slot::Value]),
    ("mlp.gate_up_proj", &[Slot::Gate, Slot::Up]),
];

/// Prefixes of a text model's layers, as in [`crate::weights`].
const LAYERS: [&str; 3] = [
    "model.layers.",
    "language_model.model.layers.",
    "model.language_model.layers.",
];

/// One linear of the model and the part of an adapter for it.
pub(super) struct Part<'a> {
    pub(super) stage: usize,
    /// Among the stage's.
    pub(super) layer: usize,
    pub(super) slot: Slot,
    pub(super) module: &'a AdapterModule,
    /// The module's outputs that are the linear's.
    pub(super) outputs: Range<usize>,
}

impl Part<'_> {
    /// Header of the part's B.
    pub(super) fn b(&self) -> LinearHeader {
        LinearHeader {
            out_features: self.outputs.len(),
            ..self.module.b
        }
    }
}

/// A part with the room for its A and its B.
struct Job<'a, D> {
    device: &'a D,
    part: &'a Part<'a>,
    for_a: Reservation,
    for_b: Reservation,
}

/// The widest input or output of a layer's linears.
pub(super) fn widest(spec: &ModelSpec) -> usize {
    let attention = spec.query_width().max(spec.kv_width());
    spec.hidden_size.max(spec.intermediate_size).max(attention)
}

/// Finds the model's linear for every module of an adapter and holds their shapes together.
pub(super) fn find_parts<'a, D: Device>(
    source: &'a AdapterSource,
    spec: &ModelSpec,
    stages: &[Stage<D>],
) -> Result<Vec<Part<'a>>, ModelError> {
    let mut parts: Vec<Part<'a>> = Vec::new();
    for module in source.modules() {
        let unknown = |reason: &str| ModelError::AdapterModule {
            module: module.name.clone(),
            reason: reason.to_owned(),
            layers: spec.layers.len(),
            known: MODULES.map(|(name, _)| name).to_vec(),
        };
        let (layer, slots) = place(&module.name).ok_or_else(|| unknown("is not known"))?;
        let (stage, layer) = stage_of(layer, stages)
            .ok_or_else(|| unknown("is of a layer that the model does not have"))?;
        let linears = &stages[stage].layers[layer].linears;
        let mut outputs = 0;
        for &slot in slots {
            let linear = linear_of(linears, slot);
            let (in_features, out_features) = stages[stage].device.linear_shape(linear);
            check(module, "in_features", module.a.in_features, in_features)?;
            let start = outputs;
            outputs += out_features;
            let part = Part {
                stage,
                layer,
                slot,
                module,
                outputs: start..outputs,
            };
            let same =
                |other: &Part<'_>| (other.stage, other.layer, other.slot) == (stage, layer, slot);
            if parts.iter().any(same) {
                return Err(unknown("is there under another name as well"));
            }
            parts.push(part);
        }
        check(module, "out_features", module.b.out_features, outputs)?;
        // The scratch of a step's linears is sized for the model's own.
        let (rank, widest) = (module.rank(), widest(spec));
        if rank > widest {
            return Err(ModelError::AdapterShape {
                module: module.name.clone(),
                what: "rank",
                found: rank,
                expected: format!("at most {widest}, the model's widest layer"),
            });
        }
    }
    Ok(parts)
}

fn check(
    module: &AdapterModule,
    what: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), ModelError> {
    if found == expected {
        return Ok(());
    }
    Err(ModelError::AdapterShape {
        module: module.name.clone(),
        what,
        found,
        expected: expected.to_string(),
    })
}

/// Layer and linears that a module's name stands for.
fn place(name: &str) -> Option<(usize, &'static [Slot])> {
    let rest = LAYERS.iter().find_map(|prefix| name.strip_prefix(prefix))?;
    let (layer, module) = rest.split_once('.')?;
    let (_, slots) = MODULES.iter().find(|(known, _)| *known == module)?;
    let is_number = !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit());
    // A number too large for this machine is that of no layer either.
    is_number.then(|| (layer.parse().unwrap_or(usize::MAX), *slots))
}

/// The stage that holds a layer of the model, and the layer's place there.
fn stage_of<D: Device>(mut layer: usize, stages: &[Stage<D>]) -> Option<(usize, usize)> {
    for (index, stage) in stages.iter().enumerate() {
        match layer.checked_sub(stage.layers.len()) {
            None => return Some((index, layer)),
            Some(beyond) => layer = beyond,
        }
    }
    None
}

fn linear_of<L>(linears: &LayerLinears<L>, slot: Slot) -> &L {
    linears.as_array()[slot as usize]
}

/// Loads A and B of every part in parallel, each into its piece of its stage's `weights`.
pub(super) fn load_parts<D: Device>(
    source: &AdapterSource,
    scale: f32,
    parts: &[Part<'_>],
    stages: &[Stage<D>],
    weights: &mut [Reservation],
) -> Result<Vec<Delta<D::Linear>>, ModelError> {
    let mut jobs = Vec::with_capacity(parts.len());
    for part in parts {
        let device = &stages[part.stage].device;
        let mut carve = |header: &LinearHeader| {
            let bytes = device.linear_bytes(header);
            carve(&mut weights[part.stage], bytes, || part.module.name.clone())
        };
        jobs.push(Job {
            device,
            part,
            for_a: carve(&part.module.a)?,
            for_b: carve(&part.b())?,
        });
    }
    let load = |job: Job<'_, D>| {
        let Part {
            module, outputs, ..
        } = job.part;
        let a = source.read_a(module)?;
        let b = source.read_b(module)?.slice_outputs(outputs.clone())?;
        Ok(Delta {
            a: job.device.load_linear(&a, job.for_a)?,
            b: job.device.load_linear(&b, job.for_b)?,
            scale: (f64::from(scale) * module.scale) as f32,
        })
    };
    jobs.into_par_iter().map(load).collect()
}
