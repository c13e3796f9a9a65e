//! The names of a job's fields, and what a misspelt one may have meant.

use oxllama_engine::{SamplingSettings, near_names};

/// Fields of a job besides the sampling settings.
const FIELDS: [&str; 26] = [
    "custom_id",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "seed",
    "stop",
    "stop_token_ids",
    "n",
    "logprobs",
    "top_logprobs",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "guided_choice",
    "banned_strings",
    "token_healing",
    "negative_prompt",
    "cfg_scale",
    "priority",
    // OpenAI's envelope, for which there is advice of its own.
    "method",
    "url",
    "body",
    "model",
];

/// What to say of a field that nobody knows.
pub(super) fn unknown(name: &str) -> String {
    match name {
        "method" | "url" | "body" => {
            return format!(
                "unknown field `{name}`: put the fields of OpenAI's `body` beside custom_id"
            );
        }
        "model" => {
            return "unknown field `model`: all jobs of a file run on the model of the command \
                    line"
                .to_owned();
        }
        _ => {}
    }
    let near = near(name);
    let name = super::input::shortened(name);
    if near.is_empty() {
        let fields = FIELDS[..FIELDS.len() - 4].join(", ");
        format!("unknown field {name}; there are {fields} and the sampling settings")
    } else {
        format!("unknown field {name}; is {} meant?", near.join(" or "))
    }
}

/// Known names that are like `name`.
fn near(name: &str) -> Vec<&'static str> {
    near_names(name, FIELDS.into_iter().chain(SamplingSettings::names()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_names_are_found_among_fields_and_sampling_settings() {
        assert_eq!(near("max_token")[0], "max_tokens");
        assert_eq!(near("promt")[0], "prompt");
        assert_eq!(near("Temprature")[0], "temperature");
        assert_eq!(near("stop_strings")[0], "stop");
        assert!(near("zzzzzzzz").is_empty());
        assert!(near(&"a".repeat(100)).is_empty());
        assert!(unknown("body").contains("beside custom_id"));
        assert!(unknown("zzzzzzzz").contains("guided_regex"));
    }
}
