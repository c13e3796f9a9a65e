//! A job's tokens depend on the job alone.

use oxllama_engine::{Completion, EngineSettings, Event, FinishReason, Job};
use oxllama_memory::CacheFormat;

use crate::common::{
    PROMPT, Shape, engine, engine_with, greedy, load, prompt, run, run_all, run_alone, sampled,
    settings,
};

const WIDE: Shape = Shape {
    context_tokens: 1024,
    cache_tokens: None,
    batch: 32,
    chunk_tokens: 256,
    logit_rows: 64,
    cache: CacheFormat::F16,
};

/// Thirty-two jobs of many lengths in four families of prompts, each with logprobs.
fn crowd() -> Vec<Job> {
    (0..32u32)
        .map(|index| {
            let length = 20 + (index as usize * 37) % 500;
            let ids = prompt(index % 4, index, (length * 3 / 4).min(300), length);
            Job {
                logprobs: Some(2),
                priority: index as i32 % 2,
                ..sampled(&ids, 10 + (index as usize * 11) % 60, u64::from(index))
            }
        })
        .collect()
}

#[track_caller]
fn assert_same(found: &[Completion], expected: &[Completion], what: &str) {
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.token_ids, expected.token_ids, "job {index}, {what}");
        assert_eq!(found.logprobs, expected.logprobs, "job {index}, {what}");
        assert_eq!(found.text, expected.text, "job {index}, {what}");
        assert_eq!(
            found.finish_reason, expected.finish_reason,
            "job {index}, {what}"
        );
    }
}

#[test]
fn neighbours_chunks_prefixes_and_preemption_change_nothing() {
    let jobs = crowd();
    // Each by itself, with an empty cache before it.
    let alone: Vec<Completion> = {
        let engine = engine(WIDE);
        let fresh = |job: &Job| {
            engine.reshape_cache(Default::default()).unwrap();
            let completion = run(&engine, job.clone());
            assert_eq!(completion.usage.cached_tokens, 0);
            completion
        };
        jobs.iter().map(fresh).collect()
    };
    let together = engine(WIDE);
    assert_same(&run_all(&together, &jobs), &alone, "among 31 others");
    let again = run_all(&together, &jobs);
    assert!(
        again
            .iter()
            .all(|completion| completion.usage.cached_tokens > 0)
    );
    assert_same(&again, &alone, "with everything cached");
    for chunk in [64, 128, 2048] {
        let shape = Shape {
            chunk_tokens: 2048,
            ..WIDE
        };
        let settings = EngineSettings {
            max_chunk_tokens: Some(chunk),
            ..settings()
        };
        let engine = engine_with(load("llama2", shape).0, None, settings);
        assert_same(
            &run_all(&engine, &jobs),
            &alone,
            &format!("chunks of {chunk}"),
        );
    }
    let small = engine(Shape {
        cache_tokens: Some(6 * 256),
        ..WIDE
    });
    let squeezed = run_all(&small, &jobs);
    let preempted = squeezed
        .iter()
        .filter(|completion| completion.usage.preemptions > 0)
        .count();
    assert!(preempted > 0, "six pages should be too few for all");
    assert_same(&squeezed, &alone, "after preemption");
    assert_eq!(small.stats().unwrap().held_pages, 0);
}

#[test]
fn quantised_caches_are_as_independent() {
    for cache in [CacheFormat::Q8, CacheFormat::Q6, CacheFormat::Q4] {
        let shape = Shape {
            cache,
            batch: 4,
            ..WIDE
        };
        let (runner, _) = load("qwen3", shape);
        let engine = engine_with(runner, None, settings());
        let jobs = &crowd()[..8];
        let together = run_all(&engine, jobs);
        engine.reshape_cache(Default::default()).unwrap();
        let alone: Vec<_> = jobs.iter().map(|job| run(&engine, job.clone())).collect();
        assert_same(&together, &alone, "quantised");
    }
}

#[test]
fn choices_share_their_prompt_and_the_first_is_the_answer_of_one() {
    let engine = engine(WIDE);
    let ids = prompt(1, 1, 700, 700);
    let streams = engine.submit_choices(sampled(&ids, 20, 5), 4).unwrap();
    let choices: Vec<Completion> = streams.into_iter().map(|stream| stream.wait()).collect();
    let computed: usize = choices
        .iter()
        .map(|choice| 700 - choice.usage.cached_tokens)
        .sum();
    assert_eq!(computed, 700 + 3, "the prompt is computed once");
    assert_eq!(
        choices[0].token_ids,
        run_alone(WIDE, sampled(&ids, 20, 5)).token_ids
    );
    assert_ne!(choices[0].token_ids, choices[1].token_ids);
}

#[test]
fn jobs_that_are_held_back_share_their_steps_however_slowly_they_come() {
    let engine = engine(WIDE);
    let held = engine.hold();
    let streams: Vec<_> = (0..4)
        .map(|index| {
            // Time for a step or two.
            std::thread::sleep(std::time::Duration::from_millis(5));
            engine.submit(greedy(&prompt(index, index, 0, 8), 3))
        })
        .collect();
    drop(held);
    for stream in streams {
        assert_eq!(stream.unwrap().wait().token_ids.len(), 3);
    }
    assert_eq!(engine.stats().unwrap().steps, 3, "one of prompts, two more");
}

#[test]
fn an_engine_can_end_while_jobs_are_held_back() {
    let engine = engine(Shape::default());
    let mut running = engine.submit(greedy(&PROMPT, 40)).unwrap();
    assert!(matches!(running.next(), Some(Event::Started { .. })));
    let held = engine.hold();
    let waiting = engine.submit(greedy(&PROMPT, 3)).unwrap();
    // What runs goes on.
    assert_eq!(running.wait().token_ids.len(), 40);
    engine.shutdown();
    assert_eq!(waiting.wait().finish_reason, FinishReason::Cancelled);
    drop(held);
}

#[test]
fn the_cache_can_be_reshaped_while_idle() {
    let engine = engine(WIDE);
    let job = sampled(&prompt(1, 2, 100, 300), 40, 8);
    let before = run(&engine, job.clone());
    let smaller = oxllama_model::CacheRequest {
        tokens: Some(512),
        format: None,
    };
    let limits = engine.reshape_cache(smaller).unwrap();
    assert_eq!(limits.pages, 2);
    let after = run(&engine, job.clone());
    assert_eq!(after.usage.cached_tokens, 0);
    assert_eq!(after.token_ids, before.token_ids);
    let long = sampled(&prompt(1, 2, 100, 600), 40, 8);
    assert!(engine.submit(long.clone()).is_err());
    let larger = oxllama_model::CacheRequest {
        tokens: Some(4096),
        format: Some(CacheFormat::F32),
    };
    assert_eq!(engine.reshape_cache(larger).unwrap().pages, 16);
    assert_eq!(run(&engine, long).token_ids.len(), 40);
}
