//! The cache of a loaded model: its size, and copies of its pages.

use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_memory::{Bytes, DeviceId, Policy, Purpose};
use oxllama_model::{ModelError, ModelRequest, PageCopy, Runner, StepPlan};

use crate::families::fixture;
use crate::files::altered_copy;
use crate::harness::{Loaded, cpu_device, exact_request, load_with, virtual_devices};

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
    let mut run = |step: &StepPlan| model.run(step).expect("a valid step").to_vec();

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
