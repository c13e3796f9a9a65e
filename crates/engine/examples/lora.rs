//! The same prompt with and without a LoRA adapter (a directory that PEFT saved), both in one
//! batch.
//!
//! `cargo run --release --example lora -- MODEL_DIRECTORY ADAPTER_DIRECTORY`
#![allow(clippy::print_stdout, reason = "an example shows what it got")]

mod common;

use oxllama_engine::{Job, SamplingSettings};
use oxllama_format::AdapterSource;
use oxllama_text::EncodeOptions;

fn main() -> common::Result<()> {
    let model = common::path_argument(1, "a model directory")?;
    let adapter = common::path_argument(2, "a LoRA directory with adapter_config.json")?;
    let engine = common::engine(&model, None)?;
    let adapter = engine.load_adapter(AdapterSource::open(&adapter)?, 1.0)?;

    let prompt = "My favourite food is";
    let plain = Job {
        sampling: SamplingSettings::greedy(),
        ..Job::new(
            engine.tokenizer().encode(prompt, EncodeOptions::PROMPT)?,
            30,
        )
    };
    let adapted = Job {
        adapter: Some(adapter),
        ..plain.clone()
    };
    let streams = [("plain", plain), ("adapted", adapted)]
        .map(|(name, job)| engine.submit(job).map(|stream| (name, stream)));
    for stream in streams {
        let (name, stream) = stream?;
        println!("{name}: {prompt}{}", stream.wait().text);
    }
    engine.unload_adapter(adapter)?;
    Ok(())
}
