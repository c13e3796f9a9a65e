//! Loads and decodes a linear. Input: five bytes (N/32 or N/8, word rows, groups, K/32,
//! encoding), then the tensors' bytes in the order below, zeros where the input ends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oxllama_format::{DType, GptqConfig, LinearSource, MemoryTensors, TensorInfo};

/// Takes a tensor's bytes from the front of `input`.
fn take(tensors: &mut MemoryTensors, input: &mut &[u8], name: &str, dtype: DType, shape: &[usize]) {
    let info = TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let size_bytes = info.size_bytes() as usize;
    let (front, rest) = input.split_at(size_bytes.min(input.len()));
    *input = rest;
    let mut bytes = front.to_vec();
    bytes.resize(size_bytes, 0);
    tensors
        .insert(info, bytes)
        .expect("the length was computed");
}

fuzz_target!(|input: &[u8]| {
    let Some((sizes, mut rest)) = input.split_first_chunk::<5>() else {
        return;
    };
    let [columns, words, groups, rows, encoding] = sizes.map(usize::from);
    let (columns, rows) = (columns % 5, rows % 9);
    let mut tensors = MemoryTensors::new();
    let config = GptqConfig {
        bits: 4,
        zeros_plain: encoding & 2 != 0,
    };
    if encoding & 1 == 0 {
        let n = 32 * columns;
        take(
            &mut tensors,
            &mut rest,
            "p.q_groups",
            DType::I16,
            &[2 * groups],
        );
        take(
            &mut tensors,
            &mut rest,
            "p.q_invperm",
            DType::I32,
            &[32 * rows],
        );
        take(
            &mut tensors,
            &mut rest,
            "p.q_scale_max",
            DType::F16,
            &[groups],
        );
        take(
            &mut tensors,
            &mut rest,
            "p.q_scale",
            DType::I32,
            &[groups, n / 8],
        );
        take(
            &mut tensors,
            &mut rest,
            "p.q_weight",
            DType::I32,
            &[words, n],
        );
    } else {
        let n = 8 * columns;
        if encoding & 4 != 0 {
            take(&mut tensors, &mut rest, "p.g_idx", DType::I32, &[32 * rows]);
        }
        take(
            &mut tensors,
            &mut rest,
            "p.qzeros",
            DType::I32,
            &[groups, n / 8],
        );
        take(
            &mut tensors,
            &mut rest,
            "p.scales",
            DType::F16,
            &[groups, n],
        );
        take(
            &mut tensors,
            &mut rest,
            "p.qweight",
            DType::I32,
            &[words, n],
        );
    }
    let Ok(linear) = LinearSource::load(&tensors, "p", &config, 1.0) else {
        return;
    };
    let (k, n) = (linear.in_features(), linear.out_features());
    let weights = match &linear {
        LinearSource::Exl2(linear) => linear.decode_f16(),
        LinearSource::Gptq(linear) => linear.decode_f16(),
        LinearSource::Float(_) => unreachable!("no float tensor was made"),
    };
    assert_eq!(weights.len(), k * n);
    let granularity = if encoding & 1 == 0 { 32 } else { 8 };
    let part = linear
        .slice_outputs(0..granularity)
        .expect("the first columns");
    assert_eq!(part.out_features(), granularity);
});
