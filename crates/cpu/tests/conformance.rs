//! Every instruction set and several numbers of threads against the backend's conformance suite.

use std::sync::Arc;

use oxllama_backend::conformance::{self, Tolerances};
use oxllama_cpu::{CpuDevice, Isa, SpinPool};
use oxllama_memory::{Bytes, DeviceId, Ledger};

/// In quantised products the oracle rounds every weight to fp16 (half a unit is 2.4e-4) and the
/// kernels do not; their 16-bit activations add far less. Everything else is f32 in another order
/// of sums than the oracle's, with functions of a few units in the last place.
const TOLERANCES: Tolerances = Tolerances {
    exl2_linear: 1.5e-3,
    gptq_linear: 1.5e-3,
    float_linear: 1e-5,
    norm: 2e-6,
    elementwise: 2e-6,
    attention_f32: 1e-5,
    attention_f16: 5e-4,
    attention_quantised: 1e-5,
};

fn conforms(isa: Isa, threads: usize) {
    let id = DeviceId::cpu(0);
    let ledger = Ledger::for_device(id.clone(), Bytes::from_mib(256));
    let pool = Arc::new(SpinPool::new(threads).expect("threads start"));
    let device = CpuDevice::with_pool(id, Some(isa), pool);
    let summary = conformance::run(&device, &ledger, &TOLERANCES, &mut |_| {})
        .unwrap_or_else(|error| panic!("{isa:?} on {threads} threads: {error}"));
    assert!(summary.cases > 0);
    assert_eq!(
        summary.failures,
        [],
        "{isa:?} on {threads} threads, of {} cases",
        summary.cases
    );
}

/// One test for each number of threads, over every level that the machine has.
fn conforms_on_every_level(threads: usize) {
    for isa in Isa::available() {
        conforms(isa, threads);
    }
}

#[test]
fn one_thread_conforms() {
    conforms_on_every_level(1);
}

#[test]
fn two_threads_conform() {
    conforms_on_every_level(2);
}

#[test]
fn three_threads_conform() {
    conforms_on_every_level(3);
}
