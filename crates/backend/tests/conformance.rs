//! The scalar reference against the conformance suite's f64 oracle, and a backend with
//! known faults, every one of which the suite must find.

mod faulty;

use std::collections::HashSet;

use faulty::FaultyDevice;
use oxllama_backend::conformance::{self, Tolerances};
use oxllama_backend::reference::ReferenceDevice;
use oxllama_memory::{Bytes, DeviceId, Ledger};

fn small_device() -> (ReferenceDevice, Ledger) {
    let id = DeviceId::cpu(0);
    let ledger = Ledger::for_device(id.clone(), Bytes::from_mib(256));
    (ReferenceDevice::new(id), ledger)
}

#[test]
fn the_reference_conforms() {
    let (device, ledger) = small_device();
    let mut names = HashSet::new();
    let summary = conformance::run(&device, &ledger, &Tolerances::REFERENCE, &mut |report| {
        assert!(names.insert(report.name.clone()), "twice: {}", report.name);
    })
    .expect("every case runs");
    assert_eq!(summary.failures, [], "of {} cases", summary.cases);
    assert_eq!(summary.cases, names.len());
}

#[test]
fn only_selected_cases_run() {
    let (device, ledger) = small_device();
    let mut ran = Vec::new();
    let summary = conformance::run_selected(
        &device,
        &ledger,
        &Tolerances::REFERENCE,
        &mut |name| name.starts_with("embed "),
        &mut |report| ran.push(report.name.clone()),
    )
    .expect("every case runs");
    assert!(!ran.is_empty() && ran.iter().all(|name| name.starts_with("embed ")));
    assert_eq!(summary.cases, ran.len());
}

#[test]
fn every_fault_is_found_and_nothing_else() {
    // Each fault of `FaultyDevice`: the cases that must fail of it, and those that may.
    let must_fail = |name: &str| {
        name.starts_with("norm Rms")
            || (name.starts_with("embed ") && name.ends_with("scale 7.25"))
            || name.starts_with("logits 67 of 96")
            || name.starts_with("scatter and add rows")
            || (name.starts_with("gated linear ") && name.ends_with("GeluErf"))
            || name.starts_with("attention window ")
            || name.starts_with("row independence: linear ")
            || name.starts_with("32 draws of ")
    };
    let may_fail = |name: &str| {
        must_fail(name)
            || name.contains("norm ")
            || name.contains("GeluErf")
            || name.starts_with("attention all at once")
            || name.contains(" draws of ")
    };
    let (device, ledger) = small_device();
    let mut wrong = Vec::new();
    let mut found = 0;
    conformance::run(
        &FaultyDevice(device),
        &ledger,
        &Tolerances::REFERENCE,
        &mut |report| {
            let name = report.name.as_str();
            let passed = report.passed();
            found += usize::from(must_fail(name) && !passed);
            if (passed && must_fail(name)) || (!passed && !may_fail(name)) {
                wrong.push(report.clone());
            }
        },
    )
    .expect("every case runs");
    assert_eq!(wrong, []);
    assert!(found > 100, "{found} cases found a fault");
}
