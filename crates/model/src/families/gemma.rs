//! Gemma (the first): a Llama with norm weights stored minus one and scaled embeddings.

use oxllama_backend::Activation;

use super::common::{Defaults, read_attention_bias, read_base};
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = read_base(config, &Defaults::GEMMA)?;
    read_attention_bias(config, &mut spec)?;
    spec.embedding_scale = embedding_scale(&spec);
    // Its first files say "gelu" and mean the tanh form.
    if spec.activation == Activation::GeluErf {
        spec.activation = Activation::GeluTanh;
    }
    Ok(spec)
}

/// The square root of the width, by which every Gemma multiplies its embeddings.
pub(super) fn embedding_scale(spec: &ModelSpec) -> f32 {
    (spec.hidden_size as f64).sqrt() as f32
}
