//! `oxllama generate` on tiny models: what it prints, and that nothing but the job decides it.

use crate::common::{Output, Oxllama};
use crate::support::{edit_json, generate, ids, json, keys, tiny, tiny_directory};

const PROMPT: &str = "hello world";

/// Greedy tokens of the tiny Llama with further options.
#[track_caller]
fn greedy_ids(options: &[&str]) -> Vec<u64> {
    let arguments = [&["--greedy", "--max-tokens", "24"], options].concat();
    ids(&generate(&tiny("llama"), PROMPT, &arguments)["token_ids"])
}

/// `oxllama generate` on the tiny Llama with anything at all.
fn run(arguments: &[&str]) -> Output {
    command(arguments).run()
}

fn command(arguments: &[&str]) -> Oxllama {
    Oxllama::new()
        .arg("generate")
        .arg(tiny("llama"))
        .args(arguments)
}

#[test]
fn the_json_object_has_the_promised_fields() {
    let arguments = ["--greedy", "--max-tokens", "5", "--logprobs", "3"];
    let answer = generate(&tiny("llama"), PROMPT, &arguments);
    assert_eq!(
        keys(&answer),
        [
            "text",
            "token_ids",
            "prompt_token_ids",
            "finish_reason",
            "logprobs",
            "usage",
            "timings"
        ]
    );
    let token_ids = ids(&answer["token_ids"]);
    assert_eq!(token_ids.len(), 5);
    assert_eq!(answer["finish_reason"], "length");
    assert!(!answer["text"].as_str().unwrap().is_empty());
    // The model's own BOS, once.
    let prompt_ids = ids(&answer["prompt_token_ids"]);
    assert_eq!(prompt_ids[0], 1);
    assert!(prompt_ids.len() > 1 && prompt_ids[1] != 1);

    let logprobs = answer["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 5);
    for (token_id, entry) in token_ids.iter().zip(logprobs) {
        assert_eq!(keys(entry), ["token_id", "logprob", "top"]);
        assert_eq!(entry["token_id"], *token_id);
        let top = entry["top"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!(keys(&top[0]), ["token_id", "logprob"]);
        // Greedy: the token drawn is the most likely.
        assert_eq!(top[0]["token_id"], *token_id);
        assert_eq!(top[0]["logprob"], entry["logprob"]);
        let falling: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(falling[0] < 0.0 && falling.is_sorted_by(|a, b| a >= b));
    }

    let usage = &answer["usage"];
    assert_eq!(
        keys(usage),
        [
            "prompt_tokens",
            "cached_tokens",
            "generated_tokens",
            "drafted_tokens",
            "accepted_tokens",
            "preemptions"
        ]
    );
    assert_eq!(usage["prompt_tokens"], prompt_ids.len());
    assert_eq!(usage["generated_tokens"], 5);
    assert_eq!(usage["drafted_tokens"], 0);

    let timings = &answer["timings"];
    assert_eq!(
        keys(timings),
        [
            "load_s",
            "queue_s",
            "prompt_tokens",
            "prefill_s",
            "generated_tokens",
            "decode_s",
            "decode_steps"
        ]
    );
    assert_eq!(timings["decode_steps"], 4);
    assert_eq!(timings["prompt_tokens"], prompt_ids.len());
    assert_eq!(timings["generated_tokens"], 5);
    for name in ["load_s", "prefill_s", "decode_s"] {
        assert!(timings[name].as_f64().unwrap() > 0.0, "{name}");
    }
}

#[test]
fn logprobs_are_null_unless_asked_for_and_may_list_no_others() {
    let answer = generate(&tiny("llama"), PROMPT, &["--greedy", "--max-tokens", "2"]);
    assert!(answer["logprobs"].is_null());
    let arguments = ["--greedy", "--max-tokens", "2", "--logprobs", "0"];
    let answer = generate(&tiny("llama"), PROMPT, &arguments);
    assert_eq!(answer["logprobs"][1]["top"].as_array().unwrap().len(), 0);
}

#[test]
fn generation_ends_at_any_eos_token_and_leaves_it_out() {
    let (_folder, directory) = tiny_directory("llama");
    let all = greedy_ids(&[]);
    let end = all[7];
    let first = all.iter().position(|&id| id == end).unwrap();
    // The model's own EOS and another, as generation_config.json may list them.
    let config = format!("{{\"eos_token_id\": [2, {end}]}}");
    std::fs::write(directory.join("generation_config.json"), config).unwrap();
    let arguments = ["--greedy", "--max-tokens", "24"];
    let answer = generate(&directory, PROMPT, &arguments);
    assert_eq!(ids(&answer["token_ids"]), all[..first]);
    assert_eq!(answer["finish_reason"], "stop");
    assert_eq!(answer["timings"]["generated_tokens"], first);
}

#[test]
fn plain_output_is_the_json_text() {
    let arguments = ["--greedy", "--max-tokens", "24"];
    let answer = generate(&tiny("llama"), PROMPT, &arguments);
    let output = run(&[&["--prompt", PROMPT], &arguments[..]].concat()).succeeded();
    assert_eq!(
        output.stdout,
        format!("{}\n", answer["text"].as_str().unwrap())
    );
    assert!(
        output.stderr.contains("prompt tokens in"),
        "{}",
        output.stderr
    );
}

#[test]
fn the_prompt_may_come_from_standard_input() {
    let output = command(&["--prompt", "-", "--greedy", "-n", "24", "--json"])
        .stdin(PROMPT)
        .run()
        .succeeded();
    assert_eq!(ids(&json(&output)["token_ids"]), greedy_ids(&[]));
}

#[test]
fn standard_input_that_is_not_utf8_is_refused() {
    command(&["--prompt", "-"])
        .stdin_bytes(b"abc\xff\xfe")
        .run()
        .failed_with(&["standard input is not UTF-8", "byte 3"]);
}

#[test]
fn where_and_how_a_model_is_computed_does_not_change_its_tokens() {
    let expected = greedy_ids(&[]);
    let ways: [&[&str]; 10] = [
        &["--device", "reference"],
        &["--threads", "1"],
        &["--threads", "2"],
        &["--threads", "3"],
        &["--cache", "fp32"],
        &["--virtual-devices", "2x1300KiB", "--context", "256"],
        &["--gpu-split", "0.00124,1", "--context", "256"],
        &["--policy", "balanced", "--virtual-devices", "3x2MiB"],
        &["--context", "64"],
        &["--chunk", "1"],
    ];
    for way in ways {
        assert_eq!(greedy_ids(way), expected, "{way:?}");
    }
}

#[test]
fn a_model_split_over_devices_gives_the_same_numbers() {
    let arguments = ["--greedy", "-n", "8", "--logprobs", "5", "--context", "256"];
    let whole = generate(&tiny("llama"), PROMPT, &arguments);
    let devices = ["--virtual-devices", "2x1300KiB"];
    let split = generate(&tiny("llama"), PROMPT, &[&arguments[..], &devices].concat());
    for field in ["text", "token_ids", "logprobs"] {
        assert_eq!(whole[field], split[field], "{field}");
    }
    // Neither device could hold the model alone.
    let plan = Oxllama::new()
        .arg("plan")
        .arg(tiny("llama"))
        .args(devices)
        .args(["--context", "256", "--json"])
        .run()
        .succeeded();
    assert_eq!(json(&plan)["plan"]["devices"].as_array().unwrap().len(), 2);
}

#[test]
fn the_chunk_that_a_refused_plan_proposes_is_enough() {
    let devices = ["--virtual-devices", "2x300KiB", "--context", "512"];
    run(&[&["--prompt", PROMPT], &devices[..]].concat()).failed_with(&[
        "the workspace for so large a chunk",
        "a chunk of at most 41 tokens",
    ]);
    assert_eq!(
        greedy_ids(&[&devices[..], &["--chunk", "41"]].concat()),
        greedy_ids(&[])
    );
}

#[test]
fn every_tiny_family_generates_the_same_on_both_backends() {
    for family in ["llama3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"] {
        let arguments = ["--greedy", "--max-tokens", "6"];
        let fast = generate(&tiny(family), PROMPT, &arguments);
        let reference = [&arguments[..], &["--device", "reference"]].concat();
        let reference = generate(&tiny(family), PROMPT, &reference);
        assert_eq!(fast["token_ids"], reference["token_ids"], "{family}");
    }
}

#[test]
fn the_seed_decides_the_draw() {
    let draw = |seed: &str| {
        let arguments = ["--seed", seed, "--temperature", "1.5", "--top-k", "0"];
        let arguments = [&arguments[..], &["--top-p", "1", "--max-tokens", "16"]].concat();
        ids(&generate(&tiny("llama"), PROMPT, &arguments)["token_ids"])
    };
    assert_eq!(draw("7"), draw("7"));
    assert_ne!(draw("7"), draw("8"));
}

#[test]
fn sampling_options_reach_the_sampler() {
    let expected = greedy_ids(&[]);
    for one_choice in [
        ["--temperature", "0"],
        ["--top-k", "1"],
        ["--top-p", "0.000001"],
        ["--min-p", "1"],
    ] {
        let arguments = ["--repetition-penalty", "1", "--max-tokens", "24"];
        let arguments = [&arguments[..], &one_choice].concat();
        let answer = generate(&tiny("llama"), PROMPT, &arguments);
        assert_eq!(ids(&answer["token_ids"]), expected, "{one_choice:?}");
    }
}

#[test]
fn generation_config_gives_the_defaults() {
    let (_folder, directory) = tiny_directory("llama");
    let path = directory.join("generation_config.json");
    std::fs::write(&path, "{\"do_sample\": false}").unwrap();
    let answer = generate(&directory, PROMPT, &["--max-tokens", "24"]);
    assert_eq!(ids(&answer["token_ids"]), greedy_ids(&[]));
    std::fs::write(&path, "{\"temperature\": -3}").unwrap();
    Oxllama::new()
        .arg("generate")
        .arg(&directory)
        .args(["--prompt", PROMPT])
        .run()
        .failed_with(&["temperature is -3", "0 to 100"]);
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let arguments = ["--greedy", "--max-tokens", "24"];
    let whole = generate(&tiny("llama"), PROMPT, &arguments);
    let text = whole["text"].as_str().unwrap();
    // From the middle of the text, so that it begins within a token and spans several.
    let (middle, _) = text.char_indices().nth(text.chars().count() / 2).unwrap();
    let stop: String = text[middle..].chars().take(3).collect();
    let before = &text[..text.find(&stop).unwrap()];
    let stopped = [&arguments[..], &["--stop", &stop, "--stop", "\u{1}never"]].concat();
    let answer = generate(&tiny("llama"), PROMPT, &stopped);
    assert_eq!(answer["text"], before);
    assert_eq!(answer["finish_reason"], "stop");
    assert!(ids(&answer["token_ids"]).len() < 24);
    // Streamed text holds back what may become a stop string.
    let output = run(&[&["--prompt", PROMPT], &stopped[..]].concat()).succeeded();
    assert_eq!(output.stdout, format!("{before}\n"));
    run(&["--prompt", PROMPT, "--stop", ""]).failed_with(&["stop string 0 is empty"]);
}

#[test]
fn no_tokens_are_generated_when_none_are_asked_for() {
    let answer = generate(&tiny("llama"), PROMPT, &["--max-tokens", "0"]);
    assert_eq!(answer["text"], "");
    assert_eq!(ids(&answer["token_ids"]), [0; 0]);
    assert_eq!(answer["finish_reason"], "length");
}

#[test]
fn an_empty_prompt_needs_a_model_with_bos() {
    let answer = generate(&tiny("llama"), "", &["--greedy", "--max-tokens", "2"]);
    assert_eq!(ids(&answer["prompt_token_ids"]), [1]);
    assert_eq!(ids(&answer["token_ids"]).len(), 2);
    Oxllama::new()
        .arg("generate")
        .arg(tiny("qwen2"))
        .args(["--prompt", ""])
        .run()
        .failed_with(&["the prompt is empty", "at least one character"]);
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_with_both_lengths() {
    let prompt = "hello world ".repeat(40);
    run(&["--prompt", &prompt, "--context", "16", "--json"]).failed_with(&[
        "the prompt has",
        "holds 16",
        "--context",
    ]);
}

#[test]
fn generation_ends_where_the_context_does() {
    let arguments = ["--greedy", "--context", "16", "--max-tokens", "100"];
    let answer = generate(&tiny("llama"), "hello", &arguments);
    assert_eq!(answer["finish_reason"], "length");
    let prompt_tokens = ids(&answer["prompt_token_ids"]).len();
    let generated = ids(&answer["token_ids"]);
    // The last token needs no place in the cache.
    assert_eq!(prompt_tokens + generated.len(), 17);
    assert_eq!(generated, greedy_ids_of("hello", generated.len()));
}

fn greedy_ids_of(prompt: &str, count: usize) -> Vec<u64> {
    let count = count.to_string();
    let answer = generate(&tiny("llama"), prompt, &["--greedy", "-n", &count]);
    ids(&answer["token_ids"])
}

#[test]
fn the_chat_template_is_used_when_asked_for() {
    let prompt_ids = |prompt: &str, options: &[&str]| {
        let arguments = [&["--greedy", "--max-tokens", "1"], options].concat();
        ids(&generate(&tiny("llama"), prompt, &arguments)["prompt_token_ids"])
    };
    // The tiny model's template writes "role: content" lines.
    let chat = prompt_ids("hello", &["--chat"]);
    let system = prompt_ids("hello", &["--system", "be kind"]);
    let raw = prompt_ids("hello", &["--raw"]);
    assert_eq!(raw, prompt_ids("hello", &[]));
    // The template writes no BOS, so the raw form of its text is the same but for that.
    let without_bos = |ids: Vec<u64>| ids.into_iter().filter(|&id| id != 1).collect::<Vec<_>>();
    assert_eq!(
        without_bos(chat),
        without_bos(prompt_ids("user: hello\n", &[]))
    );
    assert_eq!(
        without_bos(system),
        without_bos(prompt_ids("system: be kind\nuser: hello\n", &[]))
    );
}

#[test]
fn a_model_without_a_chat_template_says_so() {
    let (_folder, directory) = tiny_directory("llama");
    edit_json(&directory.join("tokenizer_config.json"), |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    Oxllama::new()
        .arg("generate")
        .arg(&directory)
        .args(["--prompt", "hi", "--chat"])
        .run()
        .failed_with(&["no chat template", "raw"]);
}

#[test]
fn contradictory_options_are_usage_errors() {
    let cases: [&[&str]; 9] = [
        &["--greedy", "--temperature", "1"],
        &["--greedy", "--top-k", "4"],
        &["--raw", "--chat"],
        &["--raw", "--system", "be kind"],
        &["--logprobs", "3"],
        &["--threads", "0"],
        &["--cache", "q3"],
        &["--virtual-devices", "300"],
        &["--device", "tpu"],
    ];
    for case in cases {
        let output = run(&[&["--prompt", "hi"], case].concat());
        assert_eq!(output.code, 2, "{case:?}: {output:?}");
        assert!(output.stderr.contains("error:"), "{output:?}");
    }
    assert_eq!(run(&[]).code, 2);
}

#[test]
fn sampling_settings_out_of_range_are_named() {
    let cases = [
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "NaN"], "temperature is NaN"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--min-p", "2"], "min_p is 2"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0"),
    ];
    for ([option, value], message) in cases {
        run(&["--prompt", "hi", option, value]).failed_with(&[message, "expected"]);
    }
}

#[test]
fn absurd_sizes_are_refused_by_name() {
    let largest = u64::MAX.to_string();
    let cases: [(&[&str], &str); 6] = [
        (&["--context", &largest], "at most 512"),
        (&["--context", "0"], "the context is 0"),
        (&["--chunk", "0"], "0 tokens in its largest step"),
        (&["--chunk", &largest], "tokens in its largest step"),
        (&["--rope-scale", "0"], "`rope_scale`: found 0"),
        (&["--rope-alpha", "-1"], "--rope-alpha"),
    ];
    for (case, message) in cases {
        run(&[&["--prompt", "hi"], case].concat()).failed_with(&[message]);
    }
    // More than there are of these is all there are.
    let answer = generate(
        &tiny("llama"),
        PROMPT,
        &["--greedy", "-n", "1", "--logprobs", "4000000000"],
    );
    assert_eq!(answer["logprobs"][0]["top"].as_array().unwrap().len(), 380);
}

#[test]
fn an_unknown_model_is_refused_with_what_would_do() {
    let output = |model: &str| {
        Oxllama::new()
            .args(["generate", model, "--prompt", "hi"])
            .run()
    };
    output("no-such-model").failed_with(&["no-such-model was not found", "smollm2-135m"]);
    output("org/model").failed_with(&["org/model", "oxllama pull org/model"]);
    output("./no/such/dir").failed_with(&["./no/such/dir"]);
}

#[cfg(unix)]
#[test]
fn models_in_the_caches_are_found_by_name() {
    let (_folder, directory) = tiny_directory("llama");
    let home = Oxllama::new();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repository = home.path(".cache/huggingface/hub/models--org--tiny");
    let demo = home.path("models/models/smollm2-135m");
    for parent in [
        repository.join("refs"),
        repository.join("snapshots"),
        home.path("models/models"),
    ] {
        std::fs::create_dir_all(parent).unwrap();
    }
    std::fs::write(repository.join("refs/main"), commit).unwrap();
    std::os::unix::fs::symlink(&directory, repository.join("snapshots").join(commit)).unwrap();
    std::os::unix::fs::symlink(&directory, demo).unwrap();
    for name in [
        "org/tiny",
        "org/tiny@main",
        &format!("org/tiny@{commit}"),
        "smollm2-135m",
    ] {
        let output = home
            .again()
            .args(["generate", name, "--prompt", PROMPT])
            .args(["--greedy", "-n", "24", "--json"])
            .env("OXLLAMA_CACHE", home.path("models"))
            .run()
            .succeeded();
        assert_eq!(ids(&json(&output)["token_ids"]), greedy_ids(&[]), "{name}");
    }
}
