//! The planner against a search of every placement of small models.

mod common;

use std::ops::Range;

use common::request;
use oxllama_memory::{
    Bytes, CacheFormat, DeviceId, DeviceInfo, DeviceRole, Inventory, LayerFootprint,
    ModelFootprint, Plan, PlanError, PlanRequest, Policy, StepLimits, plan,
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
    /// At least the context asked for.
    cache_tokens: Option<u64>,
    batch: u64,
    chunk_tokens: u64,
    cache: CacheFormat,
    bandwidths: Option<Vec<f64>>,
}

fn workspace_of(factors: [u64; 5], role: &DeviceRole, limits: &StepLimits) -> Bytes {
    let [fixed, per_layer, per_chunk, per_sequence, per_context] = factors;
    let first = if role.first {
        per_chunk * limits.chunk_tokens
    } else {
        0
    };
    let last = if role.last {
        per_sequence * limits.batch
    } else {
        0
    };
    let layers = role.layers.len() as u64;
    let context = if layers > 0 {
        per_context * limits.context_tokens
    } else {
        0
    };
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
            cache_tokens: self.cache_tokens,
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
        let pages = match self.cache_tokens {
            Some(tokens) => tokens.div_ceil(footprint.page_tokens),
            None => self.batch * context_tokens.div_ceil(footprint.page_tokens),
        };
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
                let token_bytes = self.cache.bytes_per_token(layer.kv_elements_per_token);
                let page_bytes = footprint.page_tokens * token_bytes.unwrap().0;
                weights += layer.weights.0;
                kv_cache += pages * page_bytes;
                layers.end += 1;
            }
        }
        let role = DeviceRole {
            first: run.contains(&0),
            last: run.contains(&head),
            layers,
        };
        let limits = StepLimits {
            chunk_tokens: self.chunk_tokens,
            batch: self.batch,
            context_tokens,
            cache_tokens: pages * footprint.page_tokens,
        };
        [
            weights,
            kv_cache,
            workspace_of(self.workspace, &role, &limits).0,
        ]
    }

    fn fits(&self, runs: &[Range<usize>], context_tokens: u64) -> bool {
        runs.iter().zip(&self.devices).all(|(run, &size)| {
            run.is_empty()
                || (size > 0 && self.cost(run, context_tokens).iter().sum::<u64>() <= size)
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
        placements
            .iter()
            .any(|runs| self.fits(runs, context_tokens))
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
            let device = plan
                .devices
                .iter()
                .find(|plan| plan.device == DeviceId::cpu(index));
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
        let page_tokens = self.footprint.page_tokens;
        let pages = plan.context_tokens.div_ceil(page_tokens);
        let in_all = match self.cache_tokens {
            Some(tokens) => tokens.div_ceil(page_tokens),
            None => self.batch * pages,
        };
        assert_eq!(plan.cache_tokens, in_all * page_tokens);
        assert!(plan.context_tokens <= plan.cache_tokens);
        assert!(self.fits(&runs, plan.context_tokens));
        assert_eq!(plan.devices.len() + plan.unused.len(), self.devices.len());
        let used = runs
            .iter()
            .zip(&self.devices)
            .filter(|(run, _)| !run.is_empty());
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
        assert_eq!(
            [totals.weights.0, totals.kv_cache.0, totals.workspace.0],
            sum
        );
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
            quantisable_cache: true,
        }
    }
}

prop_compose! {
    fn cases()(
        footprint in footprints(),
        workspace in [0..10_u64, 0..4, 0..3, 0..5, 0..2],
        devices in proptest::collection::vec(prop_oneof![4 => 0..300_u64, 1 => Just(0)], 1..5),
        context in proptest::option::of(0..1000_u64),
        pool in proptest::option::of(0..30_u64),
        batch in 1..3_u64,
        chunk_tokens in 1..8_u64,
        cache in proptest::sample::select(&CacheFormat::ALL[..]),
        rates in proptest::option::of(proptest::collection::vec(1..9_u32, 4)),
    ) -> Case {
        let context_tokens = context.map(|context| 1 + context % footprint.max_context_tokens);
        let cache_tokens = pool.map(|beyond| beyond + context_tokens.unwrap_or(1));
        let bandwidths = rates.map(|rates| rates.into_iter().map(f64::from).collect());
        Case {
            footprint, workspace, devices, context_tokens, cache_tokens, batch, chunk_tokens,
            cache, bandwidths,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn fill_finds_a_placement_and_the_longest_context_whenever_there_is_one(case in cases()) {
        let ModelFootprint { page_tokens, max_context_tokens, .. } = case.footprint;
        let placements = case.placements();
        let in_cache = case.cache_tokens.map_or(u64::MAX, |tokens| {
            tokens.div_ceil(page_tokens) * page_tokens
        });
        let longest_context = max_context_tokens.min(in_cache);
        let page_ends = (1..=longest_context.div_ceil(page_tokens))
            .map(|pages| (pages * page_tokens).min(longest_context));
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
