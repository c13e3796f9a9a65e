//! Steps that break a limit, and how prompts are cut.

use super::*;

const LIMITS: RunnerLimits = RunnerLimits {
    max_rows: 4,
    max_sequences: 2,
    max_logit_rows: 2,
    pages: 8,
    pages_per_sequence: 2,
    context_tokens: 300,
    draws: Some(DrawLimits {
        top_k: 50,
        changes: 2,
    }),
    stages: 1,
};

#[test]
fn a_prompt_is_cut_so_that_every_device_has_work_soon() {
    // One device has nobody to wait for.
    assert_eq!(chunk_tokens(8192, 1), usize::MAX);
    assert_eq!(chunk_tokens(0, 2), usize::MAX);
    assert_eq!(chunk_tokens(2048, 2), 1024);
    assert_eq!(chunk_tokens(8192, 2), 2048);
    assert_eq!(chunk_tokens(8192, 4), 1280);
    assert_eq!(chunk_tokens(8192, 8), 768);
    // A short one is not worth several steps.
    assert_eq!(chunk_tokens(300, 2), 384);
    // No other number of equal chunks is much faster.
    for stages in 2..9 {
        for prompt in [256_usize, 700, 1024, 2048, 5000, 16_384, 65_536] {
            let time =
                |chunk: usize| (prompt.div_ceil(chunk) + stages - 1) * (ROWS_OF_A_STEP + chunk);
            let found = time(chunk_tokens(prompt, stages));
            let best = (1..=256).map(|chunks| time(prompt.div_ceil(chunks))).min();
            assert!(found * 8 <= best.unwrap_or(0) * 9, "{prompt} on {stages}");
        }
    }
}

fn valid() -> StepPlan {
    StepPlan {
        page_copies: vec![PageCopy { from: 7, to: 1 }],
        token_ids: vec![1, 2, 3],
        positions: vec![255, 256, 0],
        row_sequences: vec![0, 0, 1],
        page_tables: vec![7, 0, 3, 99],
        pages_per_sequence: 2,
        logit_rows: vec![2, 1],
        ..StepPlan::default()
    }
}

/// Breaks a valid step and returns the message.
fn broken(change: impl FnOnce(&mut StepPlan)) -> String {
    let mut step = valid();
    change(&mut step);
    step.check(&LIMITS, 10).unwrap_err().to_string()
}

#[test]
fn a_step_within_limits_passes() {
    // Page 99 of sequence 1 lies past its only token and is ignored.
    valid().check(&LIMITS, 10).unwrap();
}

#[test]
fn each_broken_rule_is_named_with_both_values() {
    let cases = [
        (broken(|step| step.clear()), "0 rows: expected 1 to 4"),
        (broken(|step| step.token_ids[1] = 10), "token id 10"),
        (
            broken(|step| step.positions.truncate(1)),
            "1 positions: expected one for each of 3 rows",
        ),
        (
            broken(|step| step.row_sequences.push(0)),
            "4 row sequences: expected one for each of 3 rows",
        ),
        (
            broken(|step| step.pages_per_sequence = 3),
            "3 pages per sequence: expected 1 to 2",
        ),
        (
            broken(|step| step.page_tables.truncate(3)),
            "3 page table entries: expected a multiple of the 2",
        ),
        (
            broken(|step| step.page_tables.extend([0, 0])),
            "3 sequences: expected 1 to 2",
        ),
        (
            broken(|step| step.sequence_adapters.push(0)),
            "1 sequence adapters: expected none, or one for each of 2 sequences",
        ),
        (
            broken(|step| step.logit_rows.push(0)),
            "3 logit rows: expected at most 2",
        ),
        (
            broken(|step| step.logit_rows[0] = 3),
            "3 as a logit row: expected one below the 3 rows",
        ),
        (
            broken(|step| step.row_sequences[2] = 2),
            "2 as a row's sequence: expected one below the 2 sequences",
        ),
        (
            broken(|step| step.positions[2] = 300),
            "position 300: expected one below 300, the planned context",
        ),
        (
            broken(|step| step.positions[1] = 255),
            "255 as the position after a row of the same sequence: expected one above 255",
        ),
        (
            broken(|step| step.page_tables[1] = 8),
            "sequence 0 has page 8 at place 1 of its table: expected one below the 8 pages",
        ),
        (
            broken(|step| step.page_copies[0].to = 8),
            "copy 0 of a step names page 8: expected one below the 8 pages",
        ),
        (
            broken(|step| step.page_copies[0].from = u32::MAX),
            "names page 4294967295: expected one below the 8 pages",
        ),
        (
            broken(|step| step.page_copies.push(PageCopy { from: 2, to: 2 })),
            "copy 1 of a step names page 2: expected another page to copy to",
        ),
        (
            broken(|step| step.token_ids.clear()),
            "3 positions: expected one for each of 0 rows",
        ),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
}

#[test]
fn copies_need_no_rows_but_logits_do() {
    let mut step = StepPlan {
        page_copies: vec![PageCopy { from: 0, to: 3 }, PageCopy { from: 3, to: 0 }],
        ..StepPlan::default()
    };
    step.check(&LIMITS, 10).unwrap();
    step.logit_rows.push(0);
    let message = step.check(&LIMITS, 10).unwrap_err().to_string();
    assert!(message.contains("0 as a logit row: expected one below the 0 rows"));
}

#[test]
fn sequences_are_put_together_row_by_row() {
    let mut step = StepPlan {
        pages_per_sequence: 2,
        ..StepPlan::default()
    };
    step.push_sequence([1, 2], 255, [7, 0], 1);
    step.push_sequence([3], 0, [3], 1);
    step.push_sequence([4, 5, 6], 4, [5], 0);
    let expected = StepPlan {
        token_ids: vec![1, 2, 3, 4, 5, 6],
        positions: vec![255, 256, 0, 4, 5, 6],
        row_sequences: vec![0, 0, 1, 2, 2, 2],
        page_tables: vec![7, 0, 3, 0, 5, 0],
        pages_per_sequence: 2,
        logit_rows: vec![1, 2],
        ..StepPlan::default()
    };
    assert_eq!(step, expected);
}

#[test]
fn positions_past_a_short_page_table_are_refused() {
    let step = StepPlan {
        token_ids: vec![1],
        positions: vec![256],
        row_sequences: vec![0],
        page_tables: vec![0],
        pages_per_sequence: 1,
        ..StepPlan::default()
    };
    let message = step.check(&LIMITS, 10).unwrap_err().to_string();
    assert!(message.contains("one below 256, the tokens of its sequence's pages"));
}
