//! What holds for all settings, histories and logits.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A vocabulary small enough for the oracle and large enough for several blocks.
const VOCAB_SIZE: usize = 150;

/// Settings of which about a third is on.
fn random_settings(random: &mut Random) -> SamplingSettings {
    let mut order = Stage::DEFAULT_ORDER.to_vec();
    let has_own_order = random.unit() < 0.5;
    if has_own_order {
        (1..order.len()).for_each(|index| order.swap(index, random.below(index + 1)));
        order.truncate(4 + random.below(8));
    }
    let (min_temp, max_temp) = random.of(&[(0.0, 0.0), (0.0, 0.0), (0.0, 1.5), (0.4, 2.1)]);
    let bias = |random: &mut Random| (random.below(VOCAB_SIZE) as u32, random.of(&[-3.3, 4.4]));
    let biases = random.of(&[0, 0, 5]);
    SamplingSettings {
        repetition_penalty: random.of(&[1.0, 1.0, 1.025, 0.9, 1.7]),
        repetition_range: random.of(&[None, None, Some(0), Some(7), Some(60)]),
        repetition_decay: random.of(&[0, 0, 5, 40]),
        frequency_penalty: random.of(&[0.0, 0.0, 0.31, -0.2]),
        presence_penalty: random.of(&[0.0, 0.0, 0.43, -0.6]),
        temperature: random.of(&[0.0, 0.31, 0.8, 1.0, 2.3]),
        temperature_last: !has_own_order && random.unit() < 0.3,
        smoothing_factor: random.of(&[0.0, 0.0, 0.23]),
        min_temp,
        max_temp,
        temp_exponent: random.of(&[1.0, 1.7]),
        top_k: random.of(&[0, 0, 1, 5, 50, 140, 1000]),
        top_p: random.of(&[0.0, 1.0, 0.33, 0.81, 0.97]),
        top_a: random.of(&[0.0, 0.0, 0.17]),
        min_p: random.of(&[0.0, 0.0, 0.043, 0.31]),
        tfs: random.of(&[0.0, 0.0, 0.953, 0.47]),
        typical: random.of(&[0.0, 0.0, 0.913, 0.31]),
        top_n_sigma: random.of(&[0.0, 0.0, 1.13]),
        mirostat: random.unit() < 0.2,
        mirostat_mu: random.of(&[0.0, 3.1]),
        logit_bias: (0..biases).map(|_| bias(random)).collect(),
        dry_multiplier: random.of(&[0.0, 0.0, 0.8]),
        dry_range: random.of(&[0, 9, 30]),
        dry_max_ngram: random.of(&[3, 5, 20]),
        xtc_probability: random.of(&[0.0, 0.0, 0.5, 1.0]),
        xtc_threshold: random.of(&[0.013, 0.107]),
        dry_sequence_breakers: random.of(&[true, false]).then(|| vec![2]),
        xtc_ignore_tokens: random.of(&[true, false]).then(|| vec![0, 1, 3]),
        sampler_order: order,
        ..SamplingSettings::default()
    }
}

#[test]
fn every_combination_agrees_with_the_definition() {
    let mut random = Random(99);
    for case in 0..4_000 {
        let mut settings = random_settings(&mut random);
        // Typical cuts through tokens of equal surprise where it likes.
        let has_ties = random.unit() < 0.5 && settings.typical == 0.0;
        if has_ties {
            // Penalties in f32 could part what is equal in f64.
            settings.repetition_penalty = 1.0;
            settings.frequency_penalty = 0.0;
            settings.presence_penalty = 0.0;
        }
        let width = random.of(&[2.0, 8.0, 30.0]);
        let logits: Vec<f32> = (0..VOCAB_SIZE)
            .map(|_| ((random.unit() - 0.5) * width) as f32)
            .map(|logit| if has_ties { logit.round() } else { logit })
            .collect();
        let history_tokens = random.of(&[0, 1, 12, 100]);
        let history: Vec<u32> = (0..history_tokens)
            .map(|_| random.below(random_range(case)) as u32)
            .collect();
        let mut mask = TokenMask::all(VOCAB_SIZE);
        let forbidden = random.of(&[0, 10, 400]);
        (0..forbidden).for_each(|_| mask.forbid(random.below(VOCAB_SIZE - 1) as u32));
        let mask = (random.unit() < 0.5).then_some(&mask);

        let step = case as u64;
        let expected = oracle::distribution(&oracle::Case {
            settings: &settings,
            history: &history,
            logits: &logits,
            mask,
            dry_breakers: settings
                .dry_sequence_breakers
                .as_deref()
                .unwrap_or_default(),
            xtc_ignored: settings.xtc_ignore_tokens.as_deref().unwrap_or_default(),
            xtc_acts: uniform(7, Stream::Xtc, step) < f64::from(settings.xtc_probability),
            mu: if settings.mirostat_mu > 0.0 {
                3.1f32.into()
            } else {
                3.0
            },
        });
        let mut sampler = sampler_after(&settings, &history, VOCAB_SIZE);
        let found = distribution(&mut sampler, &logits, mask, step);
        for (token_id, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(
                (found - expected).abs() < 1e-5,
                "case {case}, token {token_id}: found {found}, expected {expected}; {settings:?}"
            );
        }
        let drawn = sampler.sample(&logits, mask, step).unwrap();
        assert!(expected[drawn as usize] > 0.0);
    }
}

/// Few different tokens make repetitions, many make large sets of penalties.
fn random_range(case: usize) -> usize {
    [3, 10, VOCAB_SIZE][case % 3]
}

fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -20f32..20f32,
        1 => any::<f32>(),
        1 => prop::sample::select(vec![
            f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, 1e-40,
        ]),
    ]
}

/// Rows that a model could give, some of them extreme.
fn finite_logit() -> impl Strategy<Value = f32> {
    any_logit().prop_map(|logit| if logit < f32::INFINITY { logit } else { 1.0 })
}

proptest! {
    #[test]
    fn no_logits_make_it_panic(
        seed in any::<u64>(),
        logits in vec(any_logit(), 0..VOCAB_SIZE + 20),
        history in vec(0..VOCAB_SIZE as u32 + 9, 0..40),
        words in prop::option::of(vec(any::<u32>(), 0..7)),
    ) {
        let settings = random_settings(&mut Random(seed >> 1));
        let mut sampler = sampler_after(&settings, &history, VOCAB_SIZE);
        let mask = words.map(|words| TokenMask::from_words(&words, VOCAB_SIZE));
        let may_draw = |id: usize| mask.as_ref().is_none_or(|mask| mask.is_allowed(id as u32));
        let considered = || (0..logits.len().min(VOCAB_SIZE)).filter(|id| may_draw(*id));
        match sampler.sample(&logits, mask.as_ref(), 0) {
            Ok(drawn) => {
                prop_assert!(may_draw(drawn as usize));
                prop_assert!(logits[drawn as usize].is_finite());
            }
            Err(SampleError::NotFinite) => prop_assert!(
                considered().any(|id| logits[id].is_nan() || logits[id] == f32::INFINITY)
                    || considered().all(|id| logits[id] == f32::NEG_INFINITY)
            ),
            Err(SampleError::NothingAllowed) => {
                prop_assert!(mask.is_some() || !settings.logit_bias.is_empty());
            }
        }
        token_logprobs(&logits, history.first().copied().unwrap_or(0), 5);
        let mut mixed = logits.clone();
        mix_guidance(&mut mixed, &logits, 1.5);
    }

    #[test]
    fn only_the_history_counts_not_the_way_to_it(
        seed in any::<u64>(),
        logits in vec(finite_logit(), VOCAB_SIZE),
        turns in vec((vec(0..12u32, 0..20), 0..50usize), 1..8),
    ) {
        let settings = SamplingSettings {
            mirostat: false,
            ..random_settings(&mut Random(seed >> 1))
        };
        let mut sampler = new_sampler(settings.clone(), 7, VOCAB_SIZE);
        let mut history = Vec::new();
        for (step, (tokens, length)) in turns.into_iter().enumerate() {
            // Whatever was drawn in between leaves no trace.
            let _ = sampler.sample(&logits, None, 1000 + step as u64);
            tokens.iter().for_each(|id| sampler.observe(*id));
            history.extend(tokens);
            sampler.truncate(length);
            history.truncate(length);
            prop_assert_eq!(sampler.history(), &history[..]);
            let mut fresh = sampler_after(&settings, &history, VOCAB_SIZE);
            let step = step as u64;
            prop_assert_eq!(
                sampler.sample(&logits, None, step),
                fresh.sample(&logits, None, step)
            );
        }
    }

    #[test]
    fn mirostat_goes_back_with_the_history(
        rows in vec(vec(-9f32..9f32, 40), 12),
        length in 2..12usize,
    ) {
        let settings = SamplingSettings { mirostat: true, ..neutral() };
        let mut sampler = sampler_after(&settings, &[1, 2], 40);
        let run = |sampler: &mut Sampler, first: usize| -> Vec<u32> {
            (first..rows.len())
                .map(|step| {
                    let drawn = sampler.sample(&rows[step], None, step as u64).unwrap();
                    sampler.observe(drawn);
                    drawn
                })
                .collect()
        };
        let drawn = run(&mut sampler, 0);
        sampler.truncate(length);
        prop_assert_eq!(&run(&mut sampler, length - 2)[..], &drawn[length - 2..]);
    }
}
