//! Steps on two devices at a time: what waits for what, and what becomes of faults that show later.

use oxllama_backend::{DeviceError, PAGE_TOKENS};
use oxllama_cuda::CudaDevice;
use oxllama_fake_driver::FakeDriver;
use oxllama_memory::{Bytes, GpuSplit};
use oxllama_model::{Decoder, ModelError, Runner, StepPlan};

use crate::books::{assert_nothing_booked, books, cuda, load, open, prefill, source};

/// Steps whose inputs may be under way: one a device, and one that the host prepares.
const STEPS: usize = 3;

/// Limits under which neither of two devices has all of the model.
fn split(devices: &[CudaDevice]) -> GpuSplit {
    let books = books(devices);
    let whole = load(&source(4), &devices[..1], &books, None).expect("it fits");
    let used = books.1.usage(&cuda(0)).expect("a known device").used;
    drop(whole);
    GpuSplit(vec![Bytes(used.get() * 7 / 10), used])
}

fn submit(
    model: &mut dyn Runner,
    positions: std::ops::Range<usize>,
    logit_rows: usize,
) -> Result<(), ModelError> {
    let mut plan = StepPlan {
        pages_per_sequence: positions.end.div_ceil(PAGE_TOKENS),
        ..StepPlan::default()
    };
    let tokens = positions.clone().map(|position| position as u32 % 288);
    plan.push_sequence(tokens, positions.start, 0..1, logit_rows);
    model.submit(&plan)
}

/// A chunk of a prompt, without logits.
fn chunk(model: &mut dyn Runner, index: usize) -> Result<(), ModelError> {
    submit(model, 16 * index..16 * (index + 1), 0)
}

/// Two devices, and a model on both that has run once.
fn start(driver: &FakeDriver) -> (Decoder<CudaDevice>, oxllama_memory::Ledger) {
    driver.set("reset devices=2");
    let devices = open().expect("two GPUs");
    let split = split(&devices);
    let books = books(&devices);
    let mut model = load(&source(4), &devices, &books, Some(split)).expect("it fits");
    prefill(&mut model).expect("healthy devices");
    assert_eq!(model.limits().stages, 2);
    (model, books.1)
}

/// The words of a traced call: its name, stream and event.
fn words(call: &str) -> [&str; 3] {
    let mut words = call.split(' ');
    [(); 3].map(|()| words.next().expect("three words"))
}

#[test]
fn chunks_of_a_prompt_are_not_waited_for() {
    const CHUNKS: usize = 9;
    let driver = FakeDriver::start("");
    let (mut model, _ledger) = start(&driver);
    driver.set("trace=on");
    (0..CHUNKS).for_each(|index| chunk(&mut model, index).expect("a healthy device"));
    let trace = driver.report().trace;
    let named = |name: &str| trace.iter().filter(|call| words(call)[0] == name).count();
    assert_eq!(named("stream-synchronize"), 0, "{trace:#?}");
    assert_eq!(named("copy-peer"), CHUNKS);
    // The host waits for the inputs of the step so many before, on either device.
    assert_eq!(named("event-synchronize"), 2 * CHUNKS);
    for (place, call) in trace.iter().enumerate() {
        let ["event-synchronize", _, event] = words(call) else {
            continue;
        };
        let before = &trace[..place];
        let is_record = |call: &&String| {
            let [name, _, recorded] = words(call);
            name == "record" && recorded == event
        };
        // Else it was recorded before the trace began.
        if let Some(recorded) = before.iter().rposition(|call| is_record(&call)) {
            let copies = before[recorded..].iter();
            let steps = copies.filter(|call| words(call)[0] == "copy-peer").count();
            assert_eq!(steps, STEPS, "{trace:#?}");
        }
    }
}

#[test]
fn rows_between_devices_wait_for_each_other_and_for_nothing_else() {
    let driver = FakeDriver::start("");
    let (mut model, _ledger) = start(&driver);
    // It follows a step with logits, whose place is marked for whoever reads them.
    chunk(&mut model, 0).expect("a healthy device");
    driver.set("trace=on");
    (1..5).for_each(|index| chunk(&mut model, index).expect("a healthy device"));
    let trace = driver.report().trace;
    let calls: Vec<_> = trace.iter().map(|call| words(call)).collect();
    let [_, first, _] = calls[1];
    let steps: Vec<_> = calls.chunks_exact(calls.len() / 4).collect();
    for step in steps {
        let names: Vec<&str> = step.iter().map(|call| call[0]).collect();
        let inputs = ["event-synchronize", "copy-in", "record"];
        let copy = ["record", "wait", "copy-peer", "record", "wait"];
        assert_eq!(names, [&inputs[..], &inputs[..], &copy[..]].concat());
        let [_, second, _] = step[4];
        assert_ne!(first, second);
        assert_eq!((step[1][1], step[2][1]), (first, first), "inputs");
        assert_eq!((step[4][1], step[5][1]), (second, second), "inputs");
        // The rows have been computed before they are copied,
        assert_eq!((step[6][1], step[7][1]), (first, second));
        assert_eq!(step[6][2], step[7][2]);
        // and copied before others are computed in their place.
        assert_eq!(
            (step[8][1], step[9][1], step[10][1]),
            (second, second, first)
        );
        assert_eq!(step[9][2], step[10][2]);
    }
}

#[test]
fn an_output_is_read_beside_the_steps_after_it() {
    let driver = FakeDriver::start("");
    let (mut model, _ledger) = start(&driver);
    driver.set("trace=on");
    submit(&mut model, 0..3, 1).expect("a healthy device");
    let submitted = driver.report().trace.len();
    assert_eq!(model.output().expect("healthy devices").logits.len(), 288);
    let trace = driver.report().trace;
    // Alone it is read in the stream's own order.
    let names = |trace: &[String]| -> Vec<String> {
        trace.iter().map(|call| words(call)[0].to_owned()).collect()
    };
    assert_eq!(
        names(&trace[submitted..]),
        ["copy-out", "stream-synchronize"]
    );
    let steps_stream = words(&trace[submitted])[1].to_owned();

    driver.set("trace=on");
    submit(&mut model, 3..4, 1).expect("a healthy device");
    chunk(&mut model, 1).expect("a healthy device");
    chunk(&mut model, 2).expect("a healthy device");
    let submitted = driver.report().trace.len();
    assert_eq!(model.output().expect("healthy devices").logits.len(), 288);
    let trace = driver.report().trace;
    let reading = &trace[submitted..];
    assert_eq!(names(reading), ["wait", "copy-out", "stream-synchronize"]);
    let [_, stream, event] = words(&reading[0]);
    assert!(stream != steps_stream && reading.iter().all(|call| words(call)[1] == stream));
    // Marked once, after the step and before the inputs of the one after it.
    let of_steps = |call: &&String| words(call)[1] == steps_stream;
    let on_stream: Vec<&String> = trace[..submitted].iter().filter(of_steps).collect();
    let marks = |call: &&String| words(call)[0] == "record" && words(call)[2] == event;
    let mark = on_stream.iter().position(marks).expect("a mark");
    assert_eq!(on_stream.iter().copied().filter(marks).count(), 1);
    let copies_in = |calls: &[&String]| {
        let calls = calls.iter();
        calls.filter(|call| words(call)[0] == "copy-in").count()
    };
    assert_eq!(copies_in(&on_stream[..mark]), 1);
    assert_eq!(copies_in(&on_stream[mark..]), 2);
}

#[test]
fn an_output_is_not_believed_when_the_device_before_is_lost() {
    let driver = FakeDriver::start("");
    let (mut model, _ledger) = start(&driver);
    submit(&mut model, 0..3, 1).expect("healthy devices");
    driver.set("fault=cuEventQuery:0:700:sticky");
    let Err(ModelError::Device(error)) = model.output() else {
        panic!("rows came from a lost device");
    };
    assert!(matches!(&*error, DeviceError::Lost { device, .. } if *device == cuda(0)));
}

/// A prompt of several chunks, then a token with another chunk behind it.
fn life(model: &mut dyn Runner) -> Result<(), ModelError> {
    (0..4).try_for_each(|index| chunk(model, index))?;
    submit(model, 64..65, 1)?;
    chunk(model, 5)?;
    model.output()?;
    submit(model, 65..66, 1)?;
    model.output()?;
    Ok(())
}

#[test]
fn a_fault_under_way_shows_at_the_next_wait_and_leaves_nothing_behind() {
    let driver = FakeDriver::start("");
    let mut calls = 0;
    loop {
        let (mut model, ledger) = start(&driver);
        driver.set(&format!("fault=any:{calls}:700:sticky"));
        let result = life(&mut model);
        let has_fired = driver.report().has_fired();
        if let Err(error) = &result {
            let ModelError::Device(error) = error else {
                panic!("call {calls}: {error}");
            };
            let is_lost = matches!(**error, DeviceError::Lost { .. });
            assert!(is_lost, "call {calls}: {error}");
            life(&mut model).expect_err("still lost");
        }
        assert_eq!(result.is_err(), has_fired, "call {calls}");
        drop(model);
        assert_nothing_booked(&ledger);
        let report = driver.report();
        assert_eq!(report.misuse, [""; 0], "call {calls}");
        assert_eq!(report.count("leaked"), 0, "call {calls}");
        if !has_fired {
            break;
        }
        // Every call of the way is much the same as the one after the next few.
        calls += 7;
    }
    assert!(calls > 100, "{calls}");
}
