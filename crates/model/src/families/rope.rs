//! Reading rotary embeddings from `config.json`, in its older spelling (`rope_theta` beside
//! `rope_scaling`) and its newer one (`rope_parameters`).

use oxllama_backend::RopeStyle;

use crate::config::{Config, MAX_POSITIONS};
use crate::rope::yarn_mscale;
use crate::{ModelError, RopeScaling, RopeSpec};

/// What the rest of a configuration says about its ropes.
pub(super) struct RopeDefaults {
    /// `rope_theta`
    pub theta: f64,
    /// Which dimensions form a pair.
    pub style: RopeStyle,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// `max_position_embeddings`
    pub max_position_embeddings: usize,
}

/// The rope of a configuration that has one.
pub(super) fn read_rope(
    config: &Config<'_>,
    defaults: &RopeDefaults,
) -> Result<RopeSpec, ModelError> {
    let parameters = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    read_rope_from(config, parameters.as_ref(), defaults)
}

/// The rope that `parameters` describe, falling back on the top level of `config`.
pub(super) fn read_rope_from(
    config: &Config<'_>,
    parameters: Option<&Config<'_>>,
    defaults: &RopeDefaults,
) -> Result<RopeSpec, ModelError> {
    let either = |key: &str| -> Result<Option<f64>, ModelError> {
        let inner = match parameters {
            Some(parameters) => parameters.optional_positive(key)?,
            None => None,
        };
        match inner {
            Some(number) => Ok(Some(number)),
            None => config.optional_positive(key),
        }
    };
    let partial = either("partial_rotary_factor")?.unwrap_or(1.0);
    let rotary_dim = (defaults.head_dim as f64 * partial) as usize;
    if rotary_dim < 2 || !rotary_dim.is_multiple_of(2) || rotary_dim > defaults.head_dim {
        let expected = format!(
            "a factor that makes an even, positive part of the head dimension {}",
            defaults.head_dim
        );
        return Err(config.error("partial_rotary_factor", expected));
    }
    let scaling = match parameters {
        Some(parameters) => read_scaling(config, parameters, rotary_dim, defaults)?,
        None => RopeScaling::Plain,
    };
    let theta = either("rope_theta")?.unwrap_or(defaults.theta);
    // YaRN divides by its logarithm.
    if theta < 2.0 {
        return Err(config.error("rope_theta", "a number of at least 2"));
    }
    Ok(RopeSpec {
        theta,
        rotary_dim,
        style: defaults.style,
        scaling,
    })
}

fn read_scaling(
    config: &Config<'_>,
    parameters: &Config<'_>,
    rotary_dim: usize,
    defaults: &RopeDefaults,
) -> Result<RopeScaling, ModelError> {
    let key = if parameters.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let is_phi3 = config.text("model_type")? == Some("phi3");
    let factor = || {
        parameters
            .optional_positive("factor")?
            .ok_or_else(|| parameters.error("factor", "a number above 0"))
    };
    match parameters.text(key)?.unwrap_or("default") {
        "default" => Ok(RopeScaling::Plain),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "dynamic" => Ok(RopeScaling::Dynamic {
            factor: factor()?,
            original_tokens: defaults.max_position_embeddings,
        }),
        "llama3" => read_llama3(parameters, factor()?, defaults),
        // Phi-3's first files called its longrope "su", then "yarn".
        "su" | "longrope" => read_longrope(config, parameters, rotary_dim, defaults, is_phi3),
        "yarn" if is_phi3 => read_longrope(config, parameters, rotary_dim, defaults, is_phi3),
        "yarn" => read_yarn(parameters, defaults),
        _ => Err(parameters.error(key, "default, linear, dynamic, llama3, yarn or longrope")),
    }
}

fn read_llama3(
    parameters: &Config<'_>,
    factor: f64,
    defaults: &RopeDefaults,
) -> Result<RopeScaling, ModelError> {
    let low_frequency_factor = parameters.positive_or("low_freq_factor", 1.0)?;
    let high_frequency_factor = parameters.positive_or("high_freq_factor", 4.0)?;
    if high_frequency_factor <= low_frequency_factor {
        let expected = format!("a number above the low_freq_factor {low_frequency_factor}");
        return Err(parameters.error("high_freq_factor", expected));
    }
    Ok(RopeScaling::Llama3 {
        factor,
        low_frequency_factor,
        high_frequency_factor,
        original_tokens: parameters.count_or(
            "original_max_position_embeddings",
            MAX_POSITIONS,
            defaults.max_position_embeddings,
        )?,
    })
}

fn read_yarn(parameters: &Config<'_>, defaults: &RopeDefaults) -> Result<RopeScaling, ModelError> {
    let original_tokens = parameters.count_or(
        "original_max_position_embeddings",
        MAX_POSITIONS,
        defaults.max_position_embeddings,
    )?;
    let stretch = defaults.max_position_embeddings as f64 / original_tokens as f64;
    let factor = parameters.positive_or("factor", stretch)?;
    // Zero stands for "not given" in these keys.
    let optional = |key: &str| match parameters.get(key).and_then(|value| value.as_f64()) {
        Some(0.0) => Ok(None),
        _ => parameters.optional_positive(key),
    };
    let attention_factor = match optional("attention_factor")? {
        Some(given) => given,
        None => match (optional("mscale")?, optional("mscale_all_dim")?) {
            (Some(mscale), Some(all_dim)) => {
                yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
            }
            _ => yarn_mscale(factor, 1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_tokens,
        beta_fast: optional("beta_fast")?.unwrap_or(32.0),
        beta_slow: optional("beta_slow")?.unwrap_or(1.0),
        truncate: parameters.flag_or("truncate", true)?,
        attention_factor,
    })
}

fn read_longrope(
    config: &Config<'_>,
    parameters: &Config<'_>,
    rotary_dim: usize,
    defaults: &RopeDefaults,
    is_phi3: bool,
) -> Result<RopeScaling, ModelError> {
    let key = "original_max_position_embeddings";
    let original_tokens = match config.optional_count(key, MAX_POSITIONS)? {
        Some(tokens) => tokens,
        None => {
            let default = if is_phi3 {
                4096
            } else {
                defaults.max_position_embeddings
            };
            parameters.count_or(key, MAX_POSITIONS, default)?
        }
    };
    if original_tokens < 2 {
        return Err(config.error(key, "at least 2"));
    }
    let stretch = defaults.max_position_embeddings as f64 / original_tokens as f64;
    let factor = parameters.positive_or("factor", stretch)?;
    let attention_factor = match parameters.optional_positive("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original_tokens as f64).ln()).sqrt(),
    };
    Ok(RopeScaling::LongRope {
        short_factors: parameters.positives("short_factor", rotary_dim / 2)?,
        long_factors: parameters.positives("long_factor", rotary_dim / 2)?,
        original_tokens,
        attention_factor,
    })
}
