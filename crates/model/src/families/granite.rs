//! Granite: a Llama with four multipliers.

use super::common::{Defaults, read_attention_bias, read_base};
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = read_base(config, &Defaults::LLAMA)?;
    read_attention_bias(config, &mut spec)?;
    spec.biases.mlp = config.flag_or("mlp_bias", false)?;
    spec.embedding_scale = config.positive_or("embedding_multiplier", 1.0)? as f32;
    spec.residual_scale = config.positive_or("residual_multiplier", 1.0)? as f32;
    spec.attention_scale = config.positive_or("attention_multiplier", 1.0)? as f32;
    spec.logit_scale = (1.0 / config.positive_or("logits_scaling", 1.0)?) as f32;
    Ok(spec)
}
