//! Memory that another process takes, and what loading and unloading leaves behind.

use oxllama_backend::DeviceError;
use oxllama_fake_driver::FakeDriver;
use oxllama_memory::Bytes;
use oxllama_model::ModelError;

use crate::books::{
    assert_clean, assert_nothing_booked, books, cuda, decode, load, open, prefill, source,
};

#[test]
fn memory_that_another_process_took_since_the_plan_is_told_with_its_name() {
    let driver = FakeDriver::start("");
    let devices = open().expect("a GPU");
    let books = books(&devices);
    let mut model = load(&source(1), &devices, &books, None).expect("it fits");
    let used = books.1.usage(&cuda(0)).expect("a known device").used;
    // Half of what a second model needs is left, so that its load ends in the middle.
    let free = devices[0].free_memory().expect("a healthy device");
    let allocated = Bytes::from_usize(driver.report().count("allocated_bytes"));
    let others = free.saturating_sub(Bytes(allocated.get() / 2));
    driver.set(&format!("others={}", others.get()));
    let allocations = driver.report().count("allocations");
    let Some(ModelError::Device(error)) = load(&source(1), &devices, &books, None).err() else {
        panic!("it may not fit");
    };
    let text = error.to_string();
    let DeviceError::OutOfMemory { device, state, .. } = *error else {
        panic!("{text}");
    };
    assert_eq!(device, cuda(0));
    assert!(state.free.is_some_and(|free| free < used), "{text}");
    assert_eq!(state.processes.len(), 1);
    assert_eq!(state.processes[0].bytes, Some(others));
    for part in [
        "cuda:0 is out of memory",
        "allocating",
        "free now",
        "by greedy (process 4242)",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // As before, and the model that is there goes on.
    assert_eq!(books.1.usage(&cuda(0)).expect("a known device").used, used);
    assert_eq!(driver.report().count("allocations"), allocations);
    prefill(&mut model).expect("unharmed");
    decode(&mut model).expect("unharmed");

    driver.set("others=0");
    drop(load(&source(1), &devices, &books, None).expect("it fits again"));
    driver.set(&format!("others={} nvml=off", others.get()));
    let error = load(&source(1), &devices, &books, None)
        .err()
        .expect("no room");
    let text = error.to_string();
    assert!(
        text.contains("free now") && !text.contains("held"),
        "{text}"
    );
    drop((model, devices));
    assert_nothing_booked(&books.1);
    assert_eq!(driver.report().alive(), []);
    assert_clean(&driver.report(), "at the end");
}

#[test]
fn a_thousand_loads_leave_no_handle() {
    let driver = FakeDriver::start("");
    let devices = open().expect("a GPU");
    let books = books(&devices);
    let source = source(1);
    let cycle = || {
        let mut model = load(&source, &devices, &books, None).expect("it fits");
        prefill(&mut model).expect("a healthy device");
        decode(&mut model).expect("a healthy device");
    };
    cycle();
    // What the device keeps for the next load.
    let first = driver.report().alive();
    (0..1000).for_each(|_| cycle());
    assert_eq!(driver.report().alive(), first);
    assert_nothing_booked(&books.1);
    drop(devices);
    assert_eq!(driver.report().alive(), []);
    assert_clean(&driver.report(), "at the end");
}

#[test]
fn a_step_without_room_for_its_recording_runs_all_the_same() {
    /// Steps of [`decode`], each of which begins with a launch that is never recorded.
    const STEPS: usize = 4;
    let driver = FakeDriver::start("");
    let devices = open().expect("a GPU");
    let books = books(&devices);
    let launches = || driver.report().count("launches");
    for (function, has_room) in [
        ("cuGraphInstantiateWithFlags", false),
        ("cuGraphLaunch", false),
        ("cuNothing", true),
    ] {
        let mut model = load(&source(1), &devices, &books, None).expect("it fits");
        driver.set(&format!("fault={function}:0:2"));
        let start = launches();
        decode(&mut model).expect("it does without");
        let first = launches() - start - STEPS;
        decode(&mut model).expect("it does without");
        let second = launches() - start - STEPS - first - STEPS;
        let report = driver.report();
        assert_eq!(report.has_fired(), !has_room, "{function}");
        assert_eq!(report.count("executables"), usize::from(has_room));
        assert_eq!(report.count("graphs"), 0, "{function}");
        if has_room {
            assert_eq!(second, 0, "everything is replayed");
        } else {
            // The second step was launched twice: once to be recorded.
            assert_eq!(first / 5 * 4, second, "{function}");
            assert!(second > 20, "{second}");
        }
    }
    drop(devices);
    assert_eq!(driver.report().alive(), []);
    assert_clean(&driver.report(), "at the end");
}
