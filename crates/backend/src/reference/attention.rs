//! Attention over the paged cache.

use std::ops::Range;

use super::memory::StepInputs;
use super::norm::normalize_in_place;
use super::{ReferenceDevice, ReferenceWorkspace};
use crate::quantised::{GROUP, rotate};
use crate::{
    AttentionArgs, AttentionOps, DeviceError, HeadLayout, HeadNorm, HostBuffer, PAGE_TOKENS,
    RopeStyle,
};

impl AttentionOps for ReferenceDevice {
    fn attention(
        &self,
        args: AttentionArgs<'_, HostBuffer>,
        workspace: &mut ReferenceWorkspace,
    ) -> Result<(), DeviceError> {
        let ReferenceWorkspace { inputs, scores, .. } = workspace;
        let shape = args.cache.shape;
        let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
        let heads = args.heads;
        let rows = inputs.rows();
        let queries = &mut args.queries.as_mut_slice::<f32>()[..rows * heads * head_dim];
        let keys = &mut args.keys.as_mut_slice::<f32>()[..rows * kv_heads * head_dim];
        let values = &args.values.as_slice::<f32>()[..rows * kv_heads * head_dim];
        prepare_heads(queries, heads, args.query_norm, args.rope, inputs);
        prepare_heads(keys, kv_heads, args.key_norm, args.rope, inputs);
        let quantised = shape.format.is_quantised();
        if quantised {
            rotate(queries);
        }

        let (key_layout, value_layout) = (shape.key_layout(), shape.value_layout());
        let cached_keys = args.cache.keys.as_mut_slice::<u8>();
        let cached_values = args.cache.values.as_mut_slice::<u8>();
        for row in 0..rows {
            let (pages, position) = (inputs.pages(row), inputs.position(row));
            let page = pages[position / PAGE_TOKENS] as usize;
            let token = position % PAGE_TOKENS;
            for head in 0..kv_heads {
                let source = (row * kv_heads + head) * head_dim;
                let page = page * kv_heads + head;
                let key_page = &mut cached_keys[head_range(key_layout, page)];
                key_layout.store(key_page, token, &keys[source..][..head_dim]);
                let value_page = &mut cached_values[head_range(value_layout, page)];
                value_layout.store(value_page, token, &values[source..][..head_dim]);
            }
        }

        let out = &mut args.out.as_mut_slice::<f32>()[..rows * heads * head_dim];
        for row in 0..rows {
            let position = inputs.position(row);
            let visible = Visible {
                kv_heads,
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
                let keys = (key_layout, &*cached_keys);
                visible.scores(kv_head, &queries[at..][..head_dim], keys, scores);
                for score in scores.iter_mut() {
                    *score *= args.scale;
                    if let Some(cap) = args.softcap {
                        *score = cap * (*score / cap).tanh();
                    }
                }
                softmax(scores);
                let values = (value_layout, &*cached_values);
                let out = &mut out[at..][..head_dim];
                visible.weighted_sum(kv_head, scores, values, out);
                if quantised {
                    rotate(out);
                }
            }
        }
        Ok(())
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

/// The bytes of a head's page: `page` counts pages times heads.
fn head_range(layout: HeadLayout, page: usize) -> Range<usize> {
    let bytes = layout.page_bytes();
    page * bytes..(page + 1) * bytes
}

/// The positions `first..end` of one sequence, which a row attends to.
struct Visible<'a> {
    kv_heads: usize,
    pages: &'a [u32],
    first: usize,
    end: usize,
}

impl Visible<'_> {
    /// The head's page and the token in it of each position, in ascending order.
    fn places(&self, head: usize) -> impl Iterator<Item = (usize, usize)> {
        (self.first..self.end).map(move |position| {
            let page = self.pages[position / PAGE_TOKENS] as usize;
            (page * self.kv_heads + head, position % PAGE_TOKENS)
        })
    }

    /// `scores[i] = query · key` of the i-th visible position.
    fn scores(
        &self,
        head: usize,
        query: &[f32],
        (layout, keys): (HeadLayout, &[u8]),
        scores: &mut [f32],
    ) {
        for (score, (page, token)) in scores.iter_mut().zip(self.places(head)) {
            let page = &keys[head_range(layout, page)];
            *score = 0.0;
            for (part, query) in query.chunks(GROUP).enumerate() {
                for (&q, k) in query.iter().zip(layout.load(page, token, part)) {
                    *score += q * k;
                }
            }
        }
    }

    /// `out = Σ weights[i] · value` over the visible positions.
    fn weighted_sum(
        &self,
        head: usize,
        weights: &[f32],
        (layout, values): (HeadLayout, &[u8]),
        out: &mut [f32],
    ) {
        out.fill(0.0);
        for (&weight, (page, token)) in weights.iter().zip(self.places(head)) {
            let page = &values[head_range(layout, page)];
            for (part, out) in out.chunks_mut(GROUP).enumerate() {
                for (out, value) in out.iter_mut().zip(layout.load(page, token, part)) {
                    *out += weight * value;
                }
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
