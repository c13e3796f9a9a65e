//! The backend with emulated kernels against the backends' conformance suite: all but what Hopper
//! alone has, without a GPU.

use oxllama_backend::DeviceMemory;
use oxllama_backend::conformance::{self, CaseReport};
use oxllama_cuda::{CudaDevice, TOLERANCES, gpus};
use oxllama_fake_driver::FakeDriver;
use oxllama_memory::{Bytes, Ledger};

/// Runs the cases whose names are selected, on a machine of these settings.
fn run(settings: &str, select: impl Fn(&str) -> bool) -> Vec<CaseReport> {
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
    assert_eq!(driver.report().misuse, [""; 0]);
    run.unwrap_or_else(|error| panic!("{error}"));
    reports
}

/// All selected cases pass, and there are at least so many of them.
fn conforms(settings: &str, least: usize, select: impl Fn(&str) -> bool) {
    let mut reports = run(settings, select);
    let count = reports.len();
    assert!(count >= least, "{count} cases");
    reports.retain(|case| !case.passed());
    assert_eq!(reports, [], "of {count} cases");
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
    let reports = run("kernels=off capability=8.0", |name| {
        name.starts_with("linear") || name.starts_with("norm")
    });
    let passed = reports.iter().filter(|case| case.passed());
    let passed: Vec<&str> = passed.map(|case| case.name.as_str()).collect();
    assert!(reports.len() > 100 && passed.is_empty(), "{passed:?}");
}
