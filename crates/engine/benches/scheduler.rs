//! Scheduler and page table by themselves: `cargo bench -p oxllama-engine --bench scheduler`.

use divan::Bencher;
use oxllama_engine::{JobId, PageHash, Prompt, Request, Scheduler, SchedulerSettings, Step};
use oxllama_model::StepPlan;

fn main() {
    divan::main();
}

const SETTINGS: SchedulerSettings = SchedulerSettings {
    pages: 1024,
    max_sequences: 32,
    max_rows: 512,
    max_logit_rows: 256,
    max_chunk_tokens: 512,
    stages: 1,
    context_tokens: 1 << 20,
    latency: None,
};

/// One whole step of 32 running jobs of about 2,000 tokens: planned, written as flat arrays,
/// and noted as run, with a token drawn for each. Jobs start again when they reach 4,000 tokens.
#[divan::bench(args = [0, 4], sample_size = 100)]
fn step_of_32_jobs(bencher: Bencher<'_, '_>, drafts: u32) {
    let mut scheduler = Scheduler::new(SETTINGS);
    let (mut step, mut plan) = (Step::default(), StepPlan::default());
    let mut next = 0;
    let mut submit = |scheduler: &mut Scheduler| {
        let prompt = Prompt {
            root: PageHash::root(&[]),
            token_ids: (0..2000).map(|i| next as u32 * 4000 + i).collect(),
        };
        let request = Request {
            id: JobId(next),
            priority: 0,
            max_skips: 4,
            prompts: vec![prompt],
            max_new_tokens: 2000,
        };
        next += 1;
        scheduler.submit(request).expect("a job that fits");
    };
    for _ in 0..32 {
        submit(&mut scheduler);
    }
    let guesses: Vec<u32> = (0..drafts).collect();
    let mut turn = |scheduler: &mut Scheduler| {
        let decoding: Vec<JobId> = scheduler.decoding().collect();
        for &id in &decoding {
            scheduler.set_drafts(id, &guesses);
        }
        scheduler.plan_step(&mut step);
        scheduler.fill(&step, &mut plan);
        for part in &step.parts {
            let new: &[u32] = if part.wants_logits { &[7] } else { &[] };
            scheduler.complete(part, new);
        }
        decoding.len()
    };
    // The prompts first: they are not what is measured.
    while turn(&mut scheduler) < 32 {}
    bencher.bench_local(|| {
        let running = turn(&mut scheduler);
        let full = scheduler.running().find(|&id| {
            scheduler
                .sequence(id, 0)
                .is_some_and(|(ids, _)| ids.len() > 4000)
        });
        if let Some(id) = full {
            scheduler.finish(id);
            submit(&mut scheduler);
        }
        running
    });
}
