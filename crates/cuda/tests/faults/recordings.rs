//! What is recorded, and the room that it has in the books.

use oxllama_fake_driver::FakeDriver;
use oxllama_memory::{Bytes, DeviceInfo, Inventory, Ledger, Purpose};
use oxllama_model::{
    Decoder, LoadOptions, ModelError, ModelPlan, ModelRequest, ModelSpec, Runner, StepPlan,
    plan_model,
};

use crate::books::{assert_clean, assert_nothing_booked, cuda, open, source};

const LAYERS: usize = 3;

fn plan(
    device: &oxllama_cuda::CudaDevice,
    inventory: &Inventory,
    batch: u64,
) -> Result<(ModelSpec, ModelPlan), ModelError> {
    let source = source(LAYERS);
    let spec = ModelSpec::from_config(source.config())?;
    let request = ModelRequest {
        context_tokens: Some(256),
        batch,
        chunk_tokens: 64,
        logit_rows: 64,
        ..ModelRequest::default()
    };
    let plan = plan_model(&source, &spec, device, inventory, &request)?;
    Ok((spec, plan))
}

/// A GPU of so many bytes.
fn gpu(bytes: Bytes) -> Inventory {
    Inventory::of_one(DeviceInfo::new(cuda(0), "fake", bytes))
}

/// A token of each of `rows` sequences.
fn decode(model: &mut dyn Runner, rows: u32, position: usize) {
    let mut step = StepPlan {
        pages_per_sequence: 1,
        ..StepPlan::default()
    };
    for sequence in 0..rows {
        step.push_sequence([sequence], position, [sequence], 1);
    }
    model.run(&step).expect("a healthy device");
}

#[test]
fn recordings_keep_within_their_room_and_the_latest_stay() {
    let driver = FakeDriver::start("");
    let devices = open().expect("a GPU");
    let inventory = gpu(Bytes::from_mib(512));
    let ledger = Ledger::new(&inventory);
    let (spec, plan) = plan(&devices[0], &inventory, 60).expect("it fits");
    let options = LoadOptions::new(&ledger);
    let room = plan.memory.devices[0].recordings;
    let decoder = Decoder::load(&source(LAYERS), spec, devices.clone(), &plan, &options);
    let mut model = decoder.expect("it fits");
    let booked = |purpose| {
        let entries = ledger.entries(&cuda(0));
        let entry = entries.iter().find(|entry| entry.purpose == purpose);
        entry.map(|entry| entry.bytes)
    };
    assert_eq!(booked(Purpose::Recordings), Some(room));
    let mut most = 0;
    for rows in 1..=60 {
        (0..2).for_each(|position| decode(&mut model, rows, position));
        let report = driver.report();
        let recorded = devices[0].recorded_steps();
        assert_eq!(recorded.recordings, report.count("executables"));
        assert_eq!(recorded.launches, report.count("executable_launches"));
        let counted = Bytes::from_usize(recorded.launches * devices[0].node_bytes());
        assert!(counted <= room, "{rows} rows: {counted} of {room}");
        most = most.max(recorded.recordings);
        // What was planned for has room, up to as many rows as one launch multiplies.
        assert!(
            recorded.recordings >= rows.min(32) as usize || rows > 32,
            "{recorded:?}"
        );
    }
    assert!(most >= 32, "{most}");
    let launches = || driver.report().count("launches");
    let replayed = launches();
    decode(&mut model, 60, 2);
    decode(&mut model, 59, 2);
    // The step's inputs are unpacked by themselves.
    assert_eq!(launches() - replayed, 2, "these are recorded still");
    decode(&mut model, 1, 2);
    assert!(launches() - replayed > 2 + LAYERS, "this one is not");
    drop(model);
    assert_eq!(devices[0].recorded_steps().recordings, 0);
    assert_nothing_booked(&ledger);
    assert_eq!(driver.report().count("executables"), 0);
    drop(devices);
    assert_eq!(driver.report().alive(), []);
    assert_clean(&driver.report(), "at the end");
}

#[test]
fn a_plan_counts_recordings_and_says_so_where_they_do_not_fit() {
    let _driver = FakeDriver::start("");
    let devices = open().expect("a GPU");
    let (_, whole) = plan(&devices[0], &gpu(Bytes::from_mib(512)), 8).expect("it fits");
    let part = &whole.memory.devices[0];
    assert!(!part.recordings.is_zero());
    let parts = [part.weights, part.kv_cache, part.workspace, part.recordings];
    assert_eq!(part.total, Bytes::checked_sum(parts).expect("a size"));
    assert_eq!(whole.memory.totals.recordings, part.recordings);
    assert!(whole.memory.to_string().contains("recordings"));
    plan(&devices[0], &gpu(part.total), 8).expect("exactly as much as it takes");
    let short = gpu(part.total.saturating_sub(Bytes(1)));
    let error = plan(&devices[0], &short, 8).expect_err("a byte is missing");
    let text = error.to_string();
    assert!(
        text.contains("short by") && text.contains("cuda:0"),
        "{text}"
    );
    let (_, more) = plan(&devices[0], &gpu(Bytes::from_mib(512)), 9).expect("it fits");
    assert!(more.memory.totals.recordings > whole.memory.totals.recordings);
}
