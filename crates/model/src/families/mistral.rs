//! Mistral: a Llama whose every layer slides, unless the window is null.

use super::common::{Defaults, read_base, read_window};
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let defaults = Defaults {
        kv_heads: Some(8),
        ..Defaults::LLAMA
    };
    let mut spec = read_base(config, &defaults)?;
    let window = if config.has("sliding_window") {
        read_window(config)?
    } else {
        Some(4096)
    };
    for layer in &mut spec.layers {
        layer.window = window;
    }
    Ok(spec)
}
