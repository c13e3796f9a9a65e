//! The model families: one small file each, data only.
//!
//! A family reads `config.json` into a [`ModelSpec`] and says nothing of how it is run. What
//! most families share is in `common` and `rope`; a family's file states where it differs.
//! Sources of the formulas: each family's `modeling_*.py` and `configuration_*.py` in
//! Hugging Face transformers.

mod cohere;
mod common;
mod gemma;
mod gemma2;
mod gemma3;
mod granite;
mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;
mod rope;

use crate::config::Config;
use crate::{ModelError, ModelSpec};

/// Reads the configuration of one architecture.
type Reader = fn(&Config<'_>) -> Result<ModelSpec, ModelError>;

/// Every architecture that can be run, by the name that `config.json` gives it.
const REGISTRY: [(&str, Reader); 12] = [
    ("LlamaForCausalLM", llama::read),
    ("MistralForCausalLM", mistral::read),
    ("Qwen2ForCausalLM", qwen2::read),
    ("Qwen3ForCausalLM", qwen3::read),
    ("GemmaForCausalLM", gemma::read),
    ("Gemma2ForCausalLM", gemma2::read),
    ("Gemma3ForCausalLM", gemma3::read),
    ("Gemma3ForConditionalGeneration", gemma3::read_text_part),
    ("Phi3ForCausalLM", phi3::read),
    ("GraniteForCausalLM", granite::read),
    ("CohereForCausalLM", cohere::read),
    ("Cohere2ForCausalLM", cohere::read_second),
];

/// The architectures that [`ModelSpec::from_config`] knows.
pub fn known_architectures() -> Vec<&'static str> {
    REGISTRY.iter().map(|(name, _)| *name).collect()
}

/// Reads a configuration by the family that its `architectures[0]` names.
pub(crate) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let expected = "a list with the name of the architecture";
    let names = config
        .get("architectures")
        .and_then(|value| value.as_array());
    let name = names
        .and_then(|names| names.first())
        .and_then(|name| name.as_str())
        .ok_or_else(|| config.error("architectures", expected))?;
    let Some((_, reader)) = REGISTRY.iter().find(|(known, _)| *known == name) else {
        return Err(ModelError::UnknownArchitecture {
            found: name.chars().take(80).collect(),
            known: known_architectures(),
        });
    };
    let mut spec = reader(config)?;
    name.clone_into(&mut spec.architecture);
    Ok(spec)
}
