//! Drawing the next token from a row of logits.

use crate::SamplingSettings;

/// Draws tokens for one job.
///
/// The order is ExLlamaV2's: repetition penalty, temperature, top-k, top-p, min-p, draw.
/// The draw for the n-th token depends on the seed and on n alone, so a job continues with
/// the same tokens after an interruption, whatever ran beside it.
#[derive(Debug)]
pub struct Sampler {
    settings: SamplingSettings,
    seed: u64,
    /// Whether a token occurred, `[vocab_size]`.
    occurred: Vec<bool>,
    /// The tokens that occurred, once each.
    occurred_ids: Vec<u32>,
    /// Scratch: the row with penalties applied.
    penalised: Vec<f32>,
    /// Scratch: tokens that may still be drawn, with logits and later probabilities.
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token_id: u32,
    /// A logit first, an unnormalised probability later.
    weight: f32,
}

impl Sampler {
    /// A sampler over a vocabulary of `vocab_size`. `settings` are expected to be checked.
    pub fn new(settings: SamplingSettings, seed: u64, vocab_size: usize) -> Self {
        Self {
            settings,
            seed,
            occurred: vec![false; vocab_size],
            occurred_ids: Vec::new(),
            penalised: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Notes a token of the prompt or of the answer, for the repetition penalty.
    pub fn observe(&mut self, token_id: u32) {
        if let Some(occurred) = self.occurred.get_mut(token_id as usize)
            && !*occurred
        {
            *occurred = true;
            self.occurred_ids.push(token_id);
        }
    }

    /// Draws token number `step` of the job from `logits`, f32 `[vocab_size]`.
    ///
    /// Returns `None` if no logit is a finite number or one is NaN.
    pub fn sample(&mut self, logits: &[f32], step: u64) -> Option<u32> {
        let penalty = self.settings.repetition_penalty;
        self.penalised.clear();
        self.penalised.extend_from_slice(logits);
        if penalty != 1.0 {
            for &token_id in &self.occurred_ids {
                let logit = &mut self.penalised[token_id as usize];
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
        let best = argmax(&self.penalised)?;
        if self.settings.is_greedy() {
            return Some(best);
        }
        self.select_candidates(self.penalised[best as usize]);
        Some(self.draw(step))
    }

    /// Fills `candidates`, most likely first, with unnormalised probabilities.
    fn select_candidates(&mut self, best_logit: f32) {
        let candidates = &mut self.candidates;
        candidates.clear();
        let most_likely_first = |a: &Candidate, b: &Candidate| {
            b.weight
                .total_cmp(&a.weight)
                .then(a.token_id.cmp(&b.token_id))
        };
        let top_k = match self.settings.top_k as usize {
            0 => self.penalised.len(),
            top_k => top_k,
        };
        // One pass over the vocabulary with a threshold that rises each time the buffer has
        // collected a few times `top_k`: sorting or selecting over the whole row would cost
        // more than a small model's head. Ids ascend, so an equal logit met later loses.
        let mut threshold = f32::NEG_INFINITY;
        for (token_id, &weight) in (0u32..).zip(&self.penalised) {
            if weight > threshold {
                candidates.push(Candidate { token_id, weight });
                if candidates.len() >= top_k.saturating_mul(4) {
                    candidates.select_nth_unstable_by(top_k - 1, most_likely_first);
                    candidates.truncate(top_k);
                    threshold = candidates[top_k - 1].weight;
                }
            }
        }
        if top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, most_likely_first);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(most_likely_first);

        for candidate in &mut *candidates {
            candidate.weight = ((candidate.weight - best_logit) / self.settings.temperature).exp();
        }
        let top_p = self.settings.top_p;
        if top_p > 0.0 && top_p < 1.0 {
            let total: f32 = candidates.iter().map(|candidate| candidate.weight).sum();
            let mut cumulative = 0.0;
            let kept = candidates
                .iter()
                .position(|candidate| {
                    cumulative += candidate.weight;
                    cumulative >= top_p * total
                })
                .map_or(candidates.len(), |last| last + 1);
            candidates.truncate(kept);
        }
        // The most likely candidate's weight is 1 before normalising.
        let min_p = self.settings.min_p;
        let kept = candidates.partition_point(|candidate| candidate.weight >= min_p);
        candidates.truncate(kept.max(1));
    }

    fn draw(&self, step: u64) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.weight)).sum();
        let target = uniform(self.seed, step) * total;
        let mut cumulative = 0.0;
        self.candidates
            .iter()
            .find(|candidate| {
                cumulative += f64::from(candidate.weight);
                target < cumulative
            })
            .or(self.candidates.last())
            .map_or(0, |candidate| candidate.token_id)
    }
}

/// The index of the largest value, the lowest among equals; `None` if there is a NaN or
/// nothing finite.
fn argmax(values: &[f32]) -> Option<u32> {
    let mut best = (0u32, f32::NEG_INFINITY);
    let mut has_nan = false;
    for (index, &value) in (0u32..).zip(values) {
        has_nan |= value.is_nan();
        if value > best.1 {
            best = (index, value);
        }
    }
    (!has_nan && best.1.is_finite()).then_some(best.0)
}

/// A number in 0..1 that depends on `seed` and `step` alone (SplitMix64's output function
/// over a Weyl sequence; Steele, Lea and Flood, 2014).
fn uniform(seed: u64, step: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    const WEYL: u64 = 0x9E37_79B9_7F4A_7C15;
    let bits =
        mix(mix(seed.wrapping_add(WEYL)).wrapping_add(step.wrapping_add(1).wrapping_mul(WEYL)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn neutral() -> SamplingSettings {
        SamplingSettings {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }

    /// Frequencies of each token over many steps.
    fn frequencies(settings: SamplingSettings, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(settings, 7, logits.len());
        let draws = 40_000;
        let mut counts = vec![0usize; logits.len()];
        for step in 0..draws {
            counts[sampler.sample(logits, step).unwrap() as usize] += 1;
        }
        counts
            .into_iter()
            .map(|count| count as f64 / draws as f64)
            .collect()
    }

    #[track_caller]
    fn check_close(found: &[f64], expected: &[f64]) {
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() < 0.012,
                "found {found}, expected {expected}"
            );
        }
    }

    fn logits_of(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32).collect()
    }

    #[test]
    fn draws_follow_the_distribution() {
        let expected = [0.5, 0.25, 0.15, 0.1];
        check_close(&frequencies(neutral(), &logits_of(&expected)), &expected);
    }

    #[test]
    fn temperature_sharpens() {
        let settings = SamplingSettings {
            temperature: 0.5,
            ..neutral()
        };
        let found = frequencies(settings, &logits_of(&[0.5, 0.3, 0.2]));
        let total = 0.25 + 0.09 + 0.04;
        check_close(&found, &[0.25 / total, 0.09 / total, 0.04 / total]);
    }

    #[test]
    fn top_k_keeps_the_most_likely() {
        let settings = SamplingSettings {
            top_k: 2,
            ..neutral()
        };
        let found = frequencies(settings, &logits_of(&[0.2, 0.5, 0.3]));
        check_close(&found, &[0.0, 0.625, 0.375]);
    }

    #[test]
    fn top_p_keeps_the_smallest_set() {
        let settings = SamplingSettings {
            top_p: 0.7,
            ..neutral()
        };
        let found = frequencies(settings, &logits_of(&[0.1, 0.5, 0.3, 0.1]));
        check_close(&found, &[0.0, 0.625, 0.375, 0.0]);
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let settings = SamplingSettings {
            min_p: 0.5,
            ..neutral()
        };
        let found = frequencies(settings, &logits_of(&[0.5, 0.3, 0.2]));
        check_close(&found, &[0.625, 0.375, 0.0]);
    }

    #[test]
    fn repetition_penalty_counts_a_token_once() {
        let settings = SamplingSettings {
            repetition_penalty: 2.0,
            ..SamplingSettings::greedy()
        };
        let mut sampler = Sampler::new(settings, 0, 3);
        assert_eq!(sampler.sample(&[3.0, 1.6, -1.0], 0), Some(0));
        sampler.observe(0);
        sampler.observe(0);
        // 3.0 / 2 = 1.5 < 1.6, and not 3.0 / 4.
        assert_eq!(sampler.sample(&[3.0, 1.6, -1.0], 1), Some(1));
        assert_eq!(sampler.sample(&[3.0, 1.4, -1.0], 2), Some(0));
    }

    #[test]
    fn a_seed_gives_the_same_tokens_in_any_order() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut sampler = Sampler::new(neutral(), 42, logits.len());
        let forward: Vec<_> = (0..50).map(|step| sampler.sample(&logits, step)).collect();
        let backward: Vec<_> = (0..50)
            .rev()
            .map(|step| sampler.sample(&logits, step))
            .collect();
        assert!(forward.iter().eq(backward.iter().rev()));
        let mut other = Sampler::new(neutral(), 43, logits.len());
        assert_ne!(
            forward,
            (0..50)
                .map(|step| other.sample(&logits, step))
                .collect::<Vec<_>>()
        );
    }

    #[test]
    fn not_a_number_is_refused() {
        let mut sampler = Sampler::new(neutral(), 0, 2);
        assert_eq!(sampler.sample(&[f32::NAN, 1.0], 0), None);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 2], 0), None);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 0.0], 0), Some(1));
    }
}
