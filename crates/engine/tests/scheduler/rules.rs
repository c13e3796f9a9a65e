//! Who runs, who waits, and who gives way.

use oxllama_backend::PAGE_TOKENS;
use oxllama_engine::{
    JobId, LatencyGoal, PageHash, Prompt, Refusal, Request, Scheduler, SchedulerSettings, Step,
    StepCosts,
};

use crate::simulation::settings;

fn request(id: u64, token_ids: Vec<u32>, max_new_tokens: usize) -> Request {
    Request {
        id: JobId(id),
        priority: 0,
        max_skips: 2,
        prompts: vec![Prompt {
            root: PageHash::root(&[]),
            token_ids,
        }],
        max_new_tokens,
    }
}

/// Tokens that no other job has.
fn own(id: u64, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| id as u32 * 10_000 + i).collect()
}

/// Plans a step and completes it; every part with logits gets one token.
fn run(scheduler: &mut Scheduler, step: &mut Step) {
    scheduler.plan_step(step);
    scheduler.audit().unwrap();
    for part in step.parts.clone() {
        let new: &[u32] = if part.wants_logits { &[1] } else { &[] };
        scheduler.complete(&part, new);
    }
}

fn ids(jobs: impl Iterator<Item = JobId>) -> Vec<u64> {
    jobs.map(|id| id.0).collect()
}

#[test]
fn a_prompt_never_stalls_running_jobs() {
    let mut scheduler = Scheduler::new(settings(40, 8));
    let mut step = Step::default();
    scheduler.submit(request(0, own(0, 10), 200)).unwrap();
    run(&mut scheduler, &mut step);
    scheduler.submit(request(1, own(1, 800), 10)).unwrap();
    let mut steps = 0;
    while scheduler.decoding().count() < 2 {
        run(&mut scheduler, &mut step);
        assert!(
            step.parts
                .iter()
                .any(|part| part.job == JobId(0) && part.wants_logits)
        );
        steps += 1;
    }
    assert_eq!(steps, 800usize.div_ceil(96));
}

#[test]
fn prompts_are_cut_to_the_time_that_running_jobs_allow() {
    let costs = StepCosts {
        step_s: 0.009,
        row_s: 0.001,
        attended_s: 0.0,
    };
    let goal = LatencyGoal { costs, factor: 3.0 };
    let mut scheduler = Scheduler::new(SchedulerSettings {
        latency: Some(goal),
        ..settings(40, 8)
    });
    let mut step = Step::default();
    scheduler.submit(request(0, own(0, 10), 200)).unwrap();
    run(&mut scheduler, &mut step);
    scheduler.submit(request(1, own(1, 800), 10)).unwrap();
    run(&mut scheduler, &mut step);
    // A quiet step takes 10 ms: 20 more are allowed, less what floats lose.
    let chunk = step.parts.iter().find(|part| part.job == JobId(1)).unwrap();
    assert!((19..=20).contains(&chunk.tokens), "{}", chunk.tokens);
    // Alone, a prompt takes what the step has.
    scheduler.finish(JobId(0));
    run(&mut scheduler, &mut step);
    assert_eq!(step.parts[0].tokens, 96);
}

#[test]
fn prompts_go_on_while_tokens_are_awaited() {
    let mut scheduler = Scheduler::new(SchedulerSettings {
        stages: 2,
        ..settings(40, 8)
    });
    let (mut step, mut ahead) = (Step::default(), Step::default());
    scheduler.submit(request(0, own(0, 10), 200)).unwrap();
    run(&mut scheduler, &mut step);
    for id in 1..3 {
        scheduler.submit(request(id, own(id, 120), 10)).unwrap();
    }
    // A token of the first job, and as much of the second's prompt as a step takes.
    scheduler.plan_step(&mut step);
    let parts = |step: &Step| -> Vec<(u64, usize, bool)> {
        let parts = step.parts.iter();
        parts
            .map(|part| (part.job.0, part.tokens, part.wants_logits))
            .collect()
    };
    assert_eq!(parts(&step), [(0, 1, true), (1, 96, false)]);
    // Ahead of that token all of the prompt but its last token, which gives a token itself.
    scheduler.complete(&step.parts[1], &[]);
    scheduler.plan_ahead(&step.parts[..1], &mut ahead);
    assert_eq!(parts(&ahead), [(1, 23, false), (2, 73, false)]);
    for part in &ahead.parts {
        scheduler.complete(part, &[]);
    }
    scheduler.complete(&step.parts[0], &[7]);
    // The next step owes each of the first two a token.
    scheduler.plan_step(&mut step);
    let expected = [(0, 1, true), (1, 1, true), (2, 47, true)];
    assert_eq!(parts(&step), expected);
    // All that is left is awaited.
    scheduler.plan_ahead(&step.parts, &mut ahead);
    assert!(ahead.is_empty());
    scheduler.audit().unwrap();
}

#[test]
fn a_long_prompt_is_cut_for_the_devices_that_it_passes() {
    let longest_step = |stages| {
        let mut scheduler = Scheduler::new(SchedulerSettings {
            max_rows: 4096,
            max_chunk_tokens: 4096,
            context_tokens: 8192,
            stages,
            ..settings(40, 8)
        });
        let mut step = Step::default();
        scheduler.submit(request(0, own(0, 2048), 1)).unwrap();
        scheduler.plan_step(&mut step);
        step.parts[0].tokens
    };
    assert_eq!([1, 2, 4].map(longest_step), [2048, 1024, 768]);
}

#[test]
fn the_youngest_of_the_lowest_priority_gives_way_and_comes_back() {
    let mut scheduler = Scheduler::new(settings(6, 8));
    let mut step = Step::default();
    let important = Request {
        priority: 1,
        ..request(2, own(2, 200), 400)
    };
    scheduler.submit(request(0, own(0, 200), 400)).unwrap();
    scheduler.submit(request(1, own(1, 200), 400)).unwrap();
    scheduler.submit(important).unwrap();
    while step.preempted.is_empty() {
        run(&mut scheduler, &mut step);
    }
    assert_eq!(step.preempted, [JobId(1)]);
    assert_eq!(ids(scheduler.waiting()), [1]);
    let before = scheduler.preemptions();
    assert_eq!(before, 1);
    for id in [0, 2] {
        scheduler.finish(JobId(id));
    }
    run(&mut scheduler, &mut step);
    assert_eq!(ids(scheduler.running()), [1]);
    // Its first page was still there.
    let (_, cached) = step.admitted[0];
    assert!(cached >= PAGE_TOKENS, "{cached} tokens were kept");
}

#[test]
fn a_higher_priority_takes_the_room_of_a_lower_one() {
    let mut scheduler = Scheduler::new(settings(4, 8));
    let mut step = Step::default();
    scheduler.submit(request(0, own(0, 600), 100)).unwrap();
    run(&mut scheduler, &mut step);
    scheduler
        .submit(Request {
            priority: 5,
            ..request(1, own(1, 600), 100)
        })
        .unwrap();
    run(&mut scheduler, &mut step);
    assert_eq!(ids(scheduler.running()), [1]);
    assert_eq!(ids(scheduler.waiting()), [0]);
}

#[test]
fn a_blocked_job_is_overtaken_as_often_as_it_allows() {
    let mut scheduler = Scheduler::new(settings(6, 8));
    let mut step = Step::default();
    scheduler.submit(request(0, own(0, 500), 300)).unwrap();
    run(&mut scheduler, &mut step);
    // Four pages, of which three are free and one is kept for the running job.
    scheduler.submit(request(1, own(1, 800), 50)).unwrap();
    for id in 2..6 {
        scheduler.submit(request(id, own(id, 20), 5)).unwrap();
        run(&mut scheduler, &mut step);
        let started = step.admitted.iter().any(|&(job, _)| job == JobId(id));
        assert_eq!(started, id < 4, "job {id}");
        scheduler.finish(JobId(id.min(3)));
    }
    scheduler.finish(JobId(0));
    run(&mut scheduler, &mut step);
    assert_eq!(step.admitted[0].0, JobId(1));
}

#[test]
fn jobs_wait_for_a_prompt_that_is_being_computed() {
    let mut scheduler = Scheduler::new(settings(40, 8));
    let mut step = Step::default();
    for id in 0..4 {
        scheduler.submit(request(id, own(0, 700), 20)).unwrap();
    }
    run(&mut scheduler, &mut step);
    assert_eq!(ids(scheduler.running()), [0]);
    while scheduler.running().len() < 4 {
        run(&mut scheduler, &mut step);
    }
    // Two full pages are shared, and what is left of the third is copied, but for one token.
    let cached: Vec<usize> = step.admitted.iter().map(|&(_, cached)| cached).collect();
    assert_eq!(cached, [699, 699, 699]);
    assert_eq!(scheduler.held_pages(), 2 + 4);
}

#[test]
fn a_job_that_can_never_fit_is_refused_with_the_arithmetic() {
    let mut scheduler = Scheduler::new(settings(3, 1));
    let refusal = scheduler.submit(request(0, own(0, 700), 500)).unwrap_err();
    assert_eq!(
        refusal,
        Refusal::NeverFits {
            prompts: 1,
            prompt_tokens: 700,
            new_tokens: 200,
            needed_pages: 4,
            pages: 3
        }
    );
    assert!(
        refusal
            .to_string()
            .contains("need 4 pages of 256 tokens, and the cache has 3")
    );
    let mut pair = request(1, own(1, 10), 10);
    pair.prompts.push(pair.prompts[0].clone());
    let refusal = scheduler.submit(pair).unwrap_err();
    assert_eq!(refusal, Refusal::TooManySequences { found: 2, most: 1 });
}
