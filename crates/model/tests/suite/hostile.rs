//! Configurations that make no sense and files that contradict them: typed errors that name
//! the key or tensor and both values, never a panic.

use std::path::Path;

use oxllama_backend::reference::ReferenceDevice;
use oxllama_format::ModelSource;
use oxllama_memory::{Bytes, DeviceId};
use oxllama_model::{ModelError, ModelSpec, known_architectures, plan_model};
use serde_json::{Map, Value, json};

use crate::families::{fixture, fixtures};
use crate::files::{Tensor, altered_copy};
use crate::harness::{exact_request, virtual_devices};

fn config_of(path: &Path) -> Map<String, Value> {
    let text = std::fs::read_to_string(path.join("config.json")).expect("config.json");
    serde_json::from_str(&text).expect("JSON")
}

/// The error of the llama3 fixture's configuration with one value changed.
fn config_error(key: &str, value: Value) -> String {
    let mut config = config_of(&fixture("llama3"));
    config.insert(key.to_owned(), value);
    match ModelSpec::from_config(&Value::Object(config)) {
        Ok(_) => panic!("{key} was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn errors_name_the_key_and_both_values() {
    let cases = [
        (
            config_error("hidden_size", json!(0)),
            "`hidden_size`: found 0, expected a whole number",
        ),
        (
            config_error("hidden_size", json!(-4)),
            "`hidden_size`: found -4",
        ),
        (
            config_error("hidden_size", json!(1.5)),
            "`hidden_size`: found 1.5",
        ),
        (
            config_error("hidden_size", json!("64")),
            "`hidden_size`: found \"64\"",
        ),
        (
            config_error("hidden_size", Value::Null),
            "`hidden_size`: found null",
        ),
        (
            config_error("num_hidden_layers", json!(1_u64 << 40)),
            "1 to 4096",
        ),
        (
            config_error("num_attention_heads", json!(u64::MAX)),
            "`num_attention_heads`",
        ),
        (
            config_error("num_key_value_heads", json!(3)),
            "a divisor of the",
        ),
        (config_error("head_dim", json!(1 << 24)), "`head_dim`"),
        (
            config_error("rms_norm_eps", json!(-1.0)),
            "`rms_norm_eps`: found -1.0",
        ),
        (
            config_error("rms_norm_eps", json!("nan")),
            "`rms_norm_eps`: found \"nan\"",
        ),
        (config_error("rope_theta", json!(0.0)), "`rope_theta`"),
        (
            config_error("hidden_act", json!("relu")),
            "`hidden_act`: found \"relu\"",
        ),
        (
            config_error("tie_word_embeddings", json!("yes")),
            "true or false",
        ),
        (
            config_error("rope_scaling", json!([1])),
            "`rope_scaling`: found a list of 1 items",
        ),
        (
            config_error("rope_scaling", json!({"rope_type": "mystery"})),
            "`rope_scaling.rope_type`: found \"mystery\"",
        ),
        (
            config_error("rope_scaling", json!({"rope_type": "linear"})),
            "`rope_scaling.factor`: found nothing",
        ),
        (
            config_error(
                "rope_scaling",
                json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": []}),
            ),
            "`rope_scaling.short_factor`: found a list of 1 items",
        ),
        (config_error("architectures", json!([])), "`architectures`"),
        (config_error("architectures", json!([7])), "`architectures`"),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
}

#[test]
fn unknown_architectures_are_refused_by_name() {
    let config = json!({"architectures": ["MambaForCausalLM"]});
    let error = ModelSpec::from_config(&config).expect_err("an unknown architecture");
    let message = error.to_string();
    assert!(message.contains("\"MambaForCausalLM\""), "{message}");
    for known in known_architectures() {
        assert!(message.contains(known), "{message}");
    }
    assert!(ModelSpec::from_config(&json!([1, 2])).is_err());
    assert!(ModelSpec::from_config(&Value::Null).is_err());
}

/// Values that no key expects, or hardly any.
fn hostile_values() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(7),
        json!(0.5),
        json!(1e-320),
        json!(1e300),
        json!(u64::MAX),
        json!(1_u64 << 31),
        json!(""),
        json!("x".repeat(10_000)),
        json!([]),
        json!([[], null]),
        json!({}),
        json!({"rope_type": "yarn", "factor": 1e-30}),
        json!({"rope_type": "llama3", "factor": 1e30}),
        json!({"rope_type": "dynamic", "factor": 1e-30}),
        json!({"rope_type": "longrope", "short_factor": [1e-30]}),
    ]
}

/// Every key of every fixture replaced by every hostile value, or removed: the configuration
/// is refused, or contradicts the tensors, or makes a plan; nothing panics.
#[test]
fn no_value_of_any_key_panics() {
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    let (inventory, _) = virtual_devices(2, Bytes::from_gib(4));
    let mut refused = 0;
    for path in fixtures() {
        let source = ModelSource::open(&path).expect("a model");
        let config = config_of(&path);
        for key in config.keys() {
            for value in hostile_values().into_iter().map(Some).chain([None]) {
                let mut config = config.clone();
                match value {
                    Some(value) => config.insert(key.clone(), value),
                    None => config.remove(key),
                };
                let Ok(spec) = ModelSpec::from_config(&Value::Object(config)) else {
                    refused += 1;
                    continue;
                };
                for rope in spec.ropes_for(64) {
                    assert!(!rope.inverse_frequencies.iter().any(|value| value.is_nan()));
                }
                let request = exact_request(64);
                let plan = plan_model(&source, &spec, &device, &inventory, &request);
                refused += usize::from(plan.is_err());
            }
        }
    }
    assert!(refused > 1000, "{refused} refusals");
}

/// The error of planning the llama3 fixture with its configuration and tensors changed.
fn plan_error(
    change_config: impl FnOnce(&mut Map<String, Value>),
    change_tensors: impl FnOnce(&mut Vec<Tensor>),
) -> ModelError {
    let directory = altered_copy(&fixture("llama3"), change_config, change_tensors);
    let source = ModelSource::open(directory.path()).expect("a readable directory");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    let (inventory, _) = virtual_devices(1, Bytes::from_gib(4));
    match plan_model(&source, &spec, &device, &inventory, &exact_request(64)) {
        Ok(_) => panic!("planned"),
        Err(error) => error,
    }
}

#[test]
fn tensors_that_contradict_the_configuration_are_named() {
    let with = |key: &'static str, value: Value| {
        plan_error(
            move |config| {
                config.insert(key.to_owned(), value);
            },
            |_| {},
        )
    };
    let cases = [
        (with("intermediate_size", json!(96)), "mlp.gate_proj"),
        (with("vocab_size", json!(5)), "model.embed_tokens"),
        (with("head_dim", json!(128)), "self_attn.q_proj"),
    ];
    for (error, tensor) in cases {
        let message = error.to_string();
        assert!(
            matches!(error, ModelError::Contradiction { .. }),
            "{message}"
        );
        assert!(message.contains(tensor), "{message}");
    }
    let bias = with("attention_bias", json!(true));
    let message = bias.to_string();
    assert!(
        matches!(bias, ModelError::MissingWeight { .. }),
        "{message}"
    );
    assert!(message.contains("q_proj.bias"), "{message}");
    let layers = with("num_hidden_layers", json!(3)).to_string();
    assert!(
        layers.contains("model.layers.2.self_attn.q_proj"),
        "{layers}"
    );
}

#[test]
fn missing_and_unexpected_tensors_are_named() {
    for name in [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ] {
        let error = plan_error(
            |_| {},
            |tensors| tensors.retain(|tensor| tensor.name != name),
        );
        let message = error.to_string();
        assert!(
            matches!(error, ModelError::MissingWeight { .. }),
            "{message}"
        );
        assert!(
            message.contains(name.trim_end_matches(".weight")),
            "{message}"
        );
    }
    let error = plan_error(
        |_| {},
        |tensors| {
            let output = "model.layers.0.self_attn.o_proj.weight";
            let weight = tensors.iter().find(|tensor| tensor.name == output);
            let outputs = weight.expect(output).shape[0];
            tensors.push(Tensor {
                name: "model.layers.0.self_attn.o_proj.bias".to_owned(),
                dtype: "F16",
                shape: vec![outputs],
                bytes: Some(vec![0; 2 * outputs]),
            });
        },
    );
    let message = error.to_string();
    assert!(
        matches!(error, ModelError::UnexpectedWeight { .. }),
        "{message}"
    );
    assert!(message.contains("o_proj.bias"), "{message}");
}
