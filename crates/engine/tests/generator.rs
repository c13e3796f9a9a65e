//! The generator on a tiny real model: what it emits, when it stops, what it refuses.

use std::ops::ControlFlow;
use std::path::Path;

use oxllama_backend::PAGE_TOKENS;
use oxllama_cpu::{CpuDevice, CpuOptions};
use oxllama_engine::{
    Completion, EngineError, Event, FinishReason, Generator, Job, SamplingSettings,
};
use oxllama_format::ModelSource;
use oxllama_memory::{Bytes, DeviceId, DeviceInfo, Inventory, Ledger};
use oxllama_model::{Decoder, LoadOptions, ModelRequest, ModelSpec, Runner, StepPlan, plan_model};
use oxllama_text::Tokenizer;
use serde_json::json;

const CONTEXT_TOKENS: u64 = 64;

/// A tiny Llama with random weights, and steps of at most `chunk_tokens` rows.
fn runner(chunk_tokens: u64) -> Box<dyn Runner> {
    let fixture = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/models/llama2"
    );
    let source = ModelSource::open(Path::new(fixture)).unwrap();
    let spec = ModelSpec::from_config(source.config()).unwrap();
    let device = CpuDevice::new(
        DeviceId::cpu(0),
        CpuOptions {
            threads: Some(2),
            ..Default::default()
        },
    )
    .unwrap();
    let info = DeviceInfo::new(DeviceId::cpu(0), "test", Bytes::from_mib(64));
    let inventory = Inventory::new(vec![info]).unwrap();
    let request = ModelRequest {
        context_tokens: Some(CONTEXT_TOKENS),
        chunk_tokens,
        ..ModelRequest::default()
    };
    let plan = plan_model(&source, &spec, &device, &inventory, &request).unwrap();
    let ledger = Ledger::new(&inventory);
    let options = LoadOptions::new(&ledger);
    Box::new(Decoder::load(&source, spec, vec![device], &plan, &options).unwrap())
}

/// Token `i` is the printable character `'!' + i`; past those, words that never matter.
fn tokenizer(vocab_size: usize) -> Tokenizer {
    let token = |id: usize| match id {
        0..94 => char::from(b'!' + id as u8).to_string(),
        _ => format!("~{id}"),
    };
    let vocab: serde_json::Map<_, _> = (0..vocab_size).map(|id| (token(id), json!(id))).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    });
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": []
        }
    });
    let bytes = serde_json::to_vec(&file).unwrap();
    Tokenizer::new(&bytes, None, &json!({}), None).unwrap()
}

fn job(prompt_ids: &[u32], max_new_tokens: usize) -> Job {
    Job {
        prompt_ids: prompt_ids.to_vec(),
        max_new_tokens,
        sampling: SamplingSettings::greedy(),
        seed: 1,
        stop_token_ids: Vec::new(),
        stop_strings: Vec::new(),
        logprobs: None,
    }
}

/// Runs a job to its end and checks that the events add up to the text.
fn run(generator: &mut Generator<'_>, job: &Job) -> Completion {
    let mut streamed = String::new();
    let (completion, error) = generator
        .run(job, &mut |event| {
            if let Event::Text(text) = event {
                streamed.push_str(text);
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(error.is_none());
    assert_eq!(streamed, completion.text);
    completion
}

fn run_alone(chunk_tokens: u64, job: &Job) -> Completion {
    let mut runner = runner(chunk_tokens);
    let tokenizer = tokenizer(runner.spec().vocab_size);
    run(&mut Generator::new(runner.as_mut(), &tokenizer), job)
}

const PROMPT: [u32; 20] = [
    3, 14, 15, 92, 6, 5, 35, 8, 9, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 2,
];

#[test]
fn greedy_tokens_are_the_runners_best() {
    let mut runner = runner(64);
    let mut expected = PROMPT.to_vec();
    for _ in 0..10 {
        let rows = expected.len() as u32;
        let step = StepPlan {
            token_ids: expected.clone(),
            positions: (0..rows).collect(),
            row_sequences: vec![0; expected.len()],
            page_tables: vec![0; expected.len().div_ceil(PAGE_TOKENS)],
            pages_per_sequence: expected.len().div_ceil(PAGE_TOKENS),
            logit_rows: vec![rows - 1],
            ..StepPlan::default()
        };
        let logits = runner.run(&step).unwrap();
        let best = (0..logits.len())
            .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
            .unwrap();
        expected.push(best as u32);
    }
    let completion = run_alone(64, &job(&PROMPT, 10));
    assert_eq!(completion.token_ids, expected[PROMPT.len()..]);
    assert_eq!(completion.finish_reason, FinishReason::Length);
    assert_eq!(completion.timings.prompt_tokens, PROMPT.len());
    assert_eq!(completion.timings.generated_tokens, 10);
}

#[test]
fn chunks_and_cached_prefixes_change_nothing() {
    let sampled = Job {
        sampling: SamplingSettings {
            temperature: 1.0,
            ..SamplingSettings::default()
        },
        logprobs: Some(3),
        ..job(&PROMPT, 16)
    };
    let alone = run_alone(64, &sampled);
    for chunk_tokens in [1, 3, 7] {
        let chunked = run_alone(chunk_tokens, &sampled);
        assert_eq!(
            chunked.token_ids, alone.token_ids,
            "chunks of {chunk_tokens}"
        );
        assert_eq!(chunked.logprobs, alone.logprobs, "chunks of {chunk_tokens}");
    }

    let mut runner = runner(64);
    let tokenizer = tokenizer(runner.spec().vocab_size);
    let mut generator = Generator::new(runner.as_mut(), &tokenizer);
    let mut other = sampled.clone();
    other.prompt_ids[12..].fill(7);
    run(&mut generator, &other);
    let after_other = run(&mut generator, &sampled);
    assert_eq!(after_other.timings.cached_tokens, 12);
    assert_eq!(after_other.logprobs, alone.logprobs);
    let again = run(&mut generator, &sampled);
    assert_eq!(again.timings.cached_tokens, PROMPT.len() - 1);
    assert_eq!(again.logprobs, alone.logprobs);
    generator.clear_cache();
    assert_eq!(run(&mut generator, &sampled).timings.cached_tokens, 0);
}

#[test]
fn a_stop_token_ends_the_answer_and_is_not_part_of_it() {
    let free = run_alone(64, &job(&PROMPT, 10));
    let stop = free.token_ids[4];
    let first = free.token_ids.iter().position(|&id| id == stop).unwrap();
    let stopped = run_alone(
        64,
        &Job {
            stop_token_ids: vec![stop],
            ..job(&PROMPT, 10)
        },
    );
    assert_eq!(stopped.token_ids, free.token_ids[..first]);
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let free = run_alone(64, &job(&PROMPT, 12));
    let characters: Vec<char> = free.text.chars().collect();
    let stop: String = characters[5..8].iter().collect();
    let expected = free.text.split(&stop).next().unwrap();
    let stopped = run_alone(
        64,
        &Job {
            stop_strings: vec![stop.clone()],
            ..job(&PROMPT, 12)
        },
    );
    assert_eq!(stopped.text, expected);
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
}

#[test]
fn held_back_text_is_released_at_the_end() {
    let free = run_alone(64, &job(&PROMPT, 6));
    // The whole text is the beginning of this stop string, which never completes.
    let stop_strings = vec![format!("{}???", free.text)];
    let held = run_alone(
        64,
        &Job {
            stop_strings,
            ..job(&PROMPT, 6)
        },
    );
    assert_eq!(held.text, free.text);
    assert_eq!(held.finish_reason, FinishReason::Length);
}

#[test]
fn the_answer_ends_where_the_context_does() {
    let completion = run_alone(64, &job(&PROMPT, 1_000));
    // The last drawn token needs no place of its own.
    assert_eq!(
        completion.token_ids.len(),
        CONTEXT_TOKENS as usize - PROMPT.len() + 1
    );
    assert_eq!(completion.finish_reason, FinishReason::Length);
    let nothing = run_alone(64, &job(&PROMPT, 0));
    assert_eq!(
        (nothing.token_ids.len(), nothing.finish_reason),
        (0, FinishReason::Length)
    );
}

#[test]
fn breaking_off_ends_the_job_and_the_next_one_runs() {
    let mut runner = runner(4);
    let tokenizer = tokenizer(runner.spec().vocab_size);
    let mut generator = Generator::new(runner.as_mut(), &tokenizer);
    let (completion, _) = generator
        .run(&job(&PROMPT, 10), &mut |_| ControlFlow::Break(()))
        .unwrap();
    assert!(completion.token_ids.is_empty());
    assert_eq!(completion.finish_reason, FinishReason::Stop);
    let next = run(&mut generator, &job(&PROMPT, 10));
    assert_eq!(next.timings.cached_tokens, 4);
    assert_eq!(next.token_ids, run_alone(64, &job(&PROMPT, 10)).token_ids);
}

#[test]
fn logprobs_are_those_of_the_model() {
    let completion = run_alone(
        64,
        &Job {
            logprobs: Some(5),
            ..job(&PROMPT, 4)
        },
    );
    let logprobs = completion.logprobs.unwrap();
    assert_eq!(logprobs.len(), 4);
    for (entry, &token_id) in logprobs.iter().zip(&completion.token_ids) {
        assert_eq!(entry.token_id, token_id);
        assert_eq!(entry.top.len(), 5);
        assert_eq!(
            (entry.top[0].token_id, entry.top[0].logprob),
            (token_id, entry.logprob)
        );
        assert!(entry.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
    }
    let everything = run_alone(
        64,
        &Job {
            logprobs: Some(10_000),
            ..job(&PROMPT, 1)
        },
    );
    let total: f64 = everything.logprobs.unwrap()[0]
        .top
        .iter()
        .map(|entry| f64::from(entry.logprob).exp())
        .sum();
    assert!((total - 1.0).abs() < 1e-5, "probabilities sum to {total}");
}

#[test]
fn jobs_that_make_no_sense_are_refused_and_harm_nobody() {
    let mut runner = runner(64);
    let vocab_size = runner.spec().vocab_size;
    let tokenizer = tokenizer(vocab_size);
    let mut generator = Generator::new(runner.as_mut(), &tokenizer);
    let mut refuse = |job: &Job| {
        generator
            .run(job, &mut |_| ControlFlow::Continue(()))
            .unwrap_err()
    };
    assert!(matches!(refuse(&job(&[], 1)), EngineError::EmptyPrompt));
    let long = vec![1; CONTEXT_TOKENS as usize];
    assert!(matches!(
        refuse(&job(&long, 1)),
        EngineError::PromptTooLong {
            prompt_tokens: 64,
            context_tokens: 64
        }
    ));
    let outside = vocab_size as u32;
    assert!(matches!(
        refuse(&job(&[0, outside], 1)),
        EngineError::TokenOutOfRange { token_id, .. } if token_id == outside
    ));
    let sampling = SamplingSettings {
        top_p: f32::NAN,
        ..SamplingSettings::default()
    };
    assert!(matches!(
        refuse(&Job {
            sampling,
            ..job(&[0], 1)
        }),
        EngineError::Settings(_)
    ));
    let stop_strings = vec![String::new()];
    assert!(matches!(
        refuse(&Job {
            stop_strings,
            ..job(&[0], 1)
        }),
        EngineError::Text(_)
    ));
    assert_eq!(run(&mut generator, &job(&PROMPT, 3)).token_ids.len(), 3);
}
