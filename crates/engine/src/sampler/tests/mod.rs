//! The sampler against its definition and against closed forms.

mod device;
mod draws;
mod oracle;
mod properties;
mod rules;

use super::*;
use crate::Stage;

/// Everything off, temperature 1.
fn neutral() -> SamplingSettings {
    SamplingSettings {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        repetition_penalty: 1.0,
        ..SamplingSettings::default()
    }
}

/// A vocabulary of that many plain tokens.
fn plain(vocab_size: usize) -> SamplerVocabulary {
    SamplerVocabulary::from_tokens((0..vocab_size).map(|id| (format!("t{id}"), false)))
}

fn new_sampler(settings: SamplingSettings, seed: u64, vocab_size: usize) -> Sampler {
    settings.check().unwrap();
    settings.check_vocabulary(vocab_size).unwrap();
    Sampler::new(settings, seed, vocab_size, &plain(vocab_size))
}

/// A sampler that has seen `history`.
fn sampler_after(settings: &SamplingSettings, history: &[u32], vocab_size: usize) -> Sampler {
    let mut sampler = new_sampler(settings.clone(), 7, vocab_size);
    history.iter().for_each(|id| sampler.observe(*id));
    sampler
}

/// Each token's probability of being number `step`.
fn distribution(
    sampler: &mut Sampler,
    logits: &[f32],
    mask: Option<&TokenMask>,
    step: u64,
) -> Vec<f64> {
    let mut candidates = sampler.candidates(logits, mask, step).unwrap();
    let total = candidates.total();
    let mut distribution = vec![0.0; logits.len()];
    let mut rank = 0;
    while let Some(candidate) = candidates.get(rank) {
        distribution[candidate.token_id as usize] = candidates.weight(candidate) / total;
        rank += 1;
    }
    distribution
}

fn logits_of(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() as f32).collect()
}

/// How often each token is drawn in so many steps.
fn count_draws(sampler: &mut Sampler, logits: &[f32], draws: u64) -> Vec<u64> {
    let mut counts = vec![0; logits.len()];
    for step in 0..draws {
        counts[sampler.sample(logits, None, step).unwrap() as usize] += 1;
    }
    counts
}

/// Pearson's test: found counts against expected probabilities. The bound is the value that
/// chance exceeds once in a million times (Wilson and Hilferty's approximation, 4.75 standard
/// deviations); the seed is fixed, so a pass stays a pass.
#[track_caller]
fn check_counts(counts: &[u64], expected: &[f64]) {
    let draws = counts.iter().sum::<u64>() as f64;
    let mut chi_squared = 0.0;
    let mut cells = 0;
    for (token_id, (&count, probability)) in counts.iter().zip(expected).enumerate() {
        if *probability == 0.0 {
            assert_eq!(count, 0, "token {token_id} is impossible");
        } else {
            let expected = probability * draws;
            assert!(expected >= 5.0, "too few draws for token {token_id}");
            chi_squared += (count as f64 - expected).powi(2) / expected;
            cells += 1;
        }
    }
    let freedom = f64::from(cells - 1);
    if cells > 1 {
        let spread = 2.0 / (9.0 * freedom);
        let bound = freedom * (1.0 - spread + 4.75 * spread.sqrt()).powi(3);
        assert!(
            chi_squared < bound,
            "chi-squared {chi_squared}, bound {bound}: {counts:?}"
        );
    }
}

/// SplitMix64's numbers.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 += 1;
        uniform(self.0, Stream::Draw, self.0)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.unit() * end as f64) as usize
    }

    /// One of the choices.
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}
