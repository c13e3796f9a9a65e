//! Drawing a token allocates nothing once buffers have grown: a program of its own, as the
//! allocator that counts is the whole process's.

use oxllama_engine::{Sampler, SamplerVocabulary, SamplingSettings, TokenMask};
use oxllama_test_support::{CountingAllocator, allocations_so_far};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const VOCAB_SIZE: usize = 5000;

#[test]
fn sampling_allocates_nothing_once_warm() {
    let everything = SamplingSettings {
        frequency_penalty: 0.1,
        presence_penalty: 0.1,
        typical: 0.95,
        tfs: 0.95,
        top_n_sigma: 3.0,
        mirostat: true,
        min_temp: 0.5,
        max_temp: 1.5,
        skew: 0.1,
        xtc_probability: 0.5,
        xtc_threshold: 0.05,
        dry_multiplier: 0.8,
        ..SamplingSettings::default()
    };
    let decaying = SamplingSettings {
        repetition_range: Some(50),
        repetition_decay: 50,
        ..everything.clone()
    };
    let open = SamplingSettings {
        top_k: 0,
        top_p: 1.0,
        temperature: 5.0,
        ..SamplingSettings::default()
    };
    let mut mask = TokenMask::all(VOCAB_SIZE);
    (0..VOCAB_SIZE as u32)
        .step_by(3)
        .for_each(|token_id| mask.forbid(token_id));
    let tokens = (0..VOCAB_SIZE).map(|token_id| (token_id.to_string(), false));
    let vocabulary = SamplerVocabulary::from_tokens(tokens);
    let row: Vec<f32> = (0..VOCAB_SIZE)
        .map(|token_id| (token_id as f32 * 0.37).sin() * 6.0)
        .collect();

    for settings in [SamplingSettings::greedy(), everything, decaying, open] {
        settings.check().unwrap();
        for mask in [None, Some(&mask)] {
            let mut sampler = Sampler::new(settings.clone(), 3, VOCAB_SIZE, &vocabulary);
            (0..300).for_each(|index| sampler.observe(index * index % 97));
            let mut draw_all = || {
                for step in 0..200 {
                    sampler.sample(&row, mask, step).unwrap();
                }
            };
            draw_all();
            let before = allocations_so_far();
            draw_all();
            let allocations = allocations_so_far() - before;
            assert_eq!(allocations, 0, "{settings:?}");
        }
    }
}
