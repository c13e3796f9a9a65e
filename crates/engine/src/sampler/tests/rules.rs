//! What is penalised, forbidden, refused and remembered.

use super::*;

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
fn frequency_counts_every_time_and_presence_once() {
    let greedy_after = |settings: SamplingSettings, other: f32| {
        let mut sampler = sampler_after(&settings, &[0, 0, 0], 2);
        sampler.sample(&[3.0, other], None, 0).unwrap()
    };
    let frequency = SamplingSettings {
        frequency_penalty: 0.5,
        ..SamplingSettings::greedy()
    };
    assert_eq!(greedy_after(frequency.clone(), 1.4), 0);
    assert_eq!(greedy_after(frequency, 1.6), 1);
    let presence = SamplingSettings {
        presence_penalty: 0.5,
        ..SamplingSettings::greedy()
    };
    assert_eq!(greedy_after(presence.clone(), 2.4), 0);
    assert_eq!(greedy_after(presence, 2.6), 1);
}

#[test]
fn penalties_end_with_the_range_or_fall_off_before_it() {
    let presence = |history: &[u32], range, decay| {
        let settings = SamplingSettings {
            presence_penalty: 4.0,
            repetition_range: Some(range),
            repetition_decay: decay,
            ..neutral()
        };
        let mut sampler = sampler_after(&settings, history, 6);
        let distribution = distribution(&mut sampler, &[0.0; 6], None, 0);
        // Token 5 never occurs.
        let penalty = |id: usize| (distribution[5] / distribution[id]).ln() as f32;
        [penalty(0), penalty(1), penalty(2), penalty(3)].map(|x| (x * 1e3).round() / 1e3)
    };
    assert_eq!(presence(&[0, 1, 2, 3], 2, 0), [0.0, 0.0, 4.0, 4.0]);
    assert_eq!(presence(&[0, 1, 2, 3], 0, 0), [0.0; 4]);
    assert_eq!(presence(&[0, 1, 2, 3], 9, 9), [4.0; 4]);
    // The first token of the decay still has all of it, as in ExLlamaV2.
    assert_eq!(presence(&[0, 1, 2, 3], 1, 4), [2.0, 3.0, 4.0, 4.0]);
    assert_eq!(presence(&[0, 1, 2, 3], 1, 2), [0.0, 2.0, 4.0, 4.0]);
}

#[test]
fn bias_and_penalties_count_for_the_greedy_too() {
    let settings = SamplingSettings {
        logit_bias: [(0, f32::NEG_INFINITY), (2, 2.5)].into(),
        ..SamplingSettings::greedy()
    };
    let mut sampler = new_sampler(settings, 0, 3);
    assert_eq!(sampler.sample(&[9.0, 2.0, 0.0], None, 0), Ok(2));
    assert_eq!(sampler.sample(&[9.0, 3.0, 0.0], None, 1), Ok(1));
}

#[test]
fn dry_punishes_the_loop_that_exllamav2_overlooks() {
    let settings = SamplingSettings {
        dry_multiplier: 1.0,
        dry_max_ngram: 4,
        ..SamplingSettings::greedy()
    };
    // One token over and over, longer than the longest n-gram.
    let mut sampler = sampler_after(&settings, &[1; 30], 3);
    assert_eq!(sampler.sample(&[0.0, 1.5, 0.0], None, 0), Ok(0));
    // Nothing repeats.
    let mut sampler = sampler_after(&settings, &[0, 2, 1], 3);
    assert_eq!(sampler.sample(&[0.0, 1.5, 0.0], None, 0), Ok(1));
}

#[test]
fn dry_stops_at_breakers() {
    let repeat = [0, 1, 2, 3, 0, 1];
    let settings = SamplingSettings {
        dry_multiplier: 1.0,
        ..SamplingSettings::greedy()
    };
    let logits = [0.0, 0.0, 0.5, 0.0];
    let mut sampler = sampler_after(&settings, &repeat, 4);
    assert_eq!(sampler.sample(&logits, None, 0), Ok(0));
    for breaker in [1, 2] {
        let settings = SamplingSettings {
            dry_sequence_breakers: Some(vec![breaker]),
            ..settings.clone()
        };
        let mut sampler = sampler_after(&settings, &repeat, 4);
        assert_eq!(sampler.sample(&logits, None, 0), Ok(2));
    }
    // A token with a newline is one by default.
    let tokens = [("a", false), ("b", false), ("c\n", false), ("d", false)];
    let vocabulary = SamplerVocabulary::from_tokens(tokens.into_iter());
    let mut sampler = Sampler::new(settings, 0, 4, &vocabulary);
    repeat.iter().for_each(|id| sampler.observe(*id));
    assert_eq!(sampler.sample(&logits, None, 0), Ok(2));
}

#[test]
fn default_sets_are_punctuation_newlines_and_special_tokens() {
    let tokens = [
        "a", "a,", ">", "\t", "x\ny", "<|end|>", "-", "\u{e9}", "\"", "€",
    ];
    let tokens = tokens.map(|token| (token, token == "<|end|>" || token == "-"));
    let vocabulary = SamplerVocabulary::from_tokens(tokens.into_iter());
    let of = |set: &TokenMask| (0..12).filter(|id| set.is_allowed(*id)).collect::<Vec<_>>();
    assert_eq!(of(&vocabulary.sets().dry_breakers), [1, 2, 3, 4, 5, 6, 8]);
    assert_eq!(of(&vocabulary.sets().xtc_ignored), [4, 5, 6]);
    assert_eq!(vocabulary.size(), 10);
}

#[test]
fn ids_that_are_no_tokens_are_never_drawn() {
    let mut sampler = Sampler::new(SamplingSettings::greedy(), 0, 64, &plain(50));
    let mut logits = [0.0; 64];
    logits[50..].fill(9.0);
    logits[7] = 1.0;
    assert_eq!(sampler.sample(&logits, None, 0), Ok(7));
    assert_eq!(sampler.sample(&logits, Some(&TokenMask::all(64)), 0), Ok(7));
    // Nor is a row shorter or longer than was said an accident.
    assert_eq!(sampler.sample(&logits[..8], None, 0), Ok(7));
    assert_eq!(sampler.sample(&[0.0; 100], None, 0), Ok(0));
    sampler.observe(4_000_000_000);
    assert_eq!(sampler.sample(&logits, None, 0), Ok(7));
}

#[test]
fn a_seed_gives_the_same_tokens_in_any_order() {
    let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
    let draw = |seed, steps: &mut dyn Iterator<Item = u64>| -> Vec<_> {
        let mut sampler = new_sampler(neutral(), seed, logits.len());
        steps
            .map(|step| sampler.sample(&logits, None, step))
            .collect()
    };
    let forward = draw(42, &mut (0..50));
    let backward = draw(42, &mut (0..50).rev());
    assert!(forward.iter().eq(backward.iter().rev()));
    assert_ne!(forward, draw(43, &mut (0..50)));
}

#[test]
fn what_is_no_number_is_refused_where_it_may_be_drawn() {
    let infinite = f32::INFINITY;
    let mut sampler = new_sampler(neutral(), 0, 2);
    let mut refuse = |logits: &[f32]| {
        assert_eq!(sampler.sample(logits, None, 0), Err(SampleError::NotFinite));
    };
    refuse(&[f32::NAN, 1.0]);
    refuse(&[1.0, infinite]);
    refuse(&[-infinite; 2]);
    refuse(&[]);
    assert_eq!(sampler.sample(&[-infinite, 0.0], None, 0), Ok(1));
    let mut mask = TokenMask::all(2);
    mask.forbid(0);
    assert_eq!(sampler.sample(&[f32::NAN, 1.0], Some(&mask), 0), Ok(1));
}

#[test]
fn a_mask_that_allows_nothing_is_another_error() {
    let mut sampler = new_sampler(neutral(), 0, 2);
    let none = TokenMask::none(2);
    let refused = sampler.sample(&[0.0, 1.0], Some(&none), 0);
    assert_eq!(refused, Err(SampleError::NothingAllowed));
    let settings = SamplingSettings {
        logit_bias: [(1, f32::NEG_INFINITY)].into(),
        ..neutral()
    };
    let mut sampler = new_sampler(settings, 0, 2);
    let mut mask = TokenMask::all(2);
    mask.forbid(0);
    let refused = sampler.sample(&[0.0, 1.0], Some(&mask), 0);
    assert_eq!(refused, Err(SampleError::NothingAllowed));
    assert_eq!(sampler.sample(&[0.0, 1.0], None, 0), Ok(0));
}

#[test]
fn logprobs_are_those_of_the_softmax() {
    let logits: Vec<f32> = (0..1000)
        .map(|i| ((i * 37 % 1000) as f32 * 0.01).floor())
        .collect();
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    let expected = |id: u32| f64::from(logits[id as usize]) - total.ln();
    let mut order: Vec<u32> = (0..1000).collect();
    order.sort_by(|a, b| expected(*b).total_cmp(&expected(*a)).then(a.cmp(b)));
    for top in [0, 1, 5, 999, 1000, usize::MAX] {
        let found = token_logprobs(&logits, 17, top);
        assert!((f64::from(found.logprob) - expected(17)).abs() < 1e-6);
        let ids: Vec<u32> = found.top.iter().map(|ranked| ranked.token_id).collect();
        assert_eq!(ids, order[..top.min(1000)]);
        for ranked in &found.top {
            assert!((f64::from(ranked.logprob) - expected(ranked.token_id)).abs() < 1e-6);
        }
    }
    assert_eq!(token_logprobs(&logits, 1000, 0).logprob, f32::NEG_INFINITY);
    assert!(token_logprobs(&[f32::NAN, 0.0], 1, 2).top.is_empty());
    assert!(token_logprobs(&[], 0, 3).top.is_empty());
}

#[test]
fn guidance_mixes_log_probabilities() {
    let positive: [f64; 3] = [0.5, 0.3, 0.2];
    let negative: [f64; 3] = [0.2, 0.2, 0.6];
    // Shifted by a constant, as logits may be.
    let mut mixed = logits_of(&positive)
        .iter()
        .map(|l| l + 3.0)
        .collect::<Vec<_>>();
    let other: Vec<f32> = logits_of(&negative).iter().map(|l| l - 5.0).collect();
    mix_guidance(&mut mixed, &other, 1.5);
    for i in 0..3 {
        let expected = 1.5 * positive[i].ln() - 0.5 * negative[i].ln();
        assert!((f64::from(mixed[i]) - expected).abs() < 1e-5);
    }
    // A scale of 1 is the positive prompt alone; what is impossible stays so.
    let mut mixed = vec![0.0, f32::NEG_INFINITY, 0.0];
    mix_guidance(
        &mut mixed,
        &[0.0, f32::NEG_INFINITY, f32::NEG_INFINITY],
        1.0,
    );
    let half = -(2f32.ln());
    assert!((mixed[0] - half).abs() < 1e-6 && (mixed[2] - half).abs() < 1e-6);
    assert_eq!(mixed[1], f32::NEG_INFINITY);
    let mut mixed = vec![0.0, f32::NAN];
    mix_guidance(&mut mixed, &[0.0, 0.0], 2.0);
    assert!(mixed[1].is_nan());
}
