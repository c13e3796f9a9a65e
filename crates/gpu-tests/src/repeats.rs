//! The same steps over and over, of every kind in turn: a kernel that reads what another is still
//! writing gives other bits now and then.

use std::path::Path;

use anyhow::{Result, ensure};
use oxllama_backend::{Device, PAGE_TOKENS};
use oxllama_format::{ModelSource, SyntheticShape};
use oxllama_memory::{Inventory, Ledger};
use oxllama_model::{Decoder, LoadOptions, ModelRequest, ModelSpec, Runner, StepPlan, plan_model};
use serde_json::json;

use crate::checks::Checks;
use crate::models::{request, worst};

/// How often each step is run. Those of few rows are recorded in the second round, and replayed
/// from then on.
const ROUNDS: usize = 200;

/// Sequences of the decode steps, on both sides of where one kernel takes over from another; few
/// enough for all of the steps to stay recorded.
const DECODES: [u32; 14] = [1, 2, 4, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33];

/// The most of them.
const SEQUENCES: u32 = DECODES[DECODES.len() - 1];

/// Rows of the prompts: as few as are recorded, then as many as walk through the cache, as are
/// multiplied in several launches, and as the library multiplies.
const PROMPTS: [usize; 4] = [5, 40, 100, 300];

/// Rows of a prompt, the last ones, whose logits are compared.
const LOGIT_ROWS: usize = 4;

pub(crate) fn run(checks: &mut Checks<'_>, folder: &Path) -> Result<()> {
    let (device, books) = (checks.device, checks.books()?);
    for name in ["qwen3", "gemma3"] {
        let path = folder.join(name);
        checks.check(
            &format!("the same steps give the same bits, {name}"),
            || same_bits(&ModelSource::open(&path)?, device, &books),
        );
    }
    checks.check("the same steps give the same bits, EXL2", || {
        same_bits(&ModelSource::synthetic(&shape())?, device, &books)
    });
    Ok(())
}

/// Two layers as large as TinyLlama's.
fn shape() -> SyntheticShape {
    SyntheticShape {
        name: "two-layers".to_owned(),
        hidden_size: 2048,
        intermediate_size: 5632,
        layers: 2,
        heads: 32,
        kv_heads: 4,
        head_dim: 64,
        vocab_size: 4096,
        rope_theta: 1e4,
        bits_per_weight: 4.0,
        seed: 7,
    }
}

/// A token for each place of each sequence.
fn token(sequence: u32, position: usize) -> u32 {
    (sequence * 7919 + position as u32 * 104_729) % 90
}

/// The prompts of [`PROMPTS`], each in pages of its own behind those of the decoding sequences,
/// and the decode steps of [`DECODES`].
fn steps() -> Vec<StepPlan> {
    let mut steps = Vec::new();
    let mut first_page = SEQUENCES;
    for rows in PROMPTS {
        let pages = rows.div_ceil(PAGE_TOKENS);
        let mut step = StepPlan {
            pages_per_sequence: pages,
            ..StepPlan::default()
        };
        let tokens = (0..rows).map(|position| token(first_page, position));
        let own = first_page..first_page + pages as u32;
        step.push_sequence(tokens, 0, own, LOGIT_ROWS);
        first_page += pages as u32;
        steps.push(step);
    }
    for rows in DECODES {
        let mut step = StepPlan {
            pages_per_sequence: 1,
            ..StepPlan::default()
        };
        for sequence in 0..rows {
            let position = length(sequence);
            step.push_sequence([token(sequence, position)], position, [sequence], 1);
        }
        steps.push(step);
    }
    steps
}

/// Tokens of a sequence that decodes.
fn length(sequence: u32) -> usize {
    3 + 7 * sequence as usize
}

fn same_bits<D: Device + Clone>(
    source: &ModelSource,
    device: &D,
    (inventory, ledger): &(Inventory, Ledger),
) -> Result<String> {
    let mut config = source.config().clone();
    config["max_position_embeddings"] = json!(4096);
    let spec = ModelSpec::from_config(&config)?;
    let request = ModelRequest {
        cache_tokens: Some((SEQUENCES as usize + PROMPTS.len() + 1) as u64 * 256),
        ..request(512, u64::from(SEQUENCES))
    };
    let plan = plan_model(source, &spec, device, inventory, &request)?;
    let options = LoadOptions::new(ledger);
    let mut model = Decoder::load(source, spec, vec![device.clone()], &plan, &options)?;
    for sequence in 0..SEQUENCES {
        let mut step = StepPlan {
            pages_per_sequence: 1,
            ..StepPlan::default()
        };
        let tokens = (0..length(sequence)).map(|position| token(sequence, position));
        step.push_sequence(tokens, 0, [sequence], 0);
        model.run(&step)?;
    }
    let steps = steps();
    let mut first: Vec<Vec<f32>> = Vec::with_capacity(steps.len());
    for round in 0..ROUNDS {
        for (index, step) in steps.iter().enumerate() {
            let logits = model.run(step)?.logits;
            let Some(expected) = first.get(index) else {
                ensure!(logits.iter().all(|x| x.is_finite()), "no numbers");
                first.push(logits.to_vec());
                continue;
            };
            let pairs = logits.iter().zip(expected);
            let differing = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            ensure!(
                differing == 0,
                "round {round}, a step of {} rows of {} sequences: {differing} of {} logits differ \
                 by up to {:.1e}",
                step.token_ids.len(),
                step.row_sequences.last().map_or(0, |&last| last + 1),
                expected.len(),
                worst(logits, expected)
            );
        }
    }
    Ok(format!("{} steps, {ROUNDS} times each", steps.len()))
}
