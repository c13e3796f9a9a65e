//! Hostile and merely incomplete documents beside the tensors.

mod support;

use std::fs;
use std::path::Path;

use oxllama_format::{
    ConfigView, DType, FormatError, GptqConfig, ModelSource, parse_json_object, read_json_object,
    read_optional_file,
};
use serde_json::{Value, json};
use support::{assert_names, tensor, write_file};

/// Asserts the variant and that the message contains every part.
macro_rules! assert_error {
    ($result:expr, $variant:pat, $parts:expr) => {{
        let error = $result.map(|_| ()).expect_err("must be refused");
        assert!(matches!(error, $variant), "another variant: {error:?}");
        assert_names(&error, &$parts);
    }};
}

/// A directory with one tensor and the given documents.
fn model_directory(documents: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_file(
        directory.path(),
        "model.safetensors",
        &[tensor("a", DType::U8, &[1], &[1u8])],
    );
    for (name, content) in documents {
        fs::write(directory.path().join(name), content).expect("a document");
    }
    directory
}

#[test]
fn missing_files_are_named() {
    let directory = model_directory(&[]);
    assert_error!(
        ModelSource::open(directory.path()),
        FormatError::MissingFile { .. },
        ["config.json", "not found"]
    );
    assert_error!(
        ModelSource::open(&directory.path().join("nowhere")),
        FormatError::MissingFile { .. },
        ["nowhere", "a model directory or a .gguf file"]
    );
    assert_error!(
        ModelSource::open(&directory.path().join("model.safetensors")),
        FormatError::Malformed { .. },
        ["model.safetensors", "a directory with config.json"]
    );
    let directory = model_directory(&[("config.json", "{}")]);
    let model = ModelSource::open(directory.path()).expect("a model without tokenizer");
    assert_error!(
        model.tokenizer_json(),
        FormatError::MissingFile { .. },
        ["tokenizer.json", "not found"]
    );
    assert!(model.generation_config().is_none());
    assert!(model.tokenizer_config().is_none());
}

#[test]
fn documents_that_do_not_parse() {
    let path = Path::new("config.json");
    assert_error!(
        parse_json_object(path, b"{\"a\": \"\xc3\x28\"}"),
        FormatError::InvalidUtf8 { offset: 7, .. },
        ["config.json", "byte 7"]
    );
    assert_error!(
        parse_json_object(path, b"{\n  \"a\": 1,\n}"),
        FormatError::InvalidJson {
            line: 3,
            column: 1,
            ..
        },
        ["config.json", "line 3 column 1"]
    );
    assert_error!(
        parse_json_object(path, "{\"a\":".repeat(100_000).as_bytes()),
        FormatError::InvalidJson { .. },
        ["config.json", "recursion limit"]
    );
    assert_error!(
        parse_json_object(path, b"[1, 2]"),
        FormatError::Malformed { .. },
        ["config.json", "a list of 2 items", "a JSON object"]
    );
    let document = parse_json_object(path, b"\xef\xbb\xbf{\"a\": 1}").expect("a mark is skipped");
    assert_eq!(document, json!({ "a": 1 }));
}

#[test]
fn large_and_special_files() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("config.json");
    fs::File::create(&path)
        .and_then(|file| file.set_len(1 << 40))
        .expect("a sparse file");
    assert_error!(
        read_json_object(&path),
        FormatError::Malformed { .. },
        ["config.json", "1099511627776", "16777216"]
    );
    assert_error!(
        read_optional_file(directory.path(), 10),
        FormatError::Malformed { .. },
        ["regular file"]
    );
}

#[test]
fn getters_say_what_was_found_and_expected() {
    let value = json!({
        "count": 7, "whole": 8.0, "huge": 1u64 << 40, "negative": -1, "text": "x", "flag": true,
        "nothing": null, "list": [1, 2.5], "ids": [1, 2], "nested": { "factor": 8.0 },
        "long": "y".repeat(1000), "strings": ["a", "b"],
    });
    let config = ConfigView::new(&value, Path::new("config.json"));
    assert_eq!(config.usize("count").expect("a count"), 7);
    assert_eq!(config.usize("whole").expect("a count"), 8);
    assert_eq!(config.optional_usize("nothing").expect("absent"), None);
    assert_eq!(config.f64("nested.factor").expect("a number"), 8.0);
    assert_eq!(
        config.optional_f64_list("list").expect("a list"),
        Some(vec![1.0, 2.5])
    );
    assert_eq!(
        config.optional_str_list("strings").expect("a list"),
        Some(vec!["a", "b"])
    );
    assert_eq!(config.token_ids("ids").expect("ids"), [1, 2]);
    assert_eq!(config.token_ids("count").expect("one id"), [7]);
    assert!(config.token_ids("absent").expect("no ids").is_empty());
    assert!(config.bool_or("absent", true).expect("the default"));
    assert_eq!(config.str("text").expect("a string"), "x");

    let invalid = |result: Result<(), FormatError>, parts: &[&str]| {
        let error = result.expect_err("must be refused");
        assert!(
            matches!(error, FormatError::InvalidConfig { .. }),
            "{error:?}"
        );
        assert_names(&error, &[&["config.json"], parts].concat());
    };
    invalid(
        config.usize("absent").map(|_| ()),
        &["`absent`", "nothing", "whole number"],
    );
    invalid(
        config.usize("nothing").map(|_| ()),
        &["`nothing`", "found nothing"],
    );
    invalid(
        config.usize("negative").map(|_| ()),
        &["found -1", "2147483648"],
    );
    invalid(
        config.usize("huge").map(|_| ()),
        &["found 1099511627776", "2147483648"],
    );
    invalid(config.usize("text").map(|_| ()), &["\"x\"", "whole number"]);
    invalid(config.usize("list").map(|_| ()), &["a list of 2 items"]);
    invalid(config.usize("long").map(|_| ()), &["yyy…"]);
    invalid(
        config.f64("flag").map(|_| ()),
        &["`flag`", "true", "finite number"],
    );
    invalid(
        config.bool_or("count", false).map(|_| ()),
        &["found 7", "true or false"],
    );
    invalid(
        config.str("nested").map(|_| ()),
        &["an object with 1 keys", "a string"],
    );
    invalid(
        config.token_ids("negative").map(|_| ()),
        &["found -1", "token id"],
    );
    invalid(config.token_ids("huge").map(|_| ()), &["token id"]);
    invalid(
        config.optional_f64_list("strings").map(|_| ()),
        &["list of finite numbers"],
    );
    invalid(
        config.optional_str_list("list").map(|_| ()),
        &["list of strings"],
    );
}

#[test]
fn chat_templates_are_merged_in_the_order_of_transformers() {
    let config = ("config.json", "{}");
    let tokenizer = (
        "tokenizer_config.json",
        r#"{"chat_template":"inline","bos_token":"<s>"}"#,
    );
    let jinja = ("chat_template.jinja", "file");
    let old = ("chat_template.json", r#"{"chat_template":"old"}"#);
    let template = |documents: &[(&str, &str)]| {
        let directory = model_directory(documents);
        let model = ModelSource::open(directory.path()).expect("a model");
        model
            .tokenizer_config()
            .map(|document| document["chat_template"].clone())
    };
    assert_eq!(template(&[config, tokenizer]), Some(json!("inline")));
    assert_eq!(
        template(&[config, tokenizer, jinja, old]),
        Some(json!("file"))
    );
    assert_eq!(template(&[config, tokenizer, old]), Some(json!("inline")));
    assert_eq!(template(&[config, old]), Some(json!("old")));
    assert_eq!(template(&[config, jinja]), Some(json!("file")));
    assert_eq!(
        template(&[config, ("tokenizer_config.json", "{}")]),
        Some(Value::Null)
    );
}

#[test]
fn quantisation_methods() {
    let path = Path::new("config.json");
    let read = |quantization: Value| {
        GptqConfig::from_config(&json!({ "quantization_config": quantization }), path)
    };
    assert_eq!(
        GptqConfig::from_config(&json!({}), path).expect("v1"),
        GptqConfig::default()
    );
    let exl2 = read(json!({ "quant_method": "exl2", "bits": 4.5 })).expect("EXL2's average");
    assert_eq!(exl2, GptqConfig::default());
    let v2 = json!({ "quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2" });
    assert_eq!(
        read(v2).expect("v2"),
        GptqConfig {
            bits: 4,
            zeros_plain: true
        }
    );
    assert_eq!(
        read(json!({ "quant_method": "gptq", "bits": 3 }))
            .expect("kept")
            .bits,
        3
    );
    for method in [json!("awq"), json!(7)] {
        assert_error!(
            read(json!({ "quant_method": method })),
            FormatError::Unsupported { .. },
            [
                "config.json",
                "quant_method",
                method.to_string().as_str(),
                "exl2"
            ]
        );
    }
    assert_error!(
        read(json!({ "quant_method": "gptq", "bits": "four" })),
        FormatError::InvalidConfig { .. },
        ["config.json", "quantization_config.bits", "four"]
    );
}
