//! JSON schemas of varied shape, the same in every run.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::writer::Random;

const NAMES: [&str; 16] = [
    "name",
    "id",
    "age",
    "tags",
    "price",
    "e-mail",
    "größe",
    "a b",
    "x/y",
    "items",
    "kind",
    "$id_",
    "children",
    "日本",
    "\"quoted\"",
    "until",
];

const PATTERNS: [&str; 8] = [
    "^[A-Z]{2}-[0-9]{3,5}$",
    "^(red|green|blue)+$",
    "^[a-f0-9]{8}$",
    "^\\d{3}-\\d{4}$",
    "[aeiou]{2}",
    "^[^\"\\\\]{1,5}!$",
    "^a.{0,3}z$",
    "^(0|[1-9][0-9]{0,2})(\\.[0-9]+)?$",
];

/// An email address needs a limit besides: llguidance knows none, the validator does.
const FORMATS: [&str; 5] = ["date", "time", "date-time", "uuid", "ipv4"];

/// `count` different schemas.
pub(crate) fn schemas(count: usize) -> Vec<Value> {
    let mut random = Random(7);
    let mut seen = BTreeSet::new();
    let mut schemas = Vec::new();
    while schemas.len() < count {
        let schema = document(&mut random, schemas.len());
        if seen.insert(schema.to_string()) {
            schemas.push(schema);
        }
    }
    schemas
}

/// A schema whose outermost kind goes with its number, so that every kind is there.
fn document(random: &mut Random, number: usize) -> Value {
    let mut schema = match number % 8 {
        0..3 => object(random, 3),
        3 => array(random, 2),
        4 => any_of(random, 2),
        5 => references(random),
        6 => tree(random),
        _ => value(random, 3),
    };
    if random.once_in(4) {
        schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    }
    schema
}

/// Any schema, nested at most `depth` levels.
fn value(random: &mut Random, depth: usize) -> Value {
    let kinds = if depth == 0 { 6 } else { 9 };
    match random.below(kinds) {
        0 => integer(random),
        1 => number(random),
        2 | 3 => string(random),
        4 => enumeration(random),
        5 => json!({ "type": random.choose(&["boolean", "null"]) }),
        6 => object(random, depth - 1),
        7 => array(random, depth - 1),
        _ => any_of(random, depth - 1),
    }
}

fn integer(random: &mut Random) -> Value {
    let low = random.below(2_000) as i64 - 1_000;
    let high = low + random.below(5_000) as i64;
    match random.below(5) {
        0 => json!({ "type": "integer", "minimum": low, "maximum": high }),
        1 => json!({ "type": "integer", "exclusiveMinimum": low }),
        2 => json!({ "type": "integer", "maximum": high }),
        3 => json!({ "type": "integer", "multipleOf": 1 + random.below(9), "minimum": 0 }),
        _ => json!({ "type": "integer", "minimum": low, "exclusiveMaximum": high + 2 }),
    }
}

fn number(random: &mut Random) -> Value {
    let low = random.below(1_000) as f64 / 8.0 - 60.0;
    let high = low + 0.5 + random.below(9_000) as f64 / 16.0;
    match random.below(3) {
        0 => json!({ "type": "number", "minimum": low, "maximum": high }),
        1 => json!({ "type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high }),
        _ => json!({ "type": ["number", "null"], "minimum": low, "maximum": high }),
    }
}

fn string(random: &mut Random) -> Value {
    let least = random.below(6);
    match random.below(6) {
        0 => json!({ "type": "string" }),
        1 => json!({ "type": "string", "minLength": least }),
        2 => json!({ "type": "string", "minLength": least, "maxLength": least + random.below(9) }),
        3 => json!({ "type": "string", "pattern": random.choose(&PATTERNS) }),
        4 if random.once_in(6) => json!({ "type": "string", "format": "email", "maxLength": 60 }),
        4 => json!({ "type": "string", "format": random.choose(&FORMATS) }),
        _ => json!({ "type": "string", "maxLength": 1 + random.below(20) }),
    }
}

fn enumeration(random: &mut Random) -> Value {
    let values = [
        json!("red"),
        json!("rot\n\t"),
        json!("\"\\"),
        json!(17),
        json!(-2.5),
        json!(null),
        json!(true),
        json!([1, "x"]),
        json!({ "k": [] }),
        json!("日本語 🦀"),
    ];
    if random.once_in(4) {
        return json!({ "const": random.choose(&values) });
    }
    let first = random.below(values.len() - 1);
    let count = 1 + random.below(values.len() - first);
    json!({ "enum": &values[first..first + count] })
}

fn object(random: &mut Random, depth: usize) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for _ in 0..1 + random.below(5) {
        let name = random.choose(&NAMES);
        if properties.contains_key(name) {
            continue;
        }
        properties.insert(name.to_owned(), value(random, depth.saturating_sub(1)));
        if random.once_in(2) {
            required.push(name);
        }
    }
    let mut schema = json!({ "type": "object", "properties": properties });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    match random.below(4) {
        0 => {}
        1 => schema["additionalProperties"] = integer(random),
        _ => schema["additionalProperties"] = json!(false),
    }
    schema
}

fn array(random: &mut Random, depth: usize) -> Value {
    let depth = depth.saturating_sub(1);
    let least = random.below(3);
    match random.below(4) {
        0 => json!({ "type": "array", "items": value(random, depth) }),
        1 => json!({
            "type": "array", "items": value(random, depth),
            "minItems": least, "maxItems": least + random.below(4)
        }),
        2 => json!({
            "type": "array", "prefixItems": [value(random, depth), value(random, depth)],
            "items": false, "minItems": 2
        }),
        _ => json!({
            "type": "array", "prefixItems": [string(random)], "items": value(random, depth),
            "minItems": 1 + least
        }),
    }
}

fn any_of(random: &mut Random, depth: usize) -> Value {
    let depth = depth.saturating_sub(1);
    let choices: Vec<Value> = (0..2 + random.below(3))
        .map(|_| value(random, depth))
        .collect();
    match random.below(3) {
        // Kinds that exclude each other, as oneOf asks.
        0 => json!({ "oneOf": [integer(random), string(random), { "type": "null" }] }),
        1 => json!({ "allOf": [{ "type": "object" }, object(random, depth)] }),
        _ => json!({ "anyOf": choices }),
    }
}

fn references(random: &mut Random) -> Value {
    json!({
        "type": "object",
        "properties": {
            "first": { "$ref": "#/$defs/part" },
            "rest": { "type": "array", "items": { "$ref": "#/$defs/part" }, "maxItems": 3 },
            "note": { "$ref": "#/$defs/deep/properties/note" }
        },
        "required": ["first", random.choose(&["rest", "note"])],
        "additionalProperties": false,
        "$defs": {
            "part": object(random, 1),
            "deep": { "properties": { "note": string(random) } }
        }
    })
}

/// A schema that contains itself.
fn tree(random: &mut Random) -> Value {
    json!({
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "label": string(random),
                    "value": value(random, 1),
                    "children": {
                        "type": "array", "items": { "$ref": "#/$defs/node" },
                        "maxItems": 1 + random.below(3)
                    }
                },
                "required": random.choose(&[vec!["label"], vec!["label", "children"]]),
                "additionalProperties": false
            }
        }
    })
}
