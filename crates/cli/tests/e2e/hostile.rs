//! Damaged and contradictory model directories: a message that names the file and what to do,
//! exit code 1, and never a panic.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::common::{Output, Oxllama};
use crate::support::{edit_json, tiny, tiny_directory};

fn generate(model: &Path, arguments: &[&str]) -> Output {
    Oxllama::new()
        .arg("generate")
        .arg(model)
        .args(["--prompt", "hi", "--max-tokens", "2"])
        .args(arguments)
        .run()
}

/// Damages a tiny model's directory and expects `generate` to say `texts`.
#[track_caller]
fn refused(damage: impl FnOnce(&Path), texts: &[&str]) {
    let (_folder, directory) = tiny_directory("llama");
    damage(&directory);
    let output = generate(&directory, &[]).failed_with(texts);
    assert!(
        output.stderr.contains(directory.to_str().unwrap()),
        "{output:?}"
    );
    assert_eq!(output.stdout, "");
    assert!(output.stderr.starts_with("oxllama: "), "{}", output.stderr);
}

#[test]
fn missing_files_are_named() {
    for (name, help) in [
        ("config.json", "expected"),
        ("tokenizer.json", "expected"),
        ("model.safetensors", "at least one safetensors file"),
    ] {
        refused(
            |directory| fs::remove_file(directory.join(name)).unwrap(),
            &[name.trim_start_matches("model"), help],
        );
    }
}

#[test]
fn files_that_are_cut_short_are_named() {
    let cut = |name: &'static str, bytes: u64| {
        move |directory: &Path| {
            let file = fs::OpenOptions::new()
                .write(true)
                .open(directory.join(name))
                .unwrap();
            let length = file.metadata().unwrap().len();
            file.set_len(length.min(bytes)).unwrap();
        }
    };
    refused(
        cut("model.safetensors", 100_000),
        &["model.safetensors", "truncated"],
    );
    refused(
        cut("model.safetensors", 40),
        &["model.safetensors", "truncated"],
    );
    refused(cut("model.safetensors", 3), &["model.safetensors"]);
    refused(cut("model.safetensors", 0), &["model.safetensors"]);
    refused(cut("config.json", 30), &["config.json", "invalid JSON"]);
    refused(
        cut("tokenizer.json", 500),
        &["tokenizer.json", "fetch the file again"],
    );
}

#[test]
fn a_header_that_claims_to_be_huge_is_refused() {
    refused(
        |directory| {
            fs::write(directory.join("model.safetensors"), [0xff; 64]).unwrap();
        },
        &["model.safetensors"],
    );
}

#[test]
fn a_config_that_contradicts_the_tensors_is_refused_with_both_values() {
    let set = |key: &'static str, value: serde_json::Value| {
        move |directory: &Path| {
            edit_json(&directory.join("config.json"), |config| config[key] = value);
        }
    };
    refused(
        set("intermediate_size", json!(96)),
        &["config.json", "64", "96"],
    );
    refused(
        set("vocab_size", json!(999)),
        &["config.json", "380", "999"],
    );
    refused(set("num_hidden_layers", json!(3)), &["model.layers.2."]);
    refused(
        set("num_key_value_heads", json!(3)),
        &["num_key_value_heads"],
    );
    refused(
        set("hidden_size", json!(-5)),
        &["config.json", "hidden_size", "-5"],
    );
    refused(
        set("hidden_size", json!(u64::MAX)),
        &["config.json", "hidden_size"],
    );
    refused(
        set("rope_theta", json!("a lot")),
        &["config.json", "rope_theta", "a lot"],
    );
}

#[test]
fn an_unknown_architecture_is_named_with_the_known_ones() {
    refused(
        |directory| {
            edit_json(&directory.join("config.json"), |config| {
                config["architectures"] = json!(["MambaForCausalLM"]);
                config["model_type"] = json!("mamba");
            });
        },
        &["MambaForCausalLM", "LlamaForCausalLM"],
    );
}

#[test]
fn documents_that_are_not_utf8_are_refused() {
    for name in ["config.json", "tokenizer_config.json"] {
        refused(
            |directory| fs::write(directory.join(name), b"{\"a\": \"\xff\"}").unwrap(),
            &[name, "UTF-8"],
        );
    }
}

#[test]
fn weights_that_are_not_numbers_are_named() {
    let (_folder, directory) = tiny_directory("llama");
    let path = directory.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    // fp16 0x7e7e is not a number; the header stays.
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[start..].fill(0x7e);
    fs::write(&path, bytes).unwrap();
    for device in ["cpu", "reference"] {
        generate(&directory, &["--device", device])
            .failed_with(&["model.safetensors", "found NaN, expected a finite number"]);
    }
}

#[test]
fn a_template_that_raises_is_quoted() {
    let (_folder, directory) = tiny_directory("llama");
    let template = |text: &'static str| {
        edit_json(&directory.join("tokenizer_config.json"), |config| {
            config["chat_template"] = json!(text);
        });
        generate(&directory, &["--chat"])
    };
    template("{{ raise_exception('roles must alternate') }}")
        .failed_with(&["refuses these messages", "roles must alternate"]);
    template("{% for m in %}").failed_with(&["chat template cannot be parsed"]);
    template("{{ messages[7].content.x }}").failed_with(&["chat template failed"]);
    template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
        .failed_with(&["does not come to an end"]);
    // Without --chat the template is not looked at.
    generate(&directory, &[]).succeeded();
}

#[test]
fn a_damaged_gguf_file_is_refused() {
    let command = Oxllama::new();
    let whole = fs::read(tiny("llama")).unwrap();
    let path = command.path("damaged.gguf");
    for length in [0, 3, 4, 20, 1000, 20_000, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let output = generate(&path, &[]).failed_with(&["damaged.gguf"]);
        assert_eq!(output.stdout, "");
    }
    fs::write(&path, "not a model at all").unwrap();
    generate(&path, &[]).failed_with(&["damaged.gguf", "not a GGUF file"]);
}

#[test]
fn an_empty_directory_and_a_strange_file_are_no_models() {
    let command = Oxllama::new();
    generate(&command.path(""), &[]).failed_with(&["config.json"]);
    generate(Path::new("/dev/null"), &[]).failed_with(&["/dev/null"]);
}

#[test]
fn every_command_refuses_a_damaged_model_alike() {
    let (_folder, directory) = tiny_directory("llama");
    fs::write(directory.join("model.safetensors"), b"????????????").unwrap();
    fs::write(directory.join("text.txt"), "hello").unwrap();
    let text = directory.join("text.txt");
    let text = text.to_str().unwrap();
    let commands: [&[&str]; 5] = [
        &["plan"],
        &["inspect"],
        &["bench"],
        &["chat"],
        &["eval", "--text", text],
    ];
    for command in commands {
        Oxllama::new()
            .args(command)
            .arg(&directory)
            .run()
            .failed_with(&["model.safetensors"]);
    }
}
