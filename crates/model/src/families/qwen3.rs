//! Qwen 3: heads of 128 dimensions whatever the width, queries and keys normed by head.

use super::common::{Defaults, read_attention_bias, read_base};
use super::qwen2::read_upper_windows;
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let defaults = Defaults {
        head_dim: Some(128),
        ..Defaults::LLAMA
    };
    let mut spec = read_base(config, &defaults)?;
    spec.head_norm = Some(spec.norm);
    read_attention_bias(config, &mut spec)?;
    read_upper_windows(config, &mut spec)?;
    Ok(spec)
}
