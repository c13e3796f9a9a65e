//! Planned bytes are the bytes taken, and a failed load takes none.

use oxllama_backend::reference::ReferenceDevice;
use oxllama_format::{HostMemory, ModelSource};
use oxllama_memory::{Bytes, DeviceId, Ledger, Purpose};
use oxllama_model::{
    Decoder, LoadOptions, LoadProgress, ModelError, ModelRequest, ModelSpec, plan_model,
};

use crate::families::{fixture, fixtures};
use crate::files::altered_copy;
use crate::harness::{exact_request, load_on, shared, virtual_devices};

/// What `device` holds for `purpose`.
fn held(ledger: &Ledger, device: &DeviceId, purpose: Purpose) -> Bytes {
    let entries = ledger.entries(device);
    let entry = entries.iter().find(|entry| entry.purpose == purpose);
    entry.map_or(Bytes::ZERO, |entry| entry.bytes)
}

#[test]
fn planned_bytes_are_actual_bytes() {
    let mut paths = fixtures();
    paths.extend(shared("models/smollm2-135m-exl2-4.0bpw"));
    for path in paths {
        for devices in [1, 2] {
            let (inventory, ledger) = virtual_devices(devices, Bytes::from_gib(2));
            let request = ModelRequest {
                batch: 3,
                policy: oxllama_memory::Policy::Balanced,
                ..exact_request(64)
            };
            let loaded = load_on(&path, &request, &inventory, ledger).expect("a model");
            for part in &loaded.plan.memory.devices {
                for (purpose, planned) in [
                    (Purpose::Weights, part.weights),
                    (Purpose::KvCache, part.kv_cache),
                    (Purpose::Workspace, part.workspace),
                    (Purpose::Recordings, part.recordings),
                ] {
                    let actual = held(&loaded.ledger, &part.device, purpose);
                    assert_eq!(actual, planned, "{} {purpose}", path.display());
                }
            }
            let ledger = loaded.ledger.clone();
            drop(loaded);
            for info in inventory.devices() {
                assert!(ledger.entries(&info.id).is_empty());
            }
        }
    }
}

/// Loads a copy of a fixture, expecting an error, and that nothing stays reserved.
fn expect_failure(path: &std::path::Path, expected: &str) {
    let (inventory, ledger) = virtual_devices(2, Bytes::from_mib(64));
    let error = match load_on(path, &exact_request(64), &inventory, ledger.clone()) {
        Ok(_) => panic!("{expected}: loaded"),
        Err(error) => error.to_string(),
    };
    assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    for info in inventory.devices() {
        assert!(ledger.entries(&info.id).is_empty(), "{expected}: {error}");
    }
}

#[test]
fn a_failed_load_leaves_the_ledger_as_it_was() {
    let infinite = |name: &'static str| {
        altered_copy(
            &fixture("qwen2"),
            |_| {},
            move |tensors| {
                let tensor = tensors.iter_mut().find(|tensor| tensor.name == name);
                let bytes = tensor.and_then(|tensor| tensor.bytes.as_mut()).expect(name);
                // An infinite fp16 in the last place, reached after everything else.
                let end = bytes.len();
                bytes[end - 2..].copy_from_slice(&[0x00, 0x7c]);
            },
        )
    };
    // Data errors are found while loading, when everything is reserved.
    for name in [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.k_proj.bias",
    ] {
        expect_failure(infinite(name).path(), name);
    }
}

#[test]
fn a_host_with_too_little_memory_is_refused_before_loading() {
    let source = ModelSource::open(&fixture("llama3")).expect("a model");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let (inventory, ledger) = virtual_devices(1, Bytes::from_gib(1));
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    let request = exact_request(64);
    let plan = plan_model(&source, &spec, &device, &inventory, &request).expect("a plan");
    let needed = plan.memory.totals.total;
    let options = |available: u64| LoadOptions {
        host_memory: Some(HostMemory {
            total_bytes: 1 << 30,
            available_bytes: available,
        }),
        ..LoadOptions::new(&ledger)
    };
    let load = |available: u64| {
        let devices = vec![device.clone()];
        Decoder::load(&source, spec.clone(), devices, &plan, &options(available)).map(|_| ())
    };
    load(needed.get()).expect("just enough");
    match load(needed.get() - 1) {
        Err(ModelError::HostMemory { needed: asked, .. }) => assert_eq!(asked, needed),
        other => panic!("expected a refusal, got {other:?}"),
    }
    assert!(ledger.entries(&DeviceId::cpu(0)).is_empty());
}

#[test]
fn plans_for_other_devices_or_models_are_refused() {
    let source = ModelSource::open(&fixture("llama3")).expect("a model");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let (inventory, ledger) = virtual_devices(1, Bytes::from_gib(1));
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    let request = exact_request(64);
    let plan = plan_model(&source, &spec, &device, &inventory, &request).expect("a plan");
    let options = LoadOptions::new(&ledger);

    let other_device = vec![ReferenceDevice::new(DeviceId::cpu(1))];
    let result = Decoder::load(&source, spec.clone(), other_device, &plan, &options);
    assert!(matches!(
        result.map(|_| ()),
        Err(ModelError::PlanMismatch { .. })
    ));

    let mut fewer_layers = plan.clone();
    fewer_layers.memory.devices[0].layers.end -= 1;
    let result = Decoder::load(
        &source,
        spec.clone(),
        vec![device.clone()],
        &fewer_layers,
        &options,
    );
    assert!(matches!(
        result.map(|_| ()),
        Err(ModelError::PlanMismatch { .. })
    ));

    let mut fewer_bytes = plan.clone();
    fewer_bytes.memory.devices[0].weights = Bytes(1000);
    let result = Decoder::load(&source, spec, vec![device], &fewer_bytes, &options);
    assert!(matches!(
        result.map(|_| ()),
        Err(ModelError::PlanTooSmall { .. })
    ));
    assert!(ledger.entries(&DeviceId::cpu(0)).is_empty());
}

#[test]
fn progress_ends_at_the_total() {
    let source = ModelSource::open(&fixture("gemma2")).expect("a model");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let (inventory, ledger) = virtual_devices(1, Bytes::from_gib(1));
    let device = ReferenceDevice::new(DeviceId::cpu(0));
    let request = exact_request(64);
    let plan = plan_model(&source, &spec, &device, &inventory, &request).expect("a plan");
    let reports = std::sync::Mutex::new(Vec::<LoadProgress>::new());
    let progress = |report| reports.lock().expect("a lock").push(report);
    let options = LoadOptions {
        progress: Some(&progress),
        ..LoadOptions::new(&ledger)
    };
    let layers = spec.layers.len();
    Decoder::load(&source, spec, vec![device], &plan, &options).expect("a model");
    let reports = reports.into_inner().expect("a lock");
    // Seven linears a layer and the embedding, which is the head as well.
    assert_eq!(reports.len(), 7 * layers + 1);
    let last = reports
        .iter()
        .max_by_key(|report| report.done)
        .expect("a report");
    assert_eq!(last.done, last.total);
}
