//! How long steps take, and how much prefill may ride along with running jobs.

use std::time::Instant;

use oxllama_backend::{Draw, PAGE_TOKENS};
use oxllama_model::{ModelError, Runner, StepPlan};
use serde::Serialize;

/// Steps of each size that are timed; the fastest counts.
const REPEATS: usize = 3;

/// Position at which attention is timed, if the context reaches that far.
const FAR_POSITION: usize = 2048;

/// A model of a step's duration, linear in its rows and in the positions they attend to.
///
/// It decides how prompts are cut into chunks, never which tokens are drawn: by the backends'
/// row independence chunks change no bit of the result.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepCosts {
    /// Seconds of a step whatever its rows.
    pub step_s: f64,
    /// Seconds a row.
    pub row_s: f64,
    /// Seconds for each position that a row attends to.
    pub attended_s: f64,
}

impl StepCosts {
    /// Times steps of `runner`, whose cache is overwritten: one row, then twice as many until
    /// a step takes `factor` times as long, then one row at a far position.
    ///
    /// # Errors
    /// A step fails.
    pub fn measure(runner: &mut dyn Runner, factor: f64) -> Result<Self, ModelError> {
        let limits = *runner.limits();
        let one_row_s = time_step(runner, 1, 0)?;
        let most_rows = limits.max_rows.min(limits.context_tokens);
        let (mut rows, mut rows_s) = (1, one_row_s);
        while rows * 2 <= most_rows && rows_s < factor * one_row_s {
            rows *= 2;
            rows_s = time_step(runner, rows, 0)?;
        }
        let row_s = (rows_s - one_row_s).max(0.0) / (rows - 1).max(1) as f64;
        let far = FAR_POSITION.min(limits.context_tokens - 1);
        let far_s = time_step(runner, 1, far)?;
        Ok(Self {
            step_s: (one_row_s - row_s).max(0.0),
            row_s,
            attended_s: (far_s - one_row_s).max(0.0) / far.max(1) as f64,
        })
    }

    /// Seconds of a step of `rows` rows that attend to `attended` positions together.
    pub fn step_seconds(&self, rows: usize, attended: usize) -> f64 {
        self.step_s + self.row_s * rows as f64 + self.attended_s * attended as f64
    }

    /// Seconds that `rows` rows of a prefill from position `first` on add to a step.
    pub fn prefill_seconds(&self, rows: usize, first: usize) -> f64 {
        let attended = rows * first + rows * rows / 2;
        self.row_s * rows as f64 + self.attended_s * attended as f64
    }

    /// The most rows of a prefill from position `first` on that take at most `seconds`.
    pub fn rows_within(&self, seconds: f64, first: usize) -> usize {
        // rows · (row_s + attended_s · first) + attended_s · rows² / 2 = seconds
        let linear = self.row_s + self.attended_s * first as f64;
        let square = self.attended_s / 2.0;
        let seconds = seconds.max(0.0);
        let root = (linear * linear + 4.0 * square * seconds).sqrt();
        let rows = 2.0 * seconds / (linear + root);
        // A float's cast saturates; without any cost there is no bound.
        if rows.is_nan() {
            usize::MAX
        } else {
            rows as usize
        }
    }
}

/// Seconds of the fastest of a few steps of `rows` rows of one sequence from `first` on.
fn time_step(runner: &mut dyn Runner, rows: usize, first: usize) -> Result<f64, ModelError> {
    let pages = (first + rows).div_ceil(PAGE_TOKENS);
    let mut step = StepPlan {
        pages_per_sequence: pages,
        ..StepPlan::default()
    };
    step.push_sequence(std::iter::repeat_n(0, rows), first, 0..pages as u32, 1);
    if runner.limits().draws.is_some() {
        step.draws
            .push(Draw::greedy(runner.spec().vocab_size as u32));
    }
    let mut fastest = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        runner.run(&step)?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    Ok(fastest)
}

/// How much slower a running job's tokens may come while prompts of others arrive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatencyGoal {
    /// What steps take.
    pub costs: StepCosts,
    /// A step with prefill takes at most this many times as long as one without.
    pub factor: f64,
}

impl LatencyGoal {
    /// Seconds that prefill may add to a step of `rows` decode rows over `attended` positions.
    pub fn spare_seconds(&self, rows: usize, attended: usize) -> f64 {
        (self.factor - 1.0).max(0.0) * self.costs.step_seconds(rows, attended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_within_a_time_take_that_time(
            row_us in 1.0f64..2000.0,
            attended_ns in 0.0f64..2000.0,
            first in 0usize..100_000,
            seconds in 0.0f64..0.5,
        ) {
            let costs = StepCosts {
                step_s: 0.005,
                row_s: row_us * 1e-6,
                attended_s: attended_ns * 1e-9,
            };
            let rows = costs.rows_within(seconds, first);
            let taken = |rows: usize| costs.prefill_seconds(rows, first);
            prop_assert!(taken(rows) <= seconds * 1.001 + 1e-9);
            prop_assert!(taken(rows + 1) * 1.001 + 1e-6 >= seconds);
        }
    }

    #[test]
    fn without_costs_there_is_no_bound() {
        let free = StepCosts {
            step_s: 0.0,
            row_s: 0.0,
            attended_s: 0.0,
        };
        assert_eq!(free.rows_within(0.1, 5), usize::MAX);
        assert_eq!(free.rows_within(0.0, 5), usize::MAX);
    }
}
