//! The cache of a loaded model: its size, copies of its pages, and its reshaping.

use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_memory::{Bytes, CacheFormat, DeviceId, Holding, Ledger, Policy, Purpose};
use oxllama_model::{
    CacheRequest, ModelError, ModelRequest, PageCopy, Runner, RunnerLimits, StepPlan,
};

use crate::families::fixture;
use crate::files::altered_copy;
use crate::harness::{Loaded, Sequence, cpu_device, exact_request, load_with, virtual_devices};

/// A fixture on two devices with three pages of cache.
fn load_three_pages<D: Device>(name: &str, device: fn(DeviceId) -> D) -> Loaded<D> {
    let (inventory, ledger) = virtual_devices(2, Bytes::from_gib(1));
    let request = ModelRequest {
        batch: 3,
        policy: Policy::Balanced,
        ..exact_request(64)
    };
    load_with(&fixture(name), &request, &inventory, ledger, device).expect("a model")
}

/// A fixture with 1024 positions.
fn long_llama() -> tempfile::TempDir {
    altered_copy(
        &fixture("llama3"),
        |config| {
            config.insert("max_position_embeddings".to_owned(), 1024.into());
        },
        |_| {},
    )
}

#[test]
fn the_pool_may_be_smaller_or_larger_than_all_contexts() {
    // Three contexts of 512 tokens take six pages.
    for (cache_tokens, pages) in [(None, 6), (Some(513), 3), (Some(2000), 8)] {
        let (inventory, ledger) = virtual_devices(2, Bytes::from_gib(1));
        let request = ModelRequest {
            batch: 3,
            cache_tokens,
            policy: Policy::Balanced,
            ..exact_request(512)
        };
        let path = long_llama();
        let loaded = load_with(
            path.path(),
            &request,
            &inventory,
            ledger,
            ReferenceDevice::new,
        );
        let mut loaded = loaded.expect("a model");
        let limits = *loaded.model.limits();
        assert_eq!(limits.pages, pages);
        assert_eq!(limits.pages_per_sequence, 2);
        assert_eq!(limits.context_tokens, 512);
        for part in &loaded.plan.memory.devices {
            let entries = loaded.ledger.entries(&part.device);
            let held = entries
                .iter()
                .find(|entry| entry.purpose == Purpose::KvCache);
            assert_eq!(held.expect("a cache").bytes, part.kv_cache);
        }
        let last = pages as u32 - 1;
        loaded
            .model
            .run(&on_page(last, 0, &[1]))
            .expect("the last page");
        let beyond = loaded.model.run(&on_page(last + 1, 0, &[1]));
        assert!(matches!(beyond, Err(ModelError::PageOutOfRange { .. })));
    }
}

/// `tokens` of one sequence from `start` on, whose only page is `page`.
fn on_page(page: u32, start: u32, tokens: &[u32]) -> StepPlan {
    let rows = tokens.len() as u32;
    StepPlan {
        token_ids: tokens.to_vec(),
        positions: (start..start + rows).collect(),
        row_sequences: vec![0; tokens.len()],
        page_tables: vec![page],
        pages_per_sequence: 1,
        logit_rows: (0..rows).collect(),
        ..StepPlan::default()
    }
}

fn check_copies<D: Device>(name: &str, device: fn(DeviceId) -> D) {
    let mut model = load_three_pages(name, device).model;
    let prompt: Vec<u32> = (0..20).map(|index| (index * 7 + 3) % 100).collect();
    let continuation = [5, 80, 17];
    let mut run = |step: &StepPlan| model.run(step).expect("a valid step").logits.to_vec();

    run(&on_page(2, 0, &prompt));
    let expected = run(&on_page(2, 20, &continuation));
    // The copies come before the rows of their own step.
    let mut step = on_page(0, 20, &continuation);
    step.page_copies = vec![PageCopy { from: 2, to: 0 }];
    assert!(run(&step) == expected, "{name}: in the step of the copy");
    // In order: what page 1 receives is what page 2 has received just before.
    run(&on_page(2, 0, &[1; 20]));
    let copies = StepPlan {
        page_copies: vec![PageCopy { from: 0, to: 2 }, PageCopy { from: 2, to: 1 }],
        ..StepPlan::default()
    };
    assert!(run(&copies).is_empty(), "a step without rows has no logits");
    for page in [0, 1, 2] {
        let found = run(&on_page(page, 20, &continuation));
        assert!(found == expected, "{name}: on page {page}");
    }
}

#[test]
fn a_copied_page_continues_as_its_original() {
    for name in ["llama3", "gemma3"] {
        check_copies(name, ReferenceDevice::new);
        check_copies(name, cpu_device);
    }
}

/// All that the books of two devices say.
fn books(ledger: &Ledger) -> [Vec<Holding>; 2] {
    [0, 1].map(|index| ledger.entries(&DeviceId::cpu(index)))
}

/// Another size of the cache, in the same format.
fn tokens(tokens: u64) -> CacheRequest {
    CacheRequest {
        tokens: Some(tokens),
        format: None,
    }
}

/// A model of 1024 positions on two devices of `each`, planned for one context of 768 tokens
/// kept in `cache`.
fn load_long<D: Device>(each: Bytes, cache: CacheFormat, device: fn(DeviceId) -> D) -> Loaded<D> {
    let (inventory, ledger) = virtual_devices(2, each);
    let request = ModelRequest {
        cache,
        policy: Policy::Balanced,
        ..exact_request(768)
    };
    let path = long_llama();
    load_with(path.path(), &request, &inventory, ledger, device).expect("a model")
}

fn check_reshaping<D: Device>(device: fn(DeviceId) -> D) {
    let each = Bytes::from_gib(1);
    let mut loaded = load_long(each, CacheFormat::F32, device);
    let prompt: Vec<u32> = (0..40).map(|index| (index * 7 + 3) % 100).collect();
    let expected = Sequence::new(&loaded.model).feed(&mut loaded.model, &prompt);
    let as_planned = *loaded.model.limits();
    let before = books(&loaded.ledger);

    // Fewer pages than the planned context: the context shrinks, and grows back with the cache.
    let limits = *loaded
        .model
        .reshape_cache(tokens(300))
        .expect("a smaller cache");
    let smaller = RunnerLimits {
        pages: 2,
        pages_per_sequence: 2,
        context_tokens: 512,
        ..as_planned
    };
    assert_eq!(limits, smaller);
    let found = Sequence::new(&loaded.model).feed(&mut loaded.model, &prompt);
    assert!(found == expected, "in the smaller cache");
    let limits = *loaded
        .model
        .reshape_cache(tokens(5000))
        .expect("a larger cache");
    assert_eq!(
        limits,
        RunnerLimits {
            pages: 20,
            ..as_planned
        }
    );
    // Its last pages can be used.
    let last_pages = StepPlan {
        page_tables: vec![19],
        ..on_page(19, 0, &prompt)
    };
    let found = loaded.model.run(&last_pages).expect("the last page");
    assert!(found.logits == expected, "in the larger cache");

    // The books hold what a model loaded with this cache would.
    let back = CacheRequest {
        tokens: Some(768),
        format: Some(CacheFormat::F32),
    };
    loaded.model.reshape_cache(back).expect("the first cache");
    assert_eq!(*loaded.model.limits(), as_planned);
    assert_eq!(books(&loaded.ledger), before);

    let half = CacheRequest {
        tokens: None,
        format: Some(CacheFormat::F16),
    };
    loaded
        .model
        .reshape_cache(half)
        .expect("half as wide a cache");
    assert_eq!(*loaded.model.limits(), as_planned);
    let mut in_half = load_long(each, CacheFormat::F16, device);
    // Each was loaded under a name of its own.
    let sizes = |ledger| {
        books(ledger).map(|entries| {
            let sizes = entries.iter().map(|entry| (entry.purpose, entry.bytes));
            sizes.collect::<Vec<_>>()
        })
    };
    assert_eq!(sizes(&loaded.ledger), sizes(&in_half.ledger));
    let found = Sequence::new(&loaded.model).feed(&mut loaded.model, &prompt);
    let expected = Sequence::new(&in_half.model).feed(&mut in_half.model, &prompt);
    assert!(found == expected, "in fp16");
}

#[test]
fn a_reshaped_cache_gives_the_same_bits() {
    check_reshaping(ReferenceDevice::new);
    check_reshaping(cpu_device);
}

#[test]
fn a_cache_that_does_not_fit_changes_nothing() {
    let roomy = load_long(Bytes::from_gib(1), CacheFormat::F32, ReferenceDevice::new);
    let needed = roomy
        .plan
        .memory
        .devices
        .iter()
        .map(|part| part.total)
        .max();
    let mut loaded = load_long(
        needed.expect("two devices"),
        CacheFormat::F32,
        ReferenceDevice::new,
    );
    let before = books(&loaded.ledger);
    let as_planned = *loaded.model.limits();
    let prompt: Vec<u32> = (0..20).collect();
    let run = |model: &mut dyn Runner, start| {
        model
            .run(&on_page(2, start, &prompt))
            .expect("a step")
            .logits
            .to_vec()
    };
    run(&mut loaded.model, 0);
    let expected = run(&mut loaded.model, 20);

    match loaded.model.reshape_cache(tokens(100_000)) {
        Err(ModelError::Shortfall(shortfall)) => {
            assert!(shortfall.needed > shortfall.available, "{shortfall}");
        }
        other => panic!("expected a shortfall, got {other:?}"),
    }
    assert_eq!(books(&loaded.ledger), before);
    assert_eq!(*loaded.model.limits(), as_planned);
    // Not even the contents have gone.
    let found = run(&mut loaded.model, 20);
    assert!(found == expected, "after a shortfall");

    for request in [tokens(0), tokens(u64::MAX)] {
        let result = loaded.model.reshape_cache(request);
        assert!(
            matches!(result, Err(ModelError::Request { .. })),
            "{result:?}"
        );
    }
    // A smaller cache makes room for others, and only then is there none for the old one.
    loaded
        .model
        .reshape_cache(tokens(256))
        .expect("a smaller cache");
    let others: Vec<_> = [0, 1]
        .map(|index| {
            let device = DeviceId::cpu(index);
            let free = loaded.ledger.usage(&device).expect("a device").available;
            loaded
                .ledger
                .reserve(&device, "other", Purpose::Weights, free)
        })
        .into_iter()
        .map(|reservation| reservation.expect("what is free"))
        .collect();
    let result = loaded.model.reshape_cache(tokens(768));
    assert!(
        matches!(result, Err(ModelError::Shortfall(_))),
        "{result:?}"
    );
    drop(others);
    loaded.model.reshape_cache(tokens(768)).expect("room again");
    assert_eq!(books(&loaded.ledger), before);
}

#[test]
fn what_the_system_refuses_is_undone() {
    // The books of these devices believe in more memory than addresses can name.
    let mut loaded = load_long(
        Bytes::from_gib(1 << 30),
        CacheFormat::F32,
        ReferenceDevice::new,
    );
    let before = books(&loaded.ledger);
    let as_planned = *loaded.model.limits();
    let prompt: Vec<u32> = (0..20).collect();
    let expected = Sequence::new(&loaded.model).feed(&mut loaded.model, &prompt);
    let result = loaded.model.reshape_cache(tokens(256 << 31));
    assert!(matches!(result, Err(ModelError::Device(_))), "{result:?}");
    assert_eq!(books(&loaded.ledger), before);
    assert_eq!(*loaded.model.limits(), as_planned);
    let found = Sequence::new(&loaded.model).feed(&mut loaded.model, &prompt);
    assert!(found == expected, "after what the system refused");
}
