//! Specifications that must be refused, or at least do no harm.

use oxllama_engine::{ConstraintError, ConstraintSpec};
use serde_json::{Value, json};

use crate::Model;

fn refusal(model: &Model, spec: &ConstraintSpec) -> ConstraintError {
    match model.compiler.compile(spec) {
        Ok(_) => panic!("accepted: {spec:?}"),
        Err(error) => error,
    }
}

#[test]
fn what_llguidance_refuses_is_a_typed_error_with_its_words() {
    let model = Model::byte_level();
    let schema = |schema: Value| ConstraintSpec::JsonSchema(schema);
    let regex = |text: &str| ConstraintSpec::Regex(text.to_owned());
    let lark = |text: &str| ConstraintSpec::Lark(text.to_owned());
    let cases = [
        (schema(json!({ "type": "object", "not": {} })), "not"),
        (schema(json!({ "type": "fish" })), "fish"),
        (schema(json!({ "$ref": "#/$defs/missing" })), "missing"),
        (
            schema(json!({ "$ref": "http://localhost/x.json" })),
            "localhost",
        ),
        (
            schema(json!({ "type": "array", "uniqueItems": true })),
            "uniqueItems",
        ),
        (
            schema(json!({ "minimum": 3, "maximum": 1, "type": "integer" })),
            "minimum",
        ),
        (schema(json!({ "type": "string", "pattern": "(" })), "regex"),
        (schema(json!(false)), "Unsatisfiable"),
        (schema(json!(7)), ""),
        (regex("["), "regex"),
        (regex("a(?=b)"), "look"),
        (regex("\\b"), ""),
        (lark(""), ""),
        (lark("start: missing"), "missing"),
        (lark("start: \"a"), ""),
        (lark("begin: \"a\""), "start"),
        (lark("start: <|no such token|>"), "no such token"),
    ];
    for (spec, word) in cases {
        let error = refusal(&model, &spec);
        let ConstraintError::Rejected { message, .. } = &error else {
            panic!("{error:?}");
        };
        assert!(message.contains(word), "{message}");
        assert!(
            !message.contains("<state>") && !message.contains("backtrace"),
            "{message}"
        );
    }
}

#[test]
fn long_and_deep_specifications_are_refused() {
    let model = Model::byte_level();
    let mut deep = json!({ "type": "string" });
    for _ in 0..2_000 {
        deep = json!({ "type": "array", "items": deep });
    }
    let nested = |count: usize| format!("{}a{}", "(".repeat(count), ")".repeat(count));
    for spec in [
        ConstraintSpec::JsonSchema(deep),
        ConstraintSpec::Regex(nested(2_000)),
        ConstraintSpec::Lark(format!("start: {}", nested(2_000))),
    ] {
        let error = refusal(&model, &spec);
        assert!(
            matches!(error, ConstraintError::TooDeep { limit: 100, .. }),
            "{error:?}"
        );
    }
    for spec in [
        ConstraintSpec::JsonSchema(json!({ "enum": ["a".repeat(2 << 20)] })),
        ConstraintSpec::Regex("a".repeat(2 << 20)),
        ConstraintSpec::Choice(vec![String::new(); 2 << 20]),
    ] {
        let error = refusal(&model, &spec);
        assert!(
            matches!(error, ConstraintError::TooLong { .. }),
            "{error:?}"
        );
    }
    let error = refusal(&model, &ConstraintSpec::Choice(Vec::new()));
    assert_eq!(error, ConstraintError::NoChoices);
}

#[test]
fn grammars_that_cannot_be_rolled_back_are_refused() {
    let model = Model::byte_level();
    for grammar in [
        "start: text \"x\"\ntext[stop=\"!\"]: /.*/",
        "start: text \"x\"\ntext[max_tokens=3]: /.*/",
    ] {
        let error = refusal(&model, &ConstraintSpec::Lark(grammar.to_owned()));
        assert_eq!(error, ConstraintError::NotReversible);
    }
}

#[test]
fn specifications_survive_json() {
    for spec in [
        ConstraintSpec::Json,
        ConstraintSpec::JsonSchema(json!({ "type": "integer" })),
        ConstraintSpec::Choice(vec!["a".to_owned()]),
    ] {
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<ConstraintSpec>(&text).unwrap(), spec);
    }
}
