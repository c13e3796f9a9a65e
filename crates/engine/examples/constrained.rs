//! Answers that cannot have another form: by JSON schema, regular expression, and list.
//!
//! `cargo run --release --example constrained -- MODEL_DIRECTORY`
#![allow(clippy::print_stdout, reason = "an example shows what it got")]

mod common;

use oxllama_engine::{ConstraintSpec, Job, SamplingSettings};
use oxllama_text::EncodeOptions;
use serde_json::{Value, json};

fn main() -> common::Result<()> {
    let engine = common::engine(&common::path_argument(1, "a model directory")?, None)?;
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "population": {"type": "integer", "minimum": 0, "maximum": 100_000_000},
            "capital": {"type": "boolean"},
        },
        "required": ["name", "population", "capital"],
        "additionalProperties": false,
    });
    let questions = [
        ("A city as JSON: ", ConstraintSpec::JsonSchema(schema)),
        (
            "The first moon landing was on (year-month-day) ",
            ConstraintSpec::Regex(r"19[0-9]{2}-[01][0-9]-[0-3][0-9]".to_owned()),
        ),
        (
            "Review: \"I would watch this film every day.\" Mood: ",
            ConstraintSpec::Choice(vec!["positive".to_owned(), "negative".to_owned()]),
        ),
    ];
    for (prompt, constraint) in questions {
        let is_json = matches!(constraint, ConstraintSpec::JsonSchema(_));
        let prompt_ids = engine.tokenizer().encode(prompt, EncodeOptions::PROMPT)?;
        let answer = engine.submit(Job {
            sampling: SamplingSettings::greedy(),
            constraint: Some(constraint),
            ..Job::new(prompt_ids, 80)
        })?;
        let answer = answer.wait();
        println!("{prompt}{} [{:?}]", answer.text, answer.finish_reason);
        if is_json {
            let city: Value = serde_json::from_str(&answer.text)?;
            println!(
                "  parsed: {} has {} people",
                city["name"], city["population"]
            );
        }
    }
    Ok(())
}
