//! Jobs whose tokens are drawn where the model runs: the same tokens as drawn on the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use oxllama_backend::DrawLimits;
use oxllama_backend::reference::draw;
use oxllama_engine::{
    Engine, EngineError, EngineSettings, FinishReason, Guidance, Job, SamplingSettings,
    Speculation, Stage,
};
use oxllama_format::AdapterSource;
use oxllama_model::{
    AdapterId, CacheRequest, ModelError, ModelSpec, Runner, RunnerLimits, StepOutput, StepPlan,
};

use crate::common::{
    PROMPT, SHAPE, Shape, engine_with, greedy, load, prompt, run, run_all, sampled, settings,
};

/// A model that draws by the definition, within limits of its own.
struct Drawing {
    runner: Box<dyn Runner>,
    limits: RunnerLimits,
    plan: StepPlan,
    /// The last step with logits.
    wanted: StepPlan,
    logits: Vec<f32>,
    drawn: Vec<u32>,
    /// Draws made so far, and rows of logits returned.
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    draws: AtomicUsize,
    logit_rows: AtomicUsize,
}

impl Counts {
    fn take(&self) -> (usize, usize) {
        let take = |count: &AtomicUsize| count.swap(0, Ordering::Relaxed);
        (take(&self.draws), take(&self.logit_rows))
    }
}

const LIMITS: DrawLimits = DrawLimits {
    top_k: 60,
    changes: 90,
};

impl Drawing {
    fn boxed(draws: DrawLimits, shape: Shape) -> (Box<dyn Runner>, Arc<Counts>) {
        let runner = load("llama2", shape).0;
        let counts = Arc::<Counts>::default();
        let limits = RunnerLimits {
            draws: Some(draws),
            ..*runner.limits()
        };
        let drawing = Self {
            runner,
            limits,
            plan: StepPlan::default(),
            wanted: StepPlan::default(),
            logits: Vec::new(),
            drawn: Vec::new(),
            counts: Arc::clone(&counts),
        };
        (Box::new(drawing), counts)
    }
}

impl Runner for Drawing {
    fn spec(&self) -> &ModelSpec {
        self.runner.spec()
    }

    fn limits(&self) -> &RunnerLimits {
        &self.limits
    }

    fn submit(&mut self, step: &StepPlan) -> Result<(), ModelError> {
        step.check(&self.limits, self.runner.spec().vocab_size)?;
        if !step.logit_rows.is_empty() {
            self.wanted.clone_from(step);
        }
        self.plan.clone_from(step);
        self.plan.draws.clear();
        self.plan.changes.clear();
        self.runner.submit(&self.plan)
    }

    fn output(&mut self) -> Result<StepOutput<'_>, ModelError> {
        let vocab_size = self.runner.spec().vocab_size;
        let step = &self.wanted;
        let logits = self.runner.output()?.logits;
        let kept_rows = step.logit_rows.len() - step.draws.len();
        let (kept, drawn_from) = logits.split_at(kept_rows * vocab_size);
        self.logits.clear();
        self.logits.extend_from_slice(kept);
        self.drawn.clear();
        for (logits, settings) in drawn_from.chunks_exact(vocab_size).zip(&step.draws) {
            let first = settings.first_change as usize;
            let changes = &step.changes[first..first + settings.change_count as usize];
            self.drawn.push(draw(logits, settings, changes));
        }
        let Counts { draws, logit_rows } = &*self.counts;
        draws.fetch_add(step.draws.len(), Ordering::Relaxed);
        logit_rows.fetch_add(kept_rows, Ordering::Relaxed);
        Ok(StepOutput {
            logits: &self.logits,
            drawn: &self.drawn,
        })
    }

    fn reshape_cache(&mut self, request: CacheRequest) -> Result<&RunnerLimits, ModelError> {
        let draws = self.limits.draws;
        self.limits = RunnerLimits {
            draws,
            ..*self.runner.reshape_cache(request)?
        };
        Ok(&self.limits)
    }

    fn load_adapter(
        &mut self,
        source: &AdapterSource,
        scale: f32,
    ) -> Result<AdapterId, ModelError> {
        self.runner.load_adapter(source, scale)
    }

    fn unload_adapter(&mut self, id: AdapterId) -> Result<(), ModelError> {
        self.runner.unload_adapter(id)
    }
}

fn changed(change: impl FnOnce(&mut SamplingSettings)) -> SamplingSettings {
    let mut settings = SamplingSettings::default();
    change(&mut settings);
    settings
}

/// Settings that a device knows.
fn known() -> Vec<SamplingSettings> {
    vec![
        SamplingSettings::greedy(),
        SamplingSettings::default(),
        changed(|settings| {
            settings.temperature = 1.3;
            settings.top_k = 0;
            settings.top_p = 1.0;
        }),
        changed(|settings| {
            settings.temperature = 1.5;
            settings.temperature_last = true;
            settings.min_p = 0.05;
        }),
        changed(|settings| {
            settings.temperature = 1.1;
            settings.top_k = 0;
            settings.top_p = 0.95;
            settings.frequency_penalty = 0.2;
            settings.presence_penalty = 0.3;
            settings.repetition_range = Some(12);
            settings.repetition_decay = 9;
            settings.logit_bias = [(5, 2.5), (9, f32::NEG_INFINITY), (32, -1.0)].into();
        }),
        changed(|settings| {
            settings.top_k = 1;
            settings.repetition_penalty = 1.4;
        }),
    ]
}

/// Settings that are the host's.
fn unknown() -> Vec<SamplingSettings> {
    let order = vec![Stage::MinP, Stage::TopK, Stage::Temperature];
    vec![
        changed(|settings| settings.top_k = LIMITS.top_k + 1),
        changed(|settings| settings.top_a = 0.1),
        changed(|settings| settings.typical = 0.9),
        changed(|settings| settings.tfs = 0.9),
        changed(|settings| settings.top_n_sigma = 2.0),
        changed(|settings| settings.skew = 0.1),
        changed(|settings| settings.mirostat = true),
        changed(|settings| settings.dry_multiplier = 0.8),
        changed(|settings| settings.xtc_probability = 0.5),
        changed(|settings| settings.smoothing_factor = 0.2),
        changed(|settings| (settings.min_temp, settings.max_temp) = (0.5, 1.5)),
        changed(|settings| {
            settings.min_p = 0.05;
            settings.sampler_order = order;
        }),
    ]
}

fn job(sampling: SamplingSettings, seed: u64) -> Job {
    let ids = prompt(seed as u32 % 3, seed as u32, 10, 20 + 7 * seed as usize);
    Job {
        sampling,
        seed,
        ..Job::new(ids, 30)
    }
}

/// Measures nothing beforehand, so that only jobs draw.
fn engine(runner: Box<dyn Runner>) -> Engine {
    engine_with(runner, None, settings())
}

fn host_engine(shape: Shape) -> Engine {
    engine(load("llama2", shape).0)
}

#[test]
fn known_settings_are_drawn_on_the_device_and_all_others_on_the_host() {
    let (runner, counts) = Drawing::boxed(LIMITS, SHAPE);
    let (device, host) = (engine(runner), host_engine(SHAPE));
    let mut seed = 0;
    for (all, on_device) in [(known(), true), (unknown(), false)] {
        for sampling in all {
            seed += 1;
            let found = run(&device, job(sampling.clone(), seed));
            let expected = run(&host, job(sampling, seed));
            assert_eq!(found.token_ids, expected.token_ids, "settings {seed}");
            assert_eq!(found.text, expected.text);
            let expected = if on_device { (30, 0) } else { (0, 30) };
            assert_eq!(counts.take(), expected, "settings {seed}");
        }
    }
}

#[test]
fn what_a_job_asks_for_beside_tokens_is_the_hosts() {
    let (runner, counts) = Drawing::boxed(LIMITS, SHAPE);
    let engine = engine(runner);
    let with = |change: fn(&mut Job)| {
        let mut job = greedy(&PROMPT, 6);
        change(&mut job);
        job
    };
    let jobs = [
        with(|job| job.logprobs = Some(0)),
        with(|job| job.return_logits = true),
        with(|job| {
            job.guidance = Some(Guidance {
                negative_ids: vec![1, 2],
                scale: 1.5,
            });
        }),
    ];
    for job in jobs {
        run(&engine, job);
        let (draws, logit_rows) = counts.take();
        assert!(draws == 0 && logit_rows >= 6, "{draws}, {logit_rows}");
    }
    // Only the tokens that stop tokens may not be among.
    let job = with(|job| (job.min_new_tokens, job.stop_token_ids) = (4, vec![2]));
    run(&engine, job);
    assert_eq!(counts.take(), (2, 4));
    // A history of more different tokens than a draw may change.
    let long: Vec<u32> = (0..100).collect();
    run(&engine, sampled(&long, 5, 1));
    assert_eq!(counts.take(), (0, 5));
}

#[test]
fn mixtures_neighbours_and_preemption_change_nothing() {
    let tight = Shape {
        cache_tokens: Some(3 * 256),
        batch: 8,
        ..SHAPE
    };
    let settings: Vec<SamplingSettings> = known().into_iter().chain(unknown()).collect();
    let jobs: Vec<Job> = (0..24)
        .map(|index| {
            let mut job = job(settings[index % settings.len()].clone(), index as u64);
            job.prompt_ids = prompt(index as u32 % 2, index as u32, 100, 200);
            job.max_new_tokens = 120;
            job.logprobs = (index % 5 == 0).then_some(2);
            job
        })
        .collect();
    let (runner, counts) = Drawing::boxed(LIMITS, tight);
    let device = engine(runner);
    let found = run_all(&device, &jobs);
    let host = host_engine(SHAPE);
    for (index, (found, job)) in found.iter().zip(&jobs).enumerate() {
        let expected = run(&host, job.clone());
        assert_eq!(found.token_ids, expected.token_ids, "job {index}");
        assert_eq!(found.logprobs, expected.logprobs, "job {index}");
    }
    assert!(device.stats().unwrap().preemptions > 0);
    let (draws, logit_rows) = counts.take();
    assert!(draws > 300 && logit_rows > 300, "{draws}, {logit_rows}");
}

#[test]
fn guesses_are_checked_on_the_host_and_change_nothing() {
    let eager = EngineSettings {
        ngram_cost: 0.0,
        max_draft_tokens: 5,
        ..settings()
    };
    let (runner, counts) = Drawing::boxed(LIMITS, SHAPE);
    let device = engine_with(runner, None, eager);
    let host = host_engine(SHAPE);
    for sampling in [SamplingSettings::greedy(), known()[2].clone()] {
        let is_greedy = sampling.is_greedy();
        let plain = Job {
            max_new_tokens: 200,
            ..job(sampling, 3)
        };
        let guessing = Job {
            speculation: Speculation::Ngram,
            ..plain.clone()
        };
        let found = run(&device, guessing);
        assert_eq!(found.token_ids, run(&host, plain).token_ids);
        let (draws, logit_rows) = counts.take();
        // A step without guesses can leave a greedy token to the device.
        assert_eq!(draws > 0, is_greedy, "{draws}");
        assert!(logit_rows > 0);
    }
}

#[test]
fn stops_bans_and_faults_are_as_on_the_host() {
    let limits = DrawLimits {
        changes: 200,
        ..LIMITS
    };
    let (runner, counts) = Drawing::boxed(limits, SHAPE);
    let (device, host) = (engine(runner), host_engine(SHAPE));
    let free = run(&host, greedy(&PROMPT, 20));
    let text: String = free.text.chars().skip(4).take(3).collect();
    let jobs = [
        Job {
            stop_token_ids: vec![free.token_ids[7]],
            ..greedy(&PROMPT, 20)
        },
        Job {
            stop_strings: vec![text.clone()],
            ..greedy(&PROMPT, 20)
        },
        Job {
            banned_strings: vec![text],
            ..greedy(&PROMPT, 20)
        },
    ];
    for job in jobs {
        let (found, expected) = (run(&device, job.clone()), run(&host, job));
        assert_eq!(found.token_ids, expected.token_ids);
        assert_eq!(found.text, expected.text);
        assert_eq!(found.finish_reason, expected.finish_reason);
    }
    let mut nothing = greedy(&PROMPT, 20);
    nothing.sampling.logit_bias = (0..90).map(|id| (id, f32::NEG_INFINITY)).collect();
    let vocab_size = 103;
    let all = (0..vocab_size).map(|id| (id, f32::NEG_INFINITY)).collect();
    let forbidden = Job {
        sampling: SamplingSettings {
            logit_bias: all,
            ..SamplingSettings::greedy()
        },
        ..greedy(&PROMPT, 20)
    };
    let (found, expected) = (run(&device, nothing.clone()), run(&host, nothing));
    assert_eq!(found.token_ids, expected.token_ids);
    counts.take();
    let failed = run(&device, forbidden);
    assert_eq!(failed.finish_reason, FinishReason::Error);
    let error = failed.error.unwrap();
    assert!(
        matches!(*error, EngineError::NothingAllowed { position: 19 }),
        "{error}"
    );
    assert_eq!(counts.take(), (1, 0));
}
