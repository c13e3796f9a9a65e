//! The planner on a model of real shape, and on requests without sense.

mod common;

use common::{gib, inventory, llama_70b, llama_70b_workspace, request};
use oxllama_memory::{
    Bytes, DeviceId, DeviceInfo, DeviceRole, GpuSplit, Inventory, LayerFootprint, Ledger,
    ModelFootprint, Plan, PlanError, PlanRequest, Policy, Purpose, StepLimits, WorkspaceModel,
    plan,
};

#[test]
fn seventy_billion_parameters_over_unequal_devices() {
    let footprint = llama_70b(550);
    let asked = PlanRequest {
        context_tokens: Some(8192),
        ..request(&footprint, &llama_70b_workspace)
    };
    let filled = plan(&gib(&[24, 24, 12]), &asked).unwrap();
    let layers: Vec<_> = filled
        .devices
        .iter()
        .map(|device| device.layers.clone())
        .collect();
    // 588 MB of weights and 33.5 MB of cache a layer: the first device has 2.1 GB of
    // embedding as well.
    assert_eq!(layers, [0..37, 37..78, 78..80]);
    assert!(filled.devices[0].holds_embedding && filled.devices[2].holds_head);
    assert!(
        filled
            .devices
            .iter()
            .all(|device| device.remaining < device.limit)
    );
    let next_layer = Bytes(footprint.layers[0].weights.0 + 8192 * 2048 * 2);
    assert!(
        filled.devices[..2]
            .iter()
            .all(|device| device.remaining < next_layer)
    );
    assert_eq!(filled.totals.kv_cache, Bytes(80 * 8192 * 2048 * 2));
    assert_eq!(filled.max_context_tokens % 256, 0);

    let longest = PlanRequest {
        context_tokens: Some(filled.max_context_tokens),
        ..asked.clone()
    };
    assert!(plan(&gib(&[24, 24, 12]), &longest).is_ok());
    let too_long = PlanRequest {
        context_tokens: Some(filled.max_context_tokens + 1),
        ..asked.clone()
    };
    assert!(matches!(
        plan(&gib(&[24, 24, 12]), &too_long),
        Err(PlanError::Infeasible(_))
    ));

    let balanced = plan(
        &gib(&[24, 24, 12]),
        &PlanRequest {
            policy: Policy::Balanced,
            ..asked
        },
    )
    .unwrap();
    let counts: Vec<_> = balanced
        .devices
        .iter()
        .map(|device| device.layers.len())
        .collect();
    assert_eq!(counts.iter().sum::<usize>(), 80);
    assert!(
        counts[2] > 15,
        "the third device is filled to relieve the others: {counts:?}"
    );
    assert!(counts[0].abs_diff(counts[1]) <= 4, "{counts:?}");
}

#[test]
fn unequal_bandwidths_get_unequal_shares() {
    let footprint = llama_70b(400);
    let mut devices = gib(&[48, 48]).devices().to_vec();
    devices[0].read_bytes_per_second = Some(3e12);
    devices[1].read_bytes_per_second = Some(1e12);
    let asked = PlanRequest {
        context_tokens: Some(4096),
        policy: Policy::Balanced,
        ..request(&footprint, &llama_70b_workspace)
    };
    let counts = |devices: Vec<DeviceInfo>| -> Vec<usize> {
        let plan = plan(&Inventory::new(devices).unwrap(), &asked).unwrap();
        plan.devices
            .iter()
            .map(|device| device.layers.len())
            .collect()
    };
    // The head is worth about two layers and stays with the last.
    assert_eq!(counts(devices.clone()), [62, 18]);
    // One unknown bandwidth makes all equal.
    devices[0].read_bytes_per_second = Some(f64::NAN);
    assert_eq!(counts(devices), [41, 39]);
}

#[test]
fn splits_caps_and_exclusions_limit_what_is_used() {
    let footprint = llama_70b(300);
    let base = PlanRequest {
        context_tokens: Some(4096),
        ..request(&footprint, &llama_70b_workspace)
    };
    let used = |request: &PlanRequest<'_>| -> Vec<(DeviceId, Bytes)> {
        let plan = plan(&gib(&[24, 24, 24]), request).unwrap();
        for device in &plan.devices {
            assert!(device.total <= device.limit);
        }
        plan.devices
            .into_iter()
            .map(|device| (device.device, device.limit))
            .collect()
    };
    let cuda = DeviceId::cuda;
    let gib = Bytes::from_gib;
    assert_eq!(used(&base), [(cuda(0), gib(24)), (cuda(1), gib(24))]);

    let split = Policy::GpuSplit(GpuSplit(vec![gib(10), Bytes::ZERO, gib(99)]));
    let with_split = PlanRequest {
        policy: split,
        ..base.clone()
    };
    assert_eq!(used(&with_split), [(cuda(0), gib(10)), (cuda(2), gib(24))]);

    let caps = vec![(cuda(0), gib(8)), (cuda(1), gib(5)), (cuda(1), gib(9))];
    let with_caps = PlanRequest {
        caps,
        ..base.clone()
    };
    assert_eq!(
        used(&with_caps),
        [(cuda(0), gib(8)), (cuda(1), gib(5)), (cuda(2), gib(24))]
    );

    let without_first = PlanRequest {
        excluded: vec![cuda(0)],
        ..base
    };
    assert_eq!(
        used(&without_first),
        [(cuda(1), gib(24)), (cuda(2), gib(24))]
    );
}

#[test]
fn a_tied_head_is_held_once_where_the_embedding_is() {
    let mut footprint = llama_70b(300);
    footprint.head_tied_to_embedding = true;
    footprint.head = footprint.embedding;
    let asked = PlanRequest {
        context_tokens: Some(256),
        ..request(&footprint, &llama_70b_workspace)
    };
    let layers = footprint.layers[0].weights.0 * 80 + footprint.final_norm.0;
    let together = plan(&gib(&[80]), &asked).unwrap();
    assert_eq!(together.totals.weights.0, layers + footprint.embedding.0);
    let apart = plan(&gib(&[24, 24]), &asked).unwrap();
    assert_eq!(apart.totals.weights.0, layers + 2 * footprint.embedding.0);
}

#[test]
fn a_device_may_hold_only_the_embedding_or_only_the_head() {
    let footprint = llama_70b(300);
    let asked = PlanRequest {
        context_tokens: Some(256),
        ..request(&footprint, &llama_70b_workspace)
    };
    let embedding = Bytes(footprint.embedding.0 + (64 << 20));
    let head = Bytes(footprint.head.0 + (64 << 20));
    let layers = Bytes(80 * footprint.layers[0].weights.0 + (256 << 20));
    let plan = plan(&inventory(&[embedding, layers, head]), &asked).unwrap();
    let roles: Vec<_> = plan
        .devices
        .iter()
        .map(|device| {
            (
                device.holds_embedding,
                device.layers.clone(),
                device.holds_head,
            )
        })
        .collect();
    assert_eq!(
        roles,
        [
            (true, 0..0, false),
            (false, 0..80, false),
            (false, 80..80, true)
        ]
    );
}

#[test]
fn a_plan_is_reserved_whole_or_not_at_all() {
    let footprint = llama_70b(400);
    let inventory = gib(&[24, 24]);
    let ledger = Ledger::new(&inventory);
    let asked = PlanRequest {
        context_tokens: Some(4096),
        ..request(&footprint, &llama_70b_workspace)
    };
    let plan = plan(&ledger.inventory(), &asked).unwrap();
    let mut reserved = plan.reserve(&ledger).unwrap();
    let mut buffers = Vec::new();
    for (device, reservations) in plan.devices.iter().zip(&mut reserved) {
        assert_eq!(
            ledger.usage(&device.device).unwrap().available,
            device.remaining
        );
        assert_eq!(reservations.device, device.device);
        assert_eq!(reservations.kv_cache.purpose(), Purpose::KvCache);
        let matrix = reservations.weights.split(Bytes::from_mib(100)).unwrap();
        assert_eq!(matrix.owner(), "llama-70b");
        buffers.push(matrix);
        assert_eq!(
            ledger.usage(&device.device).unwrap().available,
            device.remaining
        );
    }
    let shortfall = plan.reserve(&ledger).unwrap_err();
    assert_eq!(shortfall.device, DeviceId::cuda(0));
    for device in &plan.devices {
        assert_eq!(
            ledger.usage(&device.device).unwrap().available,
            device.remaining
        );
    }
    drop((reserved, buffers));
    assert_eq!(ledger.inventory(), inventory);

    // The second device has no room: what was taken of the first comes back.
    let _other = ledger
        .reserve(
            &DeviceId::cuda(1),
            "other",
            Purpose::Weights,
            Bytes::from_gib(20),
        )
        .unwrap();
    assert_eq!(plan.reserve(&ledger).unwrap_err().device, DeviceId::cuda(1));
    assert_eq!(ledger.usage(&DeviceId::cuda(0)).unwrap().used, Bytes::ZERO);
}

#[test]
fn senseless_requests_are_told_why() {
    let footprint = llama_70b(400);
    let base = request(&footprint, &llama_70b_workspace);
    let error = |inventory: &Inventory, request: &PlanRequest<'_>| {
        plan(inventory, request).unwrap_err().to_string()
    };
    let devices = gib(&[24]);
    assert_eq!(
        plan(&Inventory::default(), &base),
        Err(PlanError::NoDevices)
    );
    let no_layers = ModelFootprint {
        layers: Vec::new(),
        ..footprint.clone()
    };
    assert_eq!(
        error(
            &devices,
            &PlanRequest {
                footprint: &no_layers,
                ..base.clone()
            }
        ),
        "model llama-70b has no layers: expected at least one"
    );
    let zero = |what| Err(PlanError::Zero { what });
    let no_batch = PlanRequest {
        batch: 0,
        ..base.clone()
    };
    assert_eq!(plan(&devices, &no_batch), zero("the batch"));
    let no_chunk = PlanRequest {
        chunk_tokens: 0,
        ..base.clone()
    };
    assert_eq!(plan(&devices, &no_chunk), zero("the chunk"));
    let no_context = PlanRequest {
        context_tokens: Some(0),
        ..base.clone()
    };
    assert_eq!(plan(&devices, &no_context), zero("the context"));
    let no_pages = ModelFootprint {
        page_tokens: 0,
        ..footprint.clone()
    };
    let no_pages = PlanRequest {
        footprint: &no_pages,
        ..base.clone()
    };
    assert_eq!(
        plan(&devices, &no_pages),
        zero("the page size of the cache")
    );
    assert_eq!(
        error(
            &devices,
            &PlanRequest {
                context_tokens: Some(131_073),
                ..base.clone()
            }
        ),
        "a context of 131073 tokens is more than model llama-70b was made for: ask for at most \
         131072"
    );
    assert_eq!(
        error(
            &devices,
            &PlanRequest {
                excluded: vec![DeviceId::cpu(3)],
                ..base.clone()
            }
        ),
        "device cpu:3 is not in the inventory: expected one of cuda:0"
    );
    let long_split = Policy::GpuSplit(GpuSplit(vec![Bytes::from_gib(20); 2]));
    assert_eq!(
        error(
            &devices,
            &PlanRequest {
                policy: long_split,
                ..base.clone()
            }
        ),
        "the split lists 2 devices, but there are 1: remove entries"
    );
    let none_left = PlanRequest {
        excluded: vec![DeviceId::cuda(0)],
        ..base
    };
    assert_eq!(
        plan(&devices, &none_left),
        Err(PlanError::AllDevicesExcluded)
    );
}

#[test]
fn absurd_numbers_neither_overflow_nor_hang() {
    let footprint = llama_70b(400);
    let base = request(&footprint, &llama_70b_workspace);
    let devices = inventory(&[Bytes::MAX, Bytes::MAX]);
    assert!(plan(&devices, &base).is_ok());
    let mut heavy = footprint.clone();
    for layer in &mut heavy.layers {
        *layer = LayerFootprint {
            weights: Bytes::MAX,
            weight_elements: u64::MAX,
            kv_elements_per_token: u64::MAX,
        };
    }
    let too_large = |result: Result<Plan, PlanError>| {
        assert!(
            matches!(result, Err(PlanError::TooLarge { .. })),
            "{result:?}"
        );
    };
    too_large(plan(
        &devices,
        &PlanRequest {
            footprint: &heavy,
            ..base.clone()
        },
    ));
    let endless = ModelFootprint {
        max_context_tokens: u64::MAX,
        ..footprint.clone()
    };
    let base_endless = PlanRequest {
        footprint: &endless,
        ..base.clone()
    };
    too_large(plan(
        &devices,
        &PlanRequest {
            context_tokens: Some(u64::MAX),
            ..base_endless.clone()
        },
    ));
    assert!(plan(&devices, &base_endless).is_ok());
    let huge = |_: &DeviceRole, _: &StepLimits| Bytes::MAX;
    too_large(plan(
        &devices,
        &PlanRequest {
            workspace: &huge,
            ..base.clone()
        },
    ));
    let tiny = |_: &DeviceRole, _: &StepLimits| Bytes::ZERO;
    let crowd = PlanRequest {
        batch: u64::MAX,
        workspace: &tiny,
        ..base.clone()
    };
    too_large(plan(&devices, &crowd));
    assert!(matches!(
        plan(&inventory(&[Bytes::ZERO]), &base),
        Err(PlanError::Infeasible(_))
    ));
}

#[test]
fn the_cache_has_a_size_of_its_own() {
    let footprint = llama_70b(400);
    let devices = gib(&[24, 24, 12]);
    let base = PlanRequest {
        batch: 32,
        ..request(&footprint, &llama_70b_workspace)
    };
    // 32 sequences of 8192 tokens would take 80 GiB.
    let shared = PlanRequest {
        context_tokens: Some(8192),
        cache_tokens: Some(20_000),
        ..base.clone()
    };
    let found = plan(&devices, &shared).unwrap();
    assert_eq!(found.cache_tokens, 20_224); // 79 pages
    assert_eq!(
        found.totals.kv_cache,
        Bytes(20_224 * 80 * 2 * 1024 * 2) // layers, keys and values, width, fp16
    );
    assert_eq!(found.context_tokens, 8192);
    assert_eq!(found.max_context_tokens, 20_224);
    let table = found.to_string();
    assert!(
        table.contains("cache f16 of 20224 tokens for all sequences"),
        "{table}"
    );
    assert!(table.contains("20224 tokens (the whole cache)"), "{table}");

    // Left open, a context is as long as the cache.
    let open = PlanRequest {
        context_tokens: None,
        ..shared.clone()
    };
    assert_eq!(plan(&devices, &open).unwrap().context_tokens, 20_224);

    // Whole pages are what there is.
    let just_enough = PlanRequest {
        context_tokens: Some(20_224),
        ..shared.clone()
    };
    assert_eq!(plan(&devices, &just_enough).unwrap().context_tokens, 20_224);
    let beyond = PlanRequest {
        context_tokens: Some(20_225),
        ..shared.clone()
    };
    let error = plan(&devices, &beyond).unwrap_err();
    assert_eq!(
        error,
        PlanError::ContextBeyondCache {
            asked: 20_225,
            cache_tokens: 20_224,
        }
    );
    assert_eq!(
        error.to_string(),
        "a context of 20225 tokens does not fit a cache of 20224 tokens: ask for a context of \
         at most 20224 tokens, or for a cache of at least 20225"
    );
    let none = PlanRequest {
        cache_tokens: Some(0),
        ..base.clone()
    };
    assert_eq!(
        plan(&devices, &none),
        Err(PlanError::Zero { what: "the cache" })
    );
    let endless = PlanRequest {
        cache_tokens: Some(u64::MAX),
        ..base
    };
    assert!(plan(&devices, &endless).is_err());
}

#[test]
fn a_plan_reads_as_a_table() {
    let footprint = llama_70b(400);
    let asked = PlanRequest {
        context_tokens: Some(8192),
        ..request(&footprint, &llama_70b_workspace)
    };
    let plan = plan(&gib(&[24, 24, 12]), &asked).unwrap();
    let expected = "\
device  parts                     weights    kv cache   workspace      total  remaining
cuda:0  embedding, layers 0-50  22.28 GiB    1.59 GiB   88.00 MiB  23.96 GiB  44.00 MiB
cuda:1  layers 51-79, head      12.29 GiB  928.00 MiB   88.49 MiB  13.28 GiB  10.72 GiB
all                             34.57 GiB    2.50 GiB  176.49 MiB  37.24 GiB
not used: cuda:2
context 8192 tokens, batch 1, chunk 512 tokens, cache f16
longest context that fits: 79872 tokens";
    assert_eq!(plan.to_string(), expected);
    let alone = PlanRequest {
        context_tokens: None,
        ..asked
    };
    let text = oxllama_memory::plan(&gib(&[96]), &alone)
        .unwrap()
        .to_string();
    assert!(text.ends_with("longest context that fits: 131072 tokens (the model's maximum)"));
    assert!(
        !text.contains("\nall ") && !text.contains("not used"),
        "{text}"
    );
}

/// Steps that are recorded: 1 MiB for each layer.
struct Recorded;

impl WorkspaceModel for Recorded {
    fn workspace(&self, role: &DeviceRole, limits: &StepLimits) -> Bytes {
        llama_70b_workspace(role, limits)
    }

    fn recordings(&self, role: &DeviceRole, _: &StepLimits) -> Bytes {
        Bytes::from_mib(role.layers.len() as u64)
    }
}

#[test]
fn recorded_steps_are_planned_reserved_and_shown() {
    let footprint = llama_70b(400);
    let asked = PlanRequest {
        context_tokens: Some(8192),
        ..request(&footprint, &Recorded)
    };
    let inventory = gib(&[24, 24]);
    let found = plan(&inventory, &asked).unwrap();
    // The 44 MiB that the first device has left without them are too few for those of 51 layers.
    assert_eq!(found.devices[0].layers, 0..50);
    assert_eq!(found.totals.recordings, Bytes::from_mib(80));
    for device in &found.devices {
        let recordings = Bytes::from_mib(device.layers.len() as u64);
        assert_eq!(device.recordings, recordings);
        let parts = [
            device.weights,
            device.kv_cache,
            device.workspace,
            recordings,
        ];
        assert_eq!(Bytes::checked_sum(parts), Some(device.total));
    }
    let ledger = Ledger::new(&inventory);
    let reserved = found.reserve(&ledger).unwrap();
    assert_eq!(reserved[0].recordings.bytes(), Bytes::from_mib(50));
    assert_eq!(reserved[0].recordings.purpose(), Purpose::Recordings);
    drop(reserved);
    assert_eq!(ledger.inventory(), inventory);
    let table = found.to_string();
    let header = "workspace  recordings      total";
    assert!(table.contains(header), "{table}");
    assert!(table.contains("88.00 MiB   50.00 MiB"), "{table}");
}

/// Not a timed test: counts how often the workspace model, the only part of unknown
/// price, is asked.
#[test]
fn planning_asks_little() {
    let footprint = llama_70b(400);
    let calls = std::cell::Cell::new(0_u32);
    let workspace = |role: &DeviceRole, limits: &StepLimits| {
        calls.set(calls.get() + 1);
        llama_70b_workspace(role, limits)
    };
    let base = request(&footprint, &workspace);
    for policy in [Policy::Fill, Policy::Balanced] {
        calls.set(0);
        assert!(
            plan(
                &gib(&[24, 24, 12]),
                &PlanRequest {
                    policy,
                    ..base.clone()
                }
            )
            .is_ok()
        );
        assert!(calls.get() < 2500, "{}", calls.get());
    }
    calls.set(0);
    let too_much = PlanRequest {
        context_tokens: Some(131_072),
        batch: 64,
        ..base
    };
    assert!(plan(&gib(&[24, 24, 12]), &too_much).is_err());
    assert!(calls.get() < 5000, "{}", calls.get());
}
