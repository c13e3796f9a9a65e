//! A fault at every single call of a life: opening, loading, steps and the end.

use oxllama_backend::DeviceError;
use oxllama_fake_driver::FakeDriver;
use oxllama_format::ModelSource;
use oxllama_model::ModelError;

use crate::books::{
    Failure, assert_clean, assert_nothing_booked, books, decode, load, open, prefill, source,
};

/// The device has too little of something for a launch.
const OUT_OF_RESOURCES: &str = "701";

/// Opens the GPU, loads the model and runs it. Whatever happens, everything is given back.
fn live(source: &ModelSource) -> Result<(), Failure> {
    let devices = open()?;
    let books = books(&devices);
    let result = (|| {
        let mut model = load(source, &devices, &books, None)?;
        prefill(&mut model)?;
        decode(&mut model)
    })();
    assert_nothing_booked(&books.1);
    if let Err(ModelError::Device(error)) = &result {
        let is_lost = matches!(**error, DeviceError::Lost { .. });
        assert_eq!(is_lost, devices[0].is_lost(), "{error}");
    }
    Ok(result?)
}

/// Lets the `n`th call of `function` fail with one of `faults`, for every `n` that there is, and
/// hands each error to `check`. Returns how many calls there are and how many gave an error.
fn at_every_call(
    function: &str,
    faults: &[&str],
    mut check: impl FnMut(&str, &Failure),
) -> (usize, usize) {
    let source = source(1);
    let mut errors = 0;
    for call in 0.. {
        let fault = faults[call % faults.len()];
        let driver = FakeDriver::start(&format!("fault={function}:{call}:{fault}"));
        let result = live(&source);
        let report = driver.report();
        let when = format!("{function} {call} fails with {fault}: {result:?}");
        assert_eq!(report.alive(), [], "{when}");
        assert_clean(&report, &when);
        match result {
            Err(error) => {
                assert!(report.has_fired(), "{when}");
                errors += 1;
                check(&when, &error);
            }
            Ok(()) if report.has_fired() => {}
            Ok(()) => return (call, errors),
        }
    }
    unreachable!("a life has an end")
}

#[test]
fn every_allocation_that_fails_is_told_with_what_is_left() {
    let (calls, errors) = at_every_call("cuMemAlloc_v2", &["2"], |when, error| {
        let Failure::Model(ModelError::Device(error)) = error else {
            panic!("{when}");
        };
        let DeviceError::OutOfMemory { state, .. } = &**error else {
            panic!("{when}");
        };
        assert!(state.free.is_some(), "{when}");
    });
    assert_eq!(calls, errors, "no allocation may fail silently");
    // Linears, norms, keys and values, activations, scratch.
    assert!(calls > 20, "{calls}");
}

#[test]
fn every_call_that_is_refused_once_is_told_and_harms_nothing_else() {
    // Out of memory, and out of a launch's resources.
    let (calls, errors) = at_every_call("any", &["2", OUT_OF_RESOURCES], |when, error| {
        let is_lost = match error {
            Failure::Unavailable(error) => error.to_string().contains("lost"),
            Failure::Model(ModelError::Device(error)) => {
                matches!(**error, DeviceError::Lost { .. })
            }
            Failure::Model(_) => panic!("{when}"),
        };
        assert!(!is_lost, "{when}");
    });
    assert!(errors > 300 && errors < calls, "{errors} of {calls}");
}

#[test]
fn every_call_after_which_the_device_is_lost_says_so_and_nothing_more_is_asked_of_it() {
    // An illegal address.
    let (calls, errors) = at_every_call("any", &["700:sticky"], |when, error| match error {
        // Not opened.
        Failure::Unavailable(_) => {}
        Failure::Model(ModelError::Device(error)) => {
            assert!(matches!(**error, DeviceError::Lost { .. }), "{when}");
            let text = error.to_string();
            assert!(text.contains("cuda:0 is lost"), "{text}");
            assert!(text.contains("illegal memory access"), "{text}");
            assert!(text.contains("restart"), "{text}");
        }
        Failure::Model(_) => panic!("{when}"),
    });
    assert!(errors > 300 && errors < calls, "{errors} of {calls}");
}

#[test]
fn a_step_that_failed_can_be_run_again() {
    let driver = FakeDriver::start("");
    let devices = open().expect("a GPU");
    let books = books(&devices);
    let mut model = load(&source(1), &devices, &books, None).expect("it fits");
    let mut calls = 0;
    loop {
        driver.set(&format!("fault=any:{calls}:{OUT_OF_RESOURCES}"));
        let mut steps = || {
            prefill(&mut model)?;
            decode(&mut model)
        };
        let result = steps();
        let has_fired = driver.report().has_fired();
        driver.set("fault=none");
        assert_eq!(result.is_err(), has_fired, "call {calls}: {result:?}");
        steps().unwrap_or_else(|error| panic!("after call {calls}: {error}"));
        if !has_fired {
            break;
        }
        calls += 1;
    }
    assert!(calls > 30, "{calls}");
    drop((model, devices));
    assert_eq!(driver.report().alive(), []);
    assert_clean(&driver.report(), "at the end");
    assert_nothing_booked(&books.1);
}
