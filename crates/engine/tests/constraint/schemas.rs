//! Documents written under a schema, judged by a validator that knows nothing of llguidance.

use oxllama_engine::ConstraintSpec;
use serde_json::{Value, json};

use crate::Model;
use crate::schema_generator::schemas;
use crate::writer::write;

/// Schemas as applications write them.
fn realistic() -> Vec<Value> {
    vec![
        json!({
            "type": "object",
            "properties": {
                "name": { "type": "string", "minLength": 1, "maxLength": 40 },
                "age": { "type": "integer", "minimum": 0, "maximum": 130 },
                "email": { "type": "string", "format": "email", "maxLength": 60 },
                "address": {
                    "type": "object",
                    "properties": {
                        "street": { "type": "string" },
                        "postcode": { "type": "string", "pattern": "^[0-9]{5}$" },
                        "country": { "enum": ["DE", "AT", "CH"] }
                    },
                    "required": ["street", "postcode", "country"],
                    "additionalProperties": false
                }
            },
            "required": ["name", "age", "address"],
            "additionalProperties": false
        }),
        // The arguments of a tool call.
        json!({
            "type": "object",
            "properties": {
                "name": { "const": "get_weather" },
                "arguments": {
                    "type": "object",
                    "properties": {
                        "city": { "type": "string" },
                        "unit": { "type": "string", "enum": ["celsius", "fahrenheit"] },
                        "days": { "type": ["integer", "null"], "minimum": 1, "maximum": 14 }
                    },
                    "required": ["city", "unit", "days"],
                    "additionalProperties": false
                }
            },
            "required": ["name", "arguments"],
            "additionalProperties": false
        }),
        // As pydantic writes a tagged union.
        json!({
            "$defs": {
                "Circle": {
                    "properties": {
                        "kind": { "const": "circle", "title": "Kind", "type": "string" },
                        "radius": { "exclusiveMinimum": 0, "maximum": 1000, "title": "Radius",
                            "type": "number" }
                    },
                    "required": ["kind", "radius"], "title": "Circle", "type": "object"
                },
                "Label": {
                    "properties": {
                        "kind": { "const": "label", "title": "Kind", "type": "string" },
                        "text": { "title": "Text", "type": "string" },
                        "tags": { "default": [], "items": { "type": "string" }, "maxItems": 4,
                            "title": "Tags", "type": "array" }
                    },
                    "required": ["kind", "text"], "title": "Label", "type": "object"
                }
            },
            "properties": {
                "shapes": {
                    "items": { "anyOf": [{ "$ref": "#/$defs/Circle" }, { "$ref": "#/$defs/Label" }] },
                    "maxItems": 5, "title": "Shapes", "type": "array"
                },
                "created": { "format": "date-time", "title": "Created", "type": "string" }
            },
            "required": ["shapes", "created"], "title": "Drawing", "type": "object"
        }),
        json!({ "type": "array", "items": { "type": "array", "items": { "type": "number",
            "minimum": -1, "maximum": 1 }, "minItems": 3, "maxItems": 3 }, "minItems": 2,
            "maxItems": 2 }),
        // Names by $id and $anchor instead of a path.
        json!({
            "$id": "https://example.com/order",
            "type": "object",
            "properties": { "line": { "$ref": "#line" }, "total": { "$ref": "money" } },
            "required": ["line", "total"], "additionalProperties": false,
            "$defs": {
                "line": { "$anchor": "line", "type": "string", "maxLength": 8 },
                "money": { "$id": "money", "type": "integer", "minimum": 0 }
            }
        }),
        json!(true),
    ]
}

fn check(model: &Model, schemas: &[Value], seed: u64) {
    for (number, schema) in (seed..).zip(schemas) {
        let document = write(model, &ConstraintSpec::JsonSchema(schema.clone()), number);
        // Second 60 is in the grammar of RFC 3339, which llguidance follows; the validator wants
        // it to be a leap second.
        let value: Value = serde_json::from_str(&document.replace(":60", ":59"))
            .unwrap_or_else(|error| panic!("{error}: {document}\n{schema}"));
        let mut schemas = boon::Schemas::new();
        let mut compiler = boon::Compiler::new();
        compiler.enable_format_assertions();
        compiler
            .add_resource("schema.json", schema.clone())
            .unwrap();
        let index = compiler.compile("schema.json", &mut schemas).unwrap();
        if let Err(error) = schemas.validate(&value, index) {
            panic!("{error:#}: {document}\n{schema}");
        }
    }
}

#[test]
fn documents_of_200_schemas_are_valid() {
    let schemas = schemas(200);
    check(&Model::byte_level(), &schemas, 0);
}

#[test]
fn documents_of_realistic_schemas_are_valid() {
    for seed in [0, 100, 200] {
        check(&Model::byte_level(), &realistic(), seed);
        check(&Model::tiny("sentencepiece", &[2]), &realistic(), seed);
    }
}

#[test]
fn documents_of_a_real_vocabulary_are_valid() {
    if let Some(model) = Model::smollm2() {
        check(&model, &schemas(200), 0);
        check(&model, &realistic(), 300);
    }
}

#[test]
fn any_object_is_a_json_object() {
    let model = Model::byte_level();
    for seed in 0..20 {
        let document = write(&model, &ConstraintSpec::Json, seed);
        let value: Value = serde_json::from_str(&document).unwrap();
        assert!(value.is_object(), "{document}");
    }
}
