//! The planner against a search of every placement, and on models of real shape.

mod common;

use std::ops::Range;

use common::{gib, inventory, llama_70b, llama_70b_workspace, request};
use oxllama_memory::{
    Bytes, CacheFormat, DeviceId, DeviceInfo, DeviceRole, GpuSplit, Inventory, LayerFootprint,
    Ledger, ModelFootprint, Plan, PlanError, PlanRequest, Policy, Purpose, StepLimits, plan,
};
use proptest::prelude::*;

/// A small planning problem in plain numbers.
#[derive(Clone, Debug)]
struct Case {
    footprint: ModelFootprint,
    /// Workspace per device, per layer, per chunk token on the first device, per
    /// sequence on the last, and per token of context.
    workspace: [u64; 5],
    devices: Vec<u64>,
    context_tokens: Option<u64>,
    batch: u64,
    chunk_tokens: u64,
    cache: CacheFormat,
    bandwidths: Option<Vec<f64>>,
}

fn workspace_of(factors: [u64; 5], role: &DeviceRole, limits: &StepLimits) -> Bytes {
    let [fixed, per_layer, per_chunk, per_sequence, per_context] = factors;
    let first = if role.first { per_chunk * limits.chunk_tokens } else { 0 };
    let last = if role.last { per_sequence * limits.batch } else { 0 };
    let layers = role.layers.len() as u64;
    let context = if layers > 0 { per_context * limits.context_tokens } else { 0 };
    Bytes(fixed + per_layer * layers + first + last + context)
}

impl Case {
    fn inventory(&self) -> Inventory {
        let device = |(index, &size): (usize, &u64)| DeviceInfo {
            read_bytes_per_second: self.bandwidths.as_ref().map(|rates| rates[index]),
            ..DeviceInfo::new(DeviceId::cpu(index as u32), "virtual", Bytes(size))
        };
        Inventory::new(self.devices.iter().enumerate().map(device).collect()).unwrap()
    }

    fn plan(&self, policy: Policy) -> Result<Plan, PlanError> {
        let workspace =
            |role: &DeviceRole, limits: &StepLimits| workspace_of(self.workspace, role, limits);
        let request = PlanRequest {
            context_tokens: self.context_tokens,
            batch: self.batch,
            chunk_tokens: self.chunk_tokens,
            cache: self.cache,
            policy,
            ..request(&self.footprint, &workspace)
        };
        plan(&self.inventory(), &request)
    }

    fn parts(&self) -> usize {
        self.footprint.layers.len() + 2
    }

    /// Weights, cache and workspace of a run of parts, added up one by one.
    fn cost(&self, run: &Range<usize>, context_tokens: u64) -> [u64; 3] {
        if run.is_empty() {
            return [0; 3];
        }
        let footprint = &self.footprint;
        let head = self.parts() - 1;
        let pages = self.batch * context_tokens.div_ceil(footprint.page_tokens);
        let element_bytes = if self.cache == CacheFormat::F32 { 4 } else { 2 };
        let (mut weights, mut kv_cache, mut layers) = (0, 0, 0..0);
        for part in run.clone() {
            if part == 0 {
                weights += footprint.embedding.0;
            } else if part == head {
                weights += footprint.final_norm.0;
                weights += match footprint.head_tied_to_embedding && run.contains(&0) {
                    true => footprint.head.0.saturating_sub(footprint.embedding.0),
                    false => footprint.head.0,
                };
            } else {
                let layer = &footprint.layers[part - 1];
                let page_bytes =
                    footprint.page_tokens * layer.kv_elements_per_token * element_bytes;
                weights += layer.weights.0;
                kv_cache += pages * page_bytes;
                layers.end += 1;
            }
        }
        let role = DeviceRole { first: run.contains(&0), last: run.contains(&head), layers };
        let limits =
            StepLimits { chunk_tokens: self.chunk_tokens, batch: self.batch, context_tokens };
        [weights, kv_cache, workspace_of(self.workspace, &role, &limits).0]
    }

    fn fits(&self, runs: &[Range<usize>], context_tokens: u64) -> bool {
        runs.iter().zip(&self.devices).all(|(run, &size)| {
            run.is_empty() || (size > 0 && self.cost(run, context_tokens).iter().sum::<u64>() <= size)
        })
    }

    /// Every way of dividing the parts among the devices in order.
    fn placements(&self) -> Vec<Vec<Range<usize>>> {
        let mut partial = vec![(0, Vec::new())];
        for device in 0..self.devices.len() {
            let is_last = device + 1 == self.devices.len();
            let mut longer = Vec::new();
            for (start, runs) in partial {
                let first_end = if is_last { self.parts() } else { start };
                for end in first_end..=self.parts() {
                    let mut runs: Vec<Range<usize>> = runs.clone();
                    runs.push(start..end);
                    longer.push((end, runs));
                }
            }
            partial = longer;
        }
        partial.into_iter().map(|(_, runs)| runs).collect()
    }

    fn any_fits(&self, placements: &[Vec<Range<usize>>], context_tokens: u64) -> bool {
        placements.iter().any(|runs| self.fits(runs, context_tokens))
    }

    /// Time of the slowest device: layers, head and cache over bandwidth.
    fn slowest(&self, runs: &[Range<usize>], context_tokens: u64) -> f64 {
        let seconds = |(device, run): (usize, &Range<usize>)| {
            let [_, kv_cache, _] = self.cost(run, context_tokens);
            let read = run.clone().map(|part| match part {
                0 => 0,
                _ if part == self.parts() - 1 => self.footprint.head.0,
                _ => self.footprint.layers[part - 1].weights.0,
            });
            let bandwidth = self.bandwidths.as_ref().map_or(1.0, |rates| rates[device]);
            (read.sum::<u64>() + kv_cache) as f64 / bandwidth
        };
        runs.iter().enumerate().map(seconds).fold(0.0, f64::max)
    }

    /// The runs of a plan, empty for devices that it does not use.
    fn runs(&self, plan: &Plan) -> Vec<Range<usize>> {
        let mut next = 0;
        let mut runs = Vec::new();
        for index in 0..self.devices.len() as u32 {
            let device = plan.devices.iter().find(|plan| plan.device == DeviceId::cpu(index));
            let end = match device {
                Some(device) if device.holds_head => self.parts(),
                Some(device) if device.layers.is_empty() => 1,
                Some(device) => device.layers.end + 1,
                None => next,
            };
            runs.push(next..end);
            next = end;
        }
        runs
    }

    /// The plan's own figures agree with sums made here, and all parts are placed once.
    fn check(&self, plan: &Plan) {
        let runs = self.runs(plan);
        assert_eq!(runs.last().map(|run| run.end), Some(self.parts()));
        assert!(self.fits(&runs, plan.context_tokens));
        assert_eq!(plan.devices.len() + plan.unused.len(), self.devices.len());
        let used = runs.iter().zip(&self.devices).filter(|(run, _)| !run.is_empty());
        let mut sum = [0; 3];
        for (device, (run, &size)) in plan.devices.iter().zip(used) {
            let figures = [device.weights.0, device.kv_cache.0, device.workspace.0];
            assert_eq!(figures, self.cost(run, plan.context_tokens));
            assert_eq!(device.total.0, figures.iter().sum::<u64>());
            assert_eq!(device.limit.0, size);
            assert_eq!(device.remaining.0, size - device.total.0);
            assert_eq!(device.holds_embedding, run.start == 0);
            assert_eq!(device.holds_head, run.end == self.parts());
            for (sum, figure) in sum.iter_mut().zip(figures) {
                *sum += figure;
            }
        }
        let totals = plan.totals;
        assert_eq!([totals.weights.0, totals.kv_cache.0, totals.workspace.0], sum);
        assert_eq!(totals.total.0, sum.iter().sum::<u64>());
    }
}

prop_compose! {
    fn footprints()(
        embedding in 0..60_u64,
        final_norm in 0..3_u64,
        head in 0..60_u64,
        head_tied_to_embedding: bool,
        layers in proptest::collection::vec((0..40_u64, 0..3_u64), 1..6),
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
            final_norm: Bytes(final_norm),
            head: Bytes(head),
            head_tied_to_embedding,
            layers: layers.into_iter().map(layer).collect(),
            max_context_tokens,
            page_tokens,
        }
    }
}

prop_compose! {
    fn cases()(
        footprint in footprints(),
        workspace in [0..10_u64, 0..4, 0..3, 0..5, 0..2],
        devices in proptest::collection::vec(prop_oneof![4 => 0..300_u64, 1 => Just(0)], 1..5),
        context in proptest::option::of(0..1000_u64),
        batch in 1..3_u64,
        chunk_tokens in 1..8_u64,
        use_f32: bool,
        rates in proptest::option::of(proptest::collection::vec(1..9_u32, 4)),
    ) -> Case {
        let context_tokens = context.map(|context| 1 + context % footprint.max_context_tokens);
        let bandwidths = rates.map(|rates| rates.into_iter().map(f64::from).collect());
        let cache = if use_f32 { CacheFormat::F32 } else { CacheFormat::F16 };
        Case {
            footprint, workspace, devices, context_tokens, batch, chunk_tokens, cache, bandwidths,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn fill_finds_a_placement_and_the_longest_context_whenever_there_is_one(case in cases()) {
        let ModelFootprint { page_tokens, max_context_tokens, .. } = case.footprint;
        let placements = case.placements();
        let page_ends = (1..=max_context_tokens.div_ceil(page_tokens))
            .map(|pages| (pages * page_tokens).min(max_context_tokens));
        let longest =
            page_ends.rev().find(|&context| case.any_fits(&placements, context));
        let asked_fits = case.context_tokens.map(|context| case.any_fits(&placements, context));
        let is_feasible = asked_fits.unwrap_or(longest.is_some());
        match case.plan(Policy::Fill) {
            Ok(plan) => {
                prop_assert!(is_feasible);
                case.check(&plan);
                let expected_longest = longest.max(case.context_tokens);
                prop_assert_eq!(Some(plan.max_context_tokens), expected_longest);
                let expected_context = case.context_tokens.or(longest);
                prop_assert_eq!(Some(plan.context_tokens), expected_context);
            }
            Err(PlanError::Infeasible(_)) => prop_assert!(!is_feasible),
            Err(other) => prop_assert!(false, "unexpected: {other}"),
        }
    }

    #[test]
    fn balanced_is_as_fast_as_any_placement(case in cases()) {
        match (case.plan(Policy::Fill), case.plan(Policy::Balanced)) {
            (Ok(filled), Ok(balanced)) => {
                case.check(&balanced);
                prop_assert_eq!(balanced.context_tokens, filled.context_tokens);
                prop_assert_eq!(balanced.max_context_tokens, filled.max_context_tokens);
                let context = balanced.context_tokens;
                let placements = case.placements();
                let least = placements
                    .iter()
                    .filter(|runs| case.fits(runs, context))
                    .map(|runs| case.slowest(runs, context))
                    .fold(f64::INFINITY, f64::min);
                prop_assert_eq!(case.slowest(&case.runs(&balanced), context), least);
            }
            (Err(PlanError::Infeasible(_)), Err(PlanError::Infeasible(_))) => {}
            (filled, balanced) => {
                prop_assert!(false, "fill and balanced disagree: {filled:?} {balanced:?}");
            }
        }
    }
}

#[test]
fn seventy_billion_parameters_over_unequal_devices() {
    let footprint = llama_70b(550);
    let asked = PlanRequest {
        context_tokens: Some(8192),
        ..request(&footprint, &llama_70b_workspace)
    };
    let filled = plan(&gib(&[24, 24, 12]), &asked).unwrap();
    let layers: Vec<_> = filled.devices.iter().map(|device| device.layers.clone()).collect();
    // 588 MB of weights and 33.5 MB of cache a layer: the first device has 2.1 GB of
    // embedding as well.
    assert_eq!(layers, [0..37, 37..78, 78..80]);
    assert!(filled.devices[0].holds_embedding && filled.devices[2].holds_head);
    assert!(filled.devices.iter().all(|device| device.remaining < device.limit));
    let next_layer = Bytes(footprint.layers[0].weights.0 + 8192 * 2048 * 2);
    assert!(filled.devices[..2].iter().all(|device| device.remaining < next_layer));
    assert_eq!(filled.totals.kv_cache, Bytes(80 * 8192 * 2048 * 2));
    assert_eq!(filled.max_context_tokens % 256, 0);

    let longest = PlanRequest { context_tokens: Some(filled.max_context_tokens), ..asked.clone() };
    assert!(plan(&gib(&[24, 24, 12]), &longest).is_ok());
    let too_long =
        PlanRequest { context_tokens: Some(filled.max_context_tokens + 1), ..asked.clone() };
    assert!(matches!(plan(&gib(&[24, 24, 12]), &too_long), Err(PlanError::Infeasible(_))));

    let balanced =
        plan(&gib(&[24, 24, 12]), &PlanRequest { policy: Policy::Balanced, ..asked }).unwrap();
    let counts: Vec<_> = balanced.devices.iter().map(|device| device.layers.len()).collect();
    assert_eq!(counts.iter().sum::<usize>(), 80);
    assert!(counts[2] > 15, "the third device is filled to relieve the others: {counts:?}");
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
        plan.devices.iter().map(|device| device.layers.len()).collect()
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
    let base =
        PlanRequest { context_tokens: Some(4096), ..request(&footprint, &llama_70b_workspace) };
    let used = |request: &PlanRequest<'_>| -> Vec<(DeviceId, Bytes)> {
        let plan = plan(&gib(&[24, 24, 24]), request).unwrap();
        for device in &plan.devices {
            assert!(device.total <= device.limit);
        }
        plan.devices.into_iter().map(|device| (device.device, device.limit)).collect()
    };
    let cuda = DeviceId::cuda;
    let gib = Bytes::from_gib;
    assert_eq!(used(&base), [(cuda(0), gib(24)), (cuda(1), gib(24))]);

    let split = Policy::GpuSplit(GpuSplit(vec![gib(10), Bytes::ZERO, gib(99)]));
    let with_split = PlanRequest { policy: split, ..base.clone() };
    assert_eq!(used(&with_split), [(cuda(0), gib(10)), (cuda(2), gib(24))]);

    let caps = vec![(cuda(0), gib(8)), (cuda(1), gib(5)), (cuda(1), gib(9))];
    let with_caps = PlanRequest { caps, ..base.clone() };
    assert_eq!(used(&with_caps), [(cuda(0), gib(8)), (cuda(1), gib(5)), (cuda(2), gib(24))]);

    let without_first = PlanRequest { excluded: vec![cuda(0)], ..base };
    assert_eq!(used(&without_first), [(cuda(1), gib(24)), (cuda(2), gib(24))]);
}

#[test]
fn a_tied_head_is_held_once_where_the_embedding_is() {
    let mut footprint = llama_70b(300);
    footprint.head_tied_to_embedding = true;
    footprint.head = footprint.embedding;
    let asked =
        PlanRequest { context_tokens: Some(256), ..request(&footprint, &llama_70b_workspace) };
    let layers = footprint.layers[0].weights.0 * 80 + footprint.final_norm.0;
    let together = plan(&gib(&[80]), &asked).unwrap();
    assert_eq!(together.totals.weights.0, layers + footprint.embedding.0);
    let apart = plan(&gib(&[24, 24]), &asked).unwrap();
    assert_eq!(apart.totals.weights.0, layers + 2 * footprint.embedding.0);
}

#[test]
fn a_device_may_hold_only_the_embedding_or_only_the_head() {
    let footprint = llama_70b(300);
    let asked =
        PlanRequest { context_tokens: Some(256), ..request(&footprint, &llama_70b_workspace) };
    let embedding = Bytes(footprint.embedding.0 + (64 << 20));
    let head = Bytes(footprint.head.0 + (64 << 20));
    let layers = Bytes(80 * footprint.layers[0].weights.0 + (256 << 20));
    let plan = plan(&inventory(&[embedding, layers, head]), &asked).unwrap();
    let roles: Vec<_> = plan
        .devices
        .iter()
        .map(|device| (device.holds_embedding, device.layers.clone(), device.holds_head))
        .collect();
    assert_eq!(roles, [(true, 0..0, false), (false, 0..80, false), (false, 80..80, true)]);
}

#[test]
fn a_plan_is_reserved_whole_or_not_at_all() {
    let footprint = llama_70b(400);
    let inventory = gib(&[24, 24]);
    let ledger = Ledger::new(&inventory);
    let asked =
        PlanRequest { context_tokens: Some(4096), ..request(&footprint, &llama_70b_workspace) };
    let plan = plan(&ledger.inventory(), &asked).unwrap();
    let mut reserved = plan.reserve(&ledger).unwrap();
    for (device, reservations) in plan.devices.iter().zip(&mut reserved) {
        assert_eq!(ledger.usage(&device.device).unwrap().available, device.remaining);
        assert_eq!(reservations.device, device.device);
        assert_eq!(reservations.kv_cache.purpose(), Purpose::KvCache);
        let matrix = reservations.weights.split(Bytes::from_mib(100)).unwrap();
        assert_eq!(matrix.owner(), "llama-70b");
        assert_eq!(ledger.usage(&device.device).unwrap().available, device.remaining);
    }
    let shortfall = plan.reserve(&ledger).unwrap_err();
    assert_eq!(shortfall.device, DeviceId::cuda(0));
    for device in &plan.devices {
        assert_eq!(ledger.usage(&device.device).unwrap().available, device.remaining);
    }
    drop(reserved);
    assert_eq!(ledger.inventory(), inventory);

    // The second device has no room: what was taken of the first comes back.
    let _other =
        ledger.reserve(&DeviceId::cuda(1), "other", Purpose::Weights, Bytes::from_gib(20)).unwrap();
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
    assert_eq!(plan(&Inventory::default(), &base), Err(PlanError::NoDevices));
    let no_layers = ModelFootprint { layers: Vec::new(), ..footprint.clone() };
    assert_eq!(
        error(&devices, &PlanRequest { footprint: &no_layers, ..base.clone() }),
        "model llama-70b has no layers: expected at least one"
    );
    let zero = |what| Err(PlanError::Zero { what });
    let no_batch = PlanRequest { batch: 0, ..base.clone() };
    assert_eq!(plan(&devices, &no_batch), zero("the batch"));
    let no_chunk = PlanRequest { chunk_tokens: 0, ..base.clone() };
    assert_eq!(plan(&devices, &no_chunk), zero("the chunk"));
    let no_context = PlanRequest { context_tokens: Some(0), ..base.clone() };
    assert_eq!(plan(&devices, &no_context), zero("the context"));
    let no_pages = ModelFootprint { page_tokens: 0, ..footprint.clone() };
    let no_pages = PlanRequest { footprint: &no_pages, ..base.clone() };
    assert_eq!(plan(&devices, &no_pages), zero("the page size of the cache"));
    assert_eq!(
        error(&devices, &PlanRequest { context_tokens: Some(131_073), ..base.clone() }),
        "a context of 131073 tokens is more than model llama-70b was made for: ask for at most \
         131072"
    );
    assert_eq!(
        error(&devices, &PlanRequest { excluded: vec![DeviceId::cpu(3)], ..base.clone() }),
        "device cpu:3 is not in the inventory: expected one of cuda:0"
    );
    let long_split = Policy::GpuSplit(GpuSplit(vec![Bytes::from_gib(20); 2]));
    assert_eq!(
        error(&devices, &PlanRequest { policy: long_split, ..base.clone() }),
        "the split lists 2 devices, but there are 1: remove entries"
    );
    let none_left = PlanRequest { excluded: vec![DeviceId::cuda(0)], ..base };
    assert_eq!(plan(&devices, &none_left), Err(PlanError::AllDevicesExcluded));
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
        assert!(matches!(result, Err(PlanError::TooLarge { .. })), "{result:?}");
    };
    too_large(plan(&devices, &PlanRequest { footprint: &heavy, ..base.clone() }));
    let endless = ModelFootprint { max_context_tokens: u64::MAX, ..footprint.clone() };
    let base_endless = PlanRequest { footprint: &endless, ..base.clone() };
    too_large(plan(
        &devices,
        &PlanRequest { context_tokens: Some(u64::MAX), ..base_endless.clone() },
    ));
    assert!(plan(&devices, &base_endless).is_ok());
    let huge = |_: &DeviceRole, _: &StepLimits| Bytes::MAX;
    too_large(plan(&devices, &PlanRequest { workspace: &huge, ..base.clone() }));
    let tiny = |_: &DeviceRole, _: &StepLimits| Bytes::ZERO;
    let crowd = PlanRequest { batch: u64::MAX, workspace: &tiny, ..base.clone() };
    too_large(plan(&devices, &crowd));
    assert!(matches!(plan(&inventory(&[Bytes::ZERO]), &base), Err(PlanError::Infeasible(_))));
}

#[test]
fn a_plan_reads_as_a_table() {
    let footprint = llama_70b(400);
    let asked =
        PlanRequest { context_tokens: Some(8192), ..request(&footprint, &llama_70b_workspace) };
    let plan = plan(&gib(&[24, 24, 12]), &asked).unwrap();
    let expected = "\
device  parts                     weights  kv cache  workspace      total   remaining
cuda:0  embedding, layers 0-50  23.00 GiB";
    let text = plan.to_string();
    assert!(text.starts_with(expected), "{text}");
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
        assert!(plan(&gib(&[24, 24, 12]), &PlanRequest { policy, ..base.clone() }).is_ok());
        assert!(calls.get() < 2500, "{}", calls.get());
    }
    calls.set(0);
    let too_much = PlanRequest { context_tokens: Some(131_072), batch: 64, ..base };
    assert!(plan(&gib(&[24, 24, 12]), &too_much).is_err());
    assert!(calls.get() < 5000, "{}", calls.get());
}
