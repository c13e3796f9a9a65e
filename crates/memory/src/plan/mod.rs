//! Where each part of a model goes, before a byte of it is read.

mod balanced;
mod chain;
mod fill;
mod infeasible;
mod reasons;
mod reserve;
mod table;

use std::ops::Range;

use serde::Serialize;

use crate::bytes::Bytes;
use crate::device::{DeviceId, GpuSplit, Inventory};
use crate::footprint::{CacheFormat, ModelFootprint, StepLimits, WorkspaceModel};

use chain::Chain;
use fill::{fill, largest};
pub use infeasible::{Alternative, Asked, DeviceShortfall, Infeasible};
pub use reasons::{BindingConstraint, Change};
pub use reserve::DeviceReservations;

/// How layers are distributed. In every policy each device holds one run of parts, in
/// the order of the inventory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Each device in turn as full as possible, the order of ExLlamaV2. Finds a
    /// placement whenever there is one.
    Fill,
    /// The slowest device as fast as possible, by the bytes it reads in a step over its
    /// bandwidth; where a bandwidth is unknown, all are taken to be equal.
    Balanced,
    /// [`Policy::Fill`] within these limits per device; devices beyond the list are not
    /// used.
    GpuSplit(GpuSplit),
}

/// A model to be placed, and what it shall serve.
#[derive(Clone)]
pub struct PlanRequest<'a> {
    /// The parts of the model.
    pub footprint: &'a ModelFootprint,
    /// The memory of a step.
    pub workspace: &'a dyn WorkspaceModel,
    /// Tokens of context of each sequence; `None` for the longest that fits, up to the
    /// model's maximum.
    pub context_tokens: Option<u64>,
    /// Tokens of the cache, all sequences together, rounded up to whole pages; `None` for as
    /// many as [`PlanRequest::batch`] sequences of full context take. With fewer than that,
    /// sequences share what there is; no sequence's context exceeds it.
    pub cache_tokens: Option<u64>,
    /// Sequences in one step.
    pub batch: u64,
    /// Tokens of one step, all sequences together.
    pub chunk_tokens: u64,
    /// The format of the cache.
    pub cache: CacheFormat,
    /// How layers are distributed.
    pub policy: Policy,
    /// The most to be used of single devices.
    pub caps: Vec<(DeviceId, Bytes)>,
    /// Devices not to be used.
    pub excluded: Vec<DeviceId>,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum PlanError {
    /// The inventory is empty.
    #[error("there is no device to plan for: the inventory is empty")]
    NoDevices,
    /// Every device is excluded or left out by the split.
    #[error("there is no device to plan for: all are excluded, capped at 0 or outside the split")]
    AllDevicesExcluded,
    /// The model has no layers.
    #[error("model {model} has no layers: expected at least one")]
    NoLayers {
        /// The model's name.
        model: String,
    },
    /// A count that must be positive is zero.
    #[error("{what} is 0: expected at least 1")]
    Zero {
        /// Which count.
        what: &'static str,
    },
    /// The context asked for exceeds the model's.
    #[error(
        "a context of {asked} tokens is more than model {model} was made for: ask for at most \
         {maximum}"
    )]
    ContextTooLong {
        /// The model's name.
        model: String,
        /// Tokens asked for.
        asked: u64,
        /// The model's own limit.
        maximum: u64,
    },
    /// The context asked for exceeds the cache asked for.
    #[error(
        "a context of {asked} tokens does not fit a cache of {cache_tokens} tokens: ask for a \
         context of at most {cache_tokens} tokens, or for a cache of at least {asked}"
    )]
    ContextBeyondCache {
        /// Tokens of context of each sequence asked for.
        asked: u64,
        /// Tokens of the cache asked for, in whole pages.
        cache_tokens: u64,
    },
    /// A cap or an exclusion names a device that does not exist.
    #[error("device {device} is not in the inventory: expected one of {known}")]
    UnknownDevice {
        /// The name found.
        device: DeviceId,
        /// The names that exist, separated by commas.
        known: String,
    },
    /// A split for more devices than there are.
    #[error("the split lists {entries} devices, but there are {devices}: remove entries")]
    SplitTooLong {
        /// Entries of the list.
        entries: usize,
        /// Devices of the inventory.
        devices: usize,
    },
    /// Sums exceed what 64 bits hold.
    #[error("the {what} of model {model} is more than 2^64 bytes: no device could hold it")]
    TooLarge {
        /// The model's name.
        model: String,
        /// Which sum.
        what: &'static str,
    },
    /// The request does not fit; says by how much, where, and what would.
    #[error(transparent)]
    Infeasible(Box<Infeasible>),
}

/// What one device holds of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DevicePlan {
    /// The device.
    pub device: DeviceId,
    /// Indices of its layers; empty on a device with only embedding or head.
    pub layers: Range<usize>,
    /// Whether it holds the embedding.
    pub holds_embedding: bool,
    /// Whether it holds final norm and head.
    pub holds_head: bool,
    /// Bytes of parameters.
    pub weights: Bytes,
    /// Bytes of cache.
    pub kv_cache: Bytes,
    /// Bytes of intermediate results.
    pub workspace: Bytes,
    /// Bytes of recorded steps.
    pub recordings: Bytes,
    /// The sum of the four.
    pub total: Bytes,
    /// What the plan may use of the device: what is available, or a lower limit given.
    pub limit: Bytes,
    /// What it leaves of [`DevicePlan::limit`].
    pub remaining: Bytes,
}

/// Sums over all devices of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Bytes of parameters.
    pub weights: Bytes,
    /// Bytes of cache.
    pub kv_cache: Bytes,
    /// Bytes of intermediate results.
    pub workspace: Bytes,
    /// Bytes of recorded steps.
    pub recordings: Bytes,
    /// The sum of the four.
    pub total: Bytes,
}

/// What stays in the host's memory, where a device reads it in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostPlan {
    /// The host's name among the accounts of the ledger.
    pub device: DeviceId,
    /// Bytes of the embedding.
    pub embedding: Bytes,
}

/// What goes on which device, for which purpose. Displays as a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The model's name.
    pub model: String,
    /// The devices used, in the order in which a token passes them.
    pub devices: Vec<DevicePlan>,
    /// Sums over them.
    pub totals: Totals,
    /// The embedding, where no device holds it. [`plan`] leaves this open: a caller that keeps
    /// the embedding on the host plans a footprint without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<HostPlan>,
    /// Devices of the inventory that hold nothing.
    pub unused: Vec<DeviceId>,
    /// Tokens of context of each sequence.
    pub context_tokens: u64,
    /// Tokens of the cache, all sequences together: whole pages.
    pub cache_tokens: u64,
    /// Sequences in one step.
    pub batch: u64,
    /// Tokens of one step, all sequences together.
    pub chunk_tokens: u64,
    /// The format of the cache.
    pub cache: CacheFormat,
    /// Tokens in a page of the cache.
    pub page_tokens: u64,
    /// The longest context that fits with everything else the same.
    pub max_context_tokens: u64,
    /// The longest context that the model was made for.
    pub model_max_context_tokens: u64,
}

/// What keeps a plan from using more of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitedBy {
    /// What is available of it.
    Available,
    /// A cap on this device.
    Cap,
    /// The device's entry in the split, or its absence from it.
    GpuSplit,
    /// The device is excluded.
    Excluded,
}

/// A device as far as a plan may use it.
#[derive(Clone, Debug)]
struct Slot {
    device: DeviceId,
    available: Bytes,
    limit: Bytes,
    limited_by: LimitedBy,
    read_bytes_per_second: Option<f64>,
}

/// Places the model on the devices of `inventory`, of which the available bytes are used
/// ([`Ledger::inventory`] gives them as they are now).
///
/// # Errors
/// [`PlanError::Infeasible`] when the request does not fit, with the nearest plans that
/// do; the other variants when it makes no sense.
pub fn plan(inventory: &Inventory, request: &PlanRequest<'_>) -> Result<Plan, PlanError> {
    check(inventory, request)?;
    let slots = slots(inventory, request);
    if slots
        .iter()
        .all(|slot| slot.limit.is_zero() && slot.limited_by != LimitedBy::Available)
    {
        return Err(PlanError::AllDevicesExcluded);
    }
    match place(&slots, request)? {
        Some(plan) => Ok(plan),
        None => Err(PlanError::Infeasible(Box::new(infeasible::explain(
            inventory, &slots, request,
        )?))),
    }
}

/// Refuses requests that make no sense whatever the sizes.
fn check(inventory: &Inventory, request: &PlanRequest<'_>) -> Result<(), PlanError> {
    let footprint = request.footprint;
    if inventory.devices().is_empty() {
        return Err(PlanError::NoDevices);
    }
    if footprint.layers.is_empty() {
        return Err(PlanError::NoLayers {
            model: footprint.name.clone(),
        });
    }
    let counts = [
        ("the context", request.context_tokens.unwrap_or(1)),
        ("the cache", request.cache_tokens.unwrap_or(1)),
        ("the batch", request.batch),
        ("the chunk", request.chunk_tokens),
        ("the page size of the cache", footprint.page_tokens),
        ("the model's longest context", footprint.max_context_tokens),
    ];
    if let Some(&(what, _)) = counts.iter().find(|(_, count)| *count == 0) {
        return Err(PlanError::Zero { what });
    }
    if let Some(asked) = request.context_tokens
        && asked > footprint.max_context_tokens
    {
        return Err(PlanError::ContextTooLong {
            model: footprint.name.clone(),
            asked,
            maximum: footprint.max_context_tokens,
        });
    }
    if let (Some(asked), Some(cache_tokens)) = (request.context_tokens, request.cache_tokens)
        && asked > whole_pages(cache_tokens, footprint)
    {
        return Err(PlanError::ContextBeyondCache {
            asked,
            cache_tokens: whole_pages(cache_tokens, footprint),
        });
    }
    let named = request
        .caps
        .iter()
        .map(|(device, _)| device)
        .chain(&request.excluded);
    for device in named {
        if inventory.get(device).is_none() {
            let known: Vec<String> = inventory
                .devices()
                .iter()
                .map(|info| info.id.to_string())
                .collect();
            return Err(PlanError::UnknownDevice {
                device: device.clone(),
                known: known.join(", "),
            });
        }
    }
    if let Policy::GpuSplit(GpuSplit(entries)) = &request.policy
        && entries.len() > inventory.devices().len()
    {
        return Err(PlanError::SplitTooLong {
            entries: entries.len(),
            devices: inventory.devices().len(),
        });
    }
    Ok(())
}

/// The devices with their limits: the lowest of what is available and what was given.
fn slots(inventory: &Inventory, request: &PlanRequest<'_>) -> Vec<Slot> {
    let to_slot = |(index, info): (usize, &crate::device::DeviceInfo)| {
        let mut limits = vec![(info.available, LimitedBy::Available)];
        if let Policy::GpuSplit(GpuSplit(entries)) = &request.policy {
            let entry = entries.get(index).copied().unwrap_or(Bytes::ZERO);
            limits.push((entry, LimitedBy::GpuSplit));
        }
        let caps = request.caps.iter().filter(|(device, _)| *device == info.id);
        limits.extend(caps.map(|&(_, limit)| (limit, LimitedBy::Cap)));
        if request.excluded.contains(&info.id) {
            limits.push((Bytes::ZERO, LimitedBy::Excluded));
        }
        let lowest = limits.into_iter().min_by_key(|&(limit, _)| limit);
        let (limit, limited_by) = lowest.unwrap_or((Bytes::ZERO, LimitedBy::Available));
        Slot {
            device: info.id.clone(),
            available: info.available,
            limit,
            limited_by,
            read_bytes_per_second: info.read_bytes_per_second,
        }
    };
    inventory
        .devices()
        .iter()
        .enumerate()
        .map(to_slot)
        .collect()
}

/// `tokens` rounded up to whole pages of the cache.
fn whole_pages(tokens: u64, footprint: &ModelFootprint) -> u64 {
    let page_tokens = footprint.page_tokens;
    tokens.div_ceil(page_tokens).saturating_mul(page_tokens)
}

/// The shortest context that a plan is made for: one page, or the model's maximum.
fn shortest_context(footprint: &ModelFootprint) -> u64 {
    footprint.page_tokens.min(footprint.max_context_tokens)
}

fn chain<'a>(request: &PlanRequest<'a>) -> Result<Chain<'a>, PlanError> {
    Chain::new(request.footprint, request.workspace, request.cache).ok_or_else(|| {
        PlanError::TooLarge {
            model: request.footprint.name.clone(),
            what: "sum of layers",
        }
    })
}

fn step_limits(request: &PlanRequest<'_>, context_tokens: u64) -> StepLimits {
    let footprint = request.footprint;
    // Products beyond 64 bits are no sizes of a cache: the bytes of such a sum overflow as well.
    let cache_tokens = match request.cache_tokens {
        Some(tokens) => whole_pages(tokens, footprint),
        None => whole_pages(context_tokens, footprint).saturating_mul(request.batch),
    };
    StepLimits {
        chunk_tokens: request.chunk_tokens,
        batch: request.batch,
        context_tokens,
        cache_tokens,
    }
}

/// The fill order within the limits of `slots`; complete when the last run ends at the
/// last part.
fn fill_slots(chain: &Chain<'_>, slots: &[Slot], step: &StepLimits) -> Vec<Range<usize>> {
    fill(chain.parts(), slots.len(), |slot, run| {
        fits(chain, &slots[slot], run, step)
    })
}

fn fits(chain: &Chain<'_>, slot: &Slot, run: &Range<usize>, step: &StepLimits) -> bool {
    // A device that is left out holds nothing, not even a part of no size.
    !slot.limit.is_zero()
        && chain
            .cost(run, step)
            .is_some_and(|cost| cost.total <= slot.limit)
}

fn all_fits(chain: &Chain<'_>, slots: &[Slot], step: &StepLimits) -> bool {
    fill_slots(chain, slots, step)
        .last()
        .is_some_and(|run| run.end == chain.parts())
}

/// Whether the request fits, with its shortest context when it leaves that open.
fn is_feasible(slots: &[Slot], request: &PlanRequest<'_>) -> bool {
    let context = request
        .context_tokens
        .unwrap_or_else(|| shortest_context(request.footprint));
    chain(request).is_ok_and(|chain| all_fits(&chain, slots, &step_limits(request, context)))
}

/// The longest context that fits with everything else as in the request, in whole pages
/// up to the model's maximum and the size of the cache.
fn longest_context(chain: &Chain<'_>, slots: &[Slot], request: &PlanRequest<'_>) -> Option<u64> {
    let ModelFootprint {
        page_tokens,
        max_context_tokens: model_maximum,
        ..
    } = *request.footprint;
    let cache_tokens = request
        .cache_tokens
        .map_or(u64::MAX, |tokens| whole_pages(tokens, request.footprint));
    let max_context_tokens = model_maximum.min(cache_tokens);
    let tokens = |pages: u64| pages.saturating_mul(page_tokens).min(max_context_tokens);
    let most_pages = max_context_tokens.div_ceil(page_tokens);
    largest(1, most_pages, |pages| {
        all_fits(chain, slots, &step_limits(request, tokens(pages)))
    })
    .map(tokens)
}

/// The plan within the limits of `slots`; `None` when the request does not fit.
fn place(slots: &[Slot], request: &PlanRequest<'_>) -> Result<Option<Plan>, PlanError> {
    let chain = chain(request)?;
    let smallest = request
        .context_tokens
        .unwrap_or_else(|| shortest_context(request.footprint));
    if chain
        .cost(&(0..chain.parts()), &step_limits(request, smallest))
        .is_none()
    {
        return Err(PlanError::TooLarge {
            model: request.footprint.name.clone(),
            what: "sum of weights, cache and workspace",
        });
    }
    if !all_fits(&chain, slots, &step_limits(request, smallest)) {
        return Ok(None);
    }
    // The asked context fits even where the whole pages it is part of need a larger
    // workspace that does not.
    let max_context_tokens =
        longest_context(&chain, slots, request).map_or(smallest, |longest| longest.max(smallest));
    let context_tokens = request.context_tokens.unwrap_or(max_context_tokens);
    let step = step_limits(request, context_tokens);
    let runs = match request.policy {
        Policy::Fill | Policy::GpuSplit(_) => Some(fill_slots(&chain, slots, &step)),
        Policy::Balanced => {
            let bandwidths = bandwidths(slots);
            balanced::balanced(
                chain.parts(),
                slots.len(),
                |slot, run| fits(&chain, &slots[slot], run, &step),
                |slot, run| chain.read_per_step(run, &step).0 as f64 / bandwidths[slot],
            )
        }
    };
    Ok(runs.map(|runs| describe(&chain, slots, request, &step, &runs, max_context_tokens)))
}

/// Bytes per second of each device, all 1 where any is unknown: a mixture of measured
/// and made-up figures would be worse than none.
fn bandwidths(slots: &[Slot]) -> Vec<f64> {
    let known: Option<Vec<f64>> = slots
        .iter()
        .map(|slot| {
            slot.read_bytes_per_second
                .filter(|rate| rate.is_finite() && *rate > 0.0)
        })
        .collect();
    known.unwrap_or_else(|| vec![1.0; slots.len()])
}

/// The plan that gives each slot its run of parts.
fn describe(
    chain: &Chain<'_>,
    slots: &[Slot],
    request: &PlanRequest<'_>,
    step: &StepLimits,
    runs: &[Range<usize>],
    max_context_tokens: u64,
) -> Plan {
    let mut devices = Vec::new();
    let mut unused = Vec::new();
    let mut totals = Totals::default();
    for (slot, run) in slots.iter().zip(runs) {
        if run.is_empty() {
            unused.push(slot.device.clone());
            continue;
        }
        // Every run was accepted because its cost is known and within the limit.
        let cost = chain.cost(run, step).unwrap_or_default();
        let role = chain.role(run);
        totals.weights = totals.weights.saturating_add(cost.weights);
        totals.kv_cache = totals.kv_cache.saturating_add(cost.kv_cache);
        totals.workspace = totals.workspace.saturating_add(cost.workspace);
        totals.recordings = totals.recordings.saturating_add(cost.recordings);
        totals.total = totals.total.saturating_add(cost.total);
        devices.push(DevicePlan {
            device: slot.device.clone(),
            layers: role.layers,
            holds_embedding: role.first,
            holds_head: role.last,
            weights: cost.weights,
            kv_cache: cost.kv_cache,
            workspace: cost.workspace,
            recordings: cost.recordings,
            total: cost.total,
            limit: slot.limit,
            remaining: slot.limit.saturating_sub(cost.total),
        });
    }
    Plan {
        model: request.footprint.name.clone(),
        devices,
        totals,
        host: None,
        unused,
        context_tokens: step.context_tokens,
        cache_tokens: step.cache_tokens,
        batch: step.batch,
        chunk_tokens: step.chunk_tokens,
        cache: request.cache,
        page_tokens: request.footprint.page_tokens,
        max_context_tokens,
        model_max_context_tokens: request.footprint.max_context_tokens,
    }
}
