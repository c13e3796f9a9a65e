//! Draws on a GPU against their definition in f64. Needs a GPU; skips without one.

use oxllama_backend::DeviceMemory;
use oxllama_cuda::{
    CudaDevice, CudaSampler, NO_TOKEN, SampleChange, SampleLogits, SampleRow, SampledToken,
    SamplerShape, gpus,
};
use oxllama_memory::{Bytes, Ledger, Purpose};

/// Set where the test must not skip.
const REQUIRED: &str = "OXLLAMA_REQUIRE_GPU";

#[expect(clippy::print_stderr, reason = "a test says that it skips")]
fn device() -> Option<CudaDevice> {
    match gpus() {
        Ok(gpus) => Some(CudaDevice::open(&gpus[0]).expect("the GPU opens")),
        Err(error) if std::env::var_os(REQUIRED).is_none() => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// SplitMix64's numbers.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.unit() * choices.len() as f64) as usize]
    }

    /// Roughly normal, deviation 1.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}

/// One step's rows, in every variety.
struct Case {
    width: usize,
    vocab_size: usize,
    drawable: usize,
    logits: Vec<f32>,
    rows: Vec<SampleRow>,
    changes: Vec<SampleChange>,
}

impl Case {
    fn random(rows: usize, [width, vocab_size, drawable]: [usize; 3], random: &mut Random) -> Self {
        let mut case = Self {
            width,
            vocab_size,
            drawable,
            logits: Vec::new(),
            rows: Vec::new(),
            changes: Vec::new(),
        };
        for _ in 0..rows {
            let (spread, has_ties) = (random.of(&[0.05, 2.0, 3.0, 10.0]), random.unit() < 0.2);
            for column in 0..width {
                let logit = random.normal() * spread;
                let logit = if has_ties { logit.round() } else { logit };
                let is_token = column < vocab_size;
                case.logits
                    .push(if is_token { logit as f32 } else { f32::NAN });
            }
            case.push_row(random);
        }
        case
    }

    fn push_row(&mut self, random: &mut Random) {
        let temperature: f32 = random.of(&[0.0, 0.31, 0.8, 1.0, 2.3]);
        let draw_scale = if temperature > 0.0 {
            1.0 / temperature
        } else {
            0.0
        };
        let first_change = self.changes.len() as u32;
        let mut token_id = 0;
        for _ in 0..random.of(&[0, 3, 700]) {
            token_id += 1 + (random.unit() * 20.0) as u32;
            self.changes.push(SampleChange {
                token_id,
                strongest: random.of(&[1.0, 1.0, 0.3, 0.0]),
                total: random.of(&[1.0, 3.0]),
                bias: random.of(&[0.0, 0.0, 4.4, f32::NEG_INFINITY]),
            });
        }
        self.rows.push(SampleRow {
            random: random.unit(),
            cut_scale: random.of(&[draw_scale, draw_scale, 1.0]),
            draw_scale,
            top_p: random.of(&[0.0, 1.0, 0.33, 0.81, 0.97]),
            min_p: random.of(&[0.0, 0.0, 0.043, 0.31]),
            repetition_penalty: random.of(&[1.0, 1.025, 0.9, 1.7]),
            frequency_penalty: random.of(&[0.0, 0.31]),
            presence_penalty: random.of(&[0.0, 0.43]),
            top_k: random.of(&[0, 0, 1, 5, 50, 140, 1024]),
            first_change,
            change_count: self.changes.len() as u32 - first_change,
        });
    }

    /// The row's tokens with their logits after changes, the most likely first.
    fn ranked(&self, row: usize) -> Vec<(u32, f64)> {
        let settings = &self.rows[row];
        let mut logits = self.logits[row * self.width..][..self.drawable].to_vec();
        let changes = &self.changes[settings.first_change as usize..];
        for change in &changes[..settings.change_count as usize] {
            let Some(logit) = logits.get_mut(change.token_id as usize) else {
                continue;
            };
            let penalty = settings.repetition_penalty;
            let repetition = penalty + (1.0 - penalty) * (1.0 - change.strongest);
            *logit *= if *logit > 0.0 {
                1.0 / repetition
            } else {
                repetition
            };
            *logit -= settings.presence_penalty * change.strongest;
            *logit -= settings.frequency_penalty * change.total;
            *logit += change.bias;
        }
        let mut ranked: Vec<(u32, f64)> = (0..).zip(logits.into_iter().map(f64::from)).collect();
        ranked.retain(|(_, logit)| *logit > f64::NEG_INFINITY);
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked
    }

    /// Tokens that the row may draw: the one by its definition, and its neighbours where a sum
    /// is too near to a border for f32 to tell.
    fn expected(&self, row: usize) -> Vec<u32> {
        const NEAR: f64 = 1e-6;
        let settings = &self.rows[row];
        let mut ranked = self.ranked(row);
        if settings.draw_scale == 0.0 {
            return vec![ranked[0].0];
        }
        let best = ranked[0].1;
        let weight = |logit: f64, scale: f32| (f64::from(scale) * (logit - best)).exp();
        let has_share = settings.top_p > 0.0 && settings.top_p < 1.0;
        let has_cuts = settings.top_k > 0 || has_share || settings.min_p > 0.0;
        if settings.top_k > 0 {
            ranked.truncate(settings.top_k as usize);
        }
        let mut lengths = vec![ranked.len()];
        if has_share {
            let weights = ranked
                .iter()
                .map(|(_, logit)| weight(*logit, settings.cut_scale));
            let weights: Vec<f64> = weights.collect();
            let total: f64 = weights.iter().sum();
            let kept = |share: f64| {
                let mut reached = 0.0;
                let goes_on = |weight: &&f64| {
                    let goes_on = reached < share * total;
                    reached += **weight;
                    goes_on
                };
                weights.iter().take_while(goes_on).count().max(1)
            };
            let share = f64::from(settings.top_p);
            lengths = vec![kept(share - NEAR), kept(share + NEAR)];
        }
        if settings.min_p > 0.0 {
            let least = f64::from(settings.min_p);
            let stays = |(_, logit): &&(u32, f64)| weight(*logit, settings.cut_scale) >= least;
            let most = ranked.iter().take_while(stays).count();
            lengths
                .iter_mut()
                .for_each(|length| *length = (*length).min(most));
        }
        if !has_cuts && ranked.len() > 64 {
            ranked[64..].sort_by_key(|(token_id, _)| *token_id);
        }
        let mut expected = Vec::new();
        for length in lengths {
            let kept = &ranked[..length];
            let weights = kept
                .iter()
                .map(|(_, logit)| weight(*logit, settings.draw_scale));
            let weights: Vec<f64> = weights.collect();
            let total: f64 = weights.iter().sum();
            for random in [
                settings.random - NEAR,
                settings.random,
                settings.random + NEAR,
            ] {
                let mut reached = 0.0;
                let passed = |weight: &f64| {
                    reached += weight;
                    random * total < reached
                };
                let place = weights.iter().position(passed).unwrap_or(length - 1);
                expected.push(kept[place].0);
            }
        }
        expected
    }

    /// ln of a token's probability by the unchanged logits.
    fn logprob(&self, row: usize, token_id: u32) -> f64 {
        let logits = &self.logits[row * self.width..][..self.vocab_size];
        let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        f64::from(logits[token_id as usize]) - total.ln()
    }

    /// What the device draws; it must leave the logits as they are.
    fn run(&self, device: &CudaDevice, ledger: &Ledger) -> Vec<SampledToken> {
        let reserve = |bytes| {
            let purpose = Purpose::Workspace;
            ledger
                .reserve(device.id(), "sampling", purpose, bytes)
                .expect("there is room")
        };
        let bytes: &[u8] = bytemuck::cast_slice(&self.logits);
        let mut logits = device
            .allocate(reserve(Bytes::from_usize(bytes.len())))
            .expect("logits are allocated");
        device
            .upload(bytes, &mut logits)
            .expect("logits are copied");
        let shape = SamplerShape {
            rows: self.rows.len(),
            width: self.width,
            changes: self.changes.len(),
        };
        let mut sampler = CudaSampler::new(device, &shape, reserve(CudaSampler::bytes(&shape)))
            .expect("a sampler is made");
        let mut draw = || {
            let step = SampleLogits {
                logits: &mut logits,
                width: self.width,
                vocab_size: self.vocab_size,
                drawable: self.drawable,
            };
            sampler
                .sample(device, step, &self.rows, &self.changes)
                .expect("it runs");
            sampler.tokens().expect("it has run").to_vec()
        };
        let drawn = draw();
        assert_eq!(draw(), drawn, "the same numbers draw the same tokens");
        let mut after = vec![0_u8; bytes.len()];
        device
            .download(&logits, &mut after)
            .expect("logits are copied back");
        assert!(after == bytes, "the logits are as they were");
        drawn
    }
}

#[test]
fn draws_follow_the_definition() {
    let Some(device) = device() else { return };
    let ledger = Ledger::for_device(device.id().clone(), Bytes::from_mib(256));
    let mut random = Random(3);
    for (rows, sizes) in [
        (32, [150, 150, 150]),
        (32, [4100, 4097, 4090]),
        (16, [9003, 9000, 8999]),
        (32, [32_000, 32_000, 32_000]),
        (16, [152_064, 151_936, 151_665]),
    ] {
        let case = Case::random(rows, sizes, &mut random);
        for (row, drawn) in case.run(&device, &ledger).into_iter().enumerate() {
            let what = || format!("{sizes:?}, row {row}: {:?}", case.rows[row]);
            let expected = case.expected(row);
            assert!(
                expected.contains(&drawn.token_id),
                "{drawn:?}, {expected:?}; {}",
                what()
            );
            let logprob = case.logprob(row, drawn.token_id);
            let error = (f64::from(drawn.logprob) - logprob).abs();
            assert!(error < 1e-5, "{drawn:?}, expected {logprob}; {}", what());
        }
    }
}

#[test]
fn what_is_no_number_draws_nothing() {
    let Some(device) = device() else { return };
    let ledger = Ledger::for_device(device.id().clone(), Bytes::from_mib(256));
    let mut case = Case::random(3, [5000, 4999, 4999], &mut Random(4));
    for (row, fault) in [f32::NAN, f32::INFINITY].into_iter().enumerate() {
        case.logits[row * 5000 + 4711] = fault;
    }
    // What is no token may be anything.
    case.logits[2 * 5000 + 4999] = f32::NAN;
    let drawn = case
        .run(&device, &ledger)
        .into_iter()
        .map(|drawn| drawn.token_id);
    assert_eq!(
        drawn.map(|id| id == NO_TOKEN).collect::<Vec<_>>(),
        [true, true, false]
    );
}
