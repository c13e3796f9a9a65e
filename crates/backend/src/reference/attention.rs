//! Attention over the paged cache.

use bytemuck::Pod;
use half::f16;
use oxllama_memory::CacheFormat;

use super::memory::StepInputs;
use super::norm::normalize_in_place;
use super::{ReferenceDevice, ReferenceWorkspace};
use crate::{
    AttentionArgs, AttentionOps, CacheShape, DeviceError, HeadNorm, HostBuffer, PAGE_TOKENS,
    RopeStyle,
};

/// An element of the cache.
trait CacheElement: Pod {
    fn store(value: f32) -> Self;
    fn load(self) -> f32;
}

impl CacheElement for f32 {
    fn store(value: f32) -> Self {
        value
    }

    fn load(self) -> f32 {
        self
    }
}

impl CacheElement for f16 {
    fn store(value: f32) -> Self {
        f16::from_f32(value)
    }

    fn load(self) -> f32 {
        self.to_f32()
    }
}

impl AttentionOps for ReferenceDevice {
    fn attention(
        &self,
        args: AttentionArgs<'_, HostBuffer>,
        workspace: &mut ReferenceWorkspace,
    ) -> Result<(), DeviceError> {
        match args.cache.shape.format {
            CacheFormat::F32 => attend_all::<f32>(args, workspace),
            CacheFormat::F16 => attend_all::<f16>(args, workspace),
        }
        Ok(())
    }
}

/// The whole operation for a cache of `T`.
fn attend_all<T: CacheElement>(
    args: AttentionArgs<'_, HostBuffer>,
    workspace: &mut ReferenceWorkspace,
) {
    let ReferenceWorkspace { inputs, scores } = workspace;
    let CacheShape {
        kv_heads, head_dim, ..
    } = args.cache.shape;
    let heads = args.heads;
    let rows = inputs.rows();
    let queries = &mut args.queries.as_mut_slice::<f32>()[..rows * heads * head_dim];
    let keys = &mut args.keys.as_mut_slice::<f32>()[..rows * kv_heads * head_dim];
    let values = &args.values.as_slice::<f32>()[..rows * kv_heads * head_dim];
    prepare_heads(queries, heads, args.query_norm, args.rope, inputs);
    prepare_heads(keys, kv_heads, args.key_norm, args.rope, inputs);

    let cached_keys = args.cache.keys.as_mut_slice::<T>();
    let cached_values = args.cache.values.as_mut_slice::<T>();
    let shape = args.cache.shape;
    for row in 0..rows {
        for head in 0..kv_heads {
            let source = (row * kv_heads + head) * head_dim;
            let slot = cache_offset(shape, inputs.pages(row), inputs.position(row), head);
            for dim in 0..head_dim {
                cached_keys[slot + dim] = T::store(keys[source + dim]);
                cached_values[slot + dim] = T::store(values[source + dim]);
            }
        }
    }

    let out = &mut args.out.as_mut_slice::<f32>()[..rows * heads * head_dim];
    for row in 0..rows {
        let position = inputs.position(row);
        let visible = Visible {
            shape,
            pages: inputs.pages(row),
            first: args
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window)),
            end: position + 1,
        };
        let scores = &mut scores.as_mut_slice::<f32>()[..visible.end - visible.first];
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let at = (row * heads + head) * head_dim;
            visible.scores(kv_head, &queries[at..][..head_dim], cached_keys, scores);
            for score in scores.iter_mut() {
                *score *= args.scale;
                if let Some(cap) = args.softcap {
                    *score = cap * (*score / cap).tanh();
                }
            }
            softmax(scores);
            visible.weighted_sum(kv_head, scores, cached_values, &mut out[at..][..head_dim]);
        }
    }
}

/// Norms and rotates each head of each row of `x`, f32 `[rows, heads, head_dim]`.
fn prepare_heads(
    x: &mut [f32],
    heads: usize,
    norm: Option<&HeadNorm<HostBuffer>>,
    rope: Option<usize>,
    inputs: &StepInputs,
) {
    let head_dim = x.len() / (inputs.rows() * heads).max(1);
    for (index, x) in x.chunks_exact_mut(head_dim.max(1)).enumerate() {
        let (row, head) = (index / heads, index % heads);
        if let Some(norm) = norm {
            let weight = &norm.weight.as_slice()[head * head_dim..][..head_dim];
            normalize_in_place(norm.kind, x, weight, norm.epsilon);
        }
        if let Some(rope) = rope {
            let layout = inputs.rope(rope);
            let (cosines, sines) = inputs.angles(rope, row);
            for pair in 0..layout.pairs {
                let (first, second) = match layout.style {
                    RopeStyle::Halves => (pair, pair + layout.pairs),
                    RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
                };
                let (a, b) = (x[first], x[second]);
                x[first] = a * cosines[pair] - b * sines[pair];
                x[second] = b * cosines[pair] + a * sines[pair];
            }
        }
    }
}

/// Where the vector of `head` at `position` starts in a cache buffer, in elements.
fn cache_offset(shape: CacheShape, pages: &[u32], position: usize, head: usize) -> usize {
    let page = pages[position / PAGE_TOKENS] as usize;
    ((page * shape.kv_heads + head) * PAGE_TOKENS + position % PAGE_TOKENS) * shape.head_dim
}

/// The positions `first..end` of one sequence, which a row attends to.
struct Visible<'a> {
    shape: CacheShape,
    pages: &'a [u32],
    first: usize,
    end: usize,
}

impl Visible<'_> {
    /// The cached vectors of `head` in ascending order of position.
    fn vectors<'b, T>(&self, head: usize, cache: &'b [T]) -> impl Iterator<Item = &'b [T]> {
        (self.first..self.end).map(move |position| {
            let offset = cache_offset(self.shape, self.pages, position, head);
            &cache[offset..][..self.shape.head_dim]
        })
    }

    /// `scores[i] = query · key` of the i-th visible position.
    fn scores<T: CacheElement>(&self, head: usize, query: &[f32], keys: &[T], scores: &mut [f32]) {
        for (score, key) in scores.iter_mut().zip(self.vectors(head, keys)) {
            *score = query.iter().zip(key).map(|(&q, k)| q * k.load()).sum();
        }
    }

    /// `out = Σ weights[i] · value` over the visible positions.
    fn weighted_sum<T: CacheElement>(
        &self,
        head: usize,
        weights: &[f32],
        values: &[T],
        out: &mut [f32],
    ) {
        out.fill(0.0);
        for (&weight, value) in weights.iter().zip(self.vectors(head, values)) {
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight * value.load();
            }
        }
    }
}

/// Replaces scores by their softmax.
fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0_f64;
    for score in scores.iter_mut() {
        *score = (*score - largest).exp();
        sum += f64::from(*score);
    }
    for score in scores.iter_mut() {
        *score = (f64::from(*score) / sum) as f32;
    }
}
