//! Specifications that must be refused, or at least do no harm.

use oxllama_engine::{ConstraintError, ConstraintSpec, TokenMask};
use serde_json::{Value, json};

use crate::Model;
use crate::writer::allowed;

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

/// Each of these is either refused, or gives masks, perhaps until it fails with an error.
#[test]
fn specifications_made_to_exhaust_do_no_harm() {
    let model = Model::byte_level();
    // As long as fits.
    let chain = 4_000;
    let references: serde_json::Map<String, Value> = (0..chain)
        .map(|number| {
            let next = json!({ "$ref": format!("#/$defs/p{}", number + 1) });
            (format!("p{number}"), next)
        })
        .chain([(format!("p{chain}"), json!({ "type": "integer" }))])
        .collect();
    let many_properties: serde_json::Map<String, Value> = (0..1_000)
        .map(|number| (format!("property {number}"), json!({ "type": "string" })))
        .collect();
    let rule_chain = 7_500;
    let rules = |separator: &str| {
        let names: Vec<String> = (0..rule_chain)
            .map(|number| format!("r{number}:\"x\"r{}", number + 1))
            .collect();
        format!("start: r0\n{}\nr{rule_chain}: \"y\"", names.join(separator))
    };
    let nested = |open: &str, close: &str| format!("{}a{}", open.repeat(90), close.repeat(90));
    let specs = [
        ConstraintSpec::JsonSchema(json!({ "$ref": "#/$defs/p0", "$defs": references })),
        ConstraintSpec::JsonSchema(json!({ "$ref": "#" })),
        ConstraintSpec::JsonSchema(json!({ "anyOf": [{ "$ref": "#" }, { "type": "null" }] })),
        ConstraintSpec::JsonSchema(json!({ "type": "object", "properties": many_properties })),
        ConstraintSpec::JsonSchema(json!({ "type": "string", "maxLength": u64::MAX })),
        ConstraintSpec::JsonSchema(json!({ "type": "array", "minItems": 4_000_000_000_u64 })),
        ConstraintSpec::JsonSchema(json!({ "type": "string", "pattern": "(a{999}){999}" })),
        ConstraintSpec::Regex("((a{1000}){1000}){1000}".to_owned()),
        ConstraintSpec::Regex("(.*a.{40}|.*b.{50})*c".to_owned()),
        ConstraintSpec::Regex(nested("(", "|b)*")),
        ConstraintSpec::Regex("a|".repeat(60_000) + "b"),
        ConstraintSpec::Regex("ab?".repeat(20_000)),
        ConstraintSpec::Lark(rules("\n")),
        ConstraintSpec::Lark(
            rules("\n")
                .replace('r', "R")
                .replace("staRt: R0", "start: R0"),
        ),
        ConstraintSpec::Lark(format!("start: {}", nested("(\"b\" | ", ")"))),
        ConstraintSpec::Lark("start: start start | \"a\" | \"\"".to_owned()),
        ConstraintSpec::Lark("start: start".to_owned()),
    ];
    for (number, spec) in specs.iter().enumerate() {
        let mut constraint = match model.compiler.compile(spec) {
            Ok(constraint) => constraint,
            Err(ConstraintError::Rejected { .. }) => continue,
            Err(error) => panic!("specification {number}: {error}"),
        };
        let mut mask = TokenMask::none(model.vocab_size);
        for _ in 0..20 {
            let Ok(()) = constraint.mask(&mut mask) else {
                break;
            };
            let Some(id) = allowed(&mask).into_iter().next_back() else {
                break;
            };
            match constraint.accept(id) {
                Ok(()) => {}
                Err(ConstraintError::Failed { .. }) => break,
                Err(error) => panic!("specification {number}: {error}"),
            }
        }
    }
}
