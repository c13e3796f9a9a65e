//! A step allocates nothing. Alone in its binary: it counts every allocation of the process.

use std::path::Path;

use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_cpu::{CpuDevice, CpuOptions};
use oxllama_format::{AdapterSource, ModelSource};
use oxllama_memory::{Bytes, DeviceId, DeviceInfo, Inventory, Ledger};
use oxllama_model::{
    Decoder, LoadOptions, ModelRequest, ModelSpec, NO_ADAPTER, PageCopy, Runner, StepPlan,
    plan_model,
};
use oxllama_test_support::{CountingAllocator, allocations_so_far};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// A prompt of 20 tokens for each of two sequences, or one more token for each.
fn step(is_prompt: bool) -> StepPlan {
    let mut step = StepPlan {
        page_tables: vec![1, 0],
        pages_per_sequence: 1,
        ..StepPlan::default()
    };
    let positions = if is_prompt { 0..20 } else { 20..21 };
    for sequence in 0..2 {
        for position in positions.clone() {
            step.token_ids.push((position * 5 + sequence) % 100);
            step.positions.push(position);
            step.row_sequences.push(sequence);
        }
        step.logit_rows.push(step.token_ids.len() as u32 - 1);
    }
    if !is_prompt {
        // There and back: the sequences' pages end as they were.
        step.page_copies = vec![PageCopy { from: 1, to: 2 }, PageCopy { from: 2, to: 1 }];
    }
    step
}

/// Allocations of the second prompt and the second decode step of a fixture, whose second
/// sequence has the adapter, if there is one.
fn allocations<D: Device>(
    name: &str,
    adapter: Option<&str>,
    device: impl Fn(DeviceId) -> D,
) -> usize {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models");
    let source = ModelSource::open(&root.join(name)).expect("a model");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let of_index = |index| DeviceInfo::new(DeviceId::cpu(index), "virtual", Bytes::from_mib(256));
    let inventory = Inventory::new((0..2).map(of_index).collect()).expect("two devices");
    let ledger = Ledger::new(&inventory);
    let devices = vec![device(DeviceId::cpu(0)), device(DeviceId::cpu(1))];
    let request = ModelRequest {
        batch: 3,
        context_tokens: Some(64),
        policy: oxllama_memory::Policy::Balanced,
        ..ModelRequest::default()
    };
    let plan = plan_model(&source, &spec, &devices[0], &inventory, &request).expect("a plan");
    let options = LoadOptions::new(&ledger);
    let mut model = Decoder::load(&source, spec, devices, &plan, &options).expect("a model");
    let (mut prompt, mut decode) = (step(true), step(false));
    if let Some(adapter) = adapter {
        let source = AdapterSource::open(&root.join(adapter)).expect("an adapter");
        let id = model.load_adapter(&source, 1.0).expect("an adapter");
        prompt.sequence_adapters = vec![NO_ADAPTER, id.get()];
        decode.sequence_adapters = vec![NO_ADAPTER, id.get()];
    }
    // Threads and one-time tables start with the first steps.
    for step in [&prompt, &decode] {
        model.run(step).expect("a step");
    }
    let mut run = || {
        let before = allocations_so_far();
        for step in [&prompt, &decode] {
            model.run(step).expect("a step");
        }
        allocations_so_far() - before
    };
    // The threads that have loaded the model allocate now and then while they look for more work,
    // and soon sleep; what a step allocates, it allocates every time.
    (0..MOST_RUNS).map(|_| run()).min().unwrap_or(usize::MAX)
}

/// Runs of the measured steps, of which the best counts.
const MOST_RUNS: usize = 10;

#[test]
fn steps_allocate_nothing() {
    let cpu = |id| CpuDevice::new(id, CpuOptions::default()).expect("threads");
    for (name, adapter) in [
        ("llama3", None),
        ("gemma3", None),
        ("cohere_qk_norm", None),
        ("llama2", Some("lora/llama2_plain")),
    ] {
        let on_reference = allocations(name, adapter, ReferenceDevice::new);
        assert_eq!(on_reference, 0, "{name} on the reference");
        let on_cpu = allocations(name, adapter, cpu);
        assert_eq!(on_cpu, 0, "{name} on the fast backend");
    }
}
