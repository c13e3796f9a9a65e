//! Gemma 3: Gemma 2 with head norms in place of the attention's cap, and two ropes: one of a
//! local base for sliding layers, one scaled for the full layers between them.

use super::common::{
    Defaults, read_attention_bias, read_base, read_query_scale, read_sliding_layers, read_window,
};
use super::gemma::embedding_scale;
use super::rope::{RopeDefaults, read_rope_from};
use crate::config::{Config, MAX_LAYERS};
use crate::{BlockShape, LayerSpec, ModelError, ModelSpec, RopeScaling, RopeSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let defaults = Defaults {
        heads: Some(8),
        kv_heads: Some(4),
        vocab_size: Some(262_208),
        max_position_embeddings: Some(131_072),
        theta: 1_000_000.0,
        ..Defaults::GEMMA
    };
    // The newer spelling nests one rope for each type of layer.
    let nested = config.object("rope_parameters")?;
    let (full, sliding) = match &nested {
        Some(ropes) => (
            ropes.object("full_attention")?,
            ropes.object("sliding_attention")?,
        ),
        None => (config.object("rope_scaling")?, None),
    };
    let mut spec = read_base(config, &defaults)?;
    spec.block = BlockShape::SandwichNorms;
    spec.head_norm = Some(spec.norm);
    read_attention_bias(config, &mut spec)?;
    spec.embedding_scale = embedding_scale(&spec);
    spec.attention_scale = read_query_scale(config)?;
    let cap = config.optional_positive("final_logit_softcapping")?;
    spec.logit_softcap = cap.map(|cap| cap as f32);

    let rope_defaults = |theta: f64| RopeDefaults {
        theta,
        style: defaults.rope_style,
        head_dim: spec.head_dim,
        max_position_embeddings: spec.max_position_embeddings,
    };
    let full = read_rope_from(config, full.as_ref(), &rope_defaults(defaults.theta))?;
    let local_theta = match &sliding {
        Some(sliding) => sliding.optional_positive("rope_theta")?,
        None => config.optional_positive("rope_local_base_freq")?,
    };
    let sliding = RopeSpec {
        theta: local_theta.unwrap_or(10_000.0),
        scaling: RopeScaling::Plain,
        ..full.clone()
    };
    spec.ropes = vec![full, sliding];

    let window = read_window(config)?.unwrap_or(4096);
    let pattern_key = match config.has("sliding_window_pattern") {
        true => "sliding_window_pattern",
        false => "_sliding_window_pattern",
    };
    let pattern = config.count_or(pattern_key, MAX_LAYERS, 6)?;
    let slides = read_sliding_layers(config, spec.layers.len(), |layer| {
        !(layer + 1).is_multiple_of(pattern)
    })?;
    let of_layer = |slides: &bool| LayerSpec {
        window: slides.then_some(window),
        rope: Some(usize::from(*slides)),
    };
    spec.layers = slides.iter().map(of_layer).collect();
    Ok(spec)
}

/// The text part of a multimodal Gemma 3, whose configuration is one level down.
pub(super) fn read_text_part(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    match config.object("text_config")? {
        Some(text) => read(&text),
        None => Err(config.error("text_config", "the configuration of the text part")),
    }
}
