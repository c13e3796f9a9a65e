//! `oxllama generate` with several prompts, choices, constraints, guesses and adapters.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{Output, Oxllama};
use crate::support::{generate, ids, json, tiny, tiny_directory};

const PROMPTS: [&str; 3] = ["hello world", "the quick brown fox", "a"];

/// `oxllama generate MODEL --context 128 -n 16 ARGUMENTS`
fn run(model: &Path, arguments: &[&str]) -> Output {
    Oxllama::new()
        .arg("generate")
        .arg(model)
        .args(["--context", "128", "-n", "16"])
        .args(arguments)
        .run()
}

#[track_caller]
fn run_json(model: &Path, arguments: &[&str]) -> Value {
    json(&run(model, &[&["--json"], arguments].concat()).succeeded())
}

/// Every prompt as an argument of its own.
fn prompts<'a>(prompts: &[&'a str]) -> Vec<&'a str> {
    prompts.iter().flat_map(|&p| ["--prompt", p]).collect()
}

const DRAWN: [&str; 4] = ["--seed", "7", "--temperature", "1.2"];

#[test]
fn several_prompts_are_answered_as_each_is_alone() {
    let model = tiny("llama");
    let together = run_json(&model, &[&prompts(&PROMPTS)[..], &DRAWN].concat());
    let together = together.as_array().unwrap();
    assert_eq!(together.len(), 3);
    for (prompt, answer) in PROMPTS.iter().zip(together) {
        let alone = run_json(&model, &[&["--prompt", prompt], &DRAWN[..]].concat());
        for field in ["text", "token_ids", "prompt_token_ids", "finish_reason"] {
            assert_eq!(answer[field], alone[field], "{prompt}: {field}");
        }
    }
    // Two at a time, or all in a cache that does not hold all.
    for way in [
        ["--batch", "2"],
        ["--batch", "1"],
        ["--cache-tokens", "256"],
    ] {
        let other = run_json(&model, &[&prompts(&PROMPTS)[..], &DRAWN, &way].concat());
        for (answer, other) in together.iter().zip(other.as_array().unwrap()) {
            assert_eq!(answer["token_ids"], other["token_ids"], "{way:?}");
        }
    }
}

#[test]
fn several_texts_have_headers_in_order() {
    let model = tiny("llama");
    let arguments = [&prompts(&PROMPTS[..2])[..], &["--greedy"]].concat();
    let output = run(&model, &arguments).succeeded();
    let texts = run_json(&model, &arguments);
    let text = |index: usize| texts[index]["text"].as_str().unwrap();
    let expected = format!(
        "=== prompt 1 ===\n{}\n=== prompt 2 ===\n{}\n",
        text(0),
        text(1)
    );
    assert_eq!(output.stdout, expected);
    assert!(output.stderr.contains("2 prompts"), "{output:?}");
}

#[test]
fn choices_differ_and_the_first_is_what_one_job_gets() {
    let model = tiny("llama");
    let arguments = [&["--prompt", PROMPTS[0]], &DRAWN[..]].concat();
    let one = run_json(&model, &arguments);
    let answer = run_json(&model, &[&arguments[..], &["--choices", "3"]].concat());
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    assert_eq!(choices[0]["token_ids"], one["token_ids"]);
    assert_ne!(choices[0]["token_ids"], choices[1]["token_ids"]);
    assert_ne!(choices[1]["token_ids"], choices[2]["token_ids"]);
    let page = run(&model, &[&arguments[..], &["--choices", "2"]].concat()).succeeded();
    assert!(
        page.stdout.contains("=== prompt 1, choice 2 ===\n"),
        "{page:?}"
    );
}

#[test]
fn a_prompt_that_cannot_be_answered_does_not_harm_the_others() {
    let model = tiny("llama");
    let long = "hello world ".repeat(200);
    let arguments = [&prompts(&[&long, "hi"])[..], &["--greedy", "--json"]].concat();
    let output = run(&model, &arguments).failed_with(&["prompt 1: the prompt has"]);
    let answers = json(&output);
    assert!(answers[0]["error"].as_str().unwrap().contains("holds 128"));
    assert_eq!(ids(&answers[1]["token_ids"]).len(), 16);
}

#[test]
fn constraints_decide_what_the_answer_looks_like() {
    let model = tiny("llama");
    let folder = tempfile::TempDir::new().unwrap();
    let schema = folder.path().join("schema.json");
    let object = json!({
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": false
    });
    fs::write(&schema, object.to_string()).unwrap();
    let grammar = folder.path().join("grammar.lark");
    fs::write(&grammar, "start: \"left\" | \"right\"\n").unwrap();
    let text = |options: &[&str]| {
        let arguments = [&["--prompt", PROMPTS[0], "--seed", "3"], options].concat();
        let answer = generate(&model, "x", &[&["-n", "60"], &arguments[2..]].concat());
        assert_eq!(answer["finish_reason"], "stop", "{options:?}");
        answer["text"].as_str().unwrap().to_owned()
    };
    let chosen = text(&["--choice", "yes", "--choice", "no"]);
    assert!(["yes", "no"].contains(&chosen.as_str()), "{chosen}");
    let number = text(&["--regex", "[0-9]{3}-[0-9]{2}"]);
    let digits = number.replace('-', "");
    assert!(digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()));
    let side = text(&["--grammar", grammar.to_str().unwrap()]);
    assert!(["left", "right"].contains(&side.as_str()), "{side}");
    let document: Value =
        serde_json::from_str(&text(&["--json-schema", schema.to_str().unwrap()])).unwrap();
    assert!(document["ok"].is_boolean(), "{document}");
}

#[test]
fn constraint_files_are_read_before_the_model() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("schema.json");
    let no_model = Path::new("no-such-model");
    let arguments = ["--prompt", "a", "--json-schema", path.to_str().unwrap()];
    run(no_model, &arguments).failed_with(&["schema.json", "cannot read"]);
    fs::write(&path, "{type: object}").unwrap();
    run(no_model, &arguments).failed_with(&["schema.json is not JSON"]);
    run(no_model, &["--prompt", "a", "--ban", ""]).failed_with(&["empty"]);
    // What only the compiler can know.
    run(&tiny("llama"), &["--prompt", "a", "--regex", "(("]).failed_with(&["regular expression"]);
}

#[test]
fn banned_text_is_not_written_and_the_least_length_is_kept() {
    let model = tiny("llama");
    let arguments = ["--greedy", "-n", "24"];
    let free = generate(&model, PROMPTS[0], &arguments);
    let text = free["text"].as_str().unwrap();
    let (middle, _) = text.char_indices().nth(text.chars().count() / 2).unwrap();
    let banned: String = text[middle..].chars().take(4).collect();
    let answer = generate(
        &model,
        PROMPTS[0],
        &[&arguments[..], &["--ban", &banned]].concat(),
    );
    let other = answer["text"].as_str().unwrap();
    assert!(!other.to_lowercase().contains(&banned.to_lowercase()));
    assert!(other.starts_with(&text[..1]));
    run(&model, &["--prompt", "a", "--min-tokens", "17"]).failed_with(&["min_new_tokens is 17"]);
}

#[test]
fn guesses_do_not_change_the_answers() {
    let draft = tiny("phi3");
    let draft = draft.to_str().unwrap();
    // The same vocabulary, other weights.
    let model = tiny("llama");
    let repetitive = "the fox the fox the fox the fox the";
    let prompts = prompts(&[repetitive, PROMPTS[1]]);
    for sampling in [&["--greedy"][..], &DRAWN] {
        let arguments = [&prompts[..], sampling].concat();
        let plain = run_json(&model, &arguments);
        let ways: [&[&str]; 3] = [
            &["--ngram"],
            &["--draft", draft],
            &["--draft", draft, "--draft-tokens", "2", "--batch", "1"],
        ];
        for way in ways {
            let guessed = run_json(&model, &[&arguments[..], way].concat());
            for index in 0..2 {
                let (plain, guessed) = (&plain[index], &guessed[index]);
                assert_eq!(plain["token_ids"], guessed["token_ids"], "{way:?}");
                if way[0] == "--draft" {
                    assert_ne!(guessed["usage"]["drafted_tokens"], 0, "{way:?}");
                }
            }
        }
    }
}

#[test]
fn a_draft_model_of_another_vocabulary_is_refused() {
    let draft = tiny("qwen2");
    let arguments = ["--prompt", "a", "--draft", draft.to_str().unwrap()];
    run(&tiny("llama"), &arguments).failed_with(&["another vocabulary", "344"]);
    let arguments = ["--prompt", "a", "--draft", "no-such-draft"];
    run(&tiny("llama"), &arguments).failed_with(&["draft model", "no-such-draft was not found"]);
}

#[test]
fn a_negative_prompt_of_scale_one_is_no_guidance() {
    let model = tiny("llama");
    let arguments = [&prompts(&PROMPTS[..2])[..], &["--greedy"]].concat();
    let plain = run_json(&model, &arguments);
    let guided = |scale: &str| {
        let guidance = ["--negative-prompt", "never", "--cfg-scale", scale];
        run_json(&model, &[&arguments[..], &guidance].concat())
    };
    let alike = guided("1");
    let steered = guided("-3");
    for index in 0..2 {
        assert_eq!(plain[index]["token_ids"], alike[index]["token_ids"]);
    }
    assert_ne!(plain[0]["token_ids"], steered[0]["token_ids"]);
    run(
        &model,
        &[
            "--prompt",
            "a",
            "--negative-prompt",
            "b",
            "--cfg-scale",
            "NaN",
        ],
    )
    .failed_with(&["guidance scale is NaN"]);
}

/// A LoRA adapter on one linear of the tiny Llama, of rank 1.
fn write_adapter(directory: &Path, b: f32) {
    fs::create_dir_all(directory).unwrap();
    let config =
        json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["v_proj"]});
    fs::write(directory.join("adapter_config.json"), config.to_string()).unwrap();
    let module = "base_model.model.model.layers.0.self_attn.v_proj";
    let (inputs, outputs) = (64, 32);
    let a_bytes = 4 * inputs;
    let header = json!({
        format!("{module}.lora_A.weight"):
            {"dtype": "F32", "shape": [1, inputs], "data_offsets": [0, a_bytes]},
        format!("{module}.lora_B.weight"):
            {"dtype": "F32", "shape": [outputs, 1], "data_offsets": [a_bytes, a_bytes + 4 * outputs]},
    })
    .to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..inputs).flat_map(|_| 1_f32.to_le_bytes()));
    bytes.extend((0..outputs).flat_map(|_| b.to_le_bytes()));
    fs::write(directory.join("adapter_model.safetensors"), bytes).unwrap();
}

#[test]
fn an_adapter_changes_all_answers_by_its_scale() {
    let (folder, model) = tiny_directory("llama");
    let adapter = folder.path().join("adapter");
    write_adapter(&adapter, 2.0);
    let arguments = [&prompts(&PROMPTS[..2])[..], &["--greedy"]].concat();
    let token_ids = |lora: &[&str]| {
        let answers = run_json(&model, &[&arguments[..], lora].concat());
        [0, 1].map(|index| ids(&answers[index]["token_ids"]))
    };
    let plain = token_ids(&[]);
    let path = adapter.to_str().unwrap();
    let adapted = token_ids(&["--lora", path]);
    assert_ne!(plain[0], adapted[0]);
    assert_ne!(plain[1], adapted[1]);
    assert_eq!(plain, token_ids(&["--lora", &format!("{path}=0")]));
    assert_eq!(adapted, token_ids(&["--lora", &format!("{path}=1")]));
    let elsewhere = ["--prompt", "a", "--lora", "no/such/adapter"];
    run(&model, &elsewhere).failed_with(&["no/such/adapter", "adapter_config.json"]);
}

#[test]
fn contradictory_options_are_usage_errors() {
    let cases: [&[&str]; 11] = [
        &["--prompt", "a", "--regex", "a", "--choice", "a"],
        &["--prompt", "a", "--json-schema", "a", "--grammar", "a"],
        &["--prompt", "a", "--draft", "b", "--ngram"],
        &["--prompt", "a", "--draft-tokens", "3"],
        &["--prompt", "a", "--cfg-scale", "3"],
        &["--prompt", "a", "--choices", "0"],
        &["--prompt", "a", "--batch", "0"],
        &["--prompt", "a", "--input", "b", "--output", "c"],
        &["--input", "b"],
        &["--input", "b", "--output", "c", "--json"],
        &["--prompt", "a", "--latency-factor", "0.5"],
    ];
    for case in cases {
        let output = run(&tiny("llama"), case);
        assert_eq!(output.code, 2, "{case:?}: {output:?}");
        assert!(output.stderr.contains("error:"), "{output:?}");
    }
    run(&tiny("llama"), &prompts(&["-", "-"])).failed_with(&["--prompt - was given twice"]);
}

#[test]
fn a_limit_on_latency_does_not_change_the_answers() {
    let model = tiny("llama");
    let arguments = [&prompts(&PROMPTS)[..], &["--greedy"]].concat();
    let plain = run_json(&model, &arguments);
    let limited = run_json(
        &model,
        &[&arguments[..], &["--latency-factor", "1"]].concat(),
    );
    for index in 0..3 {
        assert_eq!(plain[index]["token_ids"], limited[index]["token_ids"]);
    }
}
