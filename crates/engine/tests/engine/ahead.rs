//! A model on several devices, which is given prompts while the output of a step is awaited.

use std::sync::{Arc, Mutex};

use oxllama_backend::DeviceError;
use oxllama_engine::{EngineError, Event, FinishReason, Job};
use oxllama_format::AdapterSource;
use oxllama_memory::DeviceId;
use oxllama_model::{
    AdapterId, CacheRequest, ModelError, ModelSpec, Runner, RunnerLimits, StepOutput, StepPlan,
};

use crate::common::{SHAPE, engine_with, greedy, load, prompt, run_alone, sampled, settings};

/// What is asked of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// A step, and of how many rows it wants logits.
    Step {
        rows: usize,
        logit_rows: usize,
    },
    Output,
}

/// A model that says it lies on several devices, and fails where it is told to.
struct Staged {
    runner: Box<dyn Runner>,
    limits: RunnerLimits,
    /// While it is held, steps wait.
    gate: Arc<Mutex<()>>,
    asked: Arc<Mutex<Vec<Asked>>>,
    /// The next output after a step without logits fails. What was computed since the last
    /// output is spoilt then, as far as the model can: the cache is made anew.
    fails: Arc<Mutex<bool>>,
}

impl Staged {
    fn new(stages: usize) -> Self {
        let runner = load("llama2", SHAPE).0;
        let limits = RunnerLimits {
            stages,
            ..*runner.limits()
        };
        Self {
            runner,
            limits,
            gate: Arc::default(),
            asked: Arc::default(),
            fails: Arc::default(),
        }
    }

    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
    }
}

impl Runner for Staged {
    fn spec(&self) -> &ModelSpec {
        self.runner.spec()
    }

    fn limits(&self) -> &RunnerLimits {
        &self.limits
    }

    fn submit(&mut self, step: &StepPlan) -> Result<(), ModelError> {
        drop(self.gate.lock());
        self.note(Asked::Step {
            rows: step.token_ids.len(),
            logit_rows: step.logit_rows.len(),
        });
        self.runner.submit(step)
    }

    fn output(&mut self) -> Result<StepOutput<'_>, ModelError> {
        let mut fails = self.fails.lock().unwrap();
        let is_behind = matches!(
            self.asked.lock().unwrap().last(),
            Some(Asked::Step { logit_rows: 0, .. })
        );
        if *fails && is_behind {
            *fails = false;
            let tokens = |pages: usize| CacheRequest {
                tokens: Some(256 * pages as u64),
                format: None,
            };
            let pages = self.limits.pages;
            self.runner.reshape_cache(tokens(pages + 1))?;
            self.runner.reshape_cache(tokens(pages))?;
            return Err(ModelError::from(DeviceError::Operation {
                device: DeviceId::cuda(1),
                operation: "a step's kernels or copies".to_owned(),
                reason: "a test".to_owned(),
            }));
        }
        drop(fails);
        self.note(Asked::Output);
        self.runner.output()
    }

    fn reshape_cache(&mut self, request: CacheRequest) -> Result<&RunnerLimits, ModelError> {
        self.runner.reshape_cache(request)
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

/// A prompt that no other job has.
fn own(seed: u64, length: usize) -> Vec<u32> {
    prompt(seed as u32, seed as u32, 0, length)
}

fn jobs() -> Vec<Job> {
    (0..6)
        .map(|seed| sampled(&own(seed, 20 + 70 * seed as usize), 24, seed))
        .collect()
}

/// Most steps that are submitted before an output is asked for, of those that are; how many
/// outputs are asked for while a later step is under way.
fn steps_under_way(asked: &[Asked]) -> (usize, usize) {
    let (mut under_way, mut most, mut behind) = (0, 0, 0);
    for asked in asked {
        match asked {
            Asked::Step { logit_rows: 0, .. } if under_way == 0 => {}
            Asked::Step {
                logit_rows: 0,
                rows,
            } => {
                assert!(*rows > 0);
                under_way += 1;
            }
            Asked::Step { .. } => {
                assert_eq!(under_way, 0, "one output is asked for at a time");
                under_way = 1;
            }
            Asked::Output => {
                behind += usize::from(under_way > 1);
                most = most.max(under_way);
                under_way = 0;
            }
        }
    }
    (most, behind)
}

#[test]
fn jobs_on_several_devices_get_the_tokens_that_they_get_on_one() {
    let expected: Vec<_> = jobs()
        .into_iter()
        .map(|job| run_alone(SHAPE, job).token_ids)
        .collect();
    for stages in [1, 2, 4] {
        let model = Staged::new(stages);
        let (asked, gate) = (Arc::clone(&model.asked), Arc::clone(&model.gate));
        let engine = engine_with(Box::new(model), None, settings());
        // All are there before the first one's first step has been made.
        let shut = gate.lock().unwrap();
        let streams: Vec<_> = jobs()
            .into_iter()
            .map(|job| engine.submit(job).unwrap())
            .collect();
        drop(shut);
        for (stream, expected) in streams.into_iter().zip(&expected) {
            assert_eq!(stream.wait().token_ids, *expected, "{stages} stages");
        }
        let (most, behind) = steps_under_way(&asked.lock().unwrap());
        assert_eq!(most, stages);
        assert_eq!(behind > 0, stages > 1, "{behind} with steps behind them");
    }
}

#[test]
fn what_was_under_way_when_a_step_failed_is_computed_again() {
    let model = Staged::new(2);
    let (fails, gate) = (Arc::clone(&model.fails), Arc::clone(&model.gate));
    let engine = engine_with(Box::new(model), None, settings());
    let shared = own(9, 400);
    let expected = run_alone(SHAPE, greedy(&shared, 8)).token_ids;
    // The second one comes when the first one's first step is under way.
    let shut = gate.lock().unwrap();
    let mut decoding = engine.submit(greedy(&own(1, 10), 100)).unwrap();
    while !matches!(decoding.next().unwrap(), Event::Started { .. }) {}
    *fails.lock().unwrap() = true;
    let prefilling = engine.submit(greedy(&shared, 8)).unwrap();
    drop(shut);
    let decoding = decoding.wait();
    assert_eq!(decoding.finish_reason, FinishReason::Error);
    let error = decoding.error.expect("the device's");
    assert!(matches!(*error, EngineError::Model(_)), "{error}");
    assert!(!*fails.lock().unwrap(), "the fault has happened");
    // Pages that were taken for computed are not: whoever shares them gets the right tokens.
    assert_eq!(prefilling.wait().token_ids, expected);
    let again = engine.submit(greedy(&shared, 8)).unwrap();
    assert_eq!(again.wait().token_ids, expected);
}
