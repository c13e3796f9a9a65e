//! What can be asked of an answer.

use llguidance::api::TopLevelGrammar;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::ConstraintError;

/// The most bytes of a specification; of a schema, written without spaces. llguidance's time grows
/// with the square of some of its parts: 5,000 members of one object take ten seconds.
const BYTES_LIMIT: usize = 1 << 17;

/// The deepest nesting of a specification.
const DEPTH_LIMIT: usize = 100;

/// Space between the parts of a JSON document: one space, or a line break and its indentation.
/// More would let a model that is unsure write spaces for ever.
const JSON_SPACE: &str = r" |\r?\n[ \t]{0,40}";

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConstraintSpec {
    /// A JSON document that this schema accepts. A schema that says more than llguidance can hold
    /// a document to is refused. Its member `x-guidance` sets llguidance's own options.
    JsonSchema(Value),
    /// Any JSON object.
    Json,
    /// A text that this regular expression matches as a whole (syntax of the regex crate, without
    /// anchors and look-around).
    Regex(String),
    /// A text of this context-free grammar, in llguidance's variant of Lark.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl ConstraintSpec {
    /// The kind, as it is named in messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) | Self::Json => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark(_) => "Lark grammar",
            Self::Choice(_) => "list of choices",
        }
    }

    /// Refuses what is too long or too deep to be compiled.
    pub(super) fn check(&self) -> Result<(), ConstraintError> {
        let (bytes, depth) = match self {
            Self::JsonSchema(schema) => size_of_json(schema),
            Self::Json => (0, 0),
            Self::Regex(text) => (text.len(), depth_of_brackets(text)),
            Self::Lark(text) => (text.len(), depth_of_brackets(text)),
            Self::Choice(choices) if choices.is_empty() => return Err(ConstraintError::NoChoices),
            Self::Choice(choices) => (choices.iter().map(|choice| choice.len() + 1).sum(), 0),
        };
        let kind = self.kind();
        if bytes > BYTES_LIMIT {
            return Err(ConstraintError::TooLong {
                kind,
                bytes,
                limit: BYTES_LIMIT,
            });
        }
        if depth > DEPTH_LIMIT {
            return Err(ConstraintError::TooDeep {
                kind,
                limit: DEPTH_LIMIT,
            });
        }
        Ok(())
    }

    pub(super) fn grammar(&self) -> TopLevelGrammar {
        match self {
            Self::JsonSchema(schema) => json_grammar(schema.clone()),
            Self::Json => json_grammar(json!({ "type": "object" })),
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
            Self::Choice(choices) => {
                // Lark writes strings as JSON does, but for one control character. A terminal, as
                // opposed to a rule, is one automaton, whatever the number of choices.
                let choices: Vec<String> = choices
                    .iter()
                    .map(|choice| Value::from(choice.as_str()).to_string())
                    .map(|choice| choice.replace('\u{7f}', "\\u007f"))
                    .collect();
                let choices = choices.join(" | ");
                TopLevelGrammar::from_lark(format!("start: CHOICE\nCHOICE: {choices}\n"))
            }
        }
    }
}

fn json_grammar(mut schema: Value) -> TopLevelGrammar {
    if let Value::Object(members) = &mut schema {
        members
            .entry("x-guidance")
            .or_insert_with(|| json!({ "whitespace_pattern": JSON_SPACE }));
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// Length of a JSON document without spaces, at least, and its depth. Does not recurse: the
/// document may be of any depth.
fn size_of_json(document: &Value) -> (usize, usize) {
    let mut bytes = 0;
    let mut deepest = 0;
    let mut open = vec![(document, 1)];
    while let Some((value, depth)) = open.pop() {
        deepest = deepest.max(depth);
        bytes += 2;
        match value {
            Value::String(text) => bytes += text.len(),
            Value::Array(items) => open.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(members) => {
                bytes += members.keys().map(|key| key.len() + 3).sum::<usize>();
                open.extend(members.values().map(|member| (member, depth + 1)));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => bytes += 2,
        }
    }
    (bytes, deepest)
}

/// How deep brackets are nested, if those in strings and classes count as well.
fn depth_of_brackets(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut deepest = 0;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}
