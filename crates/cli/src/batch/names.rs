//! The names of a job's fields, and what a misspelt one may have meant.

use oxllama_engine::SamplingSettings;

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

/// Known names that differ by few letters from `name`, contain it or are contained in it.
fn near(name: &str) -> Vec<&'static str> {
    const LONGEST_BYTES: usize = 64;
    const MOST: usize = 4;
    if name.len() > LONGEST_BYTES {
        return Vec::new();
    }
    let name = name.to_ascii_lowercase();
    let known = FIELDS.into_iter().chain(SamplingSettings::names());
    let mut near: Vec<(usize, &str)> = known
        .filter_map(|known| {
            let distance = edit_distance(&name, known);
            let is_part = name.len() >= 3 && (known.contains(&name) || name.contains(known));
            let is_near = distance <= known.len() / 3 || is_part && known.len() >= 3;
            is_near.then_some((distance, known))
        })
        .collect();
    near.sort_unstable();
    near.truncate(MOST);
    near.into_iter().map(|(_, known)| known).collect()
}

/// How many letters must be inserted, removed or replaced (Levenshtein).
fn edit_distance(from: &str, to: &str) -> usize {
    let to = to.as_bytes();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (index, letter) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (place, other) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *other);
            diagonal = row[place + 1];
            row[place + 1] = replaced.min(row[place] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
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

    #[test]
    fn distances_count_letters() {
        let distances = [
            ("", "abc", 3),
            ("abc", "abc", 0),
            ("abd", "abc", 1),
            ("ac", "abc", 1),
        ];
        for (from, to, distance) in distances {
            assert_eq!(edit_distance(from, to), distance);
            assert_eq!(edit_distance(to, from), distance);
        }
    }
}
