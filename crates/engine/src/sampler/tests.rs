//! Draws against closed forms.

use super::*;

fn neutral() -> SamplingSettings {
    SamplingSettings {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        ..SamplingSettings::default()
    }
}

/// A vocabulary of that many plain tokens.
fn plain(vocab_size: usize) -> SamplerVocabulary {
    SamplerVocabulary::from_tokens((0..vocab_size).map(|id| (format!("t{id}"), false)))
}

fn new_sampler(settings: SamplingSettings, seed: u64, vocab_size: usize) -> Sampler {
    Sampler::new(settings, seed, vocab_size, &plain(vocab_size))
}

/// Frequencies of each token over many steps.
fn frequencies(settings: SamplingSettings, logits: &[f32]) -> Vec<f64> {
    let mut sampler = new_sampler(settings, 7, logits.len());
    let draws = 40_000;
    let mut counts = vec![0usize; logits.len()];
    for step in 0..draws {
        counts[sampler.sample(logits, None, step).unwrap() as usize] += 1;
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
    let mut sampler = new_sampler(settings, 0, 3);
    assert_eq!(sampler.sample(&[3.0, 1.6, -1.0], None, 0), Ok(0));
    sampler.observe(0);
    sampler.observe(0);
    // 3.0 / 2 = 1.5 < 1.6, and not 3.0 / 4.
    assert_eq!(sampler.sample(&[3.0, 1.6, -1.0], None, 1), Ok(1));
    assert_eq!(sampler.sample(&[3.0, 1.4, -1.0], None, 2), Ok(0));
}

#[test]
fn a_seed_gives_the_same_tokens_in_any_order() {
    let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut sampler = new_sampler(neutral(), 42, logits.len());
    let forward: Vec<_> = (0..50)
        .map(|step| sampler.sample(&logits, None, step))
        .collect();
    let backward: Vec<_> = (0..50)
        .rev()
        .map(|step| sampler.sample(&logits, None, step))
        .collect();
    assert!(forward.iter().eq(backward.iter().rev()));
    let mut other = new_sampler(neutral(), 43, logits.len());
    assert_ne!(
        forward,
        (0..50)
            .map(|step| other.sample(&logits, None, step))
            .collect::<Vec<_>>()
    );
}

#[test]
fn not_a_number_is_refused() {
    let mut sampler = new_sampler(neutral(), 0, 2);
    assert_eq!(
        sampler.sample(&[f32::NAN, 1.0], None, 0),
        Err(SampleError::NotFinite)
    );
    assert_eq!(
        sampler.sample(&[f32::NEG_INFINITY; 2], None, 0),
        Err(SampleError::NotFinite)
    );
    assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 0.0], None, 0), Ok(1));
}
