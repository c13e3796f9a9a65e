//! Plans from headers alone, at the real shapes of large models.

use std::path::Path;

use oxllama_backend::reference::ReferenceDevice;
use oxllama_format::ModelSource;
use oxllama_memory::{Bytes, CacheFormat, DeviceId, PlanError, Policy};
use oxllama_model::{ModelError, ModelRequest, ModelSpec, RopeScaling, plan_model};
use serde_json::{Value, json};

use crate::families::fixture;
use crate::files::{Tensor, sparse_exl2, write_safetensors};
use crate::harness::{exact_request, virtual_devices};

/// Llama 3 70B's configuration.
fn llama_70b() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    })
}

/// Phi-3-medium-128k's configuration.
fn phi3_medium() -> Value {
    let factors = vec![1.5; 64];
    json!({
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
        "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 32064,
        "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 131_072,
        "rope_scaling": {"type": "su", "short_factor": factors, "long_factor": factors},
    })
}

/// A sparse EXL2 directory of a configuration's shape.
fn write_sparse(directory: &Path, config: &Value, bits: usize) {
    std::fs::write(directory.join("config.json"), config.to_string()).expect("config.json");
    let spec = ModelSpec::from_config(config).expect("a configuration");
    let hidden = spec.hidden_size;
    let norm = |name: String| Tensor::sparse(name, "F16", &[hidden]);
    let mut tensors = vec![
        Tensor::sparse(
            "model.embed_tokens.weight".to_owned(),
            "F16",
            &[spec.vocab_size, hidden],
        ),
        norm("model.norm.weight".to_owned()),
    ];
    tensors.extend(sparse_exl2("lm_head", hidden, spec.vocab_size, 6, 128));
    for index in 0..spec.layers.len() {
        let prefix = format!("model.layers.{index}");
        for (name, in_features, out_features) in [
            ("self_attn.q_proj", hidden, spec.query_width()),
            ("self_attn.k_proj", hidden, spec.kv_width()),
            ("self_attn.v_proj", hidden, spec.kv_width()),
            ("self_attn.o_proj", spec.query_width(), hidden),
            ("mlp.gate_proj", hidden, spec.intermediate_size),
            ("mlp.up_proj", hidden, spec.intermediate_size),
            ("mlp.down_proj", spec.intermediate_size, hidden),
        ] {
            let key = format!("{prefix}.{name}");
            tensors.extend(sparse_exl2(&key, in_features, out_features, bits, 128));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push(norm(format!("{prefix}.{name}.weight")));
        }
    }
    write_safetensors(&directory.join("output.safetensors"), &tensors);
}

/// Bytes of the file at `path` that this process has mapped and touched.
fn resident_bytes(path: &Path) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("the process's mappings");
    let name = path.to_string_lossy();
    let mut is_file = false;
    let mut total = 0;
    for line in maps.lines() {
        if let Some(rest) = line.strip_prefix("Rss:") {
            let kib: u64 = rest
                .trim()
                .trim_end_matches(" kB")
                .trim()
                .parse()
                .expect("kB");
            total += if is_file { kib * 1024 } else { 0 };
        } else if line
            .split(' ')
            .next()
            .is_some_and(|range| range.contains('-'))
        {
            is_file = line.ends_with(&*name);
        }
    }
    total
}

#[test]
fn a_70b_directory_is_planned_from_its_headers() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_sparse(directory.path(), &llama_70b(), 4);
    let source = ModelSource::open(directory.path()).expect("a model");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    // The reference keeps weights as f32: 70 G of them, and 1 G of embedding.
    let (inventory, _) = virtual_devices(4, Bytes::from_gib(90));
    let request = ModelRequest {
        policy: Policy::Balanced,
        context_tokens: Some(8192),
        ..ModelRequest::default()
    };
    let plan = plan_model(&source, &spec, &device, &inventory, &request).expect("a plan");
    let layers: usize = plan
        .memory
        .devices
        .iter()
        .map(|part| part.layers.len())
        .sum();
    assert_eq!(layers, 80);
    assert_eq!(plan.memory.devices.len(), 4);
    // 80 layers × 8 heads × 128 dimensions × 2 × 2 bytes × 8192 tokens.
    assert_eq!(
        plan.memory.totals.kv_cache,
        Bytes(80 * 8 * 128 * 2 * 2 * 8192)
    );

    let file = directory.path().join("output.safetensors");
    let size = std::fs::metadata(&file).expect("the file").len();
    assert!(size > 30 << 30, "{size} bytes");
    let touched = resident_bytes(&file);
    assert!(touched < size / 100, "{touched} of {size} bytes touched");
}

#[test]
fn phi3_medium_128k_is_limited_by_its_cache_and_told_so() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_sparse(directory.path(), &phi3_medium(), 4);
    let source = ModelSource::open(directory.path()).expect("a model");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    // 200 KiB a token: the whole context takes 25 GiB beside 14 G weights of 4 bytes.
    let (inventory, _) = virtual_devices(1, Bytes::from_gib(60));
    let plan = |context_tokens| {
        let request = ModelRequest {
            context_tokens,
            cache: CacheFormat::F16,
            ..ModelRequest::default()
        };
        plan_model(&source, &spec, &device, &inventory, &request)
    };
    let longest = plan(None).expect("a plan");
    let tokens = longest.memory.context_tokens;
    assert!((4096..131_072).contains(&tokens), "{tokens} tokens");
    assert_eq!(
        longest.memory.totals.kv_cache,
        Bytes(tokens * 40 * 10 * 128 * 2 * 2)
    );
    match plan(Some(131_072)) {
        Err(ModelError::Plan(PlanError::Infeasible(infeasible))) => {
            let message = infeasible.to_string();
            assert!(message.contains(&tokens.to_string()), "{message}");
        }
        other => panic!("expected a shortfall, got {other:?}"),
    }
    // The factors follow the planned context, not the tokens fed.
    let (short, long) = (spec.ropes_for(4096), spec.ropes_for(4097));
    assert!(matches!(
        spec.ropes[0].scaling,
        RopeScaling::LongRope { .. }
    ));
    assert_eq!(short[0].inverse_frequencies, long[0].inverse_frequencies);
    assert!((short[0].attention_factor - 1.190_238).abs() < 1e-6);
}

#[test]
fn a_quantised_cache_is_for_heads_of_whole_groups() {
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    let (inventory, _) = virtual_devices(1, Bytes::from_mib(64));
    let plan = |name: &str, cache| {
        let source = ModelSource::open(&fixture(name)).expect("a model");
        let spec = ModelSpec::from_config(source.config()).expect("a configuration");
        let request = ModelRequest {
            cache,
            ..exact_request(64)
        };
        plan_model(&source, &spec, &device, &inventory, &request)
    };
    // Heads of 32 in Qwen3, of 16 in Llama 3.
    for format in [CacheFormat::Q8, CacheFormat::Q6, CacheFormat::Q4] {
        assert!(plan("qwen3", format).is_ok(), "{format}");
        let refused = plan("llama3", format);
        let Err(error @ ModelError::UnquantisableCache { head_dim: 16, .. }) = refused else {
            panic!("expected a refusal, got {refused:?}");
        };
        let message = error.to_string();
        assert!(message.contains("use a cache of format f16"), "{message}");
    }
}

#[test]
fn requests_beyond_reason_are_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_sparse(directory.path(), &phi3_medium(), 2);
    let source = ModelSource::open(directory.path()).expect("a model");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    let (inventory, _) = virtual_devices(1, Bytes::from_gib(1000));
    for (batch, chunk_tokens) in [(0, 1), (1, 0), (u64::MAX, 1), (1, u64::MAX)] {
        let request = ModelRequest {
            batch,
            chunk_tokens,
            ..ModelRequest::default()
        };
        let result = plan_model(&source, &spec, &device, &inventory, &request);
        assert!(
            matches!(result, Err(ModelError::Request { .. })),
            "{result:?}"
        );
    }
    for cache_tokens in [0, u64::MAX] {
        let request = ModelRequest {
            cache_tokens: Some(cache_tokens),
            ..ModelRequest::default()
        };
        let result = plan_model(&source, &spec, &device, &inventory, &request);
        assert!(
            matches!(result, Err(ModelError::Request { .. })),
            "{result:?}"
        );
    }
    let request = ModelRequest {
        logit_rows: u64::MAX,
        ..ModelRequest::default()
    };
    let plan = plan_model(&source, &spec, &device, &inventory, &request).expect("a plan");
    assert_eq!(plan.logit_rows, 512);
}
