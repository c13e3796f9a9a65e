//! `oxllama inspect`, `devices` and `import`: what a model is, and what there is to run it on.

use std::path::Path;

use serde_json::Value;

use crate::common::{Output, Oxllama};
use crate::support::{generate, json, keys, shared, tiny, tiny_directory};

fn inspect(model: &Path, arguments: &[&str]) -> Output {
    Oxllama::new()
        .arg("inspect")
        .arg(model)
        .args(arguments)
        .run()
        .succeeded()
}

#[test]
fn inspect_describes_a_tiny_model() {
    let report = json(&inspect(&tiny("llama"), &["--json"]));
    let expected = [
        ("layers", 2),
        ("hidden_size", 64),
        ("intermediate_size", 64),
        ("heads", 4),
        ("kv_heads", 2),
        ("head_dim", 16),
        ("vocab_size", 380),
        ("max_context_tokens", 512),
        // Embedding and head 380 × 64 each, a layer 4 × 64 × 64 of attention (k and v are half
        // as wide) less one, and 3 × 64 × 64 of the feed-forward part.
        ("parameters", 2 * 380 * 64 + 2 * (3 + 3) * 64 * 64),
    ];
    assert_eq!(report["architecture"], "LlamaForCausalLM");
    for (field, value) in expected {
        assert_eq!(report[field], value, "{field}");
    }
    let linears = report["linears"].as_array().unwrap();
    assert_eq!(linears.len(), 2 + 2 * 7);
    assert_eq!(
        keys(&linears[0]),
        [
            "name",
            "in_features",
            "out_features",
            "encoding",
            "bits_per_weight",
            "stored_bytes"
        ]
    );
    let page = inspect(&tiny("llama"), &[]).stdout;
    assert!(
        page.starts_with("LlamaForCausalLM: 2 layers, hidden 64"),
        "{page}"
    );
    assert!(page.contains("model.layers.1.mlp.down_proj"), "{page}");
    assert_eq!(
        page.lines().filter(|line| line.contains("_proj")).count(),
        14
    );
}

#[test]
fn inspect_counts_the_bits_of_the_exl2_model() {
    let Some(model) = shared("models/smollm2-135m-exl2-4.0bpw") else {
        return;
    };
    let report = json(&inspect(&model, &["--json"]));
    let number = |field: &str| report[field].as_f64().unwrap();
    // The converter was asked for 4.0 bits and came close.
    assert!(
        (3.9..4.2).contains(&number("layer_bits_per_weight")),
        "{report}"
    );
    assert!(number("bits_per_weight") > number("layer_bits_per_weight"));
    assert_eq!(number("stored_bytes"), 132_825_354.0);
    // What the decode floor is computed from.
    assert!((75e6..77e6).contains(&number("bytes_per_token")));
    let linears = report["linears"].as_array().unwrap();
    let exl2 = |linear: &&Value| linear["encoding"] == "exl2";
    assert_eq!(linears.iter().filter(exl2).count(), 30 * 7 + 1);
}

#[test]
fn devices_lists_the_cpu() {
    let devices = json(&Oxllama::new().args(["devices", "--json"]).run().succeeded());
    let cpu = &devices["cpu"];
    assert_eq!(cpu["id"], "cpu:0");
    let number = |field: &str| cpu[field].as_u64().unwrap();
    assert!(number("threads") >= 1);
    assert!(number("memory_bytes") >= number("available_bytes"));
    assert!(number("available_bytes") > 0);
    for field in ["name", "instructions"] {
        assert!(!cpu[field].as_str().unwrap().is_empty(), "{field}");
    }
    let page = Oxllama::new().arg("devices").run().succeeded().stdout;
    assert!(page.starts_with("cpu:0  "), "{page}");
    assert!(page.contains("available"), "{page}");
    // Either there are GPUs, or it says why not and what that means.
    let gpus = devices["gpus"].as_array().unwrap();
    assert_eq!(gpus.is_empty(), devices["no_gpus"].is_string());
    assert_eq!(
        gpus.is_empty(),
        page.contains("models run on the CPU"),
        "{page}"
    );
}

#[test]
fn a_gpu_that_is_not_there_is_refused_with_the_way_out() {
    let devices = json(&Oxllama::new().args(["devices", "--json"]).run().succeeded());
    if let Some(reason) = devices["no_gpus"].as_str() {
        let model = tiny("llama");
        let arguments = ["plan", model.to_str().unwrap(), "--device", "cuda"];
        let refused = Oxllama::new().args(arguments).run();
        refused.failed_with(&["--device cpu", reason]);
    }
}

#[test]
fn an_imported_model_generates_what_its_gguf_file_does() {
    for family in ["llama", "gemma2", "phi3"] {
        let (_folder, directory) = tiny_directory(family);
        let arguments = ["--greedy", "--max-tokens", "12", "--logprobs", "4"];
        let from_file = generate(&tiny(family), "hello world", &arguments);
        let from_directory = generate(&directory, "hello world", &arguments);
        for field in ["text", "token_ids", "prompt_token_ids", "logprobs"] {
            assert_eq!(from_file[field], from_directory[field], "{family} {field}");
        }
    }
}

#[test]
fn import_writes_a_hugging_face_directory_and_overwrites_none() {
    let (_folder, directory) = tiny_directory("llama");
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        assert!(directory.join(name).is_file(), "{name}");
    }
    let import =
        |file: &Path, directory: &Path| Oxllama::new().arg("import").arg(file).arg(directory).run();
    import(&tiny("llama"), &directory).failed_with(&[directory.to_str().unwrap(), "not empty"]);
    let new = directory.with_extension("new");
    import(&directory.join("config.json"), &new).failed_with(&["config.json", "not a GGUF file"]);
    import(&directory.join("none.gguf"), &new).failed_with(&["none.gguf"]);
    import(&directory, &new).failed_with(&["is a directory", "expected a .gguf file"]);
    assert!(!new.exists());
}
