//! The measuring loops.

use std::time::{Duration, Instant};

use anyhow::Result;
use oxllama_backend::{Draw, PAGE_TOKENS};
use oxllama_model::{Runner, RunnerLimits, StepPlan};

/// Sequences that decode together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DecodeCase {
    pub(super) sequences: usize,
    /// Tokens in each one's cache at the start.
    pub(super) first: usize,
    /// Tokens measured of each, after one that is not.
    pub(super) tokens: usize,
}

impl DecodeCase {
    /// Tokens in each one's cache at the end.
    pub(super) fn context_tokens(&self) -> usize {
        self.first.saturating_add(self.tokens).saturating_add(1)
    }

    /// Pages of each.
    fn pages(&self) -> usize {
        self.context_tokens().div_ceil(PAGE_TOKENS)
    }

    /// Tokens of a cache that has room for all.
    pub(super) fn cache_tokens(&self) -> usize {
        let pages = self.pages().saturating_mul(self.sequences);
        pages.saturating_mul(PAGE_TOKENS)
    }
}

/// For how long a case runs at least. A GPU finds its clock anew when its work changes: right after the ceilings
/// prompts of 2,048 tokens take up to a third longer than a tenth of a second later (tinyllama-1b on an H100: 13.7 and
/// 10.5 ms), so that a case of a few milliseconds would measure the one before it.
const LEAST_CASE_TIME: Duration = Duration::from_millis(300);

/// The best of as many runs as [`LEAST_CASE_TIME`] takes; at least one.
///
/// # Errors
/// Those of `run`.
pub(super) fn best_at_speed(mut run: impl FnMut() -> Result<f64>) -> Result<f64> {
    let start = Instant::now();
    let mut best = run()?;
    while start.elapsed() < LEAST_CASE_TIME {
        best = best.max(run()?);
    }
    Ok(best)
}

/// Tokens a second of bringing `tokens` tokens into an empty cache.
pub(super) fn prefill(runner: &mut dyn Runner, tokens: usize) -> Result<f64> {
    let start = Instant::now();
    fill(runner, (0, 0), tokens, 1)?;
    Ok(tokens as f64 / start.elapsed().as_secs_f64())
}

/// Tokens a second, all sequences together, of steps with one row for each sequence, which end
/// with the most likely token on the host where the device draws it, and else with the logits
/// there. The first step is not counted: it may touch memory or make a graph for the first time.
pub(super) fn decode(runner: &mut dyn Runner, case: DecodeCase) -> Result<f64> {
    let DecodeCase {
        sequences,
        first,
        tokens,
    } = case;
    let pages = case.pages();
    for sequence in 0..sequences {
        fill(runner, (sequence, sequence * pages), first, 0)?;
    }
    let mut step = StepPlan::default();
    let mut start = Instant::now();
    for position in first..=first + tokens {
        if position == first + 1 {
            start = Instant::now();
        }
        begin(&mut step, position + 1);
        for sequence in 0..sequences {
            let own = (sequence, sequence * pages);
            push_rows(&mut step, runner, own, position..position + 1, 1);
        }
        draw_all(&mut step, runner);
        runner.run(&step)?;
    }
    Ok((sequences * tokens) as f64 / start.elapsed().as_secs_f64())
}

/// Tokens of a step that brings `tokens` tokens of one sequence into its pages, as an engine cuts
/// a prompt.
pub(super) fn chunk_tokens(limits: &RunnerLimits, tokens: usize) -> usize {
    oxllama_model::chunk_tokens(tokens, limits.stages).min(limits.max_rows)
}

/// Brings `tokens` tokens of a sequence into its pages, the last `logit_rows` of them with logits.
fn fill(
    runner: &mut dyn Runner,
    own: (usize, usize),
    tokens: usize,
    logit_rows: usize,
) -> Result<()> {
    let mut step = StepPlan::default();
    let chunk = chunk_tokens(runner.limits(), tokens);
    for first in (0..tokens).step_by(chunk) {
        let end = (first + chunk).min(tokens);
        begin(&mut step, end);
        let logit_rows = if end == tokens { logit_rows } else { 0 };
        push_rows(&mut step, runner, own, first..end, logit_rows);
        draw_all(&mut step, runner);
        runner.run(&step)?;
    }
    Ok(())
}

/// Empties `step` for sequences of up to `tokens` tokens.
fn begin(step: &mut StepPlan, tokens: usize) {
    step.clear();
    step.pages_per_sequence = tokens.div_ceil(PAGE_TOKENS);
}

/// Adds the rows of a sequence, on pages from `first_page` on, at `positions`, with tokens that
/// differ from row to row; the last `logit_rows` of them with logits.
fn push_rows(
    step: &mut StepPlan,
    runner: &dyn Runner,
    (sequence, first_page): (usize, usize),
    positions: std::ops::Range<usize>,
    logit_rows: usize,
) {
    let vocab_size = runner.spec().vocab_size;
    let pages = first_page as u32..(first_page + step.pages_per_sequence) as u32;
    let first = positions.start;
    let tokens = positions.map(|position| spread(sequence + position, vocab_size));
    step.push_sequence(tokens, first, pages, logit_rows);
}

/// Whether tokens are drawn where the model runs.
pub(super) fn draws_on_device(runner: &dyn Runner) -> bool {
    runner.limits().draws.is_some()
}

/// Has the device draw from all rows with logits, where it can.
fn draw_all(step: &mut StepPlan, runner: &dyn Runner) {
    if draws_on_device(runner) {
        let greedy = Draw::greedy(runner.spec().vocab_size as u32);
        step.draws.resize(step.logit_rows.len(), greedy);
    }
}

/// A token for `index`: Knuth's multiplicative hash spreads them over the vocabulary.
fn spread(index: usize, vocab_size: usize) -> u32 {
    (index as u32).wrapping_mul(2_654_435_761) % vocab_size as u32
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_case_is_as_fast_as_its_best_run() {
        let mut rates = Vec::new();
        let best = best_at_speed(|| {
            let rate = [3.0, 5.0, 2.0][rates.len() % 3];
            rates.push(rate);
            std::thread::sleep(LEAST_CASE_TIME / 4);
            Ok(rate)
        });
        assert_eq!(best.unwrap(), rates.iter().copied().fold(0.0, f64::max));
    }

    #[test]
    fn a_run_that_fails_ends_its_case() {
        let mut runs = 0;
        let failed = best_at_speed(|| {
            runs += 1;
            bail!("a device failed")
        });
        assert_eq!(failed.unwrap_err().to_string(), "a device failed");
        assert_eq!(runs, 1);
    }
}
