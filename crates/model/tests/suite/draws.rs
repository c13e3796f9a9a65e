//! Tokens drawn where the model runs.

use oxllama_backend::reference::{ReferenceDevice, draw};
use oxllama_backend::{Draw, DrawLimits, LogitChange};
use oxllama_model::{ModelError, Runner, StepPlan};

use crate::harness::{cpu_device, exact_request, load, workspace_root};

/// A step of four sequences of one token, whose logits are wanted in another order.
fn step() -> StepPlan {
    StepPlan {
        token_ids: vec![5, 17, 42, 3],
        positions: vec![0; 4],
        row_sequences: vec![0, 1, 2, 3],
        page_tables: vec![0, 1, 2, 3],
        pages_per_sequence: 1,
        logit_rows: vec![2, 0, 3, 1],
        ..StepPlan::default()
    }
}

#[test]
fn rows_are_drawn_from_by_the_definition_and_the_others_return_logits() {
    let path = workspace_root().join("tests/fixtures/models/llama2");
    let mut request = exact_request(256);
    request.batch = 4;
    let mut model = load(&path, &request, ReferenceDevice::new).model;
    let vocab_size = model.spec().vocab_size;
    let logits = model.run(&step()).expect("a valid step").logits.to_vec();
    let rows: Vec<&[f32]> = logits.chunks_exact(vocab_size).collect();
    let change = LogitChange {
        token_id: 7,
        strongest: 1.0,
        total: 2.0,
        bias: 3.0,
    };
    let greedy = Draw::greedy(vocab_size as u32);
    let random = Draw {
        random: 0.7,
        cut_scale: 0.8,
        draw_scale: 0.8,
        top_k: 40,
        repetition_penalty: 1.3,
        first_change: 1,
        change_count: 1,
        ..greedy
    };
    for draws in 0..=4 {
        let plan = StepPlan {
            draws: [greedy, random, random, greedy][..draws].to_vec(),
            changes: vec![
                LogitChange {
                    bias: 99.0,
                    ..change
                },
                change,
            ],
            ..step()
        };
        let output = model.run(&plan).expect("a valid step");
        assert!(output.logits == rows[..4 - draws].concat(), "{draws} draws");
        let drawn_rows = &rows[4 - draws..];
        let expected: Vec<u32> = plan
            .draws
            .iter()
            .zip(drawn_rows)
            .map(|(settings, logits)| {
                let first = settings.first_change as usize;
                let changes = &plan.changes[first..first + settings.change_count as usize];
                draw(logits, settings, changes)
            })
            .collect();
        assert_eq!(output.drawn, expected);
    }
}

#[test]
fn draws_beyond_the_limits_are_refused() {
    let path = workspace_root().join("tests/fixtures/models/llama2");
    let mut request = exact_request(256);
    request.batch = 4;
    let mut model = load(&path, &request, ReferenceDevice::new).model;
    let vocab_size = model.spec().vocab_size as u32;
    let greedy = Draw::greedy(vocab_size);
    let mut refused = |draws: Vec<Draw>| {
        let plan = StepPlan { draws, ..step() };
        model.run(&plan).expect_err("a step too large").to_string()
    };
    let tall = Draw {
        vocab_size: vocab_size + 1,
        ..greedy
    };
    let changed = Draw {
        change_count: 1,
        ..greedy
    };
    assert!(refused(vec![greedy; 5]).contains("5 draws: expected at most 4"));
    assert!(refused(vec![tall]).contains("tokens to draw from"));
    assert!(refused(vec![changed]).contains("the end of a draw's changes"));
    let mut model = load(&path, &request, cpu_device).model;
    assert_eq!(model.limits().draws, None);
    let plan = StepPlan {
        draws: vec![greedy],
        ..step()
    };
    let error = model.run(&plan).expect_err("no draws there");
    assert!(
        matches!(
            error,
            ModelError::Step {
                what: "draws",
                found: 1,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn limits_of_one_draw_are_held() {
    let limits = DrawLimits {
        top_k: 8,
        changes: 1,
    };
    let path = workspace_root().join("tests/fixtures/models/llama2");
    let mut request = exact_request(256);
    request.batch = 4;
    let model = load(&path, &request, ReferenceDevice::new).model;
    let mut of_model = *model.limits();
    of_model.draws = Some(limits);
    let vocab_size = model.spec().vocab_size;
    let mut plan = step();
    let change = LogitChange {
        token_id: 7,
        strongest: 0.0,
        total: 0.0,
        bias: 1.0,
    };
    plan.changes = vec![change; 2];
    let draw = Draw {
        top_k: 8,
        change_count: 1,
        ..Draw::greedy(vocab_size as u32)
    };
    plan.draws = vec![draw; 2];
    plan.check(&of_model, vocab_size).expect("within limits");
    plan.draws.pop();
    let error = plan.check(&of_model, vocab_size).expect_err("changes");
    assert!(
        error.to_string().contains("2 changes: expected at most 1"),
        "{error}"
    );
    plan.draws = vec![draw; 2];
    plan.draws[0].top_k = 9;
    let error = plan.check(&of_model, vocab_size).expect_err("top-k");
    assert!(error.to_string().contains("top-k"), "{error}");
    plan.draws[0] = Draw {
        change_count: 2,
        ..draw
    };
    let error = plan.check(&of_model, vocab_size).expect_err("changes");
    assert!(error.to_string().contains("changes of a draw"), "{error}");
}
