//! Requests that do not fit: by how much, where, why, and that what is offered instead
//! really fits and is the nearest of its kind.

mod common;

use common::{gib, inventory, llama_70b, llama_70b_workspace, request};
use oxllama_memory::{
    Alternative, BindingConstraint, Bytes, CacheFormat, Change, DeviceId, DeviceInfo, DeviceRole,
    GpuSplit, Infeasible, Inventory, LayerFootprint, LimitedBy, ModelFootprint, PlanError,
    PlanRequest, Policy, StepLimits, plan,
};
use proptest::prelude::*;

fn infeasible(inventory: &Inventory, request: &PlanRequest<'_>) -> Infeasible {
    match plan(inventory, request) {
        Err(PlanError::Infeasible(infeasible)) => *infeasible,
        other => panic!("expected an infeasible request, found {other:?}"),
    }
}

fn is_feasible(inventory: &Inventory, request: &PlanRequest<'_>) -> bool {
    plan(inventory, request).is_ok()
}

/// The inventory with a device's availability changed.
fn with_available(inventory: &Inventory, device: &DeviceId, available: Bytes) -> Inventory {
    let mut devices = inventory.devices().to_vec();
    for info in devices.iter_mut().filter(|info| &info.id == device) {
        *info = DeviceInfo {
            capacity: available,
            available,
            ..info.clone()
        };
    }
    Inventory::new(devices).unwrap()
}

/// Makes the changes by hand, plans, and compares with the plan offered. A request whose
/// single change is one unit less modest must not fit.
fn check_alternative(inventory: &Inventory, asked: &PlanRequest<'_>, alternative: &Alternative) {
    let mut footprint = asked.footprint.clone();
    let mut changed = asked.clone();
    let mut devices = inventory.clone();
    for change in &alternative.changes {
        match change {
            Change::Context { tokens } => changed.context_tokens = Some(*tokens),
            Change::CacheTokens { tokens } => changed.cache_tokens = Some(*tokens),
            Change::Batch { sequences } => changed.batch = *sequences,
            Change::Chunk { tokens } => changed.chunk_tokens = *tokens,
            Change::Cache { format } => changed.cache = *format,
            Change::WithoutLimits => {
                changed.caps.clear();
                changed.excluded.clear();
                if matches!(changed.policy, Policy::GpuSplit(_)) {
                    changed.policy = Policy::Fill;
                }
            }
            Change::MoreMemory { device, limit, .. } => {
                devices = with_available(inventory, device, *limit);
                changed.caps.retain(|(capped, _)| capped != device);
            }
            Change::BitsPerWeight {
                at_most_hundredths, ..
            } => {
                footprint = footprint.with_layer_bits_per_weight_hundredths(*at_most_hundredths);
            }
        }
    }
    let changed = PlanRequest {
        footprint: &footprint,
        ..changed
    };
    assert_eq!(plan(&devices, &changed).as_ref(), Ok(&alternative.plan));

    let [only_change] = &alternative.changes[..] else {
        assert!(alternative.changes.len() > 1);
        return;
    };
    let still_fits = match only_change {
        Change::Context { tokens } => {
            let longer = (tokens / footprint.page_tokens + 1) * footprint.page_tokens;
            let longer = longer.min(footprint.max_context_tokens);
            is_feasible(
                &devices,
                &PlanRequest {
                    context_tokens: Some(longer),
                    ..changed
                },
            )
        }
        Change::CacheTokens { tokens } => is_feasible(
            &devices,
            &PlanRequest {
                cache_tokens: Some(tokens + 1),
                ..changed
            },
        ),
        Change::Batch { sequences } => is_feasible(
            &devices,
            &PlanRequest {
                batch: sequences + 1,
                ..changed
            },
        ),
        Change::Chunk { tokens } => is_feasible(
            &devices,
            &PlanRequest {
                chunk_tokens: tokens + 1,
                ..changed
            },
        ),
        Change::MoreMemory { device, limit, .. } => {
            let less = with_available(inventory, device, limit.saturating_sub(Bytes(1)));
            is_feasible(&less, &changed)
        }
        Change::BitsPerWeight {
            at_most_hundredths, ..
        } => {
            let larger = asked
                .footprint
                .with_layer_bits_per_weight_hundredths(at_most_hundredths + 1);
            is_feasible(
                &devices,
                &PlanRequest {
                    footprint: &larger,
                    ..changed
                },
            )
        }
        Change::Cache { format } => {
            let larger = CacheFormat::ALL
                .into_iter()
                .take_while(|other| other != format);
            let mut larger = larger.map(|cache| PlanRequest {
                cache,
                ..changed.clone()
            });
            larger.any(|request| is_feasible(&devices, &request))
        }
        Change::WithoutLimits => false,
    };
    assert!(!still_fits, "more than {only_change:?} fits");
}

fn change_named(infeasible: &Infeasible, name: &str) -> Option<Change> {
    let single = infeasible
        .nearest
        .iter()
        .filter(|alternative| alternative.changes.len() == 1);
    let mut changes = single.map(|alternative| alternative.changes[0].clone());
    changes.find(|change| serde_json::to_value(change).unwrap()["change"] == name)
}

#[test]
fn too_long_a_context() {
    let footprint = llama_70b(400);
    let asked = PlanRequest {
        context_tokens: Some(131_072),
        cache: CacheFormat::F32,
        ..request(&footprint, &llama_70b_workspace)
    };
    let devices = gib(&[24, 24]);
    let found = infeasible(&devices, &asked);
    assert_eq!(found.binding, BindingConstraint::Context);
    for alternative in &found.nearest {
        check_alternative(&devices, &asked, alternative);
    }
    assert!(matches!(
        change_named(&found, "context"),
        Some(Change::Context { .. })
    ));
    assert!(matches!(
        change_named(&found, "more_memory"),
        Some(Change::MoreMemory { .. })
    ));
    // 80 GiB of cache are too many whatever the bits of the weights. 20 GiB at 6.5 bits as
    // well, but not 11 GiB at 4.5.
    assert_eq!(change_named(&found, "bits_per_weight"), None);
    let q4 = Change::Cache {
        format: CacheFormat::Q4,
    };
    assert_eq!(change_named(&found, "cache"), Some(q4));
    assert_eq!(change_named(&found, "batch"), None);

    // No device can do with less than the shortfall stated for it alone.
    for device in &found.devices {
        assert_eq!(device.limited_by, LimitedBy::Available);
        assert_eq!(
            device.needed,
            device.limit.checked_add(device.short_by).unwrap()
        );
        assert!(is_feasible(
            &with_available(&devices, &device.device, device.needed),
            &asked
        ));
        let less = Bytes(device.needed.0 - 1);
        assert!(!is_feasible(
            &with_available(&devices, &device.device, less),
            &asked
        ));
    }
}

#[test]
fn too_large_a_cache_for_all_sequences() {
    let footprint = llama_70b(400);
    let base = PlanRequest {
        context_tokens: Some(8192),
        cache_tokens: Some(1 << 20),
        batch: 8,
        ..request(&footprint, &llama_70b_workspace)
    };
    let devices = gib(&[24, 24]);
    let found = infeasible(&devices, &base);
    assert_eq!(found.binding, BindingConstraint::CacheTokens);
    for alternative in &found.nearest {
        check_alternative(&devices, &base, alternative);
    }
    let Some(Change::CacheTokens { tokens }) = change_named(&found, "cache_tokens") else {
        panic!("no smaller cache is offered: {found}");
    };
    // Eight sequences of that context do not fit, but share what does.
    assert!((8192..8 * 8192).contains(&tokens), "{tokens}");
    let message = found.to_string();
    assert!(message.contains("cache f16 of 1048576 tokens"), "{message}");
    assert!(message.contains("a cache of at most "), "{message}");

    // A context that needs the whole cache shrinks along with it.
    let alone = PlanRequest {
        context_tokens: Some(131_072),
        cache_tokens: Some(131_072),
        ..base.clone()
    };
    let found = infeasible(&devices, &alone);
    let both = found.nearest.iter().find(|alternative| {
        matches!(
            alternative.changes[..],
            [Change::CacheTokens { tokens }, Change::Context { tokens: context }]
                if tokens == context
        )
    });
    check_alternative(&devices, &alone, both.expect("a smaller cache and context"));
}

#[test]
fn too_many_sequences_too_large_a_chunk_or_too_wide_a_cache() {
    let footprint = llama_70b(400);
    let base = PlanRequest {
        context_tokens: Some(16_384),
        ..request(&footprint, &llama_70b_workspace)
    };
    let devices = gib(&[24, 24]);
    assert!(is_feasible(&devices, &base));

    let many = PlanRequest {
        batch: 8,
        ..base.clone()
    };
    let found = infeasible(&devices, &many);
    for alternative in &found.nearest {
        check_alternative(&devices, &many, alternative);
    }
    assert_eq!(
        change_named(&found, "batch"),
        Some(Change::Batch { sequences: 2 })
    );
    assert_eq!(found.asked.batch, 8);

    let large = PlanRequest {
        chunk_tokens: 1 << 20,
        ..base.clone()
    };
    let found = infeasible(&devices, &large);
    assert_eq!(found.binding, BindingConstraint::Chunk);
    for alternative in &found.nearest {
        check_alternative(&devices, &large, alternative);
    }

    let wide = PlanRequest {
        batch: 2,
        context_tokens: Some(20_480),
        cache: CacheFormat::F32,
        ..base.clone()
    };
    let found = infeasible(&devices, &wide);
    let f16 = Change::Cache {
        format: CacheFormat::F16,
    };
    assert_eq!(change_named(&found, "cache"), Some(f16));
    for alternative in &found.nearest {
        check_alternative(&devices, &wide, alternative);
    }
}

#[test]
fn a_cache_that_cannot_be_quantised_is_not_proposed_to_be() {
    let footprint = ModelFootprint {
        quantisable_cache: false,
        ..llama_70b(400)
    };
    let base = request(&footprint, &llama_70b_workspace);
    let asked = PlanRequest {
        context_tokens: Some(131_072),
        ..base
    };
    let found = infeasible(&gib(&[24, 24]), &asked);
    assert_eq!(change_named(&found, "cache"), None);
    let formats: Vec<CacheFormat> = footprint.cache_formats().collect();
    assert_eq!(formats, [CacheFormat::F32, CacheFormat::F16]);
}

#[test]
fn several_changes_when_no_single_one_would_do() {
    let footprint = llama_70b(400);
    let asked = PlanRequest {
        context_tokens: Some(131_072),
        batch: 4096,
        chunk_tokens: 1 << 24,
        cache: CacheFormat::F32,
        ..request(&footprint, &llama_70b_workspace)
    };
    let devices = gib(&[24, 24]);
    let found = infeasible(&devices, &asked);
    assert_eq!(found.binding, BindingConstraint::CacheAndWorkspace);
    let several = &found.nearest[0];
    assert_eq!(several.changes.len(), 4, "{:?}", several.changes);
    for alternative in &found.nearest {
        check_alternative(&devices, &asked, alternative);
    }
}

#[test]
fn too_many_weights() {
    let footprint = llama_70b(600);
    let asked = request(&footprint, &llama_70b_workspace);
    let devices = gib(&[24, 12]);
    let found = infeasible(&devices, &asked);
    let BindingConstraint::Weights { needed, limits } = found.binding else {
        panic!("{:?}", found.binding);
    };
    assert_eq!(limits, Bytes::from_gib(36));
    assert!(needed > limits);
    let kinds: Vec<_> = found
        .nearest
        .iter()
        .map(|alternative| alternative.changes.len())
        .collect();
    assert_eq!(kinds, [1, 1], "more memory or fewer bits");
    for alternative in &found.nearest {
        check_alternative(&devices, &asked, alternative);
    }
    let Some(Change::BitsPerWeight {
        at_most_hundredths,
        now_hundredths,
    }) = change_named(&found, "bits_per_weight")
    else {
        panic!("{:?}", found.nearest);
    };
    assert_eq!(now_hundredths, 600);
    assert!(
        (405..=417).contains(&at_most_hundredths),
        "{at_most_hundredths}"
    );
}

#[test]
fn a_cap_a_split_or_an_exclusion_in_the_way() {
    let footprint = llama_70b(300);
    let base = PlanRequest {
        context_tokens: Some(4096),
        ..request(&footprint, &llama_70b_workspace)
    };
    let devices = gib(&[24, 24]);
    let cap = PlanRequest {
        caps: vec![(DeviceId::cuda(0), Bytes::from_gib(3))],
        ..base.clone()
    };
    let split = PlanRequest {
        policy: Policy::GpuSplit(GpuSplit(vec![Bytes::from_gib(20)])),
        ..base.clone()
    };
    let exclusion = PlanRequest {
        excluded: vec![DeviceId::cuda(1)],
        ..base
    };
    let limited_by = [LimitedBy::Cap, LimitedBy::GpuSplit, LimitedBy::Excluded];
    for (asked, limited_by) in [cap, split, exclusion].iter().zip(limited_by) {
        let found = infeasible(&devices, asked);
        assert_eq!(found.binding, BindingConstraint::Limits);
        assert_eq!(
            change_named(&found, "without_limits"),
            Some(Change::WithoutLimits)
        );
        assert!(
            found
                .devices
                .iter()
                .any(|device| device.limited_by == limited_by)
        );
        let verifiable = found.nearest.iter().filter(|alternative| {
            // A split cannot be changed by changing the inventory.
            !matches!(asked.policy, Policy::GpuSplit(_))
                || !matches!(alternative.changes[0], Change::MoreMemory { .. })
        });
        for alternative in verifiable {
            check_alternative(&devices, asked, alternative);
        }
        if limited_by == LimitedBy::Excluded {
            let more = change_named(&found, "more_memory");
            assert!(
                matches!(&more, Some(Change::MoreMemory { device, .. }) if *device == DeviceId::cuda(0)),
                "{more:?}"
            );
        }
    }
}

#[test]
fn one_part_too_large_or_no_cut_that_fits() {
    let part = LayerFootprint {
        weights: Bytes(60),
        weight_elements: 120,
        kv_elements_per_token: 0,
    };
    let footprint = ModelFootprint {
        name: "blocks".to_owned(),
        embedding: Bytes(10),
        final_norm: Bytes::ZERO,
        head: Bytes(10),
        head_tied_to_embedding: false,
        layers: vec![part; 2],
        max_context_tokens: 10,
        page_tokens: 1,
        quantisable_cache: true,
    };
    let no_workspace = |_: &DeviceRole, _: &StepLimits| Bytes::ZERO;
    let asked = request(&footprint, &no_workspace);
    let found = infeasible(&inventory(&[Bytes(50), Bytes(50), Bytes(50)]), &asked);
    let expected = BindingConstraint::Part {
        part: "layer 0".to_owned(),
        needed: Bytes(60),
        largest_limit: Bytes(50),
    };
    assert_eq!(found.binding, expected);
    let found = infeasible(&inventory(&[Bytes(65), Bytes(65), Bytes(15)]), &asked);
    assert_eq!(found.binding, BindingConstraint::Division);
}

#[test]
fn what_is_missing_reads_as_text_and_as_json() {
    let footprint = llama_70b(400);
    let asked = PlanRequest {
        context_tokens: Some(32_768),
        chunk_tokens: 256,
        ..request(&footprint, &llama_70b_workspace)
    };
    let error = plan(&gib(&[24, 14]), &asked).unwrap_err();
    let expected = "\
model llama-70b does not fit with a context of 32768 tokens, batch 1, chunk 256 tokens, cache f16, \
policy fill
what stands in the way: the cache for so long a context
device      limit     set by     placed     needed  short by
cuda:0  24.00 GiB  available  23.98 GiB  30.79 GiB  6.79 GiB
cuda:1  14.00 GiB  available  13.65 GiB  20.67 GiB  6.67 GiB
(placed: when filled in order; needed: if this device alone were to make room)
what would fit:
  a context of at most 10752 tokens
  a cache of format q4
  6.67 GiB more on cuda:1 (20.67 GiB to use there)
  a version of the model with at most 3.16 bits per layer weight (now 4.00)";
    assert_eq!(error.to_string(), expected);
    let json = serde_json::to_value(&error).unwrap();
    let body = &json["infeasible"];
    assert_eq!(body["asked"]["context_tokens"], 32_768);
    assert_eq!(body["binding"]["kind"], "context");
    assert_eq!(body["devices"][1]["available"], 14_u64 << 30);
    assert_eq!(body["nearest"][0]["changes"][0]["change"], "context");
    assert!(body["nearest"][0]["plan"]["totals"]["total"].is_u64());
}

prop_compose! {
    fn small_models()(
        embedding in 0..60_u64,
        head in 0..60_u64,
        layers in proptest::collection::vec((1..40_u64, 0..3_u64), 1..6),
        max_context_tokens in 1..30_u64,
        page_tokens in 1..6_u64,
    ) -> ModelFootprint {
        let layer = |(weights, kv_elements_per_token)| LayerFootprint {
            weights: Bytes(weights),
            weight_elements: 2 * weights,
            kv_elements_per_token,
        };
        ModelFootprint {
            name: "small".to_owned(),
            embedding: Bytes(embedding),
            final_norm: Bytes(1),
            head: Bytes(head),
            head_tied_to_embedding: false,
            layers: layers.into_iter().map(layer).collect(),
            max_context_tokens,
            page_tokens,
            quantisable_cache: true,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_alternative_fits_and_is_the_nearest(
        footprint in small_models(),
        factors in [0..10_u64, 0..4, 0..4, 0..6],
        sizes in proptest::collection::vec(0..150_u64, 1..5),
        context in 0..1000_u64,
        (batch, chunk_tokens) in (1..5_u64, 1..20_u64),
        cache in proptest::sample::select(&CacheFormat::ALL[..]),
        pool in proptest::option::of(0..100_u64),
        cap in proptest::option::of(1..60_u64),
        balanced: bool,
    ) {
        let workspace = |role: &DeviceRole, limits: &StepLimits| {
            let last = if role.last { factors[3] * limits.batch } else { 0 };
            Bytes(factors[0] + factors[1] * role.layers.len() as u64
                + factors[2] * limits.chunk_tokens + last)
        };
        let sizes: Vec<Bytes> = sizes.into_iter().map(Bytes).collect();
        let devices = inventory(&sizes);
        let context = 1 + context % footprint.max_context_tokens;
        let asked = PlanRequest {
            context_tokens: Some(context),
            cache_tokens: pool.map(|beyond| context + beyond),
            batch,
            chunk_tokens,
            cache,
            policy: if balanced { Policy::Balanced } else { Policy::Fill },
            caps: cap.map(|cap| (DeviceId::cuda(0), Bytes(cap))).into_iter().collect(),
            ..request(&footprint, &workspace)
        };
        if let Err(error) = plan(&devices, &asked) {
            let PlanError::Infeasible(found) = error else {
                return Err(TestCaseError::fail(format!("unexpected: {error}")));
            };
            for alternative in &found.nearest {
                check_alternative(&devices, &asked, alternative);
            }
            prop_assert!(change_named(&found, "more_memory").is_some());
            for device in &found.devices {
                prop_assert!(device.needed > device.limit);
                prop_assert!(device.placed <= device.limit);
            }
        }
    }
}
