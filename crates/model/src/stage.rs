//! What one device of a split model holds besides weights and cache: how large its buffers
//! are, for planning and for loading alike.

use oxllama_backend::{PAGE_TOKENS, WorkspaceShape};
use oxllama_memory::{Bytes, DeviceRole, StepLimits};

use crate::ModelSpec;

/// Bytes of an activation.
const ACTIVATION_BYTES: u64 = 4;

/// Activations of one device, each f32 `[rows, width]`. `B` is their size or the buffer.
#[derive(Debug)]
pub(crate) struct Activations<B> {
    /// `[rows, hidden]`: the residual stream.
    pub(crate) hidden: B,
    /// `[rows, hidden]`: norms of it.
    pub(crate) normed: B,
    /// `[rows, hidden]`: a branch before its own norm; empty where branches have none.
    pub(crate) branch: B,
    /// `[rows, heads · head_dim]`
    pub(crate) queries: B,
    /// `[rows, kv_heads · head_dim]`
    pub(crate) keys: B,
    /// `[rows, kv_heads · head_dim]`
    pub(crate) values: B,
    /// `[rows, heads · head_dim]`
    pub(crate) attended: B,
    /// `[rows, intermediate]`
    pub(crate) gate: B,
    /// `[rows, intermediate]`
    pub(crate) up: B,
    /// `[logit_rows, hidden]`: rows whose logits are wanted; empty without the head.
    pub(crate) selected: B,
    /// `[logit_rows, head's out_features]`; empty without the head.
    pub(crate) logits: B,
}

impl<B> Activations<B> {
    /// The same activations, each made into another value.
    pub(crate) fn try_map<C, E>(
        self,
        mut make: impl FnMut(B) -> Result<C, E>,
    ) -> Result<Activations<C>, E> {
        Ok(Activations {
            hidden: make(self.hidden)?,
            normed: make(self.normed)?,
            branch: make(self.branch)?,
            queries: make(self.queries)?,
            keys: make(self.keys)?,
            values: make(self.values)?,
            attended: make(self.attended)?,
            gate: make(self.gate)?,
            up: make(self.up)?,
            selected: make(self.selected)?,
            logits: make(self.logits)?,
        })
    }
}

/// Sizes of everything that a device of one role needs for steps up to some limits.
#[derive(Debug)]
pub(crate) struct StageShape {
    /// Sizes of the activations.
    pub(crate) activations: Activations<Bytes>,
    /// The backend's own scratch.
    pub(crate) workspace: WorkspaceShape,
}

impl StageShape {
    /// The sizes for `role`. `head_width` is the head's stored out_features, `logit_rows` the
    /// most rows of a step whose logits are asked for.
    pub(crate) fn new(
        spec: &ModelSpec,
        head_width: usize,
        logit_rows: usize,
        role: &DeviceRole,
        limits: &StepLimits,
    ) -> Self {
        let rows = step_rows(limits);
        let logit_rows = logit_rows.min(rows);
        let has_layers = !role.layers.is_empty();
        let size = |present: bool, rows: usize, width: usize| {
            let elements = Bytes::from_usize(rows).saturating_mul(width as u64);
            if present {
                elements.saturating_mul(ACTIVATION_BYTES)
            } else {
                Bytes::ZERO
            }
        };
        let (hidden, intermediate) = (spec.hidden_size, spec.intermediate_size);
        let (query_width, kv_width) = (spec.query_width(), spec.kv_width());
        let post_norms = has_layers && spec.block == crate::BlockShape::SandwichNorms;
        let activations = Activations {
            hidden: size(true, rows, hidden),
            normed: size(has_layers || role.last, rows, hidden),
            branch: size(post_norms, rows, hidden),
            queries: size(has_layers, rows, query_width),
            keys: size(has_layers, rows, kv_width),
            values: size(has_layers, rows, kv_width),
            attended: size(has_layers, rows, query_width),
            gate: size(has_layers, rows, intermediate),
            up: size(has_layers, rows, intermediate),
            selected: size(role.last, logit_rows, hidden),
            logits: size(role.last, logit_rows, head_width),
        };
        let widest = |in_layers: usize, in_head: usize| {
            let in_layers = if has_layers { in_layers } else { hidden };
            in_layers.max(if role.last { in_head } else { 0 })
        };
        let rotary_dim = spec.ropes.iter().map(|rope| rope.rotary_dim).max();
        let workspace = WorkspaceShape {
            rows,
            sequences: to_usize(limits.batch),
            pages_per_sequence: to_usize(limits.context_tokens).div_ceil(PAGE_TOKENS),
            max_in_features: widest(hidden.max(query_width).max(intermediate), hidden),
            max_out_features: widest(
                hidden.max(query_width).max(kv_width).max(intermediate),
                head_width,
            ),
            draw_width: if role.last { head_width } else { 0 },
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            rotary_dim: rotary_dim.unwrap_or(0),
            ropes: spec.ropes.len(),
        };
        Self {
            activations,
            workspace,
        }
    }

    /// Bytes of all activations together.
    pub(crate) fn activation_bytes(&self) -> Bytes {
        let Activations {
            hidden,
            normed,
            branch,
            queries,
            keys,
            values,
            attended,
            gate,
            up,
            selected,
            logits,
        } = self.activations;
        [
            hidden, normed, branch, queries, keys, values, attended, gate, up, selected, logits,
        ]
        .into_iter()
        .fold(Bytes::ZERO, Bytes::saturating_add)
    }
}

/// Rows of the largest step: a whole chunk, or one token of every sequence.
pub(crate) fn step_rows(limits: &StepLimits) -> usize {
    to_usize(limits.chunk_tokens.max(limits.batch))
}

/// Counts beyond the address space cannot be served by any device; sizes saturate with them.
pub(crate) fn to_usize(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
