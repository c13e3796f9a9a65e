//! A model-free simulator: random jobs, random ends, and every book checked after every step.

use std::collections::HashMap;

use oxllama_backend::PAGE_TOKENS;
use oxllama_engine::{
    JobId, LatencyGoal, PageHash, Prompt, Request, Scheduler, SchedulerSettings, Step, StepCosts,
    StepPart,
};
use proptest::prelude::*;

/// SplitMix64: tests draw the same numbers everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// What the simulator knows of a job.
struct Simulated {
    prompts: Vec<Vec<u32>>,
    new_tokens: Vec<u32>,
    wanted: usize,
}

/// Contents of the cache: for each slot the hash of all tokens up to it, as keys and values
/// depend on them. A step that reads a wrong slot is found by it.
struct Cache {
    slots: Vec<u64>,
}

fn mix(hash: u64, token_id: u32) -> u64 {
    Random(hash ^ u64::from(token_id)).next()
}

impl Cache {
    /// Runs the copies and rows of a step as a model would; checks what every row would read.
    fn run(&mut self, scheduler: &Scheduler, step: &Step) {
        for copy in &step.copies {
            let (from, to) = (copy.from as usize, copy.to as usize);
            let (from, to) = (from * PAGE_TOKENS, to * PAGE_TOKENS);
            self.slots.copy_within(from..from + PAGE_TOKENS, to);
        }
        for part in &step.parts {
            let (token_ids, table) = scheduler.sequence(part.job, part.sequence).unwrap();
            let drafts = &scheduler.drafts(part.job)[..part.drafts];
            let end = part.first + part.tokens;
            let slot = |position: usize| {
                table[position / PAGE_TOKENS].0 as usize * PAGE_TOKENS + position % PAGE_TOKENS
            };
            let mut hash = 1;
            for (position, &token_id) in token_ids[..end].iter().chain(drafts).enumerate() {
                hash = mix(hash, token_id);
                if position < part.first {
                    assert_eq!(
                        self.slots[slot(position)],
                        hash,
                        "{:?} reads what is not its own at position {position}",
                        part.job
                    );
                } else {
                    self.slots[slot(position)] = hash;
                }
            }
        }
    }
}

pub(crate) struct Simulator {
    pub(crate) scheduler: Scheduler,
    random: Random,
    jobs: HashMap<JobId, Simulated>,
    cache: Cache,
    step: Step,
    ahead: Step,
    next_id: u64,
    pub(crate) finished: u64,
    pub(crate) cancelled: u64,
    pub(crate) failed_steps: u64,
    pub(crate) steps_ahead: u64,
}

impl Simulator {
    pub(crate) fn new(settings: SchedulerSettings, seed: u64) -> Self {
        Self {
            scheduler: Scheduler::new(settings),
            random: Random(seed),
            jobs: HashMap::new(),
            cache: Cache {
                slots: vec![0; settings.pages * PAGE_TOKENS],
            },
            step: Step::default(),
            ahead: Step::default(),
            next_id: 0,
            finished: 0,
            cancelled: 0,
            failed_steps: 0,
            steps_ahead: 0,
        }
    }

    /// A prompt out of a few families, so that prefixes are shared.
    fn prompt(&mut self, longest: usize) -> Vec<u32> {
        let family = self.random.below(4) as u32;
        let shared = self.random.below(longest);
        let own = 1 + self.random.below(longest / 4 + 1);
        let salt = self.random.below(3) as u32;
        let shared = (0..shared as u32).map(|i| family * 1000 + i % 7);
        let own = (0..own as u32).map(|i| 50_000 + salt * 100 + i % 5);
        shared.chain(own).take(longest).collect()
    }

    /// Submits a random job; one that cannot fit must be refused.
    pub(crate) fn submit(&mut self) {
        let settings = *self.scheduler.settings();
        let longest = settings.context_tokens - 1;
        let count = 1 + usize::from(self.random.one_in(8));
        let prompts: Vec<Vec<u32>> = (0..count).map(|_| self.prompt(longest)).collect();
        let wanted = 1 + self.random.below(300);
        let id = JobId(self.next_id);
        self.next_id += 1;
        let request = Request {
            id,
            priority: self.random.below(3) as i32,
            max_skips: self.random.below(6) as u32,
            prompts: prompts
                .iter()
                .map(|token_ids| Prompt {
                    root: PageHash::root(&[]),
                    token_ids: token_ids.clone(),
                })
                .collect(),
            max_new_tokens: wanted,
        };
        let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let fits = settings.check(&lengths, wanted).is_ok();
        assert_eq!(self.scheduler.submit(request).is_ok(), fits);
        if fits {
            let new_tokens = Vec::new();
            let job = Simulated {
                prompts,
                new_tokens,
                wanted,
            };
            self.jobs.insert(id, job);
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.jobs.len()
    }

    /// One step, with drafts, rewinds, cancellations and failures now and then.
    pub(crate) fn step(&mut self) {
        let decoding: Vec<JobId> = self.scheduler.decoding().collect();
        for id in decoding {
            if self.random.one_in(3) {
                let drafts: Vec<u32> = (0..self.random.below(5) as u32).collect();
                self.scheduler.set_drafts(id, &drafts);
            }
        }
        self.scheduler.plan_step(&mut self.step);
        self.check_step();
        self.scheduler.audit().unwrap();
        let made_progress = !self.step.parts.is_empty();
        assert!(made_progress || self.jobs.is_empty(), "nothing runs");
        if self.random.one_in(400) {
            // What a failed step left in its pages is anybody's guess.
            for copy in &self.step.copies {
                self.cache.slots[copy.to as usize * PAGE_TOKENS..][..PAGE_TOKENS].fill(99);
            }
            for id in self.scheduler.fail_step(&self.step) {
                self.jobs.remove(&id);
            }
            self.failed_steps += 1;
            self.scheduler.audit().unwrap();
            return;
        }
        self.cache.run(&self.scheduler, &self.step);
        if self.scheduler.settings().stages > 1 && !self.run_ahead() {
            return;
        }
        let parts = self.step.parts.clone();
        for of_job in parts.chunk_by(|a, b| a.job == b.job) {
            self.complete(of_job);
        }
        if self.random.one_in(50) {
            let jobs: Vec<JobId> = self.jobs.keys().copied().collect();
            if let Some(&id) = jobs.iter().min() {
                self.scheduler.finish(id);
                self.jobs.remove(&id);
                self.cancelled += 1;
            }
        }
        self.scheduler.audit().unwrap();
    }

    /// Runs prompts before anything is known of the tokens that the step's other parts give. False:
    /// the step has failed.
    fn run_ahead(&mut self) -> bool {
        let parts = std::mem::take(&mut self.step.parts);
        for of_job in parts.chunk_by(|a, b| a.job == b.job) {
            if of_job.iter().any(|part| part.wants_logits) {
                self.step.parts.extend_from_slice(of_job);
            } else {
                self.complete(of_job);
            }
        }
        for _ in 1..self.scheduler.settings().stages {
            let before: Vec<JobId> = self.scheduler.running().collect();
            self.scheduler.plan_ahead(&self.step.parts, &mut self.ahead);
            assert!(self.scheduler.running().eq(before), "who runs has changed");
            self.scheduler.audit().unwrap();
            let settings = self.scheduler.settings();
            let rows: usize = self.ahead.parts.iter().map(StepPart::rows).sum();
            assert!(rows <= settings.max_chunk_tokens.min(settings.max_rows));
            let is_awaited = |id| self.step.parts.iter().any(|part| part.job == id);
            for part in &self.ahead.parts {
                assert!(!part.wants_logits && !is_awaited(part.job), "{part:?}");
            }
            self.cache.run(&self.scheduler, &self.ahead);
            let parts = std::mem::take(&mut self.ahead.parts);
            self.steps_ahead += u64::from(!parts.is_empty());
            for of_job in parts.chunk_by(|a, b| a.job == b.job) {
                self.complete(of_job);
            }
        }
        if !self.step.parts.is_empty() && self.random.one_in(400) {
            for id in self.scheduler.fail_step(&self.step) {
                self.jobs.remove(&id);
            }
            // Nor has anything arrived that was taken for computed.
            self.scheduler.forget_cached();
            self.cache.slots.fill(99);
            self.failed_steps += 1;
            self.scheduler.audit().unwrap();
            return false;
        }
        true
    }

    fn complete(&mut self, parts: &[StepPart]) {
        let id = parts[0].job;
        let mut new_tokens = Vec::new();
        if parts[0].wants_logits {
            let drafts = &self.scheduler.drafts(id)[..parts[0].drafts];
            let accepted = self.random.below(parts[0].drafts + 1);
            new_tokens.extend_from_slice(&drafts[..accepted]);
            new_tokens.push(self.random.below(9) as u32);
        }
        for part in parts {
            self.scheduler.complete(part, &new_tokens);
        }
        let context_tokens = self.scheduler.settings().context_tokens;
        let Some(job) = self.jobs.get_mut(&id) else {
            panic!("{id:?} runs but does not exist");
        };
        job.new_tokens.extend(&new_tokens);
        let longest = job.prompts.iter().map(Vec::len).max().unwrap();
        let full = longest + job.new_tokens.len() > context_tokens;
        for (index, prompt) in job.prompts.iter().enumerate() {
            let (token_ids, _) = self.scheduler.sequence(id, index).unwrap();
            let expected = prompt.iter().chain(&job.new_tokens);
            assert!(token_ids.iter().eq(expected), "{id:?} lost its tokens");
        }
        if job.new_tokens.len() >= job.wanted || full {
            self.scheduler.finish(id);
            self.jobs.remove(&id);
            self.finished += 1;
        } else if !new_tokens.is_empty() && self.random.one_in(40) {
            let kept = self.random.below(job.new_tokens.len());
            job.new_tokens.truncate(kept);
            let lengths: Vec<usize> = job.prompts.iter().map(Vec::len).collect();
            self.scheduler.rewind(id, &lengths, kept, &mut self.step);
        }
    }

    /// The bounds of a step, and that running jobs advance.
    fn check_step(&self) {
        let settings = self.scheduler.settings();
        let rows: usize = self.step.parts.iter().map(StepPart::rows).sum();
        let logit_rows: usize = self.step.parts.iter().map(StepPart::logit_rows).sum();
        assert!(rows <= settings.max_rows, "{rows} rows");
        assert!(
            logit_rows <= settings.max_logit_rows,
            "{logit_rows} logit rows"
        );
        assert!(self.step.parts.len() <= settings.max_sequences);
        for id in self.scheduler.decoding() {
            let advances = self
                .step
                .parts
                .iter()
                .any(|part| part.job == id && part.wants_logits);
            assert!(advances, "{id:?} is stalled");
        }
        for part in &self.step.parts {
            let (token_ids, table) = self.scheduler.sequence(part.job, part.sequence).unwrap();
            assert!(part.first + part.tokens <= token_ids.len());
            assert!((part.first + part.rows()).div_ceil(PAGE_TOKENS) <= table.len());
            assert!(part.first + part.rows() <= settings.context_tokens);
        }
    }
}

pub(crate) fn settings(pages: usize, max_sequences: usize) -> SchedulerSettings {
    SchedulerSettings {
        pages,
        max_sequences,
        max_rows: 128,
        max_logit_rows: 48,
        max_chunk_tokens: 96,
        stages: 1,
        context_tokens: 900,
        latency: None,
    }
}

/// `jobs` random jobs, submitted in bursts, to their end.
fn churn(settings: SchedulerSettings, seed: u64, jobs: usize) -> Simulator {
    let mut simulator = Simulator::new(settings, seed);
    let mut submitted = 0;
    let mut bursts = Random(seed ^ 0xb);
    while submitted < jobs || simulator.in_flight() > 0 {
        if submitted < jobs && simulator.in_flight() < 40 {
            for _ in 0..bursts.below(12).min(jobs - submitted) {
                simulator.submit();
                submitted += 1;
            }
        }
        if simulator.in_flight() > 0 {
            simulator.step();
        }
    }
    assert_eq!(simulator.scheduler.held_pages(), 0);
    assert_eq!(simulator.scheduler.waiting().len(), 0);
    simulator
}

/// The number of jobs that the issue of this module asks for. Short jobs, so that it takes
/// seconds; the property test below varies the rest.
#[test]
fn a_hundred_thousand_jobs_leave_nothing_behind() {
    let bounds = SchedulerSettings {
        context_tokens: 300,
        ..settings(12, 6)
    };
    let simulator = churn(bounds, 7, 100_000);
    assert!(
        simulator.finished > 50_000,
        "{} finished",
        simulator.finished
    );
    assert!(simulator.cancelled > 1_000 && simulator.failed_steps > 100);
    assert!(simulator.scheduler.preemptions() > 1_000);
    let counters = simulator.scheduler.prefix_counters();
    assert!(counters.shared_tokens > 0 && counters.copied_tokens > 0);
    assert!(counters.evicted_pages > 0);
}

/// The same over several devices, where prompts run while tokens are awaited.
#[test]
fn jobs_on_several_devices_leave_nothing_behind() {
    let bounds = SchedulerSettings {
        stages: 3,
        ..settings(30, 6)
    };
    let simulator = churn(bounds, 8, 5_000);
    let counts = (
        simulator.finished,
        simulator.failed_steps,
        simulator.steps_ahead,
    );
    assert!(counts.0 > 2_000, "{counts:?}");
    assert!(counts.1 > 20 && counts.2 > 1_000, "{counts:?}");
    assert!(simulator.scheduler.prefix_counters().shared_tokens > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_mix_of_jobs_ends(
        seed in any::<u64>(),
        pages in 4usize..60,
        max_sequences in 2usize..12,
        max_chunk_tokens in 1usize..128,
        stages in 1usize..4,
        row_ms in 0.0f64..2.0,
        factor in 1.0f64..4.0,
    ) {
        let costs = StepCosts { step_s: 0.005, row_s: row_ms * 1e-3, attended_s: 1e-7 };
        let bounds = SchedulerSettings {
            max_chunk_tokens,
            stages,
            latency: Some(LatencyGoal { costs, factor }),
            ..settings(pages, max_sequences)
        };
        churn(bounds, seed, 60);
    }
}
