//! The cost of any run of a model's parts on one device.

use std::ops::Range;

use crate::bytes::Bytes;
use crate::footprint::{CacheFormat, DeviceRole, ModelFootprint, StepLimits, WorkspaceModel};

/// What one device has to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) weights: Bytes,
    pub(super) kv_cache: Bytes,
    pub(super) workspace: Bytes,
    pub(super) recordings: Bytes,
    pub(super) total: Bytes,
}

/// A model as a chain of parts: part 0 is the embedding, parts 1 to n the layers, part
/// n + 1 the head. Every device holds one run of parts, so sums over prefixes give the
/// cost of a run without walking it.
pub(super) struct Chain<'a> {
    footprint: &'a ModelFootprint,
    workspace: &'a dyn WorkspaceModel,
    /// Bytes of the layers before index i.
    weight_sums: Vec<Bytes>,
    /// Cache bytes per token of the layers before index i.
    cache_sums: Vec<Bytes>,
}

impl<'a> Chain<'a> {
    /// `None` when a sum exceeds 64 bits.
    pub(super) fn new(
        footprint: &'a ModelFootprint,
        workspace: &'a dyn WorkspaceModel,
        cache: CacheFormat,
    ) -> Option<Self> {
        let count = footprint.layers.len() + 1;
        let mut weight_sums = Vec::with_capacity(count);
        let mut cache_sums = Vec::with_capacity(count);
        let (mut weights, mut per_token) = (Bytes::ZERO, Bytes::ZERO);
        weight_sums.push(weights);
        cache_sums.push(per_token);
        for layer in &footprint.layers {
            weights = weights.checked_add(layer.weights)?;
            per_token =
                per_token.checked_add(cache.bytes_per_token(layer.kv_elements_per_token)?)?;
            weight_sums.push(weights);
            cache_sums.push(per_token);
        }
        Some(Self {
            footprint,
            workspace,
            weight_sums,
            cache_sums,
        })
    }

    /// The number of parts, embedding and head included.
    pub(super) fn parts(&self) -> usize {
        self.footprint.layers.len() + 2
    }

    /// The role of a device that holds `parts`, which must not be empty.
    pub(super) fn role(&self, parts: &Range<usize>) -> DeviceRole {
        let layer_count = self.footprint.layers.len();
        let to_layer = |part: usize| part.saturating_sub(1).min(layer_count);
        DeviceRole {
            first: parts.start == 0,
            last: parts.end == self.parts(),
            layers: to_layer(parts.start)..to_layer(parts.end),
        }
    }

    fn kv_cache(&self, role: &DeviceRole, limits: &StepLimits) -> Option<Bytes> {
        let Range { start, end } = role.layers;
        let per_token = self.cache_sums[end].checked_sub(self.cache_sums[start])?;
        per_token.checked_mul(limits.cache_tokens)
    }

    /// What a device holding `parts` needs; `None` when that exceeds 64 bits.
    pub(super) fn cost(&self, parts: &Range<usize>, limits: &StepLimits) -> Option<Cost> {
        if parts.is_empty() {
            return Some(Cost::default());
        }
        let footprint = self.footprint;
        let role = self.role(parts);
        let mut weights =
            self.weight_sums[role.layers.end].checked_sub(self.weight_sums[role.layers.start])?;
        if role.first && role.last && footprint.head_tied_to_embedding {
            weights = weights.checked_add(footprint.embedding.max(footprint.head))?;
        } else {
            if role.first {
                weights = weights.checked_add(footprint.embedding)?;
            }
            if role.last {
                weights = weights.checked_add(footprint.head)?;
            }
        }
        if role.last {
            weights = weights.checked_add(footprint.final_norm)?;
        }
        let kv_cache = self.kv_cache(&role, limits)?;
        let workspace = self.workspace.workspace(&role, limits);
        let recordings = self.workspace.recordings(&role, limits);
        let total = Bytes::checked_sum([weights, kv_cache, workspace, recordings])?;
        Some(Cost {
            weights,
            kv_cache,
            workspace,
            recordings,
            total,
        })
    }

    /// Bytes that one step at full context reads on a device holding `parts`: layers,
    /// head and cache. Of the embedding a step reads only a few rows.
    pub(super) fn read_per_step(&self, parts: &Range<usize>, limits: &StepLimits) -> Bytes {
        if parts.is_empty() {
            return Bytes::ZERO;
        }
        let role = self.role(parts);
        let layers =
            self.weight_sums[role.layers.end].saturating_sub(self.weight_sums[role.layers.start]);
        let cache = self.kv_cache(&role, limits).unwrap_or(Bytes::MAX);
        let head = if role.last {
            self.footprint.head
        } else {
            Bytes::ZERO
        };
        layers.saturating_add(cache).saturating_add(head)
    }
}
