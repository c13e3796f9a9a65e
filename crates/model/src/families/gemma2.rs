//! Gemma 2: norms before and after each branch, soft caps, every other layer slides.

use super::common::{
    Defaults, read_attention_bias, read_base, read_query_scale, read_sliding_layers, read_window,
};
use super::gemma::embedding_scale;
use crate::config::Config;
use crate::{BlockShape, ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let defaults = Defaults {
        kv_heads: Some(4),
        ..Defaults::GEMMA
    };
    let mut spec = read_base(config, &defaults)?;
    spec.block = BlockShape::SandwichNorms;
    read_attention_bias(config, &mut spec)?;
    spec.embedding_scale = embedding_scale(&spec);
    spec.attention_scale = read_query_scale(config)?;
    let softcap = |key: &str, default: f64| -> Result<Option<f32>, ModelError> {
        let cap = config.positive_unless_null(key, default)?;
        Ok(cap.map(|cap| cap as f32))
    };
    spec.attention_softcap = softcap("attn_logit_softcapping", 50.0)?;
    spec.logit_softcap = softcap("final_logit_softcapping", 30.0)?;
    let window = read_window(config)?.unwrap_or(4096);
    let slides = read_sliding_layers(config, spec.layers.len(), |layer| layer.is_multiple_of(2))?;
    for (layer, slides) in spec.layers.iter_mut().zip(slides) {
        layer.window = slides.then_some(window);
    }
    Ok(spec)
}
