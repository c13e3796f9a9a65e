//! Banned strings, healing, guidance, constraints, adapters.

use oxllama_engine::{ConstraintSpec, Event, FinishReason, Guidance, Job, Speculation};
use oxllama_format::AdapterSource;

use crate::common::{
    PROMPT, SHAPE, engine, engine_with, fixture, greedy, load, run, sampled, settings,
};

#[test]
fn banned_strings_never_appear_and_the_text_before_them_stays() {
    let engine = engine(SHAPE);
    let free = run(&engine, greedy(&PROMPT, 40));
    for start in [0, 3, 20] {
        let banned = free.text[start..start + 3].to_uppercase();
        let job = Job {
            banned_strings: vec![banned.clone()],
            ..greedy(&PROMPT, 40)
        };
        let completion = run(&engine, job.clone());
        assert_eq!(completion.token_ids.len(), 40);
        assert!(
            !completion
                .text
                .to_lowercase()
                .contains(&banned.to_lowercase())
        );
        let first = free
            .text
            .to_lowercase()
            .find(&banned.to_lowercase())
            .unwrap();
        assert_eq!(completion.text[..first], free.text[..first]);
        assert_ne!(completion.text[..first + 1], free.text[..first + 1]);
        let guessed = run(
            &engine,
            Job {
                speculation: Speculation::Ngram,
                ..job
            },
        );
        assert_eq!(guessed.token_ids, completion.token_ids);
    }
}

#[test]
fn bans_across_a_page_border_rewind_what_others_may_share() {
    let engine = engine(SHAPE);
    let ids: Vec<u32> = (0..250).map(|i| i * 7 % 90).collect();
    let free = run(&engine, greedy(&ids, 40));
    // From before position 256 to after it.
    let banned = free.text[3..10].to_owned();
    let completion = run(
        &engine,
        Job {
            banned_strings: vec![banned.clone()],
            ..greedy(&ids, 40)
        },
    );
    assert!(
        !completion
            .text
            .to_lowercase()
            .contains(&banned.to_lowercase())
    );
    assert_eq!(run(&engine, greedy(&ids, 40)).token_ids, free.token_ids);
}

#[test]
fn guidance_steers_by_another_prompt() {
    let engine = engine(SHAPE);
    let negative_ids = vec![9, 8, 7, 6, 5];
    let guided = |scale: f32| Job {
        guidance: Some(Guidance {
            negative_ids: negative_ids.clone(),
            scale,
        }),
        ..greedy(&PROMPT, 30)
    };
    let plain = run(&engine, greedy(&PROMPT, 30)).token_ids;
    assert_eq!(run(&engine, guided(1.0)).token_ids, plain);
    let negative = run(&engine, greedy(&negative_ids, 30)).token_ids;
    assert_eq!(run(&engine, guided(0.0)).token_ids, negative);
    assert_ne!(run(&engine, guided(3.0)).token_ids, plain);
}

#[test]
fn progress_is_that_of_the_prompt_not_of_the_negative_one() {
    let engine = engine(SHAPE);
    let job = Job {
        guidance: Some(Guidance {
            negative_ids: (0..300).map(|i| i % 90).collect(),
            scale: 2.0,
        }),
        ..greedy(&PROMPT, 3)
    };
    engine.submit(job).unwrap().wait_with(|event| {
        if let Event::Prefill { done, total } = event {
            assert!(done <= total, "{done} of {total}");
        }
    });
}

#[test]
fn constraints_hold_with_and_without_guesses() {
    let engine = engine(SHAPE);
    let specs = [
        ConstraintSpec::Regex("[a-f]{3,9}(X|YZ)".to_owned()),
        ConstraintSpec::Choice(vec!["yes".to_owned(), "no".to_owned(), "nobody".to_owned()]),
    ];
    let pattern = regex::Regex::new("^[a-f]{3,9}(X|YZ)$").unwrap();
    for spec in specs {
        for seed in 0..5 {
            let job = Job {
                constraint: Some(spec.clone()),
                ..sampled(&PROMPT, 30, seed)
            };
            let plain = run(&engine, job.clone());
            let matches = match &spec {
                ConstraintSpec::Choice(choices) => choices.contains(&plain.text),
                _ => pattern.is_match(&plain.text),
            };
            assert!(matches, "{}", plain.text);
            assert_eq!(plain.finish_reason, FinishReason::Stop);
            let guessed = Job {
                speculation: Speculation::Ngram,
                banned_strings: vec!["@@".to_owned()],
                ..job
            };
            assert_eq!(run(&engine, guessed).token_ids, plain.token_ids);
        }
    }
}

#[test]
fn a_ban_inside_a_constraint_takes_another_way() {
    let engine = engine(SHAPE);
    let choices = ["alpha", "beta", "gamma"].map(str::to_owned).to_vec();
    let job = |banned: &[&str]| Job {
        constraint: Some(ConstraintSpec::Choice(choices.clone())),
        banned_strings: banned.iter().map(|&string| string.to_owned()).collect(),
        ..greedy(&PROMPT, 30)
    };
    let first = run(&engine, job(&[])).text;
    let second = run(&engine, job(&[&first])).text;
    assert!(choices.contains(&second) && second != first);
    let failed = run(&engine, job(&["alpha", "beta", "gamma"]));
    assert_eq!(failed.finish_reason, FinishReason::Error);
    assert!(failed.error.is_some());
}

#[test]
fn adapters_are_per_job_and_leave_others_alone() {
    let engine = engine_with(load("llama2", SHAPE).0, None, settings());
    let base = run(&engine, sampled(&PROMPT, 20, 1)).token_ids;
    let mut names: Vec<_> = std::fs::read_dir(fixture("lora"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir() && path.join("adapter_config.json").exists())
        .collect();
    names.sort();
    let source = AdapterSource::open(&names[0]).unwrap();
    let adapter = engine.load_adapter(source, 1.0).unwrap();
    let with = |seed| Job {
        adapter: Some(adapter),
        ..sampled(&PROMPT, 20, seed)
    };
    let alone = run(&engine, with(1));
    assert_eq!(
        alone.usage.cached_tokens, 0,
        "nothing is shared with the base model"
    );
    let jobs = [with(1), sampled(&PROMPT, 20, 1), with(2)];
    let streams = jobs.map(|job| engine.submit(job).unwrap());
    let found = streams.map(|stream| stream.wait().token_ids);
    assert_eq!(found[0], alone.token_ids);
    assert_eq!(found[1], base);
    engine.unload_adapter(adapter).unwrap();
    assert!(engine.submit(with(1)).is_err());
    assert!(engine.unload_adapter(adapter).is_err());
    assert_eq!(run(&engine, sampled(&PROMPT, 20, 1)).token_ids, base);
}
