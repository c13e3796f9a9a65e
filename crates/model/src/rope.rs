//! Rotary embeddings: every variant as data, and the one function that turns a variant and a
//! planned context into frequencies.
//!
//! Formulas are those of Hugging Face transformers' `modeling_rope_utils`, computed in f32 as
//! there; NTK alpha is ExLlama's `rope_alpha`.

use std::f64::consts::TAU;

use oxllama_backend::{Rope, RopeStyle};

/// One rotary embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies (`rope_theta`).
    pub theta: f64,
    /// Dimensions of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Which dimensions form a pair.
    pub style: RopeStyle,
    /// How the frequencies are stretched for contexts beyond those trained.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Plain,
    /// All divided by `factor` (position interpolation).
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// The base grows with the planned context `L` once it is above `original_tokens` `O`:
    /// `theta · (factor · L / O − (factor − 1))^(d / (d − 2))`.
    Dynamic {
        /// Stretch.
        factor: f64,
        /// Tokens of the trained context.
        original_tokens: usize,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_tokens / low` are low frequencies.
        low_frequency_factor: f64,
        /// Wavelengths below `original_tokens / high` are high frequencies.
        high_frequency_factor: f64,
        /// Tokens of the trained context.
        original_tokens: usize,
    },
    /// YaRN: interpolation by parts and a factor on the attention.
    Yarn {
        /// Stretch.
        factor: f64,
        /// Tokens of the trained context.
        original_tokens: usize,
        /// Rotations over the trained context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided by `factor`.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded outwards to whole dimensions.
        truncate: bool,
        /// Multiplies cosine and sine.
        attention_factor: f64,
    },
    /// Phi-3's longrope: one list of divisors for contexts up to the trained length, another
    /// beyond. Chosen once from the planned context, so cached keys never change meaning.
    LongRope {
        /// Divisors up to `original_tokens`, `[rotary_dim / 2]`.
        short_factors: Vec<f32>,
        /// Divisors beyond, `[rotary_dim / 2]`.
        long_factors: Vec<f32>,
        /// Tokens of the trained context.
        original_tokens: usize,
        /// Multiplies cosine and sine, whichever list is used.
        attention_factor: f64,
    },
}

/// What a user changes about a model's main rope (index 0); `None` keeps the model's own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RopeOverrides {
    /// ExLlama's `rope_scale`: positions are divided by it. Replaces a linear factor of the
    /// configuration and comes on top of any other scaling.
    pub scale: Option<f64>,
    /// ExLlama's `rope_alpha` (NTK): the base is multiplied by `alpha^(d / (d − 2))`.
    pub alpha: Option<f64>,
    /// ExLlama's `rope_yarn_alpha`: YaRN by this factor over the configuration's
    /// `max_position_embeddings`, in place of the configuration's scaling.
    pub yarn: Option<f64>,
}

/// YaRN's attention factor for a stretch of `factor`: `0.1 · mscale · ln(factor) + 1`.
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

/// The frequencies of `spec` for sequences of up to `planned_context` tokens, with a user's
/// `overrides`. `max_position_embeddings` is the trained context where an override asks for
/// YaRN.
pub fn rope(
    spec: &RopeSpec,
    overrides: &RopeOverrides,
    planned_context: usize,
    max_position_embeddings: usize,
) -> Rope {
    let dim = spec.rotary_dim as f64;
    // A rotation of a single pair has no exponent to stretch.
    let stretch = |ratio: f64| {
        if spec.rotary_dim > 2 {
            ratio.powf(dim / (dim - 2.0))
        } else {
            1.0
        }
    };
    let theta = spec.theta * overrides.alpha.map_or(1.0, stretch);
    let overriding_yarn = overrides.yarn.map(|factor| RopeScaling::Yarn {
        factor,
        original_tokens: max_position_embeddings,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: yarn_mscale(factor, 1.0),
    });
    let scaling = overriding_yarn.as_ref().unwrap_or(&spec.scaling);

    let mut attention_factor = 1.0;
    let mut divisor = overrides.scale;
    let plain = |theta: f64| plain_frequencies(theta, spec.rotary_dim);
    let mut frequencies = match scaling {
        RopeScaling::Plain => plain(theta),
        RopeScaling::Linear { factor } => {
            divisor = divisor.or(Some(*factor));
            plain(theta)
        }
        RopeScaling::Dynamic {
            factor,
            original_tokens,
        } => {
            let tokens = planned_context.max(*original_tokens) as f64;
            let ratio = factor * tokens / *original_tokens as f64 - (factor - 1.0);
            plain(theta * stretch(ratio))
        }
        RopeScaling::Llama3 { .. } => llama3_frequencies(plain(theta), scaling),
        RopeScaling::Yarn {
            attention_factor: factor,
            ..
        } => {
            attention_factor = *factor;
            yarn_frequencies(plain(theta), theta, spec.rotary_dim, scaling)
        }
        RopeScaling::LongRope {
            short_factors,
            long_factors,
            original_tokens,
            attention_factor: factor,
        } => {
            attention_factor = *factor;
            let is_long = planned_context > *original_tokens;
            let divisors = if is_long { long_factors } else { short_factors };
            let frequencies = plain(theta);
            let pairs = frequencies.iter().zip(divisors);
            pairs
                .map(|(frequency, divisor)| frequency / divisor)
                .collect()
        }
    };
    if let Some(divisor) = divisor {
        for frequency in &mut frequencies {
            *frequency /= divisor as f32;
        }
    }
    Rope {
        inverse_frequencies: frequencies,
        attention_factor: attention_factor as f32,
        style: spec.style,
    }
}

/// `theta^(-2 i / rotary_dim)` for each pair `i`, in f32.
fn plain_frequencies(theta: f64, rotary_dim: usize) -> Vec<f32> {
    let frequency = |pair: usize| {
        let exponent = (2 * pair) as f32 / rotary_dim as f32;
        1.0 / (theta as f32).powf(exponent)
    };
    (0..rotary_dim / 2).map(frequency).collect()
}

/// `frequencies` as [`RopeScaling::Llama3`] changes them; any other scaling leaves them.
fn llama3_frequencies(mut frequencies: Vec<f32>, scaling: &RopeScaling) -> Vec<f32> {
    let &RopeScaling::Llama3 {
        factor,
        low_frequency_factor: low,
        high_frequency_factor: high,
        original_tokens,
    } = scaling
    else {
        return frequencies;
    };
    let original = original_tokens as f64;
    for frequency in &mut frequencies {
        let plain = f64::from(*frequency);
        let wavelength = TAU / plain;
        let scaled = if wavelength < original / high {
            plain
        } else if wavelength > original / low {
            plain / factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * plain / factor + smooth * plain
        };
        *frequency = scaled as f32;
    }
    frequencies
}

/// `frequencies` as [`RopeScaling::Yarn`] changes them; any other scaling leaves them.
fn yarn_frequencies(
    mut frequencies: Vec<f32>,
    theta: f64,
    rotary_dim: usize,
    scaling: &RopeScaling,
) -> Vec<f32> {
    let &RopeScaling::Yarn {
        factor,
        original_tokens,
        beta_fast,
        beta_slow,
        truncate,
        ..
    } = scaling
    else {
        return frequencies;
    };
    let dim = rotary_dim as f64;
    // The pair that turns `rotations` times over the trained context.
    let pair_of = |rotations: f64| {
        dim * (original_tokens as f64 / (rotations * TAU)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    low = low.max(0.0);
    // transformers' bound: the rotated dimensions, although pairs are counted.
    high = high.min(dim - 1.0);
    if low == high {
        high += 0.001;
    }
    for (pair, frequency) in frequencies.iter_mut().enumerate() {
        let ramp = (((pair as f64 - low) / (high - low)) as f32).clamp(0.0, 1.0);
        let stretched = *frequency / factor as f32;
        *frequency = stretched * ramp + *frequency * (1.0 - ramp);
    }
    frequencies
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(theta: f64, rotary_dim: usize, scaling: RopeScaling) -> RopeSpec {
        RopeSpec {
            theta,
            rotary_dim,
            style: RopeStyle::Halves,
            scaling,
        }
    }

    /// The rope for a planned context of 4096 tokens of a model trained for 2048.
    fn rope_of(spec: &RopeSpec, overrides: RopeOverrides) -> Rope {
        rope(spec, &overrides, 4096, 2048)
    }

    /// Frequencies within f32 rounding of `expected`, which were computed in f64.
    fn assert_frequencies(rope: &Rope, expected: &[f64]) {
        assert_eq!(rope.inverse_frequencies.len(), expected.len());
        for (found, expected) in rope.inverse_frequencies.iter().zip(expected) {
            let error = (f64::from(*found) / expected - 1.0).abs();
            assert!(error < 1e-6, "{found} instead of {expected}");
        }
    }

    const PLAIN_8: [f64; 4] = [1.0, 0.1, 0.01, 0.001];

    #[test]
    fn plain_and_linear() {
        let plain = spec(10_000.0, 8, RopeScaling::Plain);
        let rope = rope_of(&plain, RopeOverrides::default());
        assert_frequencies(&rope, &PLAIN_8);
        assert_eq!(rope.attention_factor, 1.0);
        assert_eq!(rope.rotary_dim(), 8);

        let linear = spec(10_000.0, 8, RopeScaling::Linear { factor: 4.0 });
        let rope = rope_of(&linear, RopeOverrides::default());
        assert_frequencies(&rope, &PLAIN_8.map(|frequency| frequency / 4.0));
        // A user's factor replaces the configuration's.
        let overrides = RopeOverrides {
            scale: Some(2.0),
            ..RopeOverrides::default()
        };
        let rope = rope_of(&linear, overrides);
        assert_frequencies(&rope, &PLAIN_8.map(|frequency| frequency / 2.0));
    }

    #[test]
    fn ntk_alpha_raises_the_base() {
        let overrides = RopeOverrides {
            alpha: Some(2.0),
            ..RopeOverrides::default()
        };
        let rope = rope_of(&spec(10_000.0, 8, RopeScaling::Plain), overrides);
        let expected = [1.0, 0.079_370_052_6, 0.006_299_605_25, 0.0005];
        assert_frequencies(&rope, &expected);
        // A single pair always turns at frequency 1, and has no exponent.
        let rope = rope_of(&spec(10_000.0, 2, RopeScaling::Plain), overrides);
        assert_frequencies(&rope, &[1.0]);
    }

    #[test]
    fn dynamic_follows_the_planned_context() {
        let dynamic = RopeScaling::Dynamic {
            factor: 2.0,
            original_tokens: 2048,
        };
        let dynamic = spec(10_000.0, 8, dynamic);
        let none = RopeOverrides::default();
        let expected = [1.0, 0.069_336_127_4, 0.004_807_498_57, 0.000_333_333_333];
        assert_frequencies(&rope(&dynamic, &none, 4096, 2048), &expected);
        assert_frequencies(&rope(&dynamic, &none, 2048, 2048), &PLAIN_8);
    }

    #[test]
    fn llama3_divides_low_frequencies() {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_tokens: 8192,
        };
        let rope = rope_of(&spec(500_000.0, 16, llama3), RopeOverrides::default());
        let expected = [
            1.0,
            0.193_922_744_7,
            0.037_606_030_9,
            0.007_292_664_737,
            0.000_524_846_161,
            3.428_102_195_95e-5,
            6.647_869_871_18e-6,
            1.289_173_172_15e-6,
        ];
        assert_frequencies(&rope, &expected);
    }

    #[test]
    fn yarn_from_an_override() {
        let overrides = RopeOverrides {
            yarn: Some(4.0),
            ..RopeOverrides::default()
        };
        let rope = rope_of(&spec(10_000.0, 16, RopeScaling::Plain), overrides);
        let expected = [
            1.0,
            0.316_227_766,
            0.1,
            0.025_693_505_99,
            0.00625,
            0.001_383_496_476,
            0.00025,
            7.905_694_150_4e-5,
        ];
        assert_frequencies(&rope, &expected);
        assert!((rope.attention_factor - 1.138_629_4).abs() < 1e-6);
    }

    #[test]
    fn longrope_is_chosen_once_from_the_planned_context() {
        let longrope = RopeScaling::LongRope {
            short_factors: vec![1.0, 2.0],
            long_factors: vec![4.0, 5.0],
            original_tokens: 2048,
            attention_factor: 1.25,
        };
        let longrope = spec(10_000.0, 4, longrope);
        let none = RopeOverrides::default();
        let short = rope(&longrope, &none, 2048, 8192);
        assert_frequencies(&short, &[1.0, 0.005]);
        let long = rope(&longrope, &none, 2049, 8192);
        assert_frequencies(&long, &[0.25, 0.002]);
        assert_eq!(
            (short.attention_factor, long.attention_factor),
            (1.25, 1.25)
        );
    }
}
