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
