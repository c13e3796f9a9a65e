//! What must not change a model's bits: on how many devices it lies, and how a prompt is cut.

use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_memory::{Bytes, CacheFormat, DeviceId, Policy};
use oxllama_model::{ModelRequest, Runner, StepPlan};

use crate::families::fixture;
use crate::files::{Tensor, altered_copy};
use crate::harness::{
    Loaded, Sequence, cpu_device, exact_request, load, load_with, virtual_devices,
};

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32)
        .map(|index| (index * 37 + 11) % 128)
        .collect()
}

/// A request of chunks up to 512 over a context of two pages.
fn request(cache: CacheFormat) -> ModelRequest {
    ModelRequest {
        policy: Policy::Balanced,
        cache,
        ..exact_request(512)
    }
}

/// Loads a fixture made longer: 1024 positions, and its first two layers repeated to eight.
fn load_stretched<D: Device>(
    name: &str,
    cache: CacheFormat,
    devices: u32,
    device: fn(DeviceId) -> D,
) -> Loaded<D> {
    const LAYERS: usize = 8;
    let path = altered_copy(
        &fixture(name),
        |config| {
            config.insert("max_position_embeddings".to_owned(), 1024.into());
            config.insert("num_hidden_layers".to_owned(), LAYERS.into());
        },
        |tensors| {
            tensors.retain(|tensor| {
                !tensor.name.contains("layers.2.") && !tensor.name.contains("layers.3.")
            });
            for layer in 2..LAYERS {
                let source = format!("layers.{}.", layer % 2);
                let copies: Vec<Tensor> = tensors
                    .iter()
                    .filter(|tensor| tensor.name.contains(&source))
                    .map(|tensor| Tensor {
                        name: tensor.name.replace(&source, &format!("layers.{layer}.")),
                        shape: tensor.shape.clone(),
                        bytes: tensor.bytes.clone(),
                        dtype: tensor.dtype,
                    })
                    .collect();
                tensors.extend(copies);
            }
        },
    );
    let (inventory, ledger) = virtual_devices(devices, Bytes::from_mib(64));
    load_with(path.path(), &request(cache), &inventory, ledger, device).expect("a model")
}

fn check_splits<D: Device>(device: fn(DeviceId) -> D) {
    for (name, cache) in [
        ("llama3", CacheFormat::F32),
        ("gemma3", CacheFormat::F32),
        ("cohere", CacheFormat::F32),
        ("qwen3", CacheFormat::Q6),
    ] {
        let mut expected = None;
        for devices in 1..=4 {
            let mut loaded = load_stretched(name, cache, devices, device);
            assert_eq!(loaded.plan.memory.devices.len(), devices as usize, "{name}");
            let mut sequence = Sequence::new(&loaded.model);
            let mut logits = sequence.feed(&mut loaded.model, &prompt(40));
            for token in [3, 99] {
                logits.extend(sequence.feed(&mut loaded.model, &[token]));
            }
            let expected = expected.get_or_insert_with(|| logits.clone());
            assert!(logits == *expected, "{name} on {devices} devices");
        }
    }
}

#[test]
fn layers_on_several_devices_give_the_same_bits() {
    check_splits(ReferenceDevice::new);
    check_splits(cpu_device);
}

fn check_chunks<D: Device>(device: fn(DeviceId) -> D) {
    let tokens = prompt(300);
    for (name, cache) in [
        ("llama3", CacheFormat::F32),
        ("gemma2", CacheFormat::F16),
        ("qwen3", CacheFormat::Q8),
        ("qwen3", CacheFormat::Q6),
        ("qwen3", CacheFormat::Q4),
    ] {
        let mut model = load_stretched(name, cache, 1, device).model;
        let expected = Sequence::new(&model).feed(&mut model, &tokens);
        for chunk in [1, 2, 7, 32, 100, 255, 256, 257] {
            let mut sequence = Sequence::new(&model);
            let mut logits = Vec::new();
            for part in tokens.chunks(chunk) {
                logits.extend(sequence.feed(&mut model, part));
            }
            assert!(logits == expected, "{name}, {cache}, in chunks of {chunk}");
        }
    }
}

#[test]
fn prompts_cut_anywhere_give_the_same_bits() {
    check_chunks(ReferenceDevice::new);
    check_chunks(cpu_device);
}

#[test]
fn a_sequence_does_not_depend_on_its_neighbours() {
    let request = ModelRequest {
        batch: 3,
        ..exact_request(64)
    };
    let mut model = load(&fixture("qwen3"), &request, ReferenceDevice::new).model;
    let vocab_size = model.spec().vocab_size;
    let tokens = [prompt(5), prompt(9), prompt(3)];
    let alone: Vec<Vec<f32>> = tokens
        .iter()
        .map(|tokens| Sequence::new(&model).feed(&mut model, tokens))
        .collect();
    let mut step = StepPlan {
        page_tables: vec![2, 0, 1],
        pages_per_sequence: 1,
        ..StepPlan::default()
    };
    for (sequence, tokens) in tokens.iter().enumerate() {
        for (position, &token) in tokens.iter().enumerate() {
            step.token_ids.push(token);
            step.positions.push(position as u32);
            step.row_sequences.push(sequence as u32);
        }
    }
    step.logit_rows = (0..step.token_ids.len() as u32).rev().collect();
    let together = model.run(&step).expect("a valid step").logits;
    let mut rows = together.chunks_exact(vocab_size).rev();
    for (sequence, alone) in alone.iter().enumerate() {
        for (position, alone) in alone.chunks_exact(vocab_size).enumerate() {
            let together = rows.next().expect("a row of logits");
            assert!(alone == together, "sequence {sequence} position {position}");
        }
    }
}
