//! Models with random weights run like any other, from memory and from files.

use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_format::{ModelSource, SyntheticShape, write_model};
use oxllama_memory::{Bytes, DeviceId};
use oxllama_model::{ModelRequest, ModelSpec, inspect};
use oxllama_text::{EncodeOptions, Tokenizer};

use crate::harness::{Loaded, Sequence, cpu_device, exact_request, load_source, virtual_devices};

/// Small, with fewer key heads than query heads, and groups of two bit widths.
fn tiny() -> SyntheticShape {
    SyntheticShape {
        name: "tiny".to_owned(),
        hidden_size: 256,
        intermediate_size: 416,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab_size: 320,
        rope_theta: 1e4,
        bits_per_weight: 3.5,
        seed: 1,
    }
}

fn load<D: Device>(source: &ModelSource, device: impl Fn(DeviceId) -> D) -> Loaded<D> {
    let request = ModelRequest {
        logit_rows: 64,
        ..exact_request(256)
    };
    let (inventory, ledger) = virtual_devices(1, Bytes::from_mib(64));
    load_source(source, &request, &inventory, ledger, device).expect("it fits")
}

fn tokenizer(source: &ModelSource) -> Tokenizer {
    Tokenizer::new(
        &source.tokenizer_json().unwrap(),
        source.tokenizer_config(),
        source.config(),
        source.generation_config(),
    )
    .unwrap()
}

#[test]
fn logits_are_those_of_a_model_with_sane_activations() {
    let source = ModelSource::synthetic(&tiny()).unwrap();
    let mut fast = load(&source, cpu_device);
    let mut exact = load(&source, ReferenceDevice::new);
    let tokens: Vec<u32> = (0..40).map(|index| (index * 37 + 3) % 320).collect();
    let found = Sequence::new(&fast.model).feed(&mut fast.model, &tokens);
    let expected = Sequence::new(&exact.model).feed(&mut exact.model, &tokens);
    assert_eq!(found.len(), 40 * 320);
    let mean_square = found.iter().map(|logit| logit * logit).sum::<f32>() / found.len() as f32;
    assert!((0.25..4.0).contains(&mean_square), "{mean_square}");
    let distance = |(found, expected): (&f32, &f32)| (found - expected).abs();
    let furthest = found
        .iter()
        .zip(&expected)
        .map(distance)
        .fold(0.0, f32::max);
    assert!(furthest < 0.05, "{furthest}");
}

#[test]
fn a_written_model_is_inspected_planned_and_continues_a_prompt_alike() {
    let shape = tiny();
    let made = ModelSource::synthetic(&shape).unwrap();
    let work = tempfile::tempdir().unwrap();
    let directory = work.path().join("tiny");
    write_model(&made, &directory, &mut |_, _| {}).unwrap();
    let read = ModelSource::open(&directory).unwrap();

    let spec = ModelSpec::from_config(read.config()).unwrap();
    let inspection = inspect(&read, &spec).unwrap();
    assert_eq!(inspection.linears.len(), 2 + 7 * shape.layers);
    assert_eq!(inspection, {
        let stored_bytes = inspection.stored_bytes;
        let made = inspect(&made, &spec).unwrap();
        // The file has a header as well.
        assert!(stored_bytes > made.stored_bytes);
        oxllama_model::Inspection {
            stored_bytes,
            ..made
        }
    });
    // Codes of 3.5 bits (of 416 rows, 4 groups), scales, permutations of small matrices.
    let bits = inspection.layer_bits_per_weight;
    assert!((3.5..3.9).contains(&bits), "{bits}");

    let [made, read] = [&made, &read].map(|source| {
        let mut loaded = load(source, cpu_device);
        assert!(loaded.plan.memory.devices[0].weights > Bytes::from_kib(400));
        let tokenizer = tokenizer(source);
        let prompt = "Grüße, world!";
        let mut tokens = tokenizer.encode(prompt, EncodeOptions::PROMPT).unwrap();
        assert_eq!(tokenizer.decode(&tokens, true), prompt);
        let mut sequence = Sequence::new(&loaded.model);
        let mut fed = tokens.clone();
        for _ in 0..8 {
            let logits = sequence.feed(&mut loaded.model, &fed);
            let last = &logits[logits.len() - 320..];
            let best = (0..320)
                .max_by(|&a: &usize, &b| last[a].total_cmp(&last[b]))
                .unwrap();
            fed = vec![best as u32];
            tokens.extend(&fed);
        }
        (tokenizer.decode(&tokens, false), tokens)
    });
    assert_eq!(made, read);
}
