//! Llama 1 to 3.x, and the many models that are Llamas by another name.

use super::common::{Defaults, read_attention_bias, read_base};
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = read_base(config, &Defaults::LLAMA)?;
    read_attention_bias(config, &mut spec)?;
    spec.biases.mlp = config.flag_or("mlp_bias", false)?;
    Ok(spec)
}
