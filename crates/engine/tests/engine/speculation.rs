//! Guesses ahead change how fast an answer comes, and nothing else.

use oxllama_engine::{Engine, EngineError, EngineParts, EngineSettings, Job, Speculation};

use crate::common::{
    PROMPT, SHAPE, Shape, engine_with, greedy, load, prompt, run, sampled, settings, tokenizer,
};

/// As eager as can be: a guess costs nothing.
fn eager() -> EngineSettings {
    EngineSettings {
        draft_cost: 0.0,
        ngram_cost: 0.0,
        max_draft_tokens: 5,
        ..settings()
    }
}

fn with_draft(target: &str, draft: &str) -> Engine {
    engine_with(load(target, SHAPE).0, Some(load(draft, SHAPE).0), eager())
}

fn plain(target: &str) -> Engine {
    engine_with(load(target, SHAPE).0, None, settings())
}

#[test]
fn a_draft_model_changes_no_token() {
    let plain = plain("qwen3");
    let drafted = with_draft("qwen3", "mistral");
    let mut guesses = 0;
    for seed in 0..4 {
        let ids = prompt(seed, seed, 30, 40 + 60 * seed as usize);
        for job in [greedy(&ids, 50), sampled(&ids, 50, u64::from(seed))] {
            let expected = run(&plain, job.clone());
            let found = run(&drafted, job);
            assert_eq!(found.token_ids, expected.token_ids);
            assert_eq!(found.usage.generated_tokens, 50);
            guesses += found.usage.drafted_tokens;
        }
    }
    assert!(guesses > 0);
}

#[test]
fn a_perfect_draft_is_accepted_throughout() {
    let drafted = with_draft("qwen3", "qwen3");
    let plain = plain("qwen3");
    // Sampled, too: the same seed and number draw the same token from the same distribution.
    for job in [greedy(&PROMPT, 61), sampled(&PROMPT, 61, 4)] {
        let found = run(&drafted, job.clone());
        assert_eq!(found.token_ids, run(&plain, job).token_ids);
        let usage = found.usage;
        assert!(usage.drafted_tokens >= 45, "{usage:?}");
        assert_eq!(usage.accepted_tokens, usage.drafted_tokens, "{usage:?}");
        assert!(found.timings.decode_steps < 20, "{:?}", found.timings);
    }
}

#[test]
fn drafts_survive_neighbours_and_preemption() {
    let tight = Shape {
        cache_tokens: Some(3 * 256),
        ..SHAPE
    };
    let drafted = engine_with(
        load("qwen3", tight).0,
        Some(load("mistral", tight).0),
        eager(),
    );
    let plain = plain("qwen3");
    let jobs: Vec<Job> = (0..6)
        .map(|index| sampled(&prompt(index % 2, index, 100, 200), 120, u64::from(index)))
        .collect();
    let streams: Vec<_> = jobs
        .iter()
        .map(|job| drafted.submit(job.clone()).unwrap())
        .collect();
    for (stream, job) in streams.into_iter().zip(jobs) {
        assert_eq!(stream.wait().token_ids, run(&plain, job).token_ids);
    }
    assert!(drafted.stats().unwrap().preemptions > 0);
}

#[test]
fn ngrams_change_no_token_and_pay_on_repetition() {
    let engine = engine_with(load("llama2", SHAPE).0, None, eager());
    // A greedy tiny model soon goes round in circles: what n-grams are for.
    let job = greedy(&PROMPT, 300);
    let plain = run(&engine, job.clone());
    let guessed = run(
        &engine,
        Job {
            speculation: Speculation::Ngram,
            ..job
        },
    );
    assert_eq!(guessed.token_ids, plain.token_ids);
    assert!(guessed.usage.accepted_tokens > 0, "{:?}", guessed.usage);
    assert!(guessed.timings.decode_steps < plain.timings.decode_steps);
}

/// The first three tokens of many jobs, with and without guesses, against the distribution
/// that their logits state: chi-squared over a small vocabulary.
#[test]
fn sampled_speculation_keeps_the_distribution() {
    const DRAWS: u64 = 2000;
    let drafted = with_draft("qwen3", "mistral");
    let kept: [u32; 6] = [3, 17, 42, 64, 80, 101];
    let job = |seed: u64| {
        let mut job = sampled(&PROMPT, 2, seed);
        job.sampling.top_p = 1.0;
        job.sampling.repetition_penalty = 1.0;
        // A vocabulary of six: everything else is biased away.
        job.sampling.logit_bias = (0..128)
            .filter(|id| !kept.contains(id))
            .map(|id| (id, -100.0))
            .collect();
        job.logprobs = Some(128);
        job
    };
    let mut counts = [[0f64; 6]; 6];
    let mut expected = [[0f64; 6]; 6];
    let mut first = [0f64; 6];
    for seed in 0..DRAWS {
        let completion = run(&drafted, job(seed));
        let place = |id: u32| kept.iter().position(|&kept| kept == id).unwrap();
        let [a, b] = completion.token_ids[..] else {
            panic!("two tokens")
        };
        let logprobs = completion.logprobs.unwrap();
        let distribution = |index: usize| {
            let entry = &logprobs[index];
            let weight = |&id: &u32| {
                let ranked = entry
                    .top
                    .iter()
                    .find(|ranked| ranked.token_id == id)
                    .unwrap();
                // The temperature of `sampled`.
                (f64::from(ranked.logprob) / 1.2).exp()
            };
            let weights: Vec<f64> = kept.iter().map(weight).collect();
            let sum: f64 = weights.iter().sum();
            weights.into_iter().map(move |weight| weight / sum)
        };
        for (sum, p) in first.iter_mut().zip(distribution(0)) {
            *sum += p;
        }
        counts[place(a)][place(b)] += 1.0;
        for (sum, p) in expected[place(a)].iter_mut().zip(distribution(1)) {
            *sum += p;
        }
    }
    let chi = |found: f64, expected: f64| (found - expected).powi(2) / expected.max(1e-9);
    let of_first: f64 = (0..6).map(|a| chi(counts[a].iter().sum(), first[a])).sum();
    // 0.999 quantile of chi-squared with 5 degrees of freedom.
    assert!(of_first < 20.52, "first token: {of_first}");
    let of_second: f64 = (0..6)
        .flat_map(|a| (0..6).map(move |b| (a, b)))
        .map(|(a, b)| chi(counts[a][b], expected[a][b]))
        .sum();
    // With 30 degrees of freedom.
    assert!(of_second < 59.70, "second token: {of_second}");
}

#[test]
fn a_draft_with_too_small_a_cache_is_refused() {
    let small = Shape {
        cache_tokens: Some(512),
        ..SHAPE
    };
    let runner = load("qwen3", SHAPE).0;
    let parts = EngineParts {
        tokenizer: tokenizer(runner.spec().vocab_size),
        runner,
        draft: Some(load("mistral", small).0),
    };
    let error = Engine::start(parts, settings()).err().unwrap();
    assert!(
        matches!(
            error,
            EngineError::DraftTooSmall {
                what: "cache pages",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_draft_of_another_vocabulary_is_refused() {
    let runner = load("qwen3", SHAPE).0;
    let parts = EngineParts {
        tokenizer: tokenizer(runner.spec().vocab_size),
        runner,
        draft: Some(load("llama2", SHAPE).0),
    };
    let error = Engine::start(parts, settings()).err().unwrap();
    assert!(
        matches!(
            error,
            EngineError::DraftVocabulary {
                found: 103,
                needed: 128
            }
        ),
        "{error}"
    );
}
