//! `oxllama plan`: what goes where, and what to do when it does not fit.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{Output, Oxllama};
use crate::support::{json as parsed, keys, shared, tiny, write_sparse_model};

fn plan(model: &Path, arguments: &[&str]) -> Output {
    Oxllama::new().arg("plan").arg(model).args(arguments).run()
}

/// The plan as JSON.
#[track_caller]
fn plan_json(model: &Path, arguments: &[&str]) -> Value {
    let arguments = [arguments, &["--json"]].concat();
    let answer = parsed(&plan(model, &arguments).succeeded());
    assert_eq!(keys(&answer), ["fits", "plan"]);
    assert_eq!(answer["fits"], true);
    answer["plan"].clone()
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

/// Every device's sums are right, its limit is kept and the layers follow each other.
#[track_caller]
fn is_consistent(plan: &Value, layers: u64) {
    let mut next_layer = 0;
    let mut total = 0;
    for device in plan["devices"].as_array().unwrap() {
        let parts = ["weights", "kv_cache", "workspace", "recordings"];
        let sum: u64 = parts.iter().map(|&part| number(&device[part])).sum();
        assert_eq!(number(&device["total"]), sum, "{device}");
        assert_eq!(
            number(&device["limit"]),
            sum + number(&device["remaining"]),
            "{device}"
        );
        assert_eq!(number(&device["layers"]["start"]), next_layer, "{device}");
        next_layer = number(&device["layers"]["end"]);
        total += sum;
    }
    assert_eq!(next_layer, layers);
    assert_eq!(number(&plan["totals"]["total"]), total);
}

/// A Llama of 70 billion parameters in fp16, all holes.
fn llama_70b(folder: &TempDir) -> PathBuf {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": false,
    });
    let tensor = |name: &str, shape: &[u64]| (name.to_owned(), shape.to_vec());
    let mut tensors = vec![
        tensor("model.embed_tokens.weight", &[128_256, 8192]),
        tensor("lm_head.weight", &[128_256, 8192]),
        tensor("model.norm.weight", &[8192]),
    ];
    for layer in 0..80 {
        let shapes: [(&str, &[u64]); 9] = [
            ("input_layernorm", &[8192]),
            ("post_attention_layernorm", &[8192]),
            ("self_attn.q_proj", &[8192, 8192]),
            ("self_attn.k_proj", &[1024, 8192]),
            ("self_attn.v_proj", &[1024, 8192]),
            ("self_attn.o_proj", &[8192, 8192]),
            ("mlp.gate_proj", &[28672, 8192]),
            ("mlp.up_proj", &[28672, 8192]),
            ("mlp.down_proj", &[8192, 28672]),
        ];
        tensors
            .extend(shapes.map(|(name, shape)| {
                tensor(&format!("model.layers.{layer}.{name}.weight"), shape)
            }));
    }
    let directory = folder.path().join("llama-70b");
    write_sparse_model(&directory, &config, tensors);
    directory
}

/// Phi-3-medium-128k-instruct: fused sources, longrope, and a context that dwarfs the weights.
fn phi3_medium_128k(folder: &TempDir) -> PathBuf {
    let factors = |first: f64| (0..64).map(|i| first + f64::from(i)).collect::<Vec<_>>();
    let config = json!({
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32064,
        "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096, "sliding_window": 131_072,
        "tie_word_embeddings": false, "rope_scaling": {
            "type": "su", "long_factor": factors(1.0), "short_factor": factors(1.0),
        },
    });
    let tensor = |name: &str, shape: &[u64]| (name.to_owned(), shape.to_vec());
    let mut tensors = vec![
        tensor("model.embed_tokens.weight", &[32064, 5120]),
        tensor("lm_head.weight", &[32064, 5120]),
        tensor("model.norm.weight", &[5120]),
    ];
    for layer in 0..40 {
        let shapes: [(&str, &[u64]); 6] = [
            ("input_layernorm", &[5120]),
            ("post_attention_layernorm", &[5120]),
            ("self_attn.qkv_proj", &[7680, 5120]),
            ("self_attn.o_proj", &[5120, 5120]),
            ("mlp.gate_up_proj", &[35840, 5120]),
            ("mlp.down_proj", &[5120, 17920]),
        ];
        tensors
            .extend(shapes.map(|(name, shape)| {
                tensor(&format!("model.layers.{layer}.{name}.weight"), shape)
            }));
    }
    let directory = folder.path().join("phi3-medium-128k");
    write_sparse_model(&directory, &config, tensors);
    directory
}

#[test]
fn a_plan_is_a_table_by_device_and_purpose() {
    let arguments = ["--virtual-devices", "1GiB", "--context", "256"];
    let table = plan(&tiny("llama"), &arguments).succeeded().stdout;
    let mut lines = table.lines();
    let header = lines.next().unwrap();
    for column in [
        "device",
        "weights",
        "kv cache",
        "workspace",
        "total",
        "remaining",
    ] {
        assert!(header.contains(column), "{table}");
    }
    let device = lines.next().unwrap();
    assert!(
        device.starts_with("cpu:0   embedding, layers 0-1, head"),
        "{table}"
    );
    // One page of 256 tokens: 2 layers × K and V × 2 heads of 16 × 2 bytes.
    assert!(device.contains("64.00 KiB"), "{table}");
    assert!(
        table.contains("512"),
        "the longest context that would fit: {table}"
    );
}

#[test]
fn a_plan_in_json_has_the_same_numbers() {
    let arguments = ["--virtual-devices", "1GiB", "--context", "256"];
    let plan = plan_json(&tiny("llama"), &arguments);
    is_consistent(&plan, 2);
    assert_eq!(number(&plan["context_tokens"]), 256);
    assert_eq!(number(&plan["max_context_tokens"]), 512);
    assert_eq!(number(&plan["model_max_context_tokens"]), 512);
    assert_eq!(number(&plan["totals"]["kv_cache"]), 64 << 10);
    assert_eq!(plan["cache"], "f16");
    // Without --context, the longest.
    let longest = plan_json(&tiny("llama"), &["--virtual-devices", "1GiB"]);
    assert_eq!(number(&longest["context_tokens"]), 512);
}

#[test]
fn batch_and_cache_format_multiply_the_cache() {
    let model = tiny("llama");
    let base = ["--virtual-devices", "1GiB", "--context", "512"];
    let kv_cache =
        |more: &[&str]| number(&plan_json(&model, &[&base, more].concat())["totals"]["kv_cache"]);
    let one = kv_cache(&[]);
    assert_eq!(kv_cache(&["--batch", "3"]), 3 * one);
    assert_eq!(kv_cache(&["--cache", "fp32"]), 2 * one);
    assert_eq!(kv_cache(&["--cache", "fp16"]), one);
    // The pool of all sequences has a size of its own: one page here.
    let pool = |more: &[&str]| plan_json(&model, &[&["--virtual-devices", "1GiB"], more].concat());
    let shared = pool(&["--batch", "3", "--cache-tokens", "200"]);
    assert_eq!(number(&shared["totals"]["kv_cache"]), one / 2);
    assert_eq!(number(&shared["cache_tokens"]), 256);
    assert_eq!(number(&shared["context_tokens"]), 256);
    let text = plan(&model, &["--batch", "3", "--cache-tokens", "512"]).succeeded();
    assert!(
        text.stdout
            .contains("cache f16 of 512 tokens for all sequences"),
        "{}",
        text.stdout
    );
    plan(&model, &["--context", "400", "--cache-tokens", "200"]).failed_with(&[
        "a context of 400 tokens does not fit a cache of 256 tokens",
        "a cache of at least 400",
    ]);
    plan(&model, &["--batch", "0"]).failed_with(&["0 sequences", "expected 1 to"]);
}

#[test]
fn quantised_caches_take_8_6_and_4_bits_and_their_scales() {
    // Heads of 16 are no groups of 32; those of the Qwen3 fixture are one each.
    plan(&tiny("llama"), &["--cache", "q8"]).failed_with(&[
        "q8",
        "groups of 32",
        "heads of 16",
        "f16",
    ]);
    let model = tiny("qwen3");
    let kv_cache = |cache: &str| {
        let plan = plan_json(&model, &["--context", "256", "--cache", cache]);
        let name = cache.strip_prefix("fp").map(|bits| format!("f{bits}"));
        assert_eq!(plan["cache"], name.unwrap_or(cache.to_owned()));
        number(&plan["totals"]["kv_cache"])
    };
    let half = kv_cache("fp16");
    for (cache, thirty_seconds) in [("fp32", 64), ("q8", 17), ("q6", 13), ("q4", 9)] {
        assert_eq!(kv_cache(cache), half / 32 * thirty_seconds, "{cache}");
    }
}

#[test]
fn plans_of_the_real_model_fit_its_devices() {
    let Some(model) = shared("models/smollm2-135m-exl2-4.0bpw") else {
        return;
    };
    let base = ["--context", "2048", "--virtual-devices"];
    let whole = plan_json(&model, &[&base[..], &["4GiB"]].concat());
    is_consistent(&whole, 30);
    // 30 layers × K and V × 3 heads of 64 × 2 bytes × 2048 tokens.
    assert_eq!(
        number(&whole["totals"]["kv_cache"]),
        30 * 2 * 3 * 64 * 2 * 2048
    );

    let split = plan_json(&model, &[&base[..], &["2x160MiB"]].concat());
    is_consistent(&split, 30);
    assert_eq!(split["devices"].as_array().unwrap().len(), 2);

    let balanced = [&base[..], &["2x1GiB", "--policy", "balanced"]].concat();
    let balanced = plan_json(&model, &balanced);
    is_consistent(&balanced, 30);
    assert_eq!(balanced["devices"].as_array().unwrap().len(), 2);
    // Where `fill` would use one device alone.
    let fill = plan_json(&model, &[&base[..], &["2x1GiB"]].concat());
    assert_eq!(fill["devices"].as_array().unwrap().len(), 1);
    assert_eq!(fill["unused"], json!(["cpu:1"]));
}

#[test]
fn a_cap_is_kept_or_refused() {
    let Some(model) = shared("models/smollm2-135m-exl2-4.0bpw") else {
        return;
    };
    let arguments = ["--virtual-devices", "2GiB", "--cap", "cpu:0=300MiB"];
    let capped = plan_json(&model, &arguments);
    is_consistent(&capped, 30);
    assert_eq!(number(&capped["devices"][0]["limit"]), 300 << 20);
    let with_context = [&arguments[..], &["--context", "8192"]].concat();
    plan(&model, &with_context).failed_with(&["300.00 MiB", "what would fit"]);
    plan(&model, &["--cap", "cpu:7=1GiB"]).failed_with(&["cpu:7", "cpu:0"]);
}

#[test]
fn what_does_not_fit_is_refused_with_the_shortfall_and_what_would() {
    let arguments = ["--virtual-devices", "2x300KiB", "--context", "512"];
    let output = plan(&tiny("llama"), &arguments).failed_with(&["cpu:0", "what would fit"]);
    assert_eq!(output.stdout, "");

    let arguments = [&arguments[..], &["--json"]].concat();
    let output = plan(&tiny("llama"), &arguments);
    assert_eq!(output.code, 1, "{output:?}");
    assert_eq!(output.stderr, "");
    let answer = parsed(&output);
    assert_eq!(keys(&answer), ["fits", "infeasible"]);
    assert_eq!(answer["fits"], false);
    let infeasible = &answer["infeasible"];
    assert_eq!(number(&infeasible["asked"]["context_tokens"]), 512);
    let devices = infeasible["devices"].as_array().unwrap();
    assert!(devices.iter().any(|device| number(&device["short_by"]) > 0));
    let nearest = infeasible["nearest"].as_array().unwrap();
    assert!(!nearest.is_empty(), "{answer}");
    for alternative in nearest {
        assert!(!alternative["changes"].as_array().unwrap().is_empty());
        is_consistent(&alternative["plan"], 2);
    }
}

#[test]
fn sizes_without_a_unit_are_usage_errors_with_both_meanings() {
    for arguments in [["--cap", "cpu:0=300"], ["--virtual-devices", "2x300"]] {
        let output = plan(&tiny("llama"), &arguments);
        assert_eq!(output.code, 2, "{output:?}");
        for text in ["\"300\" has no unit", "300GiB", "300B"] {
            assert!(output.stderr.contains(text), "{output:?}");
        }
    }
    for arguments in [
        ["--gpu-split", "20;24"],
        ["--gpu-split", "0,0"],
        ["--cap", "300MiB"],
    ] {
        let output = plan(&tiny("llama"), &arguments);
        assert_eq!(output.code, 2, "{output:?}");
    }
}

#[test]
fn a_context_beyond_the_models_is_refused() {
    plan(&tiny("llama"), &["--context", "513"]).failed_with(&["513", "at most 512"]);
    plan(&tiny("llama"), &["--context", "0"]).failed_with(&["0", "at least 1"]);
}

#[test]
fn a_70b_model_is_planned_from_its_headers() {
    let folder = TempDir::new().unwrap();
    let model = llama_70b(&folder);
    let arguments = ["--virtual-devices", "8x24GiB", "--context", "8192"];
    let split = plan_json(&model, &arguments);
    is_consistent(&split, 80);
    assert!(split["devices"].as_array().unwrap().len() >= 6);
    // 80 layers × K and V × 8 heads of 128 × 2 bytes × 8192 tokens.
    assert_eq!(
        number(&split["totals"]["kv_cache"]),
        80 * 2 * 8 * 128 * 2 * 8192
    );
    // 70.55 billion parameters of 2 bytes, on which repacking puts little.
    let weights = number(&split["totals"]["weights"]) as f64 / 1e9;
    assert!((141.0..143.0).contains(&weights), "{weights}");

    plan(&model, &["--gpu-split", "20,24"]).failed_with(&["cpu:0", "cpu:1", "GiB"]);
    let uneven = plan_json(&model, &["--gpu-split", "0,80,80", "--context", "2048"]);
    is_consistent(&uneven, 80);
    let devices: Vec<&str> = uneven["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["device"].as_str().unwrap())
        .collect();
    assert_eq!(devices, ["cpu:1", "cpu:2"]);
}

#[test]
fn the_cache_of_a_long_context_model_is_what_does_not_fit() {
    let folder = TempDir::new().unwrap();
    let model = phi3_medium_128k(&folder);
    // 40 layers × K and V × 10 heads of 128 × 2 bytes for each token: 25 GiB for all.
    let token_bytes = 40 * 2 * 10 * 128 * 2;
    let whole = plan_json(&model, &["--virtual-devices", "80GiB"]);
    is_consistent(&whole, 40);
    assert_eq!(number(&whole["context_tokens"]), 131_072);
    assert_eq!(number(&whole["totals"]["kv_cache"]), 131_072 * token_bytes);

    // A card that holds the weights and a part of the context says how long a part.
    let arguments = [
        "--virtual-devices",
        "40GiB",
        "--context",
        "131072",
        "--json",
    ];
    let output = plan(&model, &arguments);
    assert_eq!(output.code, 1, "{output:?}");
    let answer = parsed(&output);
    let shorter = answer["infeasible"]["nearest"]
        .as_array()
        .unwrap()
        .iter()
        .find(|alternative| alternative["changes"][0]["change"] == "context")
        .expect("a shorter context");
    let tokens = number(&shorter["changes"][0]["tokens"]);
    assert!((4096..131_072).contains(&tokens), "{tokens}");
    let context = tokens.to_string();
    let fits = ["--virtual-devices", "40GiB", "--context", &context];
    is_consistent(&plan_json(&model, &fits), 40);
    // And not a page more.
    let longer = (tokens + 256).to_string();
    plan(
        &model,
        &["--virtual-devices", "40GiB", "--context", &longer],
    )
    .failed_with(&["cpu:0"]);
}
