//! The backend with emulated kernels against the backends' conformance suite, without a GPU: as on older GPUs and as on Hopper.

use oxllama_backend::DeviceMemory;
use oxllama_backend::conformance::{self, CaseReport};
use oxllama_cuda::{CudaDevice, TOLERANCES, gpus};
use oxllama_fake_driver::FakeDriver;
use oxllama_memory::{Bytes, Ledger};

/// Runs the cases whose names are selected, on a machine of these settings; how many kernels of Hopper's own were launched,
/// as well.
fn run(settings: &str, select: impl Fn(&str) -> bool) -> (Vec<CaseReport>, usize) {
    let driver = FakeDriver::start(settings);
    let gpu = gpus().expect("the driver is there").remove(0);
    let device = CudaDevice::open(&gpu).expect("a GPU that is new enough");
    let ledger = Ledger::for_device(device.id().clone(), Bytes::from_mib(800));
    let mut reports = Vec::new();
    let run = conformance::run_selected(
        &device,
        &ledger,
        &TOLERANCES,
        &mut |name| select(name),
        &mut |case| reports.push(case.clone()),
    );
    let report = driver.report();
    assert_eq!(report.misuse, [""; 0]);
    run.unwrap_or_else(|error| panic!("{error}"));
    (reports, report.count("hopper_launches"))
}

/// All selected cases pass, and there are at least so many of them. How many kernels of Hopper's own were launched.
fn conforms(settings: &str, least: usize, select: impl Fn(&str) -> bool) -> usize {
    let (mut reports, hopper_launches) = run(settings, select);
    let count = reports.len();
    assert!(count >= least, "{count} cases");
    reports.retain(|case| !case.passed());
    assert_eq!(reports, [], "of {count} cases");
    hopper_launches
}

/// Two thirds of the time: a test of their own.
fn is_of_rows(name: &str) -> bool {
    name.starts_with("row independence")
}

#[test]
fn operations_conform() {
    conforms("kernels=on capability=8.0", 500, |name| !is_of_rows(name));
}

#[test]
fn rows_are_independent() {
    conforms("kernels=on capability=8.0", 300, is_of_rows);
}

/// What threads tell each other without waiting for it is not there in this order.
#[test]
fn operations_conform_backward() {
    conforms("kernels=backward capability=8.0", 500, |name| {
        !is_of_rows(name)
    });
}

/// Many rows, which Hopper has kernels of its own for.
fn is_of_hoppers(name: &str) -> bool {
    let is_of_many_rows = ["mlp", "linear", "attention"]
        .iter()
        .any(|word| name.contains(word));
    is_of_many_rows && !is_of_rows(name)
}

#[test]
fn operations_conform_on_hopper() {
    let launches = conforms("kernels=on capability=9.0", 400, is_of_hoppers);
    assert!(launches > 100, "{launches} launches of Hopper's own");
}

#[test]
fn operations_conform_on_hopper_backward() {
    let launches = conforms("kernels=backward capability=9.0", 70, |name| {
        name.contains("mlp") || name.starts_with("attention groups")
    });
    assert!(launches > 20, "{launches} launches of Hopper's own");
}

/// Sums of 9 to 32 rows are joined in clusters.
fn is_of_clusters(name: &str) -> bool {
    let words = ["wide", "typical", "short ranges", "many outputs"];
    let is_linear = name.starts_with("row independence: linear");
    is_linear && words.iter().any(|word| name.contains(word))
        || name.contains("mlp EXL2 of many inputs and outputs")
}

#[test]
fn rows_are_independent_in_clusters() {
    let launches = conforms("kernels=on capability=9.0", 12, is_of_clusters);
    assert!(launches > 8, "{launches} launches of Hopper's own");
}

/// What one block of a cluster sends another arrives at once.
#[test]
fn rows_are_independent_in_clusters_backward() {
    let launches = conforms("kernels=backward capability=9.0", 12, is_of_clusters);
    assert!(launches > 8, "{launches} launches of Hopper's own");
}

/// As where a program has device code for older GPUs alone.
#[test]
fn older_code_serves_newer_gpus() {
    conforms("kernels=on capability=9.0 images=8.0", 50, |name| {
        name.starts_with("linear") && name.contains("EXL2")
            || name.starts_with("row independence: linear")
    });
}

#[test]
fn kernels_that_do_nothing_do_not_conform() {
    let (reports, _) = run("kernels=off capability=8.0", |name| {
        name.starts_with("linear") || name.starts_with("norm")
    });
    let passed = reports.iter().filter(|case| case.passed());
    let passed: Vec<&str> = passed.map(|case| case.name.as_str()).collect();
    assert!(reports.len() > 100 && passed.is_empty(), "{passed:?}");
}
