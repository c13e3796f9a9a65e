//! What every operation should give, in f64 and straight from its formula.

use half::f16;

use super::weights::RandomLinear;
use crate::{Activation, NormKind, Rope, RopeStyle, Store};

/// Widens.
pub(super) fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// `W · x + bias` for rows `[rows, in_features]`.
pub(super) fn linear(linear: &RandomLinear, x: &[f64]) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len() / linear.in_features * linear.out_features);
    for row in x.chunks_exact(linear.in_features) {
        let mut y = widen(&linear.bias);
        for (&x, weights) in row
            .iter()
            .zip(linear.weights.chunks_exact(linear.out_features))
        {
            for (y, &weight) in y.iter_mut().zip(weights) {
                *y += x * f64::from(weight);
            }
        }
        out.extend(y);
    }
    out
}

/// What `store` makes of the old contents and a result.
pub(super) fn store(store: Store, old: &[f32], y: &[f64]) -> Vec<f64> {
    match store {
        Store::Overwrite => y.to_vec(),
        Store::Add { scale } => old
            .iter()
            .zip(y)
            .map(|(&old, y)| f64::from(old) + f64::from(scale) * y)
            .collect(),
    }
}

/// A normalisation of each `weight.len()` elements of `x`.
pub(super) fn norm(
    kind: NormKind,
    x: &[f64],
    weight: &[f32],
    bias: Option<&[f32]>,
    epsilon: f32,
) -> Vec<f64> {
    let width = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let average = |terms: &mut dyn Iterator<Item = f64>| terms.sum::<f64>() / width as f64;
        let (mean, spread) = match kind {
            NormKind::Rms => (0.0, average(&mut row.iter().map(|x| x.powi(2)))),
            NormKind::Layer => {
                let mean = average(&mut row.iter().copied());
                // Var(x) = E(x - E(x))²
                (mean, average(&mut row.iter().map(|x| (x - mean).powi(2))))
            }
        };
        let deviation = (spread + f64::from(epsilon)).sqrt();
        for (index, x) in row.iter().enumerate() {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[index]));
            out.push((x - mean) / deviation * f64::from(weight[index]) + bias);
        }
    }
    out
}

/// The function of a gated MLP.
pub(super) fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            // 1 + tanh(z) = 2 / (1 + exp(-2 z)), which does not cancel.
            x / (1.0 + (-2.0 * inner).exp())
        }
        Activation::GeluErf => x * normal_distribution(x),
    }
}

/// The standard normal distribution function, by Simpson's rule on its density.
fn normal_distribution(x: f64) -> f64 {
    const STEPS: usize = 2000;
    // Below -9 the result is under 1e-18; above 9 it is 1 to the last digit.
    let start = -9.0_f64;
    let step = (x.clamp(start, 9.0) - start) / STEPS as f64;
    let density = |index: usize| {
        let t = start + step * index as f64;
        (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
    };
    let inner: f64 = (1..STEPS)
        .map(|index| if index % 2 == 0 { 2.0 } else { 4.0 } * density(index))
        .sum();
    step / 3.0 * (density(0) + inner + density(STEPS))
}

/// `activation(gate) ⊙ up`
pub(super) fn gate(activation: Activation, gate: &[f32], up: &[f32]) -> Vec<f64> {
    gate.iter()
        .zip(up)
        .map(|(&gate, &up)| activate(activation, f64::from(gate)) * f64::from(up))
        .collect()
}

/// Rotates one head by its position: each pair is a complex number times `exp(i angle)`.
pub(super) fn rotate(rope: &Rope, position: usize, x: &mut [f64]) {
    let pairs = rope.inverse_frequencies.len();
    for (pair, &frequency) in rope.inverse_frequencies.iter().enumerate() {
        let (real, imaginary) = match rope.style {
            RopeStyle::Halves => (pair, pair + pairs),
            RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
        };
        let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
        let factor = f64::from(rope.attention_factor);
        let (a, b) = (x[real], x[imaginary]);
        x[real] = factor * (a * cosine - b * sine);
        x[imaginary] = factor * (b * cosine + a * sine);
    }
}

/// How scores become weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scores {
    /// Multiplies the scores.
    pub(super) scale: f32,
    /// `c · tanh(score / c)`
    pub(super) softcap: Option<f32>,
}

/// One query over the keys and values that it sees, `head_dim` numbers each.
pub(super) fn attend(
    scores: Scores,
    query: &[f64],
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
) -> Vec<f64> {
    let score = |key: &Vec<f64>| {
        let product: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
        let score = product * f64::from(scores.scale);
        scores.softcap.map_or(score, |cap| {
            f64::from(cap) * (score / f64::from(cap)).tanh()
        })
    };
    let scores: Vec<f64> = keys.iter().map(score).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0.0; query.len()];
    for (weight, value) in weights.iter().zip(values) {
        for (out, value) in out.iter_mut().zip(value) {
            *out += weight / total * value;
        }
    }
    out
}

/// The fp16 number nearest to `x`: what a cache of fp16 keeps of it.
pub(super) fn round_to_f16(x: f64) -> f64 {
    f16::from_f64(x).to_f64()
}

/// `H x` with the normalised Walsh–Hadamard matrix of `x`'s length, a power of two.
pub(super) fn hadamard(x: &[f64]) -> Vec<f64> {
    let sign = |i: usize, j: usize| [1.0, -1.0][(i & j).count_ones() as usize % 2];
    let row = |i: usize| -> f64 { x.iter().enumerate().map(|(j, x)| sign(i, j) * x).sum() };
    let norm = (x.len() as f64).sqrt();
    (0..x.len()).map(|i| row(i) / norm).collect()
}

/// The largest difference of a row from what is expected, as a share of the row's largest
/// expected magnitude; the worst of all rows. Not a number anywhere: infinite.
pub(super) fn worst_error(found: &[f32], expected: &[f64], width: usize) -> f64 {
    let mut worst = 0.0_f64;
    for (found, expected) in found.chunks_exact(width).zip(expected.chunks_exact(width)) {
        let magnitude = expected.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        for (&found, &expected) in found.iter().zip(expected) {
            let difference = (f64::from(found) - expected).abs();
            let error = if difference == 0.0 {
                0.0
            } else {
                difference / magnitude
            };
            if error.is_nan() {
                return f64::INFINITY;
            }
            worst = worst.max(error);
        }
    }
    if found.len() == expected.len() {
        worst
    } else {
        f64::INFINITY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_number_is_an_error() {
        assert_eq!(worst_error(&[1.0, 2.0], &[1.0, 2.0], 2), 0.0);
        assert_eq!(worst_error(&[1.0, 2.5], &[1.0, 2.0], 2), 0.25);
        assert_eq!(worst_error(&[f32::NAN, 2.0], &[1.0, 2.0], 2), f64::INFINITY);
        assert_eq!(worst_error(&[1.0], &[1.0, 2.0], 1), f64::INFINITY);
        // Each row is measured by itself: a large row does not hide a small one's error.
        assert_eq!(worst_error(&[100.0, 1.5], &[100.0, 1.0], 1), 0.5);
    }

    #[test]
    fn the_normal_distribution_matches_its_table() {
        for (x, expected) in [
            (-1.0, 0.158_655_253_931),
            (0.0, 0.5),
            (1.96, 0.975_002_104_852),
            (40.0, 1.0),
        ] {
            assert!((normal_distribution(x) - expected).abs() < 1e-10, "{x}");
        }
    }
}
