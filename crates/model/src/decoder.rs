//! The one decoder: a fixed sequence of operations on buffers made at load, for every family
//! and every device.

use std::sync::Arc;

use oxllama_backend::{
    AttentionArgs, CacheShape, Device, DrawKinds, GatedLinear, HeadNorm, KvLayer, LinearOutput,
    LogitArgs, Norm, NormLinears, PAGE_TOKENS, Rope, SequenceKey, Store,
};
use oxllama_format::AdapterSource;

use crate::lora::{AdaptedLayer, Adapters, Slot};
use crate::plan::{check_cache_format, check_cache_tokens};
use crate::reshape::reshape;
use crate::stage::{Activations, to_usize};
use crate::weights::{LayerLinears, LayerNorms};
use crate::{
    AdapterId, CacheRequest, LayerSpec, ModelError, ModelSpec, PageCopy, Runner, RunnerLimits,
    StepOutput, StepPlan,
};

/// One layer on its device.
pub(crate) struct Layer<D: Device> {
    pub(crate) spec: LayerSpec,
    pub(crate) linears: LayerLinears<Arc<D::Linear>>,
    pub(crate) norms: LayerNorms<Norm<D::Buffer>, HeadNorm<D::Buffer>>,
    pub(crate) cache: KvLayer<D::Buffer>,
}

/// What makes logits.
pub(crate) struct Head<D: Device> {
    pub(crate) norm: Norm<D::Buffer>,
    /// Shared with the embedding where the two are tied and on one device.
    pub(crate) linear: Arc<D::Linear>,
}

/// One device's part of a model.
pub(crate) struct Stage<D: Device> {
    pub(crate) device: D,
    /// On the first device.
    pub(crate) embedding: Option<Arc<D::Linear>>,
    pub(crate) layers: Vec<Layer<D>>,
    /// On the last device.
    pub(crate) head: Option<Head<D>>,
    pub(crate) activations: Activations<D::Buffer>,
    pub(crate) workspace: D::Workspace,
}

/// A loaded model: its layers on one or several devices of one backend, its cache, and every
/// buffer that a step needs. Made by [`Decoder::load`].
pub struct Decoder<D: Device> {
    spec: ModelSpec,
    limits: RunnerLimits,
    /// Tokens of one sequence that the workspaces were made for.
    planned_context_tokens: usize,
    ropes: Vec<Rope>,
    /// In the order in which a token passes them.
    stages: Vec<Stage<D>>,
    /// Stored out_features of the head.
    head_width: usize,
    adapters: Adapters<D>,
    /// Counts how often the cache's buffers have been replaced.
    cache_generation: u64,
    /// `[max_logit_rows, head_width]`: the host's copy of the logits. Empty where the device's
    /// memory is the host's.
    logits: Vec<f32>,
    /// Rows of the last step with logit rows whose logits are returned, and its draws.
    wanted: (usize, usize),
}

impl<D: Device> Decoder<D> {
    pub(crate) fn new(
        spec: ModelSpec,
        mut limits: RunnerLimits,
        ropes: Vec<Rope>,
        mut stages: Vec<Stage<D>>,
        head_width: usize,
        adapters: Adapters<D>,
    ) -> Self {
        let is_on_host = stages.last_mut().is_some_and(|stage| {
            let logits = &mut stage.activations.logits;
            stage.device.host_memory(logits).is_some()
        });
        limits.draws = stages
            .last()
            .and_then(|stage| stage.device.draw_limits(head_width));
        if stages.iter().all(|stage| stage.device.runs_by_itself()) {
            limits.stages = stages.len();
        }
        let copied_rows = if is_on_host { 0 } else { limits.max_logit_rows };
        Self {
            logits: vec![0.0; copied_rows * head_width],
            wanted: (0, 0),
            spec,
            planned_context_tokens: limits.context_tokens,
            limits,
            ropes,
            stages,
            head_width,
            adapters,
            cache_generation: 0,
        }
    }

    /// Copies pages in every layer's keys and values.
    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), ModelError> {
        for stage in &mut self.stages {
            for layer in &mut stage.layers {
                let KvLayer {
                    shape,
                    keys,
                    values,
                } = &mut layer.cache;
                let (key_bytes, value_bytes) = (shape.key_page_bytes(), shape.value_page_bytes());
                for copy in copies {
                    for (buffer, bytes) in [(&mut *keys, key_bytes), (&mut *values, value_bytes)] {
                        let (from, to) = (copy.from as usize * bytes, copy.to as usize * bytes);
                        stage.device.copy_within(buffer, from, to, bytes)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Runs the step's rows through embedding, layers and head; the last stage's `logits` hold
    /// those of the rows that are asked for.
    fn forward(&mut self, step: &StepPlan) -> Result<(), ModelError> {
        let rows = step.token_ids.len();
        let hidden_bytes = rows * self.spec.hidden_size * size_of::<f32>();
        let batch = step.batch();
        // With adapters, the operations depend on which rows have which.
        let key = (!self.adapters.are_used()).then_some(SequenceKey {
            rows,
            logit_rows: step.logit_rows.len(),
            draws: DrawKinds::of(&step.draws),
            generation: self.cache_generation,
        });
        for index in 0..self.stages.len() {
            let (before, from_here) = self.stages.split_at_mut(index);
            let Stage {
                device,
                embedding,
                layers,
                head,
                activations,
                workspace,
            } = &mut from_here[0];
            // Not before the stages before it have their work: it may wait for an earlier step.
            device.begin_step(&batch, &self.ropes, workspace)?;
            if let Some(previous) = before.last() {
                let source = &previous.activations.hidden;
                let hidden = &mut activations.hidden;
                device.copy_from_peer(&previous.device, source, hidden, hidden_bytes)?;
            }
            let (spec, adapters) = (&self.spec, &mut self.adapters);
            device.sequence(key, workspace, |workspace| {
                // Loading puts the embedding on the first device.
                if let (0, Some(table)) = (index, &*embedding) {
                    let hidden = &mut activations.hidden;
                    device.embed(table, spec.embedding_scale, hidden, workspace)?;
                }
                for (place, layer) in layers.iter_mut().enumerate() {
                    let mut pass = LayerPass {
                        spec,
                        device,
                        adapted: adapters.layer(device, index, place),
                        activations,
                        workspace,
                        rows,
                    };
                    pass.run(layer)?;
                }
                match head {
                    Some(head) if !step.logit_rows.is_empty() => {
                        let head = (&*head, self.head_width);
                        make_logits(spec, device, head, step, activations, workspace)
                    }
                    _ => Ok(()),
                }
            })?;
        }
        Ok(())
    }
}

/// `activations.logits` ← the head's logits of the rows of `activations.hidden` that `step` wants;
/// then its draws. The head is given with its stored out_features.
fn make_logits<D: Device>(
    spec: &ModelSpec,
    device: &D,
    (head, head_width): (&Head<D>, usize),
    step: &StepPlan,
    activations: &mut Activations<D::Buffer>,
    workspace: &mut D::Workspace,
) -> Result<(), ModelError> {
    let rows = &step.logit_rows;
    let Activations {
        hidden,
        normed,
        selected,
        logits,
        ..
    } = activations;
    device.gather_logit_rows(hidden, rows, spec.hidden_size, selected, workspace)?;
    let args = NormLinears {
        norm: Some(&head.norm),
        x: selected,
        normed,
        linears: &mut [LinearOutput {
            weights: &*head.linear,
            out: &mut *logits,
        }],
        rows: rows.len(),
    };
    device.norm_linears(args, workspace)?;
    let args = LogitArgs {
        rows: rows.len(),
        width: head_width,
        vocab_size: spec.vocab_size,
        scale: spec.logit_scale,
        softcap: spec.logit_softcap,
    };
    device.finish_logits(logits, args)?;
    if !step.draws.is_empty() {
        device.draw_tokens(logits, args, workspace)?;
    }
    Ok(())
}

impl<D: Device> Runner for Decoder<D> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn limits(&self) -> &RunnerLimits {
        &self.limits
    }

    fn submit(&mut self, step: &StepPlan) -> Result<(), ModelError> {
        step.check(&self.limits, self.spec.vocab_size)?;
        self.adapters.begin_step(step)?;
        self.copy_pages(&step.page_copies)?;
        if step.token_ids.is_empty() {
            return Ok(());
        }
        if !step.logit_rows.is_empty() {
            self.wanted = (0, 0);
        }
        self.forward(step)?;
        if !step.logit_rows.is_empty() {
            let draws = step.draws.len();
            self.wanted = (step.logit_rows.len() - draws, draws);
        }
        Ok(())
    }

    fn output(&mut self) -> Result<StepOutput<'_>, ModelError> {
        let (rows, draws) = std::mem::take(&mut self.wanted);
        let mut output = StepOutput::default();
        let Some((last, before)) = self.stages.split_last_mut() else {
            return Ok(output);
        };
        let Stage {
            device,
            activations,
            workspace,
            ..
        } = last;
        if rows > 0 {
            let elements = rows * self.head_width;
            let logits = &mut activations.logits;
            let logits = device.read_logits(logits, elements, &mut self.logits, workspace)?;
            output.logits = without_padding(logits, self.head_width, self.spec.vocab_size);
        }
        if draws > 0 {
            output.drawn = device.drawn_tokens(workspace)?;
        }
        // Whether the last device has waited for another one in vain does not show there.
        for stage in before {
            stage.device.check_enqueued()?;
        }
        Ok(output)
    }

    fn reshape_cache(&mut self, request: CacheRequest) -> Result<&RunnerLimits, ModelError> {
        if let Some(tokens) = request.tokens {
            check_cache_tokens(tokens)?;
        }
        if let Some(format) = request.format {
            check_cache_format(&self.spec, format)?;
        }
        let mut layers = self.stages.iter().flat_map(|stage| &stage.layers);
        let Some(Layer { cache, .. }) = layers.next() else {
            return Ok(&self.limits);
        };
        let pages = request.tokens.map_or(self.limits.pages, |tokens| {
            to_usize(tokens).div_ceil(PAGE_TOKENS)
        });
        // After a failure that could not be undone there are none.
        let pages = pages.max(1);
        let shape = CacheShape {
            pages,
            format: request.format.unwrap_or(cache.shape.format),
            ..cache.shape
        };
        if pages == self.limits.pages && shape == cache.shape {
            return Ok(&self.limits);
        }
        self.cache_generation += 1;
        let Adapters { ledger, owner, .. } = &self.adapters;
        if let Err(failure) = reshape(&mut self.stages, shape, ledger, owner) {
            if !failure.is_restored {
                self.limits.pages = 0;
            }
            return Err(failure.error);
        }
        self.limits.pages = pages;
        self.limits.context_tokens = self.planned_context_tokens.min(pages * PAGE_TOKENS);
        self.limits.pages_per_sequence = self.limits.context_tokens.div_ceil(PAGE_TOKENS);
        Ok(&self.limits)
    }

    fn load_adapter(
        &mut self,
        source: &AdapterSource,
        scale: f32,
    ) -> Result<AdapterId, ModelError> {
        let model = (&self.spec, &self.limits, &self.stages[..]);
        self.adapters.load(source, scale, model)
    }

    fn unload_adapter(&mut self, id: AdapterId) -> Result<(), ModelError> {
        self.adapters.unload(id)
    }
}

/// Moves the first `width` of every `stored_width` elements together.
fn without_padding(rows: &mut [f32], stored_width: usize, width: usize) -> &[f32] {
    let count = rows.len() / stored_width;
    if width < stored_width {
        for row in 1..count {
            let start = row * stored_width;
            rows.copy_within(start..start + width, row * width);
        }
    }
    &rows[..count * width]
}

/// One pass of a step's rows through the layers of a device.
struct LayerPass<'a, D: Device> {
    spec: &'a ModelSpec,
    device: &'a D,
    /// The layer's linears, with what adapters add to them.
    adapted: AdaptedLayer<'a, D>,
    activations: &'a mut Activations<D::Buffer>,
    workspace: &'a mut D::Workspace,
    rows: usize,
}

impl<D: Device> LayerPass<'_, D> {
    /// `hidden` ← the layer's result; one function for every [`crate::BlockShape`].
    fn run(&mut self, layer: &mut Layer<D>) -> Result<(), ModelError> {
        let add = Store::Add {
            scale: self.spec.residual_scale,
        };
        self.project(layer)?;
        let output = &layer.linears.output;
        self.adapted.announce_reader(output, self.workspace);
        self.attend(layer)?;
        let x = &self.activations.attended;
        let (out, store) = match layer.norms.post_attention {
            Some(_) => (&mut self.activations.branch, Store::Overwrite),
            None => (&mut self.activations.hidden, add),
        };
        let output = LinearOutput {
            weights: &*layer.linears.output,
            out,
        };
        let place = (Slot::Output, self.rows);
        self.adapted
            .linear(place, x, output, store, self.workspace)?;
        self.add_normed_branch(layer.norms.post_attention.as_ref())?;
        if let Some(norm) = &layer.norms.mlp {
            self.project_mlp(layer, norm)?;
        }
        let (out, store) = match layer.norms.post_mlp {
            Some(_) => (&mut self.activations.branch, Store::Overwrite),
            None => (&mut self.activations.hidden, add),
        };
        let args = GatedLinear {
            activation: self.spec.activation,
            gate: &mut self.activations.gate,
            up: &self.activations.up,
            weights: &*layer.linears.down,
            out,
            store,
            rows: self.rows,
        };
        self.adapted.gated_linear(args, self.workspace)?;
        self.add_normed_branch(layer.norms.post_mlp.as_ref())
    }

    /// Queries, keys and values of the normed hidden states; in parallel blocks, which have
    /// no norm before the MLP, gate and up as well.
    fn project(&mut self, layer: &Layer<D>) -> Result<(), ModelError> {
        let LayerLinears {
            query,
            key,
            value,
            gate,
            up,
            ..
        } = &layer.linears;
        let activations = &mut *self.activations;
        let mut linears = [
            (query, &mut activations.queries),
            (key, &mut activations.keys),
            (value, &mut activations.values),
            (gate, &mut activations.gate),
            (up, &mut activations.up),
        ]
        .map(|(weights, out)| LinearOutput {
            weights: &**weights,
            out,
        });
        let slots = [Slot::Query, Slot::Key, Slot::Value, Slot::Gate, Slot::Up];
        let count = match layer.norms.mlp {
            Some(_) => 3,
            None => slots.len(),
        };
        let args = NormLinears {
            norm: Some(&layer.norms.attention),
            x: &activations.hidden,
            normed: &mut activations.normed,
            linears: &mut linears[..count],
            rows: self.rows,
        };
        let slots = &slots[..count];
        self.adapted.norm_linears(slots, args, self.workspace)
    }

    fn attend(&mut self, layer: &mut Layer<D>) -> Result<(), ModelError> {
        let activations = &mut *self.activations;
        let args = AttentionArgs {
            queries: &mut activations.queries,
            keys: &mut activations.keys,
            values: &activations.values,
            cache: &mut layer.cache,
            out: &mut activations.attended,
            query_norm: layer.norms.query.as_ref(),
            key_norm: layer.norms.key.as_ref(),
            rope: layer.spec.rope,
            heads: self.spec.heads,
            scale: self.spec.attention_scale,
            softcap: self.spec.attention_softcap,
            window: layer.spec.window,
        };
        Ok(self.device.attention(args, self.workspace)?)
    }

    /// Gate and up of the hidden states under a norm of their own.
    fn project_mlp(&mut self, layer: &Layer<D>, norm: &Norm<D::Buffer>) -> Result<(), ModelError> {
        let activations = &mut *self.activations;
        let mut linears = [
            LinearOutput {
                weights: &*layer.linears.gate,
                out: &mut activations.gate,
            },
            LinearOutput {
                weights: &*layer.linears.up,
                out: &mut activations.up,
            },
        ];
        let args = NormLinears {
            norm: Some(norm),
            x: &activations.hidden,
            normed: &mut activations.normed,
            linears: &mut linears,
            rows: self.rows,
        };
        let slots = [Slot::Gate, Slot::Up];
        let down = &layer.linears.down;
        self.adapted
            .announce_gate(self.spec.activation, down, self.workspace);
        self.adapted.norm_linears(&slots, args, self.workspace)
    }

    /// `hidden += scale · norm(branch)`, where the branch has a norm of its own; without one
    /// its last linear has already added it.
    fn add_normed_branch(&mut self, norm: Option<&Norm<D::Buffer>>) -> Result<(), ModelError> {
        let Some(norm) = norm else {
            return Ok(());
        };
        let activations = &mut *self.activations;
        self.device.norm(
            norm,
            &activations.branch,
            &mut activations.normed,
            self.rows,
            self.workspace,
        )?;
        self.device.add(
            &activations.normed,
            self.spec.residual_scale,
            &mut activations.hidden,
            self.rows * self.spec.hidden_size,
        )?;
        Ok(())
    }
}
