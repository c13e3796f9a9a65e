//! Draws of tokens against their definition, where the device makes them.

use super::random::Random;
use super::{Bench, CaseError, ConformanceError, Suite, differing_bits};
use crate::reference::draw;
use crate::{Device, Draw, DrawLimits, LogitArgs, LogitChange, StepBatch, WorkspaceShape};

/// Rows of a step whose logits are wanted, but no draw.
const LOGIT_ROWS: usize = 2;

/// How far a `random` or a share may lie from a border between two tokens for the device's sums
/// to take it for the other one.
const NEAR: f64 = 1e-6;

/// Padded width, tokens and tokens that can be drawn.
type Widths = [usize; 3];

/// All cases of this module.
pub(super) fn run<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for (draws, widths) in [
        (1, [37, 37, 37]),
        (32, [150, 150, 149]),
        (32, [4100, 4097, 4090]),
        (16, [9003, 9000, 8999]),
        (32, [32_000, 32_000, 32_000]),
        (6, [152_064, 151_936, 151_665]),
    ] {
        let [width, vocab_size, drawable] = widths;
        let Some(limits) = suite.bench.device.draw_limits(width) else {
            return Ok(());
        };
        let name = format!("{draws} draws of {drawable} of {vocab_size} of {width}");
        let mut random = Random::for_case(&name);
        suite.case(name, 0.0, |bench| {
            let step = DrawStep::random(draws, widths, limits, &mut random);
            let drawn = step.run(bench)?;
            Ok(step.wrong(&drawn) as f64)
        })?;
        let name = format!("greedy draws of {drawable} of {vocab_size} of {width}");
        let mut random = Random::for_case(&name);
        suite.case(name, 0.0, |bench| {
            let mut step = DrawStep::random(draws, widths, limits, &mut random);
            for draw in &mut step.draws {
                draw.draw_scale = 0.0;
            }
            let drawn = step.run(bench)?;
            Ok(step.wrong(&drawn) as f64)
        })?;
    }
    let widths = [5000, 4999, 4999];
    let Some(limits) = suite.bench.device.draw_limits(widths[0]) else {
        return Ok(());
    };
    let name = "draws where nothing can be drawn".to_owned();
    let mut random = Random::for_case(&name);
    suite.case(name, 0.0, |bench| {
        let mut step = DrawStep::random(6, widths, limits, &mut random);
        let row = |index: usize| (LOGIT_ROWS + index) * widths[0];
        step.logits[row(0) + 4711] = f32::NAN;
        step.logits[row(2) + 4998] = f32::INFINITY;
        step.logits[row(3)..][..widths[0]].fill(f32::NEG_INFINITY);
        step.draws[3].change_count = 0;
        let drawn = step.run(bench)?;
        Ok(step.wrong(&drawn) as f64)
    })
}

/// One step's draws, in every variety.
struct DrawStep {
    widths: Widths,
    /// `[LOGIT_ROWS + draws, width]`
    logits: Vec<f32>,
    draws: Vec<Draw>,
    changes: Vec<LogitChange>,
}

impl DrawStep {
    fn random(draws: usize, widths: Widths, limits: DrawLimits, random: &mut Random) -> Self {
        let mut step = Self {
            widths,
            logits: Vec::new(),
            draws: Vec::new(),
            changes: Vec::new(),
        };
        let [width, vocab_size, _] = widths;
        for _ in 0..LOGIT_ROWS + draws {
            let spread = of(random, &[0.05, 2.0, 3.0, 10.0]);
            let has_ties = random.below(5) == 0;
            for column in 0..width {
                // Roughly normal, deviation 1.
                let normal: f32 = (0..4).map(|_| random.uniform(-0.866, 0.866)).sum();
                let logit = if has_ties {
                    // Zeros of both signs among them.
                    (normal * spread).round()
                } else {
                    normal * spread
                };
                let is_token = column < vocab_size;
                let padding = f32::NEG_INFINITY;
                step.logits.push(if is_token { logit } else { padding });
            }
        }
        for _ in 0..draws {
            step.push_draw(limits, random);
        }
        step
    }

    fn push_draw(&mut self, limits: DrawLimits, random: &mut Random) {
        let temperature = of(random, &[0.0, 0.31, 0.8, 1.0, 2.3]);
        let draw_scale = if temperature > 0.0 {
            1.0 / temperature
        } else {
            0.0
        };
        let first_change = self.changes.len();
        let mut token_id = 0;
        for _ in 0..of(random, &[0, 3, 700]).min(limits.changes) {
            token_id += 1 + random.below(20) as u32;
            let strongest = of(random, &[1.0, 1.0, 0.3, 0.0]);
            self.changes.push(LogitChange {
                token_id,
                strongest,
                total: strongest * of(random, &[1.0, 3.0]),
                bias: of(random, &[0.0, 0.0, 4.4, f32::NEG_INFINITY]),
            });
        }
        self.draws.push(Draw {
            random: f64::from(random.uniform(0.0, 1.0)),
            cut_scale: of(random, &[draw_scale, draw_scale, 1.0]),
            draw_scale,
            top_k: of(random, &[0, 0, 1, 5, 50, 140, 1024]).min(limits.top_k),
            top_p: of(random, &[0.0, 1.0, 0.33, 0.81, 0.97]),
            min_p: of(random, &[0.0, 0.0, 0.043, 0.31]),
            repetition_penalty: of(random, &[1.0, 1.025, 0.9, 1.7]),
            frequency_penalty: of(random, &[0.0, 0.31]),
            presence_penalty: of(random, &[0.0, 0.43]),
            vocab_size: self.widths[2] as u32,
            first_change: first_change as u32,
            change_count: (self.changes.len() - first_change) as u32,
        });
    }

    /// What the device draws, every time with more steps begun before it is read; nothing where
    /// the times differ or the logits do not stay as they are.
    fn run<D: Device>(&self, bench: &Bench<'_, D>) -> Result<Vec<u32>, CaseError> {
        let [width, vocab_size, _] = self.widths;
        let draws = self.draws.len();
        let rows = LOGIT_ROWS + draws;
        let mut workspace = bench.workspace(&WorkspaceShape {
            rows,
            sequences: rows,
            pages_per_sequence: 1,
            max_in_features: 32,
            max_out_features: width,
            draw_width: width,
            heads: 1,
            kv_heads: 1,
            head_dim: 32,
            rotary_dim: 0,
            ropes: 0,
        })?;
        let indices: Vec<u32> = (0..rows as u32).collect();
        let batch = StepBatch {
            token_ids: &vec![0; rows],
            positions: &vec![0; rows],
            row_sequences: &indices,
            page_tables: &indices,
            pages_per_sequence: 1,
            logit_rows: &indices,
            draws: &self.draws,
            changes: &self.changes,
        };
        let silent = StepBatch {
            logit_rows: &[],
            draws: &[],
            changes: &[],
            ..batch
        };
        let args = LogitArgs {
            rows,
            width,
            vocab_size,
            scale: 1.0,
            softcap: None,
        };
        let mut logits = bench.upload(&self.logits)?;
        let mut drawn = Vec::new();
        for round in 0..3 {
            bench.device.begin_step(&batch, &[], &mut workspace)?;
            bench
                .device
                .draw_tokens(&mut logits, args, &mut workspace)?;
            // A step that wants nothing leaves what was drawn before it.
            for _ in 0..round {
                bench.device.begin_step(&silent, &[], &mut workspace)?;
            }
            let again = bench.device.drawn_tokens(&mut workspace)?;
            if !drawn.is_empty() && drawn != again {
                drawn.clear();
                break;
            }
            drawn = again.to_vec();
        }
        let after = bench.read(&logits, rows * width)?;
        if differing_bits(&after, &self.logits) > 0.0 {
            drawn.clear();
        }
        Ok(drawn)
    }

    /// How many of `drawn` are others than the definition's, nor its within [`NEAR`].
    fn wrong(&self, drawn: &[u32]) -> usize {
        let [width, ..] = self.widths;
        let rows = self.logits.chunks_exact(width).skip(LOGIT_ROWS);
        let is_wrong = |index: usize, logits: &[f32]| {
            let settings = &self.draws[index];
            let changes = &self.changes[settings.first_change as usize..];
            let changes = &changes[..settings.change_count as usize];
            let found = drawn.get(index).copied();
            let expected = |settings: Draw| Some(draw(logits, &settings, changes)) == found;
            !expected(*settings) && !near(settings).any(expected)
        };
        rows.enumerate()
            .filter(|(index, logits)| is_wrong(*index, logits))
            .count()
    }
}

/// `settings` a little to either side of every border.
fn near(settings: &Draw) -> impl Iterator<Item = Draw> {
    let shifted = |random: f64, share: f64| Draw {
        random: settings.random + random,
        top_p: (f64::from(settings.top_p) + share) as f32,
        ..*settings
    };
    let shifts = [-NEAR, 0.0, NEAR].map(|share| [-NEAR, 0.0, NEAR].map(|x| shifted(x, share)));
    // Where top-p is off it stays so.
    let is_off = !settings.cuts_by_share();
    shifts
        .into_iter()
        .flatten()
        .filter(move |near| !is_off || near.top_p == 0.0 || near.top_p >= 1.0)
}

fn of<T: Copy>(random: &mut Random, choices: &[T]) -> T {
    choices[random.below(choices.len())]
}
