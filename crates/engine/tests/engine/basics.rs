//! One job: what it gets, and where it ends.

use oxllama_backend::PAGE_TOKENS;
use oxllama_engine::{EngineSettings, Event, FinishReason, Job};
use oxllama_model::StepPlan;

use crate::common::{
    PROMPT, Shape, engine, engine_with, greedy, load, prompt, run, run_alone, sampled, settings,
};

#[test]
fn greedy_tokens_are_the_runners_best() {
    let (mut runner, _) = load("llama2", Shape::default());
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
        let logits = runner.run(&step).unwrap().logits;
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        expected.push(best.unwrap() as u32);
    }
    let completion = run_alone(Shape::default(), greedy(&PROMPT, 10));
    assert_eq!(completion.token_ids, expected[PROMPT.len()..]);
    assert_eq!(completion.finish_reason, FinishReason::Length);
    assert_eq!(completion.usage.prompt_tokens, PROMPT.len());
    assert_eq!(completion.usage.generated_tokens, 10);
}

#[test]
fn a_stop_token_ends_the_answer_and_is_not_part_of_it() {
    let engine = engine(Shape::default());
    let free = run(&engine, greedy(&PROMPT, 10));
    let stop = free.token_ids[4];
    let first = free.token_ids.iter().position(|&id| id == stop).unwrap();
    let stopping = Job {
        stop_token_ids: vec![stop],
        ..greedy(&PROMPT, 10)
    };
    let stopped = run(&engine, stopping.clone());
    assert_eq!(stopped.token_ids, free.token_ids[..first]);
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
    let longer = run(
        &engine,
        Job {
            min_new_tokens: 8,
            ..stopping
        },
    );
    assert!(longer.token_ids.len() >= 8);
    assert!(!longer.token_ids.contains(&stop));
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let engine = engine(Shape::default());
    let free = run(&engine, greedy(&PROMPT, 12));
    let characters: Vec<char> = free.text.chars().collect();
    let stop: String = characters[5..8].iter().collect();
    let expected = free.text.split(&stop).next().unwrap();
    let stopped = run(
        &engine,
        Job {
            stop_strings: vec![stop.clone()],
            ..greedy(&PROMPT, 12)
        },
    );
    assert_eq!(stopped.text, expected);
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
}

#[test]
fn held_back_text_is_released_at_the_end() {
    let engine = engine(Shape::default());
    let free = run(&engine, greedy(&PROMPT, 6));
    // The whole text is the beginning of these strings, which never complete.
    let held = run(
        &engine,
        Job {
            stop_strings: vec![format!("{}???", free.text)],
            banned_strings: vec![format!("{}!!!", free.text)],
            ..greedy(&PROMPT, 6)
        },
    );
    assert_eq!(held.text, free.text);
    assert_eq!(held.token_ids, free.token_ids);
    assert_eq!(held.finish_reason, FinishReason::Length);
}

#[test]
fn the_answer_ends_where_the_context_does() {
    let shape = Shape::default();
    let completion = run_alone(shape, greedy(&PROMPT, 1_000));
    // The last drawn token needs no place of its own.
    assert_eq!(completion.token_ids.len(), 64 - PROMPT.len() + 1);
    assert_eq!(completion.finish_reason, FinishReason::Length);
    let nothing = run_alone(shape, greedy(&PROMPT, 0));
    assert_eq!(nothing.token_ids.len(), 0);
    assert_eq!(nothing.finish_reason, FinishReason::Length);
}

#[test]
fn events_come_in_order() {
    let engine = engine(Shape {
        chunk_tokens: 8,
        ..Shape::default()
    });
    let mut names = Vec::new();
    engine
        .submit(greedy(&PROMPT, 3))
        .unwrap()
        .wait_with(|event| {
            names.push(match event {
                Event::Queued { .. } => "queued",
                Event::Started { cached_tokens } => {
                    assert_eq!(*cached_tokens, 0);
                    "started"
                }
                Event::Prefill { done, total } => {
                    assert!(done <= total);
                    "prefill"
                }
                Event::Token { text, ids, .. } => {
                    assert_eq!((text.len(), ids.len()), (1, 1));
                    "token"
                }
                Event::Finished { .. } => "finished",
            });
        });
    names.dedup();
    let expected = ["started", "prefill", "token", "finished"];
    assert_eq!(names[usize::from(names[0] == "queued")..], expected);
}

#[test]
fn logprobs_are_those_of_the_model() {
    let engine = engine(Shape::default());
    let completion = run(
        &engine,
        Job {
            logprobs: Some(5),
            return_logits: true,
            ..greedy(&PROMPT, 4)
        },
    );
    let (logprobs, logits) = (completion.logprobs.unwrap(), completion.logits.unwrap());
    assert_eq!((logprobs.len(), logits.len()), (4, 4));
    for ((entry, logits), &token_id) in logprobs.iter().zip(&logits).zip(&completion.token_ids) {
        assert_eq!(entry.token_id, token_id);
        assert_eq!(entry.top.len(), 5);
        assert_eq!(entry.top[0].token_id, token_id);
        assert!(entry.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let expected = f64::from(logits[token_id as usize]) - sum.ln();
        assert!((f64::from(entry.logprob) - expected).abs() < 1e-4);
    }
}

#[test]
fn a_later_job_reuses_prompt_and_answer() {
    let shape = Shape {
        context_tokens: 2048,
        chunk_tokens: 512,
        ..Shape::default()
    };
    let engine = engine(shape);
    let first_prompt = prompt(1, 1, 700, 700);
    let first = run(&engine, greedy(&first_prompt, 100));
    let mut next_prompt = first_prompt.clone();
    next_prompt.extend(&first.token_ids);
    next_prompt.extend([5, 6, 7]);
    let next = run(&engine, sampled(&next_prompt, 20, 3));
    // All but the answer's last token, which was never run, and the three new ones.
    assert_eq!(next.usage.cached_tokens, 799);
    let alone = run_alone(shape, sampled(&next_prompt, 20, 3));
    assert_eq!(next.token_ids, alone.token_ids);
    let stats = engine.stats().unwrap();
    assert_eq!(stats.prefix.shared_tokens, 3 * PAGE_TOKENS as u64);
    assert_eq!(stats.prefix.copied_tokens, 799 - 3 * PAGE_TOKENS as u64);
    assert_eq!((stats.held_pages, stats.running_jobs), (0, 0));
}

#[test]
fn measured_costs_change_no_token() {
    let shape = Shape {
        context_tokens: 512,
        ..Shape::default()
    };
    let (runner, _) = load("llama2", shape);
    let measured = engine_with(runner, None, EngineSettings::default());
    let costs = measured.stats().unwrap().costs.unwrap();
    assert!(costs.step_s >= 0.0 && costs.row_s >= 0.0);
    let job = sampled(&prompt(2, 3, 100, 300), 30, 9);
    let streams = [job.clone(), greedy(&PROMPT, 60)].map(|job| measured.submit(job).unwrap());
    let answers = streams.map(|stream| stream.wait().token_ids);
    assert_eq!(answers[0], run_alone(shape, job).token_ids);
    let quiet = engine_with(load("llama2", shape).0, None, settings());
    assert_eq!(answers[1], run(&quiet, greedy(&PROMPT, 60)).token_ids);
}
