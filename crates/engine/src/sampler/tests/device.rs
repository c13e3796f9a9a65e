//! Draws as a device is told to make them, by their definition, against the sampler's own.

use oxllama_backend::DrawLimits;
use oxllama_backend::reference::draw;

use super::*;

const LIMITS: DrawLimits = DrawLimits {
    top_k: 1024,
    changes: 1024,
};

/// Settings that a device knows, in every mixture.
fn random_settings(random: &mut Random, vocab_size: usize) -> SamplingSettings {
    let biased = random.of(&[0, 0, 2, 40]);
    SamplingSettings {
        repetition_penalty: random.of(&[1.0, 1.025, 0.7, 1.6]),
        repetition_range: random.of(&[None, Some(0), Some(20)]),
        repetition_decay: random.of(&[0, 30]),
        frequency_penalty: random.of(&[0.0, 0.3]),
        presence_penalty: random.of(&[0.0, 0.4]),
        temperature: random.of(&[0.0, 0.3, 1.0, 1.7]),
        temperature_last: random.below(2) == 0,
        top_k: random.of(&[0, 0, 1, 7, 300]),
        top_p: random.of(&[0.0, 0.4, 0.9, 1.0]),
        min_p: random.of(&[0.0, 0.02, 0.3]),
        logit_bias: (0..biased)
            .map(|_| {
                let bias = random.of(&[3.0, -2.0, f32::NEG_INFINITY]);
                (random.below(vocab_size) as u32, bias)
            })
            .collect(),
        ..SamplingSettings::default()
    }
}

#[test]
fn a_device_is_told_to_draw_the_same_tokens() {
    let mut random = Random(77);
    for case in 0..400 {
        let vocab_size = [50, 700, 4000][random.below(3)];
        let settings = random_settings(&mut random, vocab_size);
        let history: Vec<u32> = (0..random.below(300))
            .map(|_| random.below(vocab_size) as u32)
            .collect();
        let mut sampler = sampler_after(&settings, &history, vocab_size);
        let spread = [0.3, 2.0, 6.0][random.below(3)];
        let is_coarse = random.below(3) == 0;
        let logits: Vec<f32> = (0..vocab_size)
            .map(|_| {
                let logit = (random.unit() + random.unit() - 1.0) * 3.0 * spread;
                let logit = if is_coarse { logit.round() } else { logit };
                logit as f32
            })
            .collect();
        for step in 0..5 {
            let mut changes = Vec::new();
            let told = sampler
                .device_draw(&LIMITS, step, &mut changes)
                .expect("known settings");
            assert_eq!(told.is_greedy(), settings.is_greedy());
            let found = draw(&logits, &told, &changes);
            let expected = sampler.sample(&logits, None, step).unwrap();
            assert_eq!(found, expected, "case {case}: {settings:?}");
        }
    }
}

#[test]
fn a_device_is_not_told_what_it_cannot() {
    let told = |change: fn(&mut SamplingSettings)| {
        let mut settings = neutral();
        change(&mut settings);
        let mut sampler = sampler_after(&settings, &[1, 2, 3], 50);
        let mut changes = Vec::new();
        let draw = sampler.device_draw(&LIMITS, 0, &mut changes);
        assert_eq!(
            draw.map_or(0, |draw| draw.change_count as usize),
            changes.len()
        );
        draw
    };
    assert!(told(|_| ()).is_some());
    assert!(told(|settings| settings.top_k = 1024).is_some());
    assert!(told(|settings| settings.top_k = 1025).is_none());
    // Temperature between cuts, and cuts in another order.
    let orders: [(&[Stage], bool); 4] = [
        (&[Stage::Temperature, Stage::TopK, Stage::MinP], true),
        (&[Stage::TopK, Stage::MinP, Stage::Temperature], true),
        (&[Stage::TopK, Stage::Temperature, Stage::MinP], false),
        (&[Stage::MinP, Stage::TopK, Stage::Temperature], false),
    ];
    for (order, is_known) in orders {
        let mut settings = SamplingSettings {
            temperature: 0.7,
            top_k: 5,
            min_p: 0.1,
            ..neutral()
        };
        settings.sampler_order = order.to_vec();
        let mut sampler = sampler_after(&settings, &[], 50);
        let draw = sampler.device_draw(&LIMITS, 0, &mut Vec::new());
        assert_eq!(draw.is_some(), is_known, "{order:?}");
    }
    // More changes than a draw may have leave none behind.
    let settings = SamplingSettings {
        repetition_penalty: 1.1,
        ..neutral()
    };
    let history: Vec<u32> = (0..1025).collect();
    let mut sampler = sampler_after(&settings, &history, 2000);
    let mut changes = Vec::new();
    assert!(sampler.device_draw(&LIMITS, 0, &mut changes).is_none());
    assert!(changes.is_empty());
    sampler.truncate(1024);
    assert!(sampler.device_draw(&LIMITS, 0, &mut changes).is_some());
    assert_eq!(changes.len(), 1024);
}
