//! Draws follow the distribution.

use super::*;

/// Draws of the settings over the probabilities against what they should become.
#[track_caller]
fn check(settings: SamplingSettings, probabilities: &[f64], expected: &[f64]) {
    let logits = logits_of(probabilities);
    let mut sampler = new_sampler(settings, 7, logits.len());
    let total: f64 = expected.iter().sum();
    let expected: Vec<f64> = expected.iter().map(|weight| weight / total).collect();
    for (found, expected) in distribution(&mut sampler, &logits, None, 0)
        .iter()
        .zip(&expected)
    {
        assert!(
            (found - expected).abs() < 1e-6,
            "found {found}, expected {expected}"
        );
    }
    check_counts(&count_draws(&mut sampler, &logits, 20_000), &expected);
}

#[test]
fn draws_follow_the_distribution() {
    check(neutral(), &[0.5, 0.25, 0.15, 0.1], &[0.5, 0.25, 0.15, 0.1]);
}

#[test]
fn temperature_sharpens() {
    let settings = SamplingSettings {
        temperature: 0.5,
        ..neutral()
    };
    check(settings, &[0.5, 0.3, 0.2], &[0.25, 0.09, 0.04]);
}

#[test]
fn smoothing_squares_the_distance_to_the_best() {
    let settings = SamplingSettings {
        smoothing_factor: 0.7,
        temperature: 2.0,
        ..neutral()
    };
    let weight = |ratio: f64| (-ratio.ln().powi(2) * 0.7 / 2.0).exp();
    check(settings, &[0.5, 0.3, 0.2], &[1.0, weight(0.6), weight(0.4)]);
}

#[test]
fn top_k_keeps_the_most_likely() {
    let settings = SamplingSettings {
        top_k: 2,
        ..neutral()
    };
    check(settings, &[0.2, 0.5, 0.3], &[0.0, 0.5, 0.3]);
}

#[test]
fn top_p_keeps_the_smallest_set() {
    let settings = SamplingSettings {
        top_p: 0.7,
        ..neutral()
    };
    check(settings, &[0.1, 0.5, 0.3, 0.1], &[0.0, 0.5, 0.3, 0.0]);
    // ExLlamaV2 passes over the second and takes later ones that fit: 0.5 and 0.1 and 0.1.
    let settings = SamplingSettings {
        top_p: 0.75,
        ..neutral()
    };
    check(settings, &[0.5, 0.3, 0.1, 0.1], &[0.5, 0.3, 0.0, 0.0]);
}

#[test]
fn top_p_of_0_or_1_keeps_all() {
    for top_p in [0.0, 1.0] {
        let settings = SamplingSettings { top_p, ..neutral() };
        check(settings, &[0.5, 0.3, 0.2], &[0.5, 0.3, 0.2]);
    }
}

#[test]
fn top_a_is_relative_to_the_square_of_the_best() {
    // 0.5 * 0.5^2 = 0.125.
    let settings = SamplingSettings {
        top_a: 0.5,
        ..neutral()
    };
    check(settings, &[0.5, 0.26, 0.13, 0.11], &[0.5, 0.26, 0.13, 0.0]);
}

#[test]
fn min_p_is_relative_to_the_most_likely() {
    let settings = SamplingSettings {
        min_p: 0.5,
        ..neutral()
    };
    check(settings, &[0.5, 0.3, 0.2], &[0.5, 0.3, 0.0]);
}

#[test]
fn tail_free_cuts_where_the_curve_flattens() {
    // Second differences 0.15, 0.04, 0.01 of 0.2: shares 0.75, 0.95, 1.
    let probabilities = [0.4, 0.2, 0.15, 0.14, 0.14];
    let cut_after = |tfs: f32, kept: usize| {
        let settings = SamplingSettings { tfs, ..neutral() };
        let mut expected = probabilities;
        expected[kept..].fill(0.0);
        check(settings, &probabilities, &expected);
    };
    cut_after(0.7, 1);
    cut_after(0.8, 2);
    cut_after(0.97, 3);
    cut_after(1.0, 5);
}

#[test]
fn typical_drops_what_surprises_too_little_or_too_much() {
    // Entropy 0.5 ln 2 + 0.5 ln 20 = 1.84 nats; surprise 0.69 of the first, 3.0 of the others.
    let mut probabilities = [0.05; 11];
    probabilities[0] = 0.5;
    let settings = SamplingSettings {
        typical: 0.4,
        ..neutral()
    };
    let mut only_first = [0.0; 11];
    only_first[0] = 1.0;
    check(settings, &probabilities, &only_first);
    // Entropy 1.9: the tokens at 0.1 (2.3) are nearer than the one at 0.6 (0.5).
    let settings = SamplingSettings {
        typical: 0.35,
        ..neutral()
    };
    check(
        settings,
        &[0.45, 0.15, 0.13, 0.11, 0.09, 0.07],
        &[0.0, 0.15, 0.13, 0.11, 0.0, 0.0],
    );
}

#[test]
fn top_n_sigma_counts_deviations_from_the_best() {
    // Logits 4, 3, 0, 0, 0, 0, 0: deviation 1.69.
    let logits = [4.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0f64];
    let probabilities = logits.map(f64::exp);
    let settings = |top_n_sigma, temperature| SamplingSettings {
        top_n_sigma,
        temperature,
        ..neutral()
    };
    let two = [logits[0].exp(), logits[1].exp(), 0.0, 0.0, 0.0, 0.0, 0.0];
    check(settings(1.0, 1.0), &probabilities, &two);
    check(settings(2.0, 1.0), &probabilities, &two);
    // A temperature before it changes nothing about what is kept.
    check(settings(1.0, 2.0), &probabilities, &two.map(f64::sqrt));
    let only_first = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    check(settings(0.5, 1.0), &probabilities, &only_first);
}

#[test]
fn dynamic_temperature_follows_the_entropy() {
    let probabilities: [f64; 3] = [0.7, 0.2, 0.1];
    let entropy: f64 = probabilities.iter().map(|p| -p * p.ln()).sum();
    let temperature = 0.5 + 1.5 * (entropy / 3f64.ln()).powf(2.0);
    let settings = SamplingSettings {
        min_temp: 0.5,
        max_temp: 2.0,
        temp_exponent: 2.0,
        ..neutral()
    };
    let expected = probabilities.map(|p| p.powf(1.0 / temperature));
    check(settings.clone(), &probabilities, &expected);
    // It takes the place of a temperature that comes last.
    let last = SamplingSettings {
        temperature: 5.0,
        temperature_last: true,
        ..settings
    };
    check(last, &probabilities, &expected);
}

#[test]
fn temperature_last_cuts_first() {
    let settings = SamplingSettings {
        temperature: 4.0,
        min_p: 0.5,
        temperature_last: true,
        ..neutral()
    };
    let expected = [0.5f64.powf(0.25), 0.3f64.powf(0.25), 0.0];
    check(settings.clone(), &[0.5, 0.3, 0.2], &expected);
    let first = SamplingSettings {
        temperature_last: false,
        ..settings
    };
    let expected = [0.5, 0.3, 0.2].map(|p: f64| p.powf(0.25));
    check(first, &[0.5, 0.3, 0.2], &expected);
}

#[test]
fn stages_act_in_the_order_given() {
    // top_k before top_p leaves 0.5 and 0.3, of which the first has 0.625 alone; the other way
    // round top_p = 0.6 needs both.
    let ordered = |sampler_order: &[Stage]| SamplingSettings {
        top_k: 2,
        top_p: 0.6,
        sampler_order: sampler_order.to_vec(),
        ..neutral()
    };
    let probabilities = [0.5, 0.3, 0.2];
    check(
        ordered(&[Stage::TopK, Stage::TopP]),
        &probabilities,
        &[1.0, 0.0, 0.0],
    );
    check(
        ordered(&[Stage::TopP, Stage::TopK]),
        &probabilities,
        &[0.5, 0.3, 0.0],
    );
    // What is left out does not act.
    check(
        ordered(&[Stage::Temperature]),
        &probabilities,
        &probabilities,
    );
    check(ordered(&[]), &probabilities, &probabilities);
}

#[test]
fn a_cut_to_one_after_xtc_is_not_greedy() {
    let settings = SamplingSettings {
        top_k: 1,
        xtc_probability: 1.0,
        sampler_order: vec![Stage::Xtc, Stage::TopK],
        ..neutral()
    };
    assert!(!settings.is_greedy());
    check(settings, &[0.5, 0.3, 0.2], &[0.0, 0.0, 1.0]);
}

#[test]
fn skew_bends_the_draw() {
    // random^(e^-s) < c where random < c^(e^s), c the probability up to a token in rank order.
    let logits = logits_of(&[0.2, 0.5, 0.3]);
    for skew in [1.0f32, -0.7] {
        let settings = SamplingSettings { skew, ..neutral() };
        let mut sampler = new_sampler(settings, 7, 3);
        let bent = |cumulative: f64| cumulative.powf(f64::from(skew).exp());
        let expected = [bent(1.0) - bent(0.8), bent(0.5), bent(0.8) - bent(0.5)];
        check_counts(&count_draws(&mut sampler, &logits, 20_000), &expected);
    }
}

#[test]
fn xtc_acts_as_often_as_asked_and_spares_the_least_likely_choice() {
    let probabilities = [0.4, 0.3, 0.2, 0.06, 0.04];
    let settings = SamplingSettings {
        xtc_probability: 0.3,
        xtc_threshold: 0.1,
        ..neutral()
    };
    let logits = logits_of(&probabilities);
    let mut sampler = new_sampler(settings.clone(), 7, 5);
    let without = [0.0, 0.0, 0.2 / 0.3, 0.06 / 0.3, 0.04 / 0.3];
    let mixed: Vec<f64> = probabilities
        .iter()
        .zip(without)
        .map(|(with, without)| 0.7 * with + 0.3 * without)
        .collect();
    check_counts(&count_draws(&mut sampler, &logits, 40_000), &mixed);

    let always = SamplingSettings {
        xtc_probability: 1.0,
        ..settings
    };
    check(always.clone(), &probabilities, &without);
    // One choice alone stays.
    let high = SamplingSettings {
        xtc_threshold: 0.35,
        ..always.clone()
    };
    check(high, &probabilities, &probabilities);
    // An ignored token neither goes nor counts.
    let ignoring = SamplingSettings {
        xtc_ignore_tokens: Some(vec![2, 0]),
        ..always.clone()
    };
    check(ignoring, &probabilities, &probabilities);
    let ignoring = SamplingSettings {
        xtc_ignore_tokens: Some(vec![0]),
        ..always
    };
    check(ignoring, &probabilities, &[0.4, 0.0, 0.2, 0.06, 0.04]);
}

#[test]
fn mirostat_cuts_at_its_limit() {
    // 2 bits: tokens of at least 0.25.
    let settings = SamplingSettings {
        mirostat: true,
        mirostat_mu: 2.0,
        mirostat_eta: 0.0,
        ..neutral()
    };
    check(settings, &[0.5, 0.26, 0.24], &[0.5, 0.26, 0.0]);
}

#[test]
fn mirostat_keeps_the_mean_surprise() {
    // Zipf's law over 1,000 tokens has an entropy of 7.5 bits; mirostat is to hold it at 3. The
    // mean of mu's errors is (first mu - last mu) / (eta * draws), which draws push to 0.
    let weights: Vec<f64> = (1..=1000).map(|rank| 1.0 / f64::from(rank)).collect();
    let logits = logits_of(&weights);
    let settings = SamplingSettings {
        mirostat: true,
        mirostat_tau: 3.0,
        ..neutral()
    };
    let mut sampler = new_sampler(settings, 7, 1000);
    let mut surprise_bits = 0.0;
    let draws = 3_000;
    for step in 0..draws {
        let distribution = distribution(&mut sampler, &logits, None, step);
        let drawn = sampler.sample(&logits, None, step).unwrap();
        surprise_bits -= distribution[drawn as usize].log2();
        sampler.observe(drawn);
    }
    let mean = surprise_bits / draws as f64;
    assert!((mean - 3.0).abs() < 0.05, "{mean} bits");
}

#[test]
fn open_distributions_are_drawn_from_to_the_end() {
    // More tokens than are ranked at first, nearly alike.
    let mut random = Random(5);
    let logits: Vec<f32> = (0..700).map(|_| random.unit() as f32).collect();
    let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let expected: Vec<f64> = logits
        .iter()
        .map(|logit| f64::from(*logit).exp() / total)
        .collect();
    let mut sampler = new_sampler(neutral(), 7, 700);
    check_counts(&count_draws(&mut sampler, &logits, 70_000), &expected);
}
