//! What goes wrong with one job, or with the device, and who feels it.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use futures_core::Stream;
use oxllama_backend::DeviceError;
use oxllama_engine::{
    ConstraintSpec, EngineError, EngineSettings, Event, FinishReason, Guidance, Job,
    SamplingSettings,
};
use oxllama_format::AdapterSource;
use oxllama_memory::DeviceId;
use oxllama_model::{
    AdapterId, CacheRequest, ModelError, ModelSpec, Runner, RunnerLimits, StepOutput, StepPlan,
};

use crate::common::{
    PROMPT, Shape, engine, engine_with, greedy, load, prompt, run, run_alone, sampled, settings,
};

#[test]
fn jobs_that_make_no_sense_are_refused_and_harm_nobody() {
    let engine = engine(Shape::default());
    let refuse = |job: Job| engine.submit(job).err().unwrap();
    let sampling = |change: fn(&mut SamplingSettings)| {
        let mut job = sampled(&PROMPT, 4, 1);
        change(&mut job.sampling);
        job
    };
    let beside = engine.submit(greedy(&PROMPT, 40)).unwrap();
    assert!(matches!(refuse(greedy(&[], 1)), EngineError::EmptyPrompt));
    assert!(matches!(
        refuse(greedy(&[1; 64], 1)),
        EngineError::PromptTooLong {
            prompt_tokens: 64,
            context_tokens: 64
        }
    ));
    assert!(matches!(
        refuse(greedy(&vec![1; 1 << 20], 1)),
        EngineError::PromptTooLong { .. }
    ));
    assert!(matches!(
        refuse(greedy(&[0, 103], 1)),
        EngineError::TokenOutOfRange {
            token_id: 103,
            vocab_size: 103
        }
    ));
    let contradictory = [
        sampling(|sampling| sampling.top_p = f32::NAN),
        sampling(|sampling| sampling.top_p = 1.5),
        sampling(|sampling| sampling.temperature = -1.0),
    ];
    for job in contradictory {
        assert!(matches!(refuse(job), EngineError::Settings(_)));
    }
    let bad_strings = |stop_strings: Vec<String>| Job {
        stop_strings,
        ..greedy(&PROMPT, 4)
    };
    assert!(matches!(
        refuse(bad_strings(vec![String::new()])),
        EngineError::Text(_)
    ));
    let many = (0..10_000).map(|index| index.to_string()).collect();
    assert!(matches!(refuse(bad_strings(many)), EngineError::Text(_)));
    let rejected = Job {
        constraint: Some(ConstraintSpec::Regex("(".to_owned())),
        ..greedy(&PROMPT, 4)
    };
    assert!(matches!(refuse(rejected), EngineError::Constraint(_)));
    let limits = Job {
        min_new_tokens: 5,
        ..greedy(&PROMPT, 4)
    };
    assert!(matches!(refuse(limits), EngineError::TokenLimits { .. }));
    let scale = Job {
        guidance: Some(Guidance {
            negative_ids: vec![1],
            scale: f32::INFINITY,
        }),
        ..greedy(&PROMPT, 4)
    };
    assert!(matches!(refuse(scale), EngineError::GuidanceScale { .. }));
    let expected = run_alone(Shape::default(), greedy(&PROMPT, 40)).token_ids;
    assert_eq!(beside.wait().token_ids, expected);
}

#[test]
fn a_full_queue_refuses_and_priorities_and_positions_hold() {
    let one = EngineSettings {
        queue_limit: 2,
        ..settings()
    };
    let shape = Shape {
        batch: 1,
        context_tokens: 1024,
        ..Shape::default()
    };
    let gate = Arc::new(Mutex::new(()));
    let engine = engine_with(Faulty::boxed(shape, &gate), None, one);
    // The first job cannot end before the queue has been filled.
    let shut = gate.lock().unwrap();
    let mut running = engine.submit(drawing_no_fault(&PROMPT, 900)).unwrap();
    while !matches!(running.next().unwrap(), Event::Started { .. }) {}
    let mut low = engine.submit(drawing_no_fault(&PROMPT, 3)).unwrap();
    let low_again = engine.submit(drawing_no_fault(&PROMPT, 3)).unwrap();
    let error = engine.submit(drawing_no_fault(&PROMPT, 3)).unwrap_err();
    assert!(matches!(error, EngineError::QueueFull { limit: 2 }));
    drop(shut);
    assert!(matches!(low.next().unwrap(), Event::Queued { position: 0 }));
    drop(running);
    assert_eq!(low.wait().finish_reason, FinishReason::Length);
    assert_eq!(low_again.wait().finish_reason, FinishReason::Length);
}

#[test]
fn dropping_a_stream_cancels_its_job_and_frees_its_pages() {
    let engine = engine(Shape {
        context_tokens: 4096,
        ..Shape::default()
    });
    let mut streams: Vec<_> = (0..6)
        .map(|index| {
            engine
                .submit(greedy(&prompt(index, index, 5, 50), 4000))
                .unwrap()
        })
        .collect();
    while !matches!(streams[0].next().unwrap(), Event::Token { .. }) {}
    streams.clear();
    engine.drain();
    let stats = engine.stats().unwrap();
    assert_eq!(
        (stats.held_pages, stats.running_jobs, stats.waiting_jobs),
        (0, 0, 0)
    );
    let closed = engine.submit(greedy(&PROMPT, 1)).unwrap_err();
    assert!(matches!(closed, EngineError::Closed));
}

#[test]
fn a_passed_deadline_ends_a_job_with_what_it_has() {
    let engine = engine(Shape::default());
    let job = Job {
        deadline: Some(Instant::now()),
        ..greedy(&PROMPT, 40)
    };
    let late = run(&engine, job);
    assert_eq!(late.finish_reason, FinishReason::Deadline);
    let in_time = Job {
        deadline: Some(Instant::now() + Duration::from_secs(1000)),
        ..greedy(&PROMPT, 4)
    };
    assert_eq!(run(&engine, in_time).token_ids.len(), 4);
}

#[test]
fn shutting_down_tells_every_job() {
    let shape = Shape {
        batch: 1,
        ..Shape::default()
    };
    let gate = Arc::new(Mutex::new(()));
    let engine = engine_with(Faulty::boxed(shape, &gate), None, settings());
    // No job can end before the engine has been told to.
    let shut = gate.lock().unwrap();
    let mut streams: Vec<_> = (0..4)
        .map(|_| engine.submit(drawing_no_fault(&PROMPT, 40)).unwrap())
        .collect();
    std::thread::scope(|scope| {
        scope.spawn(|| engine.shutdown());
        loop {
            match engine.submit(drawing_no_fault(&PROMPT, 40)) {
                Ok(stream) => streams.push(stream),
                Err(EngineError::QueueFull { .. }) => {}
                Err(error) => break assert!(matches!(error, EngineError::Closed)),
            }
        }
        drop(shut);
    });
    for stream in streams {
        assert_eq!(stream.wait().finish_reason, FinishReason::Cancelled);
    }
    assert!(matches!(engine.stats(), Err(EngineError::Closed)));
}

#[test]
fn a_slow_reader_stalls_nobody() {
    let engine = engine(Shape::default());
    let unread = engine.submit(greedy(&PROMPT, 40)).unwrap();
    for _ in 0..3 {
        run(&engine, greedy(&PROMPT, 30));
    }
    assert_eq!(unread.wait().token_ids.len(), 40);
}

#[test]
fn many_threads_submit_at_once() {
    let engine = engine(Shape::default());
    let expected = run(&engine, sampled(&PROMPT, 10, 7)).token_ids;
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert_eq!(run(&engine, sampled(&PROMPT, 10, 7)).token_ids, expected);
                }
            });
        }
    });
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[test]
fn streams_are_async_without_a_runtime() {
    let engine = engine(Shape::default());
    let mut stream = engine.submit(greedy(&PROMPT, 8)).unwrap();
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut tokens = 0;
    loop {
        match Pin::new(&mut stream).poll_next(&mut context) {
            Poll::Ready(Some(Event::Token { ids, .. })) => tokens += ids.len(),
            Poll::Ready(Some(_)) => {}
            Poll::Ready(None) => break,
            Poll::Pending => std::thread::park(),
        }
    }
    assert_eq!(tokens, 8);
}

/// A model whose steps wait while its gate is held, and that breaks in steps with a certain token:
/// it fails, computes NaN, loses its device, or panics.
struct Faulty {
    runner: Box<dyn Runner>,
    gate: Arc<Mutex<()>>,
    /// Of the last step with logits: whether each row's are to be NaN.
    spoilt: Vec<bool>,
    logits: Vec<f32>,
}

impl Faulty {
    fn boxed(shape: Shape, gate: &Arc<Mutex<()>>) -> Box<dyn Runner> {
        Box::new(Self {
            runner: load("llama2", shape).0,
            gate: Arc::clone(gate),
            spoilt: Vec::new(),
            logits: Vec::new(),
        })
    }
}

const FAILS: u32 = 60;
const COMPUTES_NAN: u32 = 61;
const PANICS: u32 = 62;
const LOSES_THE_DEVICE: u32 = 102;

/// A job whose answer has none of the tokens that break the model: the tiny one would draw them.
fn drawing_no_fault(prompt_ids: &[u32], max_new_tokens: usize) -> Job {
    let faults = [FAILS, COMPUTES_NAN, PANICS, LOSES_THE_DEVICE];
    let mut job = greedy(prompt_ids, max_new_tokens);
    job.sampling.logit_bias = faults.map(|id| (id, -100.0)).into_iter().collect();
    job
}

impl Runner for Faulty {
    fn spec(&self) -> &ModelSpec {
        self.runner.spec()
    }

    fn limits(&self) -> &RunnerLimits {
        self.runner.limits()
    }

    fn submit(&mut self, step: &StepPlan) -> Result<(), ModelError> {
        drop(self.gate.lock());
        assert!(
            !step.token_ids.contains(&PANICS),
            "the fault that this test is about"
        );
        if step.token_ids.contains(&FAILS) {
            return self.runner.submit(&StepPlan::default());
        }
        if step.token_ids.contains(&LOSES_THE_DEVICE) {
            return Err(ModelError::from(DeviceError::Lost {
                device: DeviceId::cuda(0),
                operation: "a step's kernels or copies".to_owned(),
                reason: "an illegal memory access".to_owned(),
            }));
        }
        if !step.logit_rows.is_empty() {
            let is_spoilt = |&row: &u32| {
                let sequence = step.row_sequences[row as usize];
                let mut rows = step.row_sequences.iter().zip(&step.token_ids);
                rows.any(|(&other, &id)| other == sequence && id == COMPUTES_NAN)
            };
            self.spoilt = step.logit_rows.iter().map(is_spoilt).collect();
        }
        self.runner.submit(step)
    }

    fn output(&mut self) -> Result<StepOutput<'_>, ModelError> {
        let vocab_size = self.runner.spec().vocab_size;
        self.logits.clear();
        self.logits.extend_from_slice(self.runner.output()?.logits);
        let rows = self.logits.chunks_exact_mut(vocab_size);
        for (logits, &is_spoilt) in rows.zip(&self.spoilt) {
            if is_spoilt {
                logits.fill(f32::NAN);
            }
        }
        Ok(StepOutput {
            logits: &self.logits,
            drawn: &[],
        })
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

#[test]
fn a_fault_ends_the_jobs_of_its_step_and_the_engine_goes_on() {
    let gate = Arc::default();
    let engine = engine_with(Faulty::boxed(Shape::default(), &gate), None, settings());
    let job = drawing_no_fault;
    let expected = run(&engine, job(&PROMPT, 30)).token_ids;
    let good = engine.submit(job(&PROMPT, 30)).unwrap();
    let nan = run(&engine, job(&[1, 2, COMPUTES_NAN], 5));
    assert_eq!(nan.finish_reason, FinishReason::Error);
    assert!(matches!(
        *nan.error.unwrap(),
        EngineError::NotFinite { position: 2 }
    ));
    assert_eq!(good.wait().token_ids, expected);
    let failed = run(&engine, job(&[1, FAILS], 5));
    assert_eq!(failed.finish_reason, FinishReason::Error);
    assert!(matches!(*failed.error.unwrap(), EngineError::Model(_)));
    assert_eq!(run(&engine, job(&PROMPT, 30)).token_ids, expected);
    assert_eq!(engine.stats().unwrap().held_pages, 0);
    let panicked = run(&engine, job(&[1, PANICS], 5));
    assert!(matches!(*panicked.error.unwrap(), EngineError::Panicked));
    let after = engine.submit(job(&PROMPT, 1)).unwrap_err();
    assert!(matches!(after, EngineError::Closed));
}

#[test]
fn a_lost_device_ends_every_job_and_the_engine() {
    let gate = Arc::default();
    let engine = engine_with(Faulty::boxed(Shape::default(), &gate), None, settings());
    let shut = gate.lock().unwrap();
    // One is in the step that fails, the other waits for a place in the next.
    let good = engine.submit(greedy(&PROMPT, 30)).unwrap();
    let bad = engine.submit(greedy(&[1, LOSES_THE_DEVICE], 5)).unwrap();
    drop(shut);
    for stream in [good, bad] {
        let ended = stream.wait();
        assert_eq!(ended.finish_reason, FinishReason::Error);
        let error = ended.error.unwrap().to_string();
        assert!(error.contains("cuda:0 is lost"), "{error}");
    }
    engine.drain();
    for error in [
        engine.submit(greedy(&PROMPT, 1)).unwrap_err(),
        engine.stats().unwrap_err(),
    ] {
        assert!(matches!(error, EngineError::Ended { .. }), "{error}");
        assert!(error.to_string().contains("cuda:0 is lost"), "{error}");
    }
}
