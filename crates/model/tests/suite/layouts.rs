//! The same model stored in other ways gives the same bits: fused or split projections, head
//! norms of either rank, the text part of a multimodal model, a head of its own.

use std::path::Path;

use oxllama_backend::reference::ReferenceDevice;
use oxllama_model::Runner;
use serde_json::Value;

use crate::families::fixture;
use crate::files::{Tensor, altered_copy};
use crate::harness::{Sequence, exact_request, load};

fn logits(path: &Path) -> Vec<f32> {
    let mut model = load(path, &exact_request(64), ReferenceDevice::new).model;
    let vocab_size = model.spec().vocab_size;
    let logits = Sequence::new(&model).feed(&mut model, &[5, 17, 3, 99, 42]);
    assert_eq!(logits.len(), 5 * vocab_size);
    logits
}

/// Rows `start..end` of a matrix, under another name.
fn rows(tensor: &Tensor, name: String, start: usize, end: usize) -> Tensor {
    let bytes = tensor.bytes.as_ref().expect("data");
    let row_bytes = bytes.len() / tensor.shape[0];
    Tensor {
        name,
        dtype: tensor.dtype,
        shape: vec![end - start, tensor.shape[1]],
        bytes: Some(bytes[start * row_bytes..end * row_bytes].to_vec()),
    }
}

#[test]
fn fused_projections_may_be_split() {
    let from = fixture("phi3");
    let split = altered_copy(
        &from,
        |_| {},
        |tensors| {
            let fused = std::mem::take(tensors);
            for tensor in fused {
                // Queries are twice as wide as keys and as values in this fixture.
                let parts = if tensor.name.contains("qkv_proj") {
                    let unit = tensor.shape[0] / 4;
                    vec![("q_proj", 2 * unit), ("k_proj", unit), ("v_proj", unit)]
                } else if tensor.name.contains("gate_up_proj") {
                    let unit = tensor.shape[0] / 2;
                    vec![("gate_proj", unit), ("up_proj", unit)]
                } else {
                    tensors.push(tensor);
                    continue;
                };
                let mut start = 0;
                for (part, width) in parts {
                    let name = tensor
                        .name
                        .replace("qkv_proj", part)
                        .replace("gate_up_proj", part);
                    tensors.push(rows(&tensor, name, start, start + width));
                    start += width;
                }
            }
        },
    );
    assert!(logits(split.path()) == logits(&from));
}

#[test]
fn head_norms_may_be_stored_for_every_head() {
    let from = fixture("qwen3");
    let repeated = altered_copy(
        &from,
        |_| {},
        |tensors| {
            let heads_of = |tensors: &[Tensor], projection: &str, head_dim: usize| {
                let found = tensors
                    .iter()
                    .find(|tensor| tensor.name.contains(projection));
                found.expect(projection).shape[0] / head_dim
            };
            let head_dim = tensors
                .iter()
                .find(|tensor| tensor.name.contains("q_norm"))
                .expect("a norm")
                .shape[0];
            let query_heads = heads_of(tensors, "q_proj.weight", head_dim);
            let key_heads = heads_of(tensors, "k_proj.weight", head_dim);
            for tensor in tensors {
                let heads = match &tensor.name {
                    name if name.contains("q_norm") => query_heads,
                    name if name.contains("k_norm") => key_heads,
                    _ => continue,
                };
                tensor.shape.insert(0, heads);
                tensor.bytes = tensor.bytes.as_ref().map(|bytes| bytes.repeat(heads));
            }
        },
    );
    assert!(logits(repeated.path()) == logits(&from));
}

#[test]
fn the_text_part_of_a_multimodal_model_is_run() {
    let from = fixture("gemma3");
    let nested = altered_copy(
        &from,
        |config| {
            let text = Value::Object(std::mem::take(config));
            config.insert("text_config".to_owned(), text);
            let architecture = Value::from("Gemma3ForConditionalGeneration");
            config.insert("architectures".to_owned(), vec![architecture].into());
        },
        |tensors| {
            for tensor in tensors {
                tensor.name.insert_str(0, "language_model.");
            }
        },
    );
    assert!(logits(nested.path()) == logits(&from));
}

#[test]
fn a_float_copy_of_a_tied_head_is_not_loaded_twice() {
    let from = fixture("llama3");
    let with_copy = altered_copy(
        &from,
        |_| {},
        |tensors| {
            let table = tensors
                .iter()
                .find(|tensor| tensor.name == "model.embed_tokens.weight")
                .expect("the embedding");
            let copy = rows(table, "lm_head.weight".to_owned(), 0, table.shape[0]);
            tensors.push(copy);
        },
    );
    let plain = load(&from, &exact_request(64), ReferenceDevice::new).plan;
    let copied = load(with_copy.path(), &exact_request(64), ReferenceDevice::new).plan;
    assert_eq!(plain.memory.totals, copied.memory.totals);
}
