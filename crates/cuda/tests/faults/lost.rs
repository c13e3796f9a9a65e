//! A device that is lost, and the one beside it.

use oxllama_backend::DeviceError;
use oxllama_cuda::CudaDevice;
use oxllama_fake_driver::FakeDriver;
use oxllama_memory::{Bytes, GpuSplit};
use oxllama_model::ModelError;

use crate::books::{
    assert_clean, assert_nothing_booked, books, cuda, decode, load, open, prefill, source,
};

/// The device that an error says is lost.
fn lost_device(error: &ModelError) -> Option<&oxllama_memory::DeviceId> {
    let ModelError::Device(error) = error else {
        return None;
    };
    match &**error {
        DeviceError::Lost { device, .. } => Some(device),
        _ => None,
    }
}

#[test]
fn a_lost_device_answers_at_once_and_harms_no_other() {
    let driver = FakeDriver::start("devices=2");
    let devices = open().expect("two GPUs");
    let books = books(&devices);
    let source = source(2);
    let mut first = load(&source, &devices[..1], &books, None).expect("it fits");
    let mut second = load(&source, &devices[1..], &books, None).expect("it fits");
    prefill(&mut first).expect("a healthy device");
    driver.set("fault=cuStreamSynchronize:0:719:sticky");
    let error = decode(&mut first).expect_err("a kernel has failed");
    assert_eq!(lost_device(&error), Some(&cuda(0)), "{error}");
    let launches = driver.report().count("launches");
    for _ in 0..3 {
        let again = decode(&mut first).expect_err("still lost");
        assert_eq!(again.to_string(), error.to_string());
    }
    assert_eq!(driver.report().count("launches"), launches);
    assert!(devices[0].is_lost() && !devices[1].is_lost());
    let refused = load(&source, &devices[..1], &books, None).err();
    assert_eq!(refused.as_ref().and_then(lost_device), Some(&cuda(0)));

    prefill(&mut second).expect("unharmed");
    decode(&mut second).expect("unharmed");
    drop(first);
    assert!(books.1.entries(&cuda(0)).is_empty());
    assert!(!books.1.entries(&cuda(1)).is_empty());
    drop((second, devices));
    assert_nothing_booked(&books.1);
    assert_eq!(driver.report().alive(), []);
    assert_clean(&driver.report(), "at the end");
}

/// A model on two devices, whose limits let neither have all of it.
fn split_over(devices: &[CudaDevice]) -> GpuSplit {
    let books = books(devices);
    let whole = load(&source(4), &devices[..1], &books, None).expect("it fits");
    let used = books.1.usage(&cuda(0)).expect("a known device").used;
    drop(whole);
    GpuSplit(vec![Bytes(used.get() * 7 / 10), used])
}

#[test]
fn of_two_devices_the_one_that_failed_is_lost() {
    let driver = FakeDriver::start("devices=2");
    let split = split_over(&open().expect("two GPUs"));
    for (fault, index) in [
        // The copy between them is made for the second.
        ("cuMemcpyPeerAsync:0:719:sticky", 1),
        ("cuMemcpyPeerAsync:0:719:other", 0),
        ("cuStreamWaitEvent:0:719:sticky", 1),
        ("cuStreamWaitEvent:0:719:other", 0),
        // The first waits for the copy.
        ("cuStreamWaitEvent:1:719:sticky", 0),
        ("cuStreamWaitEvent:1:719:other", 1),
        ("cuEventRecord:0:719:sticky", 0),
        ("cuStreamSynchronize:0:719:sticky", 0),
    ] {
        driver.set("reset devices=2");
        let devices = open().expect("two GPUs");
        let books = books(&devices);
        let split = Some(split.clone());
        let mut model = load(&source(4), &devices, &books, split).expect("it fits");
        driver.set(&format!("fault={fault}"));
        let error = prefill(&mut model).expect_err("a device is lost");
        assert!(driver.report().has_fired());
        assert_eq!(lost_device(&error), Some(&cuda(index)), "{fault}: {error}");
        assert_eq!(devices[0].is_lost(), index == 0, "{fault}");
        assert_eq!(devices[1].is_lost(), index == 1, "{fault}");
        drop((model, devices));
        assert_nothing_booked(&books.1);
        assert_eq!(driver.report().alive(), []);
        assert_eq!(driver.report().misuse, [""; 0], "{fault}");
        assert_eq!(driver.report().count("leaked"), 0, "{fault}");
    }
}
