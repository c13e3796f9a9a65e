//! The sampler by itself, over a vocabulary of 128k: `cargo bench -p oxllama-engine --bench
//! sampler`.

use divan::Bencher;
use oxllama_engine::{Sampler, SamplerVocabulary, SamplingSettings, TokenMask, token_logprobs};

fn main() {
    divan::main();
}

const VOCAB_SIZE: usize = 128 * 1024;
const HISTORY_TOKENS: usize = 2_000;

/// SplitMix64's numbers in 0..1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Logits like a model's: a bell with a deviation of 2.5 and a few tokens that stand out.
fn logits(random: &mut Random) -> Vec<f32> {
    let mut logits: Vec<f32> = (0..VOCAB_SIZE)
        .map(|_| {
            let sum: f64 = (0..12).map(|_| random.next()).sum();
            ((sum - 6.0) * 2.5) as f32
        })
        .collect();
    for rank in 0..40 {
        let token_id = (random.next() * VOCAB_SIZE as f64) as usize;
        logits[token_id] = 16.0 - 0.2 * rank as f32;
    }
    logits
}

/// A text of tokens as uneven as words are.
fn history(random: &mut Random, logits: &[f32]) -> Vec<u32> {
    let mut by_logit: Vec<u32> = (0..VOCAB_SIZE as u32).collect();
    by_logit.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    (0..HISTORY_TOKENS)
        .map(|_| by_logit[(random.next().powi(4) * VOCAB_SIZE as f64) as usize])
        .collect()
}

fn bench(bencher: Bencher<'_, '_>, settings: SamplingSettings, mask: Option<&TokenMask>) {
    settings.check().expect("valid settings");
    let mut random = Random(1);
    // Rows take turns, as they do when jobs take turns.
    let rows: Vec<Vec<f32>> = (0..4).map(|_| logits(&mut random)).collect();
    let tokens = (0..VOCAB_SIZE).map(|id| (id.to_string(), false));
    let vocabulary = SamplerVocabulary::from_tokens(tokens);
    let mut sampler = Sampler::new(settings, 7, VOCAB_SIZE, &vocabulary);
    for token_id in history(&mut random, &rows[0]) {
        sampler.observe(token_id);
    }
    let mut step = 0;
    bencher.bench_local(|| {
        step += 1;
        sampler.sample(&rows[step as usize % rows.len()], mask, step)
    });
}

/// Nothing but a cut at 1 and the draw.
fn plain() -> SamplingSettings {
    SamplingSettings {
        repetition_penalty: 1.0,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        ..SamplingSettings::default()
    }
}

#[divan::bench(sample_count = 1000)]
fn greedy(bencher: Bencher<'_, '_>) {
    bench(bencher, SamplingSettings::greedy(), None);
}

#[divan::bench(sample_count = 1000)]
fn defaults_with_repetition_penalty(bencher: Bencher<'_, '_>) {
    bench(bencher, SamplingSettings::default(), None);
}

#[divan::bench(sample_count = 1000)]
fn defaults_with_all_penalties(bencher: Bencher<'_, '_>) {
    let settings = SamplingSettings {
        frequency_penalty: 0.2,
        presence_penalty: 0.2,
        ..SamplingSettings::default()
    };
    bench(bencher, settings, None);
}

#[divan::bench(sample_count = 1000)]
fn defaults_with_decaying_penalties(bencher: Bencher<'_, '_>) {
    let settings = SamplingSettings {
        frequency_penalty: 0.2,
        repetition_range: Some(512),
        repetition_decay: 512,
        ..SamplingSettings::default()
    };
    bench(bencher, settings, None);
}

#[divan::bench(sample_count = 1000)]
fn defaults_with_dry(bencher: Bencher<'_, '_>) {
    let settings = SamplingSettings {
        dry_multiplier: 0.8,
        ..SamplingSettings::default()
    };
    bench(bencher, settings, None);
}

#[divan::bench(sample_count = 1000)]
fn defaults_with_half_the_tokens_masked(bencher: Bencher<'_, '_>) {
    let mut mask = TokenMask::all(VOCAB_SIZE);
    let mut random = Random(2);
    for token_id in 0..VOCAB_SIZE as u32 {
        if random.next() < 0.5 {
            mask.forbid(token_id);
        }
    }
    bench(bencher, SamplingSettings::default(), Some(&mask));
}

#[divan::bench(sample_count = 1000)]
fn min_p_alone(bencher: Bencher<'_, '_>) {
    let settings = SamplingSettings {
        min_p: 0.05,
        ..plain()
    };
    bench(bencher, settings, None);
}

#[divan::bench(sample_count = 1000)]
fn top_p_alone(bencher: Bencher<'_, '_>) {
    let settings = SamplingSettings {
        top_p: 0.95,
        ..plain()
    };
    bench(bencher, settings, None);
}

#[divan::bench(sample_count = 1000)]
fn temperature_alone(bencher: Bencher<'_, '_>) {
    bench(bencher, plain(), None);
}

#[divan::bench(sample_count = 1000)]
fn high_temperature_alone(bencher: Bencher<'_, '_>) {
    let settings = SamplingSettings {
        temperature: 10.0,
        ..plain()
    };
    bench(bencher, settings, None);
}

#[divan::bench(sample_count = 1000)]
fn logprobs_of_the_best_20(bencher: Bencher<'_, '_>) {
    let row = logits(&mut Random(1));
    bencher.bench_local(|| token_logprobs(&row, 17, 20));
}
