//! PEFT directories: what is read from sound ones, and how others are refused.

mod support;

use std::fs;

use oxllama_format::{AdapterSource, DType, FormatError};
use serde_json::{Value, json};
use support::{Tensor, assert_error, tensor, write_file};

const Q_PROJ: &str = "base_model.model.model.layers.0.self_attn.q_proj";
const UP_PROJ: &str = "base_model.model.model.layers.1.mlp.up_proj";

/// A and B of ones.
fn pair(module: &str, rank: usize, inputs: usize, outputs: usize) -> Vec<Tensor> {
    let ones = |part: &str, rows: usize, columns: usize| {
        let name = format!("{module}.{part}.weight");
        tensor(
            &name,
            DType::F32,
            &[rows, columns],
            &vec![1.0f32; rows * columns],
        )
    };
    vec![ones("lora_A", rank, inputs), ones("lora_B", outputs, rank)]
}

fn small() -> Vec<Tensor> {
    pair(Q_PROJ, 2, 8, 6)
}

fn config() -> Value {
    json!({"peft_type": "LORA", "r": 2, "lora_alpha": 8})
}

fn open(config: &Value, tensors: &[Tensor]) -> Result<AdapterSource, FormatError> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path();
    fs::write(path.join("adapter_config.json"), config.to_string()).expect("a file");
    write_file(path, "adapter_model.safetensors", tensors);
    AdapterSource::open(path)
}

/// Opens a small adapter with one more key in its configuration.
fn open_with(key: &str, value: Value) -> Result<AdapterSource, FormatError> {
    let mut config = config();
    config[key] = value;
    open(&config, &small())
}

#[test]
fn modules_have_ranks_and_scales() {
    let config = json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "use_dora": false,
        "modules_to_save": null, "target_parameters": [], "fan_in_fan_out": false,
        "init_lora_weights": "gaussian",
        "rank_pattern": {"up_proj": 4, "self_attn.up_proj": 9},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 6, "q": 7, "^self_attn.q_proj": 7},
    });
    let mut tensors = small();
    tensors.extend(pair(UP_PROJ, 4, 8, 10));
    let bias = format!("{UP_PROJ}.lora_B.bias");
    tensors.push(tensor(&bias, DType::F32, &[10], &[0.5f32; 10]));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path();
    fs::write(path.join("adapter_config.json"), config.to_string()).expect("a file");
    write_file(path, "adapter_model.safetensors", &tensors);
    // Another file's tensors are none of the adapter's.
    write_file(path, "model.safetensors", &small());
    let adapter = AdapterSource::open(path).expect("an adapter");
    let [query, up] = adapter.modules() else {
        panic!("two modules");
    };
    assert_eq!(query.name, "model.layers.0.self_attn.q_proj");
    assert_eq!((query.rank(), query.scale), (2, 4.0));
    assert_eq!((query.a.in_features, query.b.out_features), (8, 6));
    assert_eq!((up.rank(), up.scale), (4, 1.5));
    assert!(up.b.bias && !up.a.bias && !query.b.bias);
    let read = adapter.read_b(up).expect("B");
    assert_eq!((read.header(), read.bias()), (up.b, Some(vec![0.5; 10])));
    assert_eq!(adapter.read_a(query).expect("A").header(), query.a);

    let mut stable = config;
    stable["use_rslora"] = true.into();
    let stable = open(&stable, &tensors).expect("an adapter");
    let scales: Vec<f64> = stable.modules().iter().map(|module| module.scale).collect();
    assert_eq!(scales, [8.0 / 2f64.sqrt(), 3.0]);
}

#[test]
fn missing_files() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path();
    assert_error!(
        AdapterSource::open(path),
        FormatError::MissingFile { .. },
        ["adapter_config.json", "PEFT"]
    );
    assert_error!(
        AdapterSource::open(&path.join("nowhere")),
        FormatError::MissingFile { .. },
        ["nowhere"]
    );
    fs::write(path.join("adapter_config.json"), config().to_string()).expect("a file");
    fs::write(path.join("adapter_model.bin"), "").expect("a file");
    write_file(path, "other.safetensors", &small());
    assert_error!(
        AdapterSource::open(path),
        FormatError::MissingFile { .. },
        ["adapter_model.safetensors", "safe_serialization=True"]
    );
    fs::write(path.join("adapter_model.safetensors"), [0; 7]).expect("a file");
    assert_error!(
        AdapterSource::open(path),
        FormatError::Truncated { .. },
        ["adapter_model.safetensors", "7 bytes"]
    );
}

#[test]
fn other_kinds_of_adapters() {
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("lora_only")),
        ("modules_to_save", json!(["lm_head"])),
        ("trainable_token_indices", json!([1, 2])),
        ("target_parameters", json!(["mlp.experts.down_proj"])),
        ("layer_replication", json!([[0, 4], [2, 6]])),
        ("alora_invocation_tokens", json!([5])),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("loftq")),
        ("rank_pattern", json!({"layers\\.[0-9]+\\.mlp": 4})),
        ("alpha_pattern", json!({"^": 4})),
    ] {
        let shown = format!("`{key}`");
        assert_error!(
            open_with(key, value),
            FormatError::Unsupported { .. },
            ["adapter_config.json", shown.as_str(), "is not supported"]
        );
    }
}

#[test]
fn senseless_configurations() {
    for (key, value, expected) in [
        ("peft_type", Value::Null, "found nothing"),
        ("r", json!(0), "at least 1"),
        ("r", json!(-1), "a whole number"),
        ("r", json!(1_u64 << 40), "a whole number"),
        ("r", json!("8"), "a whole number"),
        ("lora_alpha", json!("8"), "a finite number"),
        ("lora_alpha", Value::Null, "a number"),
        ("use_rslora", json!("yes"), "true or false"),
        ("rank_pattern", json!([1]), "an object"),
        ("rank_pattern", json!({"q_proj": 0}), "a rank from 1"),
        ("rank_pattern", json!({"q_proj": 2.5}), "a rank from 1"),
        ("rank_pattern", json!({"q_proj": u64::MAX}), "a rank from 1"),
        ("alpha_pattern", json!({"q_proj": "8"}), "a finite alpha"),
    ] {
        assert_error!(
            open_with(key, value),
            FormatError::InvalidConfig { .. },
            ["adapter_config.json", key, expected]
        );
    }
}

/// Whatever a key holds, opening gives an adapter or an error.
#[test]
fn any_value_of_any_key_is_answered() {
    let junk = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1e300),
        json!(1e-320),
        json!(u64::MAX),
        json!(""),
        json!("^"),
        json!("LORA"),
        json!([]),
        json!([null]),
        json!({}),
        json!({"": 1}),
        json!({"q_proj": null}),
        json!({"q_proj": -1e308}),
        json!({"q_proj": [2]}),
    ];
    let keys = [
        "peft_type",
        "r",
        "lora_alpha",
        "bias",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "init_lora_weights",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    ];
    for key in keys {
        for value in &junk {
            let opened = open_with(key, value.clone());
            if let Ok(adapter) = opened {
                let module = &adapter.modules()[0];
                assert!(module.scale.is_finite(), "{key}: {value}");
                assert_eq!(module.rank(), 2, "{key}: {value}");
            }
        }
    }
}

#[test]
fn tensors_that_are_no_adapter() {
    let refused = |tensors: &[Tensor]| open(&config(), tensors);
    let one = |name: &str| tensor(name, DType::F32, &[1, 1], &[1.0f32]);
    for name in [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.lm_head.weight",
    ] {
        let mut tensors = small();
        tensors.push(one(name));
        assert_error!(
            refused(&tensors),
            FormatError::Unsupported { .. },
            ["adapter_model.safetensors", name, ".lora_A.weight"]
        );
    }
    assert_error!(
        refused(&[]),
        FormatError::Malformed { .. },
        ["no tensors", "lora_A"]
    );
    let [a, b] = [0, 1].map(|index| small().remove(index));
    assert_error!(
        refused(&[a]),
        FormatError::MissingTensor { .. },
        ["q_proj.lora_B.weight"]
    );
    assert_error!(
        refused(&[b]),
        FormatError::MissingTensor { .. },
        ["q_proj.lora_A.weight"]
    );
}

#[test]
fn shapes_and_types_that_contradict() {
    let refused = |tensors: &[Tensor]| open(&config(), tensors);
    assert_error!(
        refused(&pair(Q_PROJ, 3, 8, 6)),
        FormatError::WrongShape { .. },
        ["q_proj.lora_A.weight", "[3, 8]", "[2, 8]"]
    );
    let mut tensors = small();
    tensors[1] = pair(Q_PROJ, 3, 8, 6).remove(1);
    assert_error!(
        refused(&tensors),
        FormatError::WrongShape { .. },
        ["q_proj.lora_B.weight", "[6, 3]", "[6, 2]"]
    );
    let mut tensors = small();
    let name = tensors[0].0.name.clone();
    tensors[0] = tensor(&name, DType::F32, &[16], &[1.0f32; 16]);
    assert_error!(
        refused(&tensors),
        FormatError::WrongShape { .. },
        ["q_proj.lora_A.weight", "two dimensions"]
    );
    tensors[0] = tensor(&name, DType::I32, &[2, 8], &[1i32; 16]);
    assert_error!(
        refused(&tensors),
        FormatError::WrongDType { .. },
        ["q_proj.lora_A.weight", "I32", "F16"]
    );
    let mut tensors = small();
    let bias = format!("{Q_PROJ}.lora_B.bias");
    tensors.push(tensor(&bias, DType::F32, &[5], &[1.0f32; 5]));
    assert_error!(
        refused(&tensors),
        FormatError::WrongShape { .. },
        ["q_proj.lora_B.bias", "[5]", "[6]"]
    );
}

#[test]
fn element_types_that_are_not_read() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path();
    fs::write(path.join("adapter_config.json"), config().to_string()).expect("a file");
    let header = json!({
        format!("{Q_PROJ}.lora_A.weight"):
            {"dtype": "F8_E4M3", "shape": [2, 8], "data_offsets": [0, 16]},
        format!("{Q_PROJ}.lora_B.weight"):
            {"dtype": "F8_E4M3", "shape": [6, 2], "data_offsets": [16, 28]},
    });
    let bytes = support::raw_file(header.to_string().as_bytes(), 28);
    fs::write(path.join("adapter_model.safetensors"), bytes).expect("a file");
    assert_error!(
        AdapterSource::open(path),
        FormatError::WrongDType { .. },
        ["lora_A.weight", "F8_E4M3"]
    );
}
