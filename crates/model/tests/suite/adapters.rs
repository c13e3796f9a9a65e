//! LoRA adapters: against transformers and peft, against merged weights, beside each other.

use std::path::{Path, PathBuf};

use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_format::{AdapterSource, SafetensorsDir, TensorSource};
use oxllama_memory::{Bytes, DeviceId, Policy};
use oxllama_model::{ModelError, ModelRequest, NO_ADAPTER, Runner, StepPlan};
use serde_json::{Value, json};

use crate::families::{fixture, ids, worst};
use crate::files::{Tensor, altered_copy, read_tensors, write_safetensors};
use crate::harness::{Loaded, cpu_device, exact_request, load, load_with, shared, virtual_devices};

pub(crate) const PLAIN: &str = "llama2_plain";
pub(crate) const STABLE: &str = "llama2_stable";

fn lora_fixture(name: &str) -> PathBuf {
    fixture("lora").join(name)
}

pub(crate) fn adapter(name: &str) -> AdapterSource {
    AdapterSource::open(&lora_fixture(name)).expect("an adapter")
}

fn request() -> ModelRequest {
    ModelRequest {
        batch: 4,
        policy: Policy::Balanced,
        ..exact_request(64)
    }
}

/// Feeds each sequence (its adapter and its tokens) in parts of at most `chunk` tokens, one
/// part of every sequence a step, and returns the logits of each, `[tokens, vocab_size]`.
fn feed(model: &mut dyn Runner, sequences: &[(u32, &[u32])], chunk: usize) -> Vec<Vec<f32>> {
    let vocab_size = model.spec().vocab_size;
    let longest = sequences.iter().map(|(_, tokens)| tokens.len()).max();
    let mut logits = vec![Vec::new(); sequences.len()];
    for start in (0..longest.unwrap_or(0)).step_by(chunk) {
        let mut step = StepPlan {
            page_tables: (0..sequences.len() as u32).collect(),
            pages_per_sequence: 1,
            sequence_adapters: sequences.iter().map(|&(adapter, _)| adapter).collect(),
            ..StepPlan::default()
        };
        for (sequence, (_, tokens)) in sequences.iter().enumerate() {
            for position in start..(start + chunk).min(tokens.len()) {
                step.logit_rows.push(step.token_ids.len() as u32);
                step.token_ids.push(tokens[position]);
                step.positions.push(position as u32);
                step.row_sequences.push(sequence as u32);
            }
        }
        let found = model.run(&step).expect("a valid step").logits;
        for (&sequence, row) in step.row_sequences.iter().zip(found.chunks(vocab_size)) {
            logits[sequence as usize].extend_from_slice(row);
        }
    }
    logits
}

/// One sequence by itself, in one step.
pub(crate) fn feed_one(model: &mut dyn Runner, adapter: u32, tokens: &[u32]) -> Vec<f32> {
    feed(model, &[(adapter, tokens)], 64).remove(0)
}

/// The fixture's tokens and the logits of its model with one of its adapters, or `none`.
pub(crate) fn expected(name: &str) -> (Vec<u32>, Vec<f32>) {
    let path = fixture("lora");
    let cases = std::fs::read_to_string(path.join("cases.json")).expect("cases.json");
    let cases: Value = serde_json::from_str(&cases).expect("JSON");
    let tensors = SafetensorsDir::open(&path).expect("the expected logits");
    let tensor = tensors.read(&format!("{name}.logits")).expect("logits");
    let values = tensor.bytes.as_chunks().0.iter();
    let logits = values.map(|bytes| f32::from_le_bytes(*bytes)).collect();
    (ids(&cases["token_ids"]), logits)
}

fn check_against_peft<D: Device>(device: fn(DeviceId) -> D, tolerance: f32) {
    let mut model = load(&fixture("llama2"), &request(), device).model;
    for name in [PLAIN, STABLE] {
        let id = model.load_adapter(&adapter(name), 1.0).expect("an adapter");
        let (tokens, logits) = expected(name);
        let found = feed_one(&mut model, id.get(), &tokens);
        let error = worst(&found, &logits);
        assert!(error <= tolerance, "{name}: {error}");
    }
    let (tokens, logits) = expected("none");
    let error = worst(&feed_one(&mut model, NO_ADAPTER, &tokens), &logits);
    assert!(error <= tolerance, "none: {error}");
}

#[test]
fn adapters_agree_with_peft() {
    check_against_peft(ReferenceDevice::new, 1e-4);
}

#[test]
fn adapters_agree_with_peft_on_the_fast_backend() {
    check_against_peft(cpu_device, 1e-3);
}

/// A model on `devices` virtual devices with a layer each.
pub(crate) fn load_split<D: Device>(devices: u32, device: fn(DeviceId) -> D) -> Loaded<D> {
    let (inventory, ledger) = virtual_devices(devices, Bytes::from_mib(64));
    let loaded = load_with(&fixture("llama2"), &request(), &inventory, ledger, device);
    let loaded = loaded.expect("a model");
    assert_eq!(loaded.plan.memory.devices.len(), devices as usize);
    loaded
}

fn check_mixed<D: Device>(device: fn(DeviceId) -> D) {
    let tokens = expected("none").0;
    let mut bare = load_split(1, device).model;
    let without = feed_one(&mut bare, NO_ADAPTER, &tokens);
    let shorter = feed_one(&mut bare, NO_ADAPTER, &tokens[3..12]);
    let mut alone: Option<[Vec<f32>; 2]> = None;
    for devices in [1, 2] {
        let mut model = load_split(devices, device).model;
        let [plain, stable] = [PLAIN, STABLE].map(|name| {
            let id = model.load_adapter(&adapter(name), 1.0);
            id.expect("an adapter").get()
        });
        let [of_plain, of_stable] = alone
            .get_or_insert_with(|| [plain, stable].map(|id| feed_one(&mut model, id, &tokens)));
        assert!(*of_plain != without && *of_stable != without);
        for chunk in [1, 2, 5, 16, 64] {
            let found = feed(
                &mut model,
                &[
                    (stable, &tokens),
                    (NO_ADAPTER, &tokens),
                    (plain, &tokens),
                    (NO_ADAPTER, &tokens[3..12]),
                ],
                chunk,
            );
            let same = found == [&**of_stable, &*without, &**of_plain, &*shorter];
            assert!(same, "chunks of {chunk} on {devices} devices");
        }
    }
}

#[test]
fn sequences_with_other_adapters_change_no_bit() {
    check_mixed(ReferenceDevice::new);
    check_mixed(cpu_device);
}

/// Pseudo-random numbers in −1..1 that are fp16 values.
fn draw(count: usize, seed: &mut u32) -> Vec<f32> {
    let mut next = || {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 24) as f32 / 128.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn f32_tensor(name: String, shape: [usize; 2], values: &[f32]) -> Tensor {
    Tensor {
        name,
        dtype: "F32",
        shape: shape.to_vec(),
        bytes: Some(
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        ),
    }
}

/// `[rows, columns]` of a tensor and its elements.
fn matrix(tensor: &Tensor) -> (usize, usize, Vec<f32>) {
    let bytes = tensor.bytes.as_ref().expect("data");
    let values = match tensor.dtype {
        "F16" => {
            let wide = |bytes: &[u8; 2]| half_to_f32(u16::from_le_bytes(*bytes));
            bytes.as_chunks().0.iter().map(wide).collect()
        }
        _ => {
            let values = bytes.as_chunks().0.iter();
            values.map(|bytes| f32::from_le_bytes(*bytes)).collect()
        }
    };
    (tensor.shape[0], tensor.shape[1], values)
}

/// A finite fp16 number, by its definition.
fn half_to_f32(bits: u16) -> f32 {
    let exponent = i32::from(bits >> 10 & 31);
    let fraction = f32::from(bits & 1023) / 1024.0;
    let magnitude = match exponent {
        0 => fraction * 2f32.powi(-14),
        _ => (1.0 + fraction) * 2f32.powi(exponent - 15),
    };
    if bits >> 15 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

fn write_config(directory: &Path, config: &Value) {
    let path = directory.join("adapter_config.json");
    std::fs::write(path, config.to_string()).expect("adapter_config.json");
}

/// Writes an adapter with these tensors; their names lack what PEFT puts before them.
pub(crate) fn write_adapter(config: &Value, tensors: Vec<Tensor>) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_config(directory.path(), config);
    let tensors: Vec<Tensor> = tensors
        .into_iter()
        .map(|tensor| Tensor {
            name: format!("base_model.model.{}", tensor.name),
            ..tensor
        })
        .collect();
    write_safetensors(
        &directory.path().join("adapter_model.safetensors"),
        &tensors,
    );
    directory
}

pub(crate) fn plain_config(rank: usize) -> Value {
    json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank})
}

/// A and B of one module.
pub(crate) fn pair(module: &str, rank: usize, (inputs, outputs): (usize, usize)) -> [Tensor; 2] {
    let mut seed = (rank * 31 + outputs) as u32;
    let name = |part: &str| format!("{module}.{part}.weight");
    let a: Vec<f32> = draw(rank * inputs, &mut seed)
        .iter()
        .map(|a| a / 8.0)
        .collect();
    let b: Vec<f32> = draw(outputs * rank, &mut seed)
        .iter()
        .map(|b| b / 8.0)
        .collect();
    [
        f32_tensor(name("lora_A"), [rank, inputs], &a),
        f32_tensor(name("lora_B"), [outputs, rank], &b),
    ]
}

/// Adapters of every kind of block, against the same model with the adapter merged into its
/// weights as f32, which the fast backend keeps.
#[test]
fn an_adapter_does_what_merged_weights_do() {
    const RANK: usize = 5;
    const SCALE: f32 = -0.75;
    for name in [
        "gemma2",
        "cohere",
        "granite",
        "phi3",
        "qwen2",
        "gemma3_nested",
    ] {
        let path = fixture(name);
        let mut added = Vec::new();
        let merged = altered_copy(
            &path,
            |_| {},
            |tensors| {
                for tensor in tensors {
                    let Some(module) = tensor.name.strip_suffix("_proj.weight") else {
                        continue;
                    };
                    let (outputs, inputs, mut values) = matrix(tensor);
                    let delta = pair(&format!("{module}_proj"), RANK, (inputs, outputs));
                    let [(_, _, a), (_, _, b)] = [&delta[0], &delta[1]].map(matrix);
                    for (place, value) in values.iter_mut().enumerate() {
                        let (output, input) = (place / inputs, place % inputs);
                        let products = (0..RANK)
                            .map(|rank| b[output * RANK + rank] * a[rank * inputs + input]);
                        *value += SCALE * products.sum::<f32>();
                    }
                    *tensor = f32_tensor(tensor.name.clone(), [outputs, inputs], &values);
                    added.extend(delta);
                }
            },
        );
        let adapter = write_adapter(&plain_config(RANK), added);
        let adapter = AdapterSource::open(adapter.path()).expect("an adapter");
        let tokens: Vec<u32> = (0..40).map(|index| (index * 37 + 11) % 100).collect();
        let mut of_merged = load(merged.path(), &request(), cpu_device).model;
        let expected = feed_one(&mut of_merged, NO_ADAPTER, &tokens);
        let mut model = load(&path, &request(), cpu_device).model;
        let without = feed_one(&mut model, NO_ADAPTER, &tokens);
        let id = model.load_adapter(&adapter, SCALE).expect("an adapter");
        let found = feed_one(&mut model, id.get(), &tokens);
        let together = feed(&mut model, &[(id.get(), &tokens), (NO_ADAPTER, &tokens)], 7);
        assert!(
            together == [&*found, &*without],
            "{name} beside a sequence without"
        );
        let (error, effect) = (worst(&found, &expected), worst(&without, &expected));
        assert!(
            error < 2e-4 && effect > 0.1,
            "{name}: {error}, moved by {effect}"
        );
    }
}

/// More rows than adapters are applied to at once, of which only some have one.
#[test]
fn long_prompts_are_the_same_in_parts() {
    let path = altered_copy(
        &fixture("llama2"),
        |config| {
            config.insert("max_position_embeddings".to_owned(), 1024.into());
        },
        |_| {},
    );
    let request = ModelRequest {
        batch: 2,
        ..exact_request(512)
    };
    let mut model = load(path.path(), &request, cpu_device).model;
    let id = model
        .load_adapter(&adapter(PLAIN), 1.0)
        .expect("an adapter")
        .get();
    let step = |positions: std::ops::Range<u32>| {
        let mut step = StepPlan {
            page_tables: vec![0, 1],
            pages_per_sequence: 2,
            sequence_adapters: vec![id],
            ..StepPlan::default()
        };
        for (row, position) in positions.enumerate() {
            step.token_ids.push((position * 37 + 11) % 103);
            step.positions.push(position);
            step.row_sequences.push(0);
            step.logit_rows.push(row as u32);
        }
        step
    };
    let at_once = model.run(&step(0..300)).expect("a step").logits.to_vec();
    let mut in_parts = Vec::new();
    for start in (0..300).step_by(100) {
        let logits = model.run(&step(start..start + 100));
        in_parts.extend_from_slice(logits.expect("a step").logits);
    }
    assert!(at_once == in_parts);
}

/// A quantised model: its linears quantise the rows that they share, fused or one by one.
#[test]
fn a_quantised_model_keeps_its_bits_beside_an_adapter() {
    let Some(path) = shared("models/smollm2-135m-exl2-4.0bpw") else {
        return;
    };
    let mut tensors = Vec::new();
    for (layer, module, extents) in [
        (0, "self_attn.q_proj", (576, 576)),
        (0, "mlp.down_proj", (1536, 576)),
        (3, "self_attn.v_proj", (576, 192)),
        (3, "mlp.gate_proj", (576, 1536)),
        (17, "self_attn.o_proj", (576, 576)),
    ] {
        tensors.extend(pair(&format!("model.layers.{layer}.{module}"), 8, extents));
    }
    let directory = write_adapter(&plain_config(8), tensors);
    let source = AdapterSource::open(directory.path()).expect("an adapter");
    let mut model = load(&path, &request(), cpu_device).model;
    let tokens: Vec<u32> = (0..12).map(|index| index * 977 + 5).collect();
    let without = feed_one(&mut model, NO_ADAPTER, &tokens);
    let id = model.load_adapter(&source, 1.0).expect("an adapter").get();
    let with = feed_one(&mut model, id, &tokens);
    assert!(worst(&with, &without) > 0.1);
    for chunk in [1, 5, 12] {
        let found = feed(&mut model, &[(NO_ADAPTER, &tokens), (id, &tokens)], chunk);
        assert!(found == [&*without, &*with], "chunks of {chunk}");
    }
}

#[test]
fn steps_name_loaded_adapters_only() {
    let mut model = load(&fixture("llama2"), &request(), cpu_device).model;
    let id = model
        .load_adapter(&adapter(PLAIN), 1.0)
        .expect("an adapter");
    let step = |adapter: u32| StepPlan {
        token_ids: vec![1],
        positions: vec![0],
        row_sequences: vec![0],
        page_tables: vec![0],
        pages_per_sequence: 1,
        sequence_adapters: vec![adapter],
        ..StepPlan::default()
    };
    model.run(&step(id.get())).expect("a loaded adapter");
    let error = model
        .run(&step(id.get() + 1))
        .expect_err("an unknown adapter");
    assert!(
        matches!(error, ModelError::UnknownAdapter { .. }),
        "{error}"
    );
    model.unload_adapter(id).expect("it is loaded");
    let error = model.run(&step(id.get())).expect_err("an unloaded adapter");
    assert!(
        error.to_string().contains("adapter 0 is not loaded"),
        "{error}"
    );
    let error = model.unload_adapter(id).expect_err("unloaded twice");
    assert!(
        matches!(error, ModelError::UnknownAdapter { .. }),
        "{error}"
    );
    model.run(&step(NO_ADAPTER)).expect("the model as it is");
}

#[test]
fn half_the_scale_of_twice_the_alpha_is_the_same() {
    let tokens = expected("none").0;
    let mut model = load(&fixture("llama2"), &request(), cpu_device).model;
    let once = model
        .load_adapter(&adapter(STABLE), 1.0)
        .expect("an adapter");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = lora_fixture(STABLE);
    let config = std::fs::read_to_string(path.join("adapter_config.json")).expect("a file");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    config["lora_alpha"] = 16.into();
    write_config(directory.path(), &config);
    let tensors = read_tensors(&path);
    write_safetensors(
        &directory.path().join("adapter_model.safetensors"),
        &tensors,
    );
    let doubled = AdapterSource::open(directory.path()).expect("an adapter");
    let halved = model.load_adapter(&doubled, 0.5).expect("an adapter");
    let none = model.load_adapter(&doubled, 0.0).expect("an adapter");
    let [once, halved, none] = [once, halved, none].map(|id| id.get());
    let expected = feed_one(&mut model, once, &tokens);
    assert_eq!(feed_one(&mut model, halved, &tokens), expected);
    let without = feed_one(&mut model, NO_ADAPTER, &tokens);
    assert_eq!(feed_one(&mut model, none, &tokens), without);
}
