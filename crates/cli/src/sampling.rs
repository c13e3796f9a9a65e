//! The sampling options of the command line, over the model's defaults.

use anyhow::Result;
use oxllama_engine::SamplingSettings;
use oxllama_text::StopMatcher;
use serde_json::Value;

use crate::args::SamplingArgs;

/// The settings asked for: options, else generation_config.json, else ExLlamaV2's defaults.
pub(crate) fn settings(
    args: &SamplingArgs,
    generation_config: Option<&Value>,
) -> Result<SamplingSettings> {
    if args.greedy {
        return Ok(SamplingSettings::greedy());
    }
    let defaults = SamplingSettings::from_generation_config(generation_config);
    let settings = SamplingSettings {
        temperature: args.temperature.unwrap_or(defaults.temperature),
        top_k: args.top_k.unwrap_or(defaults.top_k),
        top_p: args.top_p.unwrap_or(defaults.top_p),
        min_p: args.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: args
            .repetition_penalty
            .unwrap_or(defaults.repetition_penalty),
    };
    settings.check()?;
    Ok(settings)
}

/// Refuses options that no model's defaults could make right, before a model is loaded for them.
pub(crate) fn check(args: &SamplingArgs) -> Result<()> {
    settings(args, None)?;
    StopMatcher::new(&args.stop)?;
    Ok(())
}

/// The seed asked for, or one that differs from run to run.
pub(crate) fn seed(args: &SamplingArgs) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    args.seed
        .unwrap_or_else(|| RandomState::new().hash_one(std::process::id()))
}
