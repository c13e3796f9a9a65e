//! Synthetic models: shapes, sizes by formula, and that the same weights come every time.

mod support;

use std::collections::BTreeMap;

use half::f16;
use oxllama_format::{
    DType, Encoding, Exl2Linear, FormatError, LinearHeader, ModelSource, SyntheticShape,
    SyntheticShapeError, TensorInfo, write_model,
};
use support::assert_error;

/// Small, with a last group of 32 rows and fewer key heads than query heads.
fn tiny(bits_per_weight: f64) -> SyntheticShape {
    SyntheticShape {
        name: "tiny".to_owned(),
        hidden_size: 160,
        intermediate_size: 416,
        layers: 2,
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
        vocab_size: 320,
        rope_theta: 1e4,
        bits_per_weight,
        seed: 1,
    }
}

fn header(source: &ModelSource, key: &str) -> LinearHeader {
    let gptq = source.gptq_config().unwrap();
    LinearHeader::find(source.tensors(), key, &gptq)
        .unwrap()
        .unwrap()
}

fn linear<'s>(source: &'s ModelSource, key: &str) -> Exl2Linear<'s> {
    Exl2Linear::load(source.tensors(), key, 1.0).unwrap()
}

#[test]
fn known_shapes_have_their_parameters_and_bytes() {
    // Weights of the layers' linears, counted by hand from the published shapes.
    let expected = [
        (
            "tinyllama-1b",
            22,
            2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632,
            2048,
            32_000,
        ),
        (
            "llama2-7b",
            32,
            4 * 4096 * 4096 + 3 * 4096 * 11_008,
            4096,
            32_000,
        ),
        (
            "llama3-8b",
            32,
            2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336,
            4096,
            128_256,
        ),
        (
            "codellama-34b",
            48,
            2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 22_016,
            8192,
            32_000,
        ),
        (
            "llama3-70b",
            80,
            2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672,
            8192,
            128_256,
        ),
    ];
    for (name, layers, layer_weights, hidden, vocabulary) in expected {
        let shape: SyntheticShape = format!("{name}:4.0").parse().unwrap();
        assert_eq!(shape.to_string(), format!("{name}:4.0"));
        let source = ModelSource::synthetic(&shape).unwrap();
        let keys = ["q", "k", "v", "o"].map(|part| format!("self_attn.{part}_proj"));
        let mlp = ["gate", "up", "down"].map(|part| format!("mlp.{part}_proj"));
        let headers: Vec<LinearHeader> = keys
            .iter()
            .chain(&mlp)
            .map(|part| header(&source, &format!("model.layers.{}.{part}", layers - 1)))
            .collect();
        let weights: usize = headers
            .iter()
            .map(|one| one.in_features * one.out_features)
            .sum();
        assert_eq!(weights, layer_weights, "{name}");
        let bytes: u64 = headers.iter().map(LinearHeader::stored_bytes).sum();
        // Codes and a 4-bit scale for 128 of them; the rest is below a hundredth of a bit.
        let bits = bytes as f64 * 8.0 / weights as f64;
        assert!((4.031_25..4.05).contains(&bits), "{name}: {bits}");
        let head = header(&source, "lm_head");
        assert_eq!((head.in_features, head.out_features), (hidden, vocabulary));
        assert!(
            (head.bits_per_weight() - 6.035).abs() < 0.005,
            "{}",
            head.bits_per_weight()
        );
        assert!(
            source
                .tensors()
                .info(&format!("model.layers.{layers}.input_layernorm.weight"))
                .is_none()
        );
    }
}

#[test]
fn all_bytes_are_those_of_the_formula() {
    let shape = tiny(4.0);
    let source = ModelSource::synthetic(&shape).unwrap();
    // K, N and bits of each linear; 128 rows and the rest make a group each.
    let linear_bytes = |k: usize, n: usize, bits: usize| {
        let groups = k.div_ceil(128);
        k * n * bits / 8 + groups * n / 2 + groups * 2 + groups * 4 + 4 * k
    };
    let layer = linear_bytes(160, 192, 4)
        + 2 * linear_bytes(160, 64, 4)
        + linear_bytes(192, 160, 4)
        + 2 * linear_bytes(160, 416, 4)
        + linear_bytes(416, 160, 4)
        + 2 * 2 * 160;
    let rest = linear_bytes(160, 320, 6) + 2 * 320 * 160 + 2 * 160;
    assert_eq!(source.stored_bytes(), (2 * layer + rest) as u64);
    for info in source.tensors().infos() {
        let data = source.tensors().read(&info.name).unwrap();
        assert_eq!(data.bytes.len() as u64, info.size_bytes(), "{}", info.name);
        assert_eq!(&data.info, info);
    }
}

#[test]
fn bit_widths_are_mixed_by_groups() {
    // 4,096 rows are 32 groups.
    for (bits_per_weight, wide, narrow, wide_groups) in [
        (2.0, 3, 2, 0),
        (2.5, 3, 2, 16),
        (3.25, 4, 3, 8),
        (4.0, 5, 4, 0),
        (4.51, 5, 4, 16),
        (6.5, 8, 6, 8),
        (7.0, 8, 6, 16),
        (8.0, 8, 8, 0),
    ] {
        let shape = SyntheticShape {
            hidden_size: 4096,
            ..tiny(bits_per_weight)
        };
        let source = ModelSource::synthetic(&shape).unwrap();
        let found = linear(&source, "model.layers.0.self_attn.k_proj");
        let bits: Vec<u32> = found.groups().iter().map(|group| group.bits).collect();
        let expected = [vec![wide; wide_groups], vec![narrow; 32 - wide_groups]].concat();
        assert_eq!(bits, expected, "{bits_per_weight}");
        assert!(found.groups().iter().all(|group| group.rows == 128));
    }
    let source = ModelSource::synthetic(&tiny(3.5)).unwrap();
    let rows: Vec<(u32, usize)> = linear(&source, "model.layers.1.mlp.down_proj")
        .groups()
        .iter()
        .map(|group| (group.bits, group.rows))
        .collect();
    assert_eq!(rows, [(4, 128), (4, 128), (3, 128), (3, 32)]);
}

#[test]
fn weights_keep_the_size_of_what_goes_through() {
    for bits_per_weight in [2.0, 2.5, 4.0, 5.5, 8.0] {
        let source = ModelSource::synthetic(&tiny(bits_per_weight)).unwrap();
        for key in [
            "model.layers.0.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
            "lm_head",
        ] {
            let weights = linear(&source, key);
            let squares: f64 = weights
                .decode_f16()
                .iter()
                .map(|weight| weight.to_f64().powi(2))
                .sum();
            // A row times a column of unit variance has unit variance.
            let gain = squares / weights.out_features() as f64;
            assert!(
                (0.8..1.25).contains(&gain),
                "{key} at {bits_per_weight}: {gain}"
            );
        }
    }
}

#[test]
fn matrices_of_one_input_share_their_row_order() {
    let source = ModelSource::synthetic(&tiny(4.0)).unwrap();
    let order = |part: &str| {
        linear(&source, &format!("model.layers.{part}"))
            .permutation()
            .to_vec()
    };
    let queries = order("0.self_attn.q_proj");
    assert_eq!(order("0.self_attn.k_proj"), queries);
    assert_eq!(order("0.self_attn.v_proj"), queries);
    let gate = order("0.mlp.gate_proj");
    assert_eq!(order("0.mlp.up_proj"), gate);
    assert_ne!(gate, queries);
    assert_ne!(order("1.self_attn.q_proj"), queries);
    let identity: Vec<u32> = (0..160).collect();
    assert_ne!(queries, identity);
}

/// A sum over all bytes of each tensor.
fn sums(source: &ModelSource) -> BTreeMap<String, u32> {
    let names = source.tensors().infos().map(|info| info.name.clone());
    names
        .map(|name| {
            let data = source.tensors().read(&name).unwrap();
            (name, support::crc32(&data.bytes))
        })
        .collect()
}

#[test]
fn the_same_seed_makes_the_same_weights() {
    let shape = tiny(2.5);
    let first = sums(&ModelSource::synthetic(&shape).unwrap());
    assert_eq!(first, sums(&ModelSource::synthetic(&shape).unwrap()));
    let other = sums(&ModelSource::synthetic(&SyntheticShape { seed: 2, ..shape }).unwrap());
    let random = ["q_weight", "q_scale", "q_invperm", "embed_tokens.weight"];
    for (name, sum) in &first {
        let is_random = random.iter().any(|part| name.ends_with(part));
        assert_eq!(other[name] != *sum, is_random, "{name}");
    }
    let codes: Vec<&u32> = first
        .iter()
        .filter(|(name, _)| name.ends_with("q_weight"))
        .map(|(_, sum)| sum)
        .collect();
    assert!(
        codes
            .iter()
            .all(|sum| codes.iter().filter(|other| other == &sum).count() == 1)
    );
    // Figures are compared over versions and machines: a change of the weights must be meant.
    assert_eq!(
        first["model.layers.0.self_attn.q_proj.q_weight"],
        PINNED_CODES
    );
    assert_eq!(first["model.embed_tokens.weight"], PINNED_EMBEDDING);
}

const PINNED_CODES: u32 = 3_853_265_846;
const PINNED_EMBEDDING: u32 = 1_557_944_181;

#[test]
fn norms_are_ones_and_the_embedding_is_small() {
    let source = ModelSource::synthetic(&tiny(4.0)).unwrap();
    let values = |name: &str| -> Vec<f32> {
        let data = source.tensors().read(name).unwrap();
        assert_eq!(data.info.dtype, DType::F16);
        let halves = data.bytes.chunks_exact(2);
        halves
            .map(|half| f16::from_le_bytes([half[0], half[1]]).to_f32())
            .collect()
    };
    assert_eq!(values("model.norm.weight"), vec![1.0; 160]);
    assert_eq!(
        values("model.layers.1.post_attention_layernorm.weight"),
        vec![1.0; 160]
    );
    let embedding = values("model.embed_tokens.weight");
    assert_eq!(embedding.len(), 320 * 160);
    assert!(embedding.iter().all(|value| value.abs() <= 0.12));
}

#[test]
fn a_written_model_is_the_model() {
    let shape = tiny(4.5);
    let source = ModelSource::synthetic(&shape).unwrap();
    let work = tempfile::tempdir().unwrap();
    let directory = work.path().join("model");
    let mut steps = Vec::new();
    let written = write_model(&source, &directory, &mut |done, _| steps.push(done)).unwrap();
    assert_eq!((written.shards, written.model_type.as_str()), (1, "llama"));
    assert_eq!(written.tensor_bytes, source.stored_bytes());
    assert_eq!(steps.len(), written.tensors + 1);
    assert_eq!(steps.last(), Some(&source.stored_bytes()));

    let read = ModelSource::open(&directory).unwrap();
    assert_eq!(sums(&read), sums(&source));
    let infos =
        |source: &ModelSource| -> Vec<TensorInfo> { source.tensors().infos().cloned().collect() };
    assert_eq!(infos(&read), infos(&source));
    assert_eq!(read.config(), source.config());
    assert_eq!(read.tokenizer_config(), source.tokenizer_config());
    assert_eq!(
        read.tokenizer_json().unwrap(),
        source.tokenizer_json().unwrap()
    );
    let query = header(&read, "model.layers.0.self_attn.q_proj");
    assert!(matches!(query.encoding, Encoding::Exl2 { groups: 2, .. }));
}

#[test]
fn texts_that_are_no_shape_say_what_is() {
    let parse = |text: &str| text.parse::<SyntheticShape>().unwrap_err();
    let error = parse("llama2-7b");
    assert!(matches!(error, SyntheticShapeError::Form { .. }));
    let message = error.to_string();
    for part in ["llama2-7b", "SHAPE:BPW", "codellama-34b", "from 2 to 8"] {
        assert!(message.contains(part), "{message}");
    }
    let error = parse("llama9:4.0");
    assert!(matches!(error, SyntheticShapeError::Shape { .. }));
    let message = error.to_string();
    for part in [
        "llama9",
        "tinyllama-1b",
        "llama2-7b",
        "llama3-8b",
        "codellama-34b",
        "llama3-70b",
    ] {
        assert!(message.contains(part), "{message}");
    }
    for bits in ["", "1.9", "8.1", "-4", "NaN", "inf", "four", "4.0:1"] {
        let error = parse(&format!("llama3-8b:{bits}"));
        assert!(
            matches!(error, SyntheticShapeError::BitsPerWeight { .. }),
            "{bits}"
        );
        let message = error.to_string();
        assert!(
            message.contains(&format!("`{bits}`")) && message.contains("from 2 to 8"),
            "{message}"
        );
    }
}

#[test]
fn shapes_that_exl2_cannot_store_are_refused() {
    for (shape, part) in [
        (
            SyntheticShape {
                hidden_size: 100,
                ..tiny(4.0)
            },
            "hidden size",
        ),
        (
            SyntheticShape {
                hidden_size: usize::MAX,
                ..tiny(4.0)
            },
            "hidden size",
        ),
        (
            SyntheticShape {
                intermediate_size: 0,
                ..tiny(4.0)
            },
            "intermediate size",
        ),
        (
            SyntheticShape {
                head_dim: usize::MAX,
                ..tiny(4.0)
            },
            "query heads",
        ),
        (
            SyntheticShape {
                kv_heads: 0,
                ..tiny(4.0)
            },
            "key heads",
        ),
        (
            SyntheticShape {
                kv_heads: 4,
                ..tiny(4.0)
            },
            "key heads",
        ),
        (
            SyntheticShape {
                vocab_size: 256,
                ..tiny(4.0)
            },
            "vocabulary",
        ),
        (
            SyntheticShape {
                layers: 0,
                ..tiny(4.0)
            },
            "layers",
        ),
        (tiny(f64::NAN), "bits per weight"),
        (tiny(9.0), "bits per weight"),
    ] {
        assert_error!(
            ModelSource::synthetic(&shape).map(|_| ()),
            FormatError::Malformed { .. },
            [part, "tiny:"]
        );
    }
    let source = ModelSource::synthetic(&tiny(4.0)).unwrap();
    let missing = source
        .tensors()
        .read("model.layers.2.mlp.up_proj.q_weight")
        .map(|_| ());
    assert_error!(
        missing,
        FormatError::MissingTensor { .. },
        ["layers.2", "tiny:4.0"]
    );
}
