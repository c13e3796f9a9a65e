//! `oxllama eval` and `oxllama bench`: their figures make sense. No test asserts a speed.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::common::{Output, Oxllama};
use crate::support::{json, keys, shared, tiny};

/// `oxllama eval` on a tiny model and a text of its own.
fn eval(model: &Path, arguments: &[&str]) -> Output {
    let command = Oxllama::new();
    let text = command.path("text.txt");
    fs::write(
        &text,
        "the quick brown fox jumps over the lazy dog. ".repeat(20),
    )
    .unwrap();
    command
        .again()
        .arg("eval")
        .arg(model)
        .arg("--text")
        .arg(text)
        .args(arguments)
        .run()
}

const ROWS: [&str; 5] = ["--rows", "3", "--length", "64", "--json"];

#[test]
fn eval_reports_perplexity() {
    let report = json(&eval(&tiny("llama"), &ROWS).succeeded());
    assert_eq!(
        keys(&report),
        ["rows", "length", "perplexity", "comparison"]
    );
    assert_eq!(
        (&report["rows"], &report["length"]),
        (&3.into(), &64.into())
    );
    assert!(report["comparison"].is_null());
    let perplexity = report["perplexity"].as_f64().unwrap();
    assert!(perplexity > 1.0, "{perplexity}");
    let page = eval(&tiny("llama"), &ROWS[..4]).succeeded().stdout;
    let expected = format!("perplexity {perplexity:.4} over 3 rows of 64 tokens\n");
    assert_eq!(page, expected);
}

#[test]
fn a_model_does_not_differ_from_itself() {
    let model = tiny("llama");
    let arguments = [&ROWS[..], &["--reference", model.to_str().unwrap()]].concat();
    let report = json(&eval(&model, &arguments).succeeded());
    let comparison = &report["comparison"];
    assert_eq!(keys(comparison), ["kl", "top1", "reference_perplexity"]);
    assert!(comparison["kl"].as_f64().unwrap().abs() < 1e-6);
    assert_eq!(comparison["top1"], 1.0);
    assert_eq!(comparison["reference_perplexity"], report["perplexity"]);
}

#[test]
fn a_quantised_cache_is_measured_against_fp16() {
    let model = tiny("qwen3");
    let kl = |cache: &str| {
        let reference = ["--reference", model.to_str().unwrap(), "--cache", cache];
        let arguments = [&ROWS[..], &reference].concat();
        let report = json(&eval(&model, &arguments).succeeded());
        report["comparison"]["kl"].as_f64().unwrap()
    };
    // Were the reference's cache quantised as well, all would be zero.
    let [fp16, q8, q4] = ["fp16", "q8", "q4"].map(kl);
    assert!(fp16.abs() < 1e-9, "{fp16}");
    assert!(q8 > 0.0 && q4 > 4.0 * q8, "{q8} and {q4}");
}

#[test]
fn models_that_differ_are_measured_against_each_other() {
    let reference = tiny("phi3");
    let arguments = [&ROWS[..], &["--reference", reference.to_str().unwrap()]].concat();
    let report = json(&eval(&tiny("llama"), &arguments).succeeded());
    let comparison = &report["comparison"];
    assert!(comparison["kl"].as_f64().unwrap() > 0.0);
    assert!(comparison["top1"].as_f64().unwrap() < 1.0);
    let reference = tiny("qwen2");
    let arguments = [&ROWS[..], &["--reference", reference.to_str().unwrap()]].concat();
    eval(&tiny("llama"), &arguments).failed_with(&["vocabulary of 344", "380"]);
}

#[test]
fn eval_refuses_texts_that_are_too_short_or_none() {
    let arguments = ["--rows", "100", "--length", "64"];
    eval(&tiny("llama"), &arguments).failed_with(&["100 rows of 64", "longer text"]);
    eval(&tiny("llama"), &["--rows", "1", "--length", "1"]).failed_with(&["at least 2 tokens"]);
    Oxllama::new()
        .arg("eval")
        .arg(tiny("llama"))
        .args(["--text", "no-such-file.txt"])
        .run()
        .failed_with(&["no-such-file.txt"]);
    Oxllama::new()
        .arg("eval")
        .arg(tiny("llama"))
        .arg("--text")
        .arg(tiny("llama"))
        .run()
        .failed_with(&["llama.gguf as UTF-8 text"]);
}

#[test]
fn eval_of_the_exl2_model_is_near_exllamav2s() {
    let (Some(model), Some(text)) = (
        shared("models/smollm2-135m-exl2-4.0bpw"),
        shared("data/wiki-eval.txt"),
    ) else {
        return;
    };
    // Two rows only: the whole measurement takes minutes. The first rows read a little easier
    // than the 24 of shared/golden, whose perplexity is 22.22.
    let output = Oxllama::new()
        .arg("eval")
        .arg(model)
        .arg("--text")
        .arg(text)
        .args(["--rows", "2", "--length", "256", "--json"])
        .run()
        .succeeded();
    let perplexity = json(&output)["perplexity"].as_f64().unwrap();
    assert!((10.0..50.0).contains(&perplexity), "{perplexity}");
}

#[test]
fn bench_reports_positive_figures() {
    let output = Oxllama::new()
        .arg("bench")
        .arg(tiny("llama"))
        .args([
            "--prefill",
            "20",
            "--decode",
            "4",
            "--repeat",
            "1",
            "--batch",
            "3,2",
            "--json",
        ])
        .run()
        .succeeded();
    let report = json(&output);
    assert_eq!(
        keys(&report),
        [
            "model",
            "threads",
            "bytes_per_token",
            "read_bandwidth_gb_per_s",
            "floor_tokens_per_s",
            "prefill_tokens",
            "prefill_tokens_per_s",
            "decode_tokens",
            "decode_tokens_per_s",
            "decode_share",
            "batches",
            "load_s"
        ]
    );
    for (name, value) in report.as_object().unwrap() {
        match value {
            Value::String(text) => assert!(!text.is_empty(), "{name}"),
            Value::Array(batches) => {
                // One alone, which the others are compared with, comes of itself.
                let sequences: Vec<_> = batches.iter().map(|batch| &batch["sequences"]).collect();
                assert_eq!(sequences, [&1, &2, &3]);
                assert_eq!(batches[0]["speedup"], 1.0);
                for batch in batches {
                    assert!(batch["tokens_per_s"].as_f64().unwrap() > 0.0, "{batch}");
                }
            }
            number => assert!(number.as_f64().unwrap() > 0.0, "{name}: {number}"),
        }
    }
    assert_eq!(report["prefill_tokens"], 20);
    assert_eq!(report["decode_tokens"], 4);
}

#[test]
fn bench_refuses_to_measure_nothing() {
    for option in ["--prefill", "--decode", "--repeat"] {
        Oxllama::new()
            .arg("bench")
            .arg(tiny("llama"))
            .args([option, "0"])
            .run()
            .failed_with(&[option, "at least 1"]);
    }
    Oxllama::new()
        .arg("bench")
        .arg(tiny("llama"))
        .args(["--batch", "4,0"])
        .run()
        .failed_with(&["--batch", "from 1 on"]);
    Oxllama::new()
        .arg("bench")
        .arg(tiny("llama"))
        .args(["--prefill", "100000"])
        .run()
        .failed_with(&["100000", "at most 512"]);
}
