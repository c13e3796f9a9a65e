//! Qwen 2 and 2.5: biases on query, key and value; optional windows in the upper layers.

use super::common::{Defaults, read_base, read_sliding_layers, read_window};
use crate::config::{Config, MAX_LAYERS};
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = read_base(config, &Defaults::LLAMA)?;
    spec.biases.qkv = true;
    read_upper_windows(config, &mut spec)?;
    Ok(spec)
}

/// Windows where `use_sliding_window` is on: in the layers that `layer_types` names, or from
/// layer `max_window_layers` on.
pub(super) fn read_upper_windows(
    config: &Config<'_>,
    spec: &mut ModelSpec,
) -> Result<(), ModelError> {
    if !config.flag_or("use_sliding_window", false)? {
        return Ok(());
    }
    let window = match config.has("sliding_window") {
        true => read_window(config)?,
        false => Some(4096),
    };
    // Zero layers without a window is a legal value here.
    let first = match config
        .get("max_window_layers")
        .and_then(|value| value.as_u64())
    {
        Some(0) => 0,
        _ => config.count_or("max_window_layers", MAX_LAYERS, 28)?,
    };
    let slides = read_sliding_layers(config, spec.layers.len(), |layer| layer >= first)?;
    for (layer, slides) in spec.layers.iter_mut().zip(slides) {
        layer.window = window.filter(|_| slides);
    }
    Ok(())
}
