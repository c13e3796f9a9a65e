//! Cohere's Command R (attention and MLP side by side, interleaved rotary pairs), and its
//! second generation (windows, and full layers without any rotation).

use oxllama_backend::{NormKind, RopeStyle};

use super::common::{Defaults, read_attention_bias, read_base, read_sliding_layers, read_window};
use crate::config::{Config, MAX_LAYERS};
use crate::{BlockShape, LayerSpec, ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = read_parallel(config)?;
    if config.flag_or("use_qk_norm", false)? {
        spec.head_norm = Some(spec.norm);
    }
    Ok(spec)
}

/// Command R7B and later (`Cohere2ForCausalLM`).
pub(super) fn read_second(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = read_parallel(config)?;
    let window = read_window(config)?.unwrap_or(4096);
    let pattern = config.count_or("sliding_window_pattern", MAX_LAYERS, 4)?;
    let slides = read_sliding_layers(config, spec.layers.len(), |layer| {
        !(layer + 1).is_multiple_of(pattern)
    })?;
    let of_layer = |slides: &bool| LayerSpec {
        window: slides.then_some(window),
        rope: slides.then_some(0),
    };
    spec.layers = slides.iter().map(of_layer).collect();
    Ok(spec)
}

fn read_parallel(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let defaults = Defaults {
        norm: NormKind::Layer,
        epsilon_key: "layer_norm_eps",
        epsilon: 1e-5,
        tied_head: true,
        rope_style: RopeStyle::Interleaved,
        ..Defaults::LLAMA
    };
    let mut spec = read_base(config, &defaults)?;
    spec.block = BlockShape::Parallel;
    read_attention_bias(config, &mut spec)?;
    spec.logit_scale = config.positive_or("logit_scale", 0.0625)? as f32;
    Ok(spec)
}
