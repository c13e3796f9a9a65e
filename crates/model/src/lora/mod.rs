//! LoRA adapters: what they add to the linears of a loaded model, for those rows of a step
//! whose sequence asks for them.
//!
//! `y = W · x + scale · B · A · x`. The product with W is made for all rows as without
//! adapters; then each adapter's rows are gathered, multiplied by A and B, and added. So a
//! row's bits depend neither on which adapters other rows have nor on whether they have any.

mod apply;
mod parts;

use std::ops::Range;

use oxllama_backend::Device;
use oxllama_format::AdapterSource;
use oxllama_memory::{Bytes, Ledger, Purpose, Reservation};

pub(crate) use apply::AdaptedLayer;

use parts::{Part, find_parts, load_parts, widest};

use crate::decoder::Stage;
use crate::{ModelError, ModelSpec, RunnerLimits, StepPlan};

/// In [`StepPlan::sequence_adapters`]: the model as it is.
pub const NO_ADAPTER: u32 = u32::MAX;

/// Most rows that adapters are applied to at once. It bounds the scratch; A and B, small as
/// they are, are read again for every block.
const ROW_BLOCK: usize = 256;

/// A loaded adapter; its number stands in [`StepPlan::sequence_adapters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(u32);

impl AdapterId {
    /// The number; never [`NO_ADAPTER`].
    pub fn get(self) -> u32 {
        self.0
    }
}

/// A linear of a layer, in the order of [`crate::weights::LayerLinears::as_array`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

/// What an adapter adds to one linear.
struct Delta<L> {
    /// `[rank, in_features]`
    a: L,
    /// `[out_features, rank]`
    b: L,
    scale: f32,
}

/// What an adapter adds to the linears of a layer, by [`Slot`].
type LayerDeltas<L> = [Option<Delta<L>>; 7];

/// Buffers for one adapter's rows on one device.
struct Scratch<B> {
    /// f32 `[row block, widest input or output]`
    wide: B,
    /// f32 `[row block, rank]`
    narrow: B,
    /// The largest rank that `narrow` has room for.
    rank: usize,
}

/// All adapters' parts on one device.
pub(crate) struct StageAdapters<D: Device> {
    /// By adapter, then by layer of the device.
    adapters: Vec<Vec<LayerDeltas<D::Linear>>>,
    /// Made with the first part on this device, freed with the last adapter.
    scratch: Option<Scratch<D::Buffer>>,
}

/// The rows of a step that use one adapter.
struct Group {
    /// Index of the adapter.
    adapter: usize,
    /// Places in [`Adapters::rows`].
    rows: Range<usize>,
}

/// The adapters of a model.
pub(crate) struct Adapters<D: Device> {
    pub(crate) ledger: Ledger,
    /// The model's name in the ledger.
    pub(crate) owner: String,
    /// Of each adapter.
    ids: Vec<u32>,
    next_id: u32,
    stages: Vec<StageAdapters<D>>,
    /// Rows of the current step, adapter by adapter.
    rows: Vec<u32>,
    groups: Vec<Group>,
}

/// What is reserved for an adapter on a device.
struct Room {
    weights: Reservation,
    /// Where the scratch has to be made or is too small: the `wide` buffer's, if there is none
    /// yet, and the `narrow` one's with its rank.
    scratch: Option<(Option<Reservation>, Reservation, usize)>,
}

impl<D: Device> Adapters<D> {
    /// None, for a model of `stages` devices that is called `owner` in the ledger.
    pub(crate) fn new(ledger: Ledger, owner: String, stages: usize, limits: &RunnerLimits) -> Self {
        let empty = || StageAdapters {
            adapters: Vec::new(),
            scratch: None,
        };
        Self {
            ledger,
            owner,
            ids: Vec::new(),
            next_id: 0,
            stages: (0..stages).map(|_| empty()).collect(),
            rows: Vec::with_capacity(limits.max_rows),
            groups: Vec::with_capacity(limits.max_sequences),
        }
    }

    /// Loads an adapter onto the devices that hold the linears it changes.
    ///
    /// # Errors
    /// As [`crate::Runner::load_adapter`]; nothing has changed then.
    pub(crate) fn load(
        &mut self,
        source: &AdapterSource,
        scale: f32,
        model: (&ModelSpec, &RunnerLimits, &[Stage<D>]),
    ) -> Result<AdapterId, ModelError> {
        let (spec, limits, stages) = model;
        if !scale.is_finite() {
            return Err(ModelError::AdapterScale { found: scale });
        }
        let parts = find_parts(source, spec, stages)?;
        let rooms = self.reserve(&parts, spec, limits, stages)?;
        let (mut weights, scratches): (Vec<_>, Vec<_>) = rooms
            .into_iter()
            .map(|room| (room.weights, room.scratch))
            .unzip();
        let deltas = load_parts(source, scale, &parts, stages, &mut weights)?;
        let mut made = Vec::new();
        for (stage, scratch) in stages.iter().zip(scratches) {
            let device = &stage.device;
            made.push(match scratch {
                Some((wide, narrow, rank)) => {
                    let wide = wide.map(|wide| device.allocate(wide)).transpose()?;
                    Some((wide, device.allocate(narrow)?, rank))
                }
                None => None,
            });
        }
        // Nothing fails from here on.
        for (adapters, (stage, scratch)) in self.stages.iter_mut().zip(stages.iter().zip(made)) {
            let layers = stage.layers.iter();
            let deltas = layers.map(|_| LayerDeltas::default()).collect();
            adapters.adapters.push(deltas);
            if let Some((wide, narrow, rank)) = scratch {
                let old = adapters.scratch.take().map(|scratch| scratch.wide);
                adapters.scratch = wide.or(old).map(|wide| Scratch { wide, narrow, rank });
            }
        }
        for (part, delta) in parts.iter().zip(deltas) {
            if let Some(layers) = self.stages[part.stage].adapters.last_mut() {
                layers[part.layer][part.slot as usize] = Some(delta);
            }
        }
        let mut id = self.next_id;
        while id == NO_ADAPTER || self.ids.contains(&id) {
            id = id.wrapping_add(1);
        }
        self.next_id = id.wrapping_add(1);
        self.ids.push(id);
        Ok(AdapterId(id))
    }

    /// Frees an adapter, and with the last one the buffers that they share.
    ///
    /// # Errors
    /// There is no such adapter.
    pub(crate) fn unload(&mut self, id: AdapterId) -> Result<(), ModelError> {
        let Some(index) = self.ids.iter().position(|&loaded| loaded == id.0) else {
            return Err(self.unknown(id.0));
        };
        self.ids.remove(index);
        for stage in &mut self.stages {
            stage.adapters.remove(index);
            if stage.adapters.is_empty() {
                stage.scratch = None;
            }
        }
        Ok(())
    }

    /// Takes note of which rows of a checked step use which adapter.
    ///
    /// # Errors
    /// A sequence names an adapter that is not loaded.
    pub(crate) fn begin_step(&mut self, step: &StepPlan) -> Result<(), ModelError> {
        self.rows.clear();
        self.groups.clear();
        let of_sequences = &step.sequence_adapters;
        let is_known = |id: &u32| *id == NO_ADAPTER || self.ids.contains(id);
        if let Some(&id) = of_sequences.iter().find(|&id| !is_known(id)) {
            return Err(self.unknown(id));
        }
        if of_sequences.iter().all(|&id| id == NO_ADAPTER) {
            return Ok(());
        }
        for (adapter, &id) in self.ids.iter().enumerate() {
            let start = self.rows.len();
            let rows = step.row_sequences.iter().enumerate();
            let rows = rows.filter(|&(_, &sequence)| of_sequences[sequence as usize] == id);
            self.rows.extend(rows.map(|(row, _)| row as u32));
            if self.rows.len() > start {
                let rows = start..self.rows.len();
                self.groups.push(Group { adapter, rows });
            }
        }
        Ok(())
    }

    /// Whether a row of the step has an adapter.
    pub(crate) fn are_used(&self) -> bool {
        !self.groups.is_empty()
    }

    /// The linears of layer `layer` of stage `stage`, whose device is `device`, with what
    /// this step's adapters add.
    pub(crate) fn layer<'a>(
        &'a mut self,
        device: &'a D,
        stage: usize,
        layer: usize,
    ) -> AdaptedLayer<'a, D> {
        AdaptedLayer {
            device,
            stage: &mut self.stages[stage],
            layer,
            groups: &self.groups,
            rows: &self.rows,
        }
    }

    fn unknown(&self, id: u32) -> ModelError {
        ModelError::UnknownAdapter {
            found: id,
            loaded: self.ids.clone(),
        }
    }

    /// Reserves everything that `parts` need, all or nothing.
    fn reserve(
        &self,
        parts: &[Part<'_>],
        spec: &ModelSpec,
        limits: &RunnerLimits,
        stages: &[Stage<D>],
    ) -> Result<Vec<Room>, ModelError> {
        let rows = |width: usize| {
            Bytes::from_usize(size_of::<f32>())
                .saturating_mul(limits.max_rows.min(ROW_BLOCK) as u64)
                .saturating_mul(width as u64)
        };
        let mut rooms = Vec::with_capacity(stages.len());
        for (index, (stage, adapters)) in stages.iter().zip(&self.stages).enumerate() {
            let parts = || parts.iter().filter(move |part| part.stage == index);
            let reserve = |bytes| {
                let device = stage.device.id();
                self.ledger
                    .reserve(device, &self.owner, Purpose::Lora, bytes)
            };
            let weights = parts().fold(Bytes::ZERO, |sum, part| {
                sum.saturating_add(stage.device.linear_bytes(&part.module.a))
                    .saturating_add(stage.device.linear_bytes(&part.b()))
            });
            let rank = parts().map(|part| part.module.rank()).max().unwrap_or(0);
            let room_for = adapters.scratch.as_ref().map_or(0, |scratch| scratch.rank);
            let weights = reserve(weights)?;
            let scratch = if rank > room_for {
                let wide = match adapters.scratch {
                    None => Some(reserve(rows(widest(spec)))?),
                    Some(_) => None,
                };
                Some((wide, reserve(rows(rank))?, rank))
            } else {
                None
            };
            rooms.push(Room { weights, scratch });
        }
        Ok(rooms)
    }
}
