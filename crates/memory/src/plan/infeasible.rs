//! Why a request does not fit, and the nearest ones that do. Nothing here is an
//! estimate: every alternative is a plan that was made.

use serde::Serialize;

use super::fill::{covered_from_behind, fill, largest};
use super::{
    BindingConstraint, Chain, Change, LimitedBy, Plan, PlanError, PlanRequest, Policy, Slot, chain,
    fits, is_feasible, longest_context, place, shortest_context, slots as slots_of, step_limits,
};
use crate::bytes::Bytes;
use crate::device::{DeviceId, Inventory};
use crate::footprint::{CacheFormat, StepLimits};

/// The fewest bits per weight that EXL2 can hold, in hundredths.
const FEWEST_BITS_HUNDREDTHS: u64 = 200;

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Asked {
    /// Tokens of context; `None` when any would do.
    pub context_tokens: Option<u64>,
    /// Tokens of the cache, all sequences together; `None` for batch × context.
    pub cache_tokens: Option<u64>,
    /// Sequences in one step.
    pub batch: u64,
    /// Tokens of one step.
    pub chunk_tokens: u64,
    /// The format of the cache.
    pub cache: CacheFormat,
    /// How layers were to be distributed.
    pub policy: Policy,
}

/// One device of a request that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceShortfall {
    /// The device.
    pub device: DeviceId,
    /// What is available of it.
    pub available: Bytes,
    /// What the plan may use of it.
    pub limit: Bytes,
    /// What sets that limit.
    pub limited_by: LimitedBy,
    /// What it holds when devices are filled in order.
    pub placed: Bytes,
    /// The least limit of this device with which the request would fit, all other
    /// devices as they are.
    pub needed: Bytes,
    /// What is missing from [`DeviceShortfall::limit`] to that.
    pub short_by: Bytes,
}

/// A request near to the one that does not fit, with its plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alternative {
    /// All differences to the request.
    pub changes: Vec<Change>,
    /// The plan with these changes.
    pub plan: Plan,
}

/// A request that does not fit: by how much, where, why, and what would. Displays as
/// lines of text.
#[derive(Clone, Debug, PartialEq, Serialize, thiserror::Error)]
pub struct Infeasible {
    /// The model's name.
    pub model: String,
    /// What was asked for.
    pub asked: Asked,
    /// All devices in order, with what is missing on each.
    pub devices: Vec<DeviceShortfall>,
    /// What stands in the way.
    pub binding: BindingConstraint,
    /// Plans that do fit. Empty only when not even changes of the model's size, such
    /// as they are considered here, would do.
    pub nearest: Vec<Alternative>,
}

/// Why `request` does not fit into `slots`, the devices of `inventory` within its limits.
pub(super) fn explain(
    inventory: &Inventory,
    slots: &[Slot],
    request: &PlanRequest<'_>,
) -> Result<Infeasible, PlanError> {
    let chain = chain(request)?;
    let context = request
        .context_tokens
        .unwrap_or_else(|| shortest_context(request.footprint));
    let devices = device_shortfalls(&chain, slots, &step_limits(request, context));
    let finder = Finder {
        inventory,
        slots,
        request,
    };
    Ok(Infeasible {
        model: request.footprint.name.clone(),
        asked: Asked {
            context_tokens: request.context_tokens,
            cache_tokens: request.cache_tokens,
            batch: request.batch,
            chunk_tokens: request.chunk_tokens,
            cache: request.cache,
            policy: request.policy.clone(),
        },
        binding: finder.binding_constraint(),
        nearest: finder.alternatives(&devices),
        devices,
    })
}

/// What each device lacks if it alone were to make room. It would start where the
/// devices before it, filled in order, leave off, and go on to where the devices
/// behind it, filled from the end, begin: no device can be asked for less.
fn device_shortfalls(chain: &Chain<'_>, slots: &[Slot], step: &StepLimits) -> Vec<DeviceShortfall> {
    let parts = chain.parts();
    let fits = |slot: usize, run: &std::ops::Range<usize>| fits(chain, &slots[slot], run, step);
    let runs = fill(parts, slots.len(), fits);
    let covered = covered_from_behind(parts, slots.len(), fits);
    let describe = |((slot, run), &end): ((&Slot, &std::ops::Range<usize>), &usize)| {
        let placed = chain.cost(run, step).unwrap_or_default().total;
        let needed = chain
            .cost(&(run.start..end), step)
            .map_or(Bytes::MAX, |cost| cost.total);
        DeviceShortfall {
            device: slot.device.clone(),
            available: slot.available,
            limit: slot.limit,
            limited_by: slot.limited_by,
            placed,
            needed,
            short_by: needed.saturating_sub(slot.limit),
        }
    };
    slots
        .iter()
        .zip(&runs)
        .zip(&covered)
        .map(describe)
        .collect()
}

/// Tries changes of one request.
struct Finder<'a> {
    inventory: &'a Inventory,
    slots: &'a [Slot],
    request: &'a PlanRequest<'a>,
}

impl<'a> Finder<'a> {
    fn feasible(&self, request: &PlanRequest<'_>) -> bool {
        is_feasible(self.slots, request)
    }

    /// The request without caps, exclusions and split, and the devices for it; `None`
    /// when it has none of them.
    fn without_limits(&self) -> Option<(PlanRequest<'a>, Vec<Slot>)> {
        let has_split = matches!(self.request.policy, Policy::GpuSplit(_));
        let request = self.request;
        if request.caps.is_empty() && request.excluded.is_empty() && !has_split {
            return None;
        }
        let policy = if has_split {
            Policy::Fill
        } else {
            request.policy.clone()
        };
        let free = PlanRequest {
            caps: Vec::new(),
            excluded: Vec::new(),
            policy,
            ..request.clone()
        };
        let slots = slots_of(self.inventory, &free);
        Some((free, slots))
    }

    fn smallest_cache(&self) -> Option<CacheFormat> {
        let kv_elements = self.request.footprint.layers.first()?.kv_elements_per_token;
        self.request
            .footprint
            .cache_formats()
            .min_by_key(|format| format.bytes_per_token(kv_elements))
    }

    /// The request with a cache of so many tokens, and its context cut to that.
    fn with_cache_tokens(&self, tokens: u64) -> PlanRequest<'a> {
        let context = self.request.context_tokens;
        PlanRequest {
            context_tokens: context.map(|context| context.min(tokens)),
            cache_tokens: Some(tokens),
            ..self.request.clone()
        }
    }

    /// The request with the least context, batch, chunk and cache.
    fn smallest(&self) -> PlanRequest<'a> {
        let one_page = self.request.footprint.page_tokens;
        PlanRequest {
            context_tokens: Some(shortest_context(self.request.footprint)),
            cache_tokens: self.request.cache_tokens.map(|_| one_page),
            batch: 1,
            chunk_tokens: 1,
            cache: self.smallest_cache().unwrap_or(self.request.cache),
            ..self.request.clone()
        }
    }

    fn binding_constraint(&self) -> BindingConstraint {
        let request = self.request;
        if let Some((free, slots)) = self.without_limits()
            && is_feasible(&slots, &free)
        {
            return BindingConstraint::Limits;
        }
        let smallest = self.smallest();
        let context_tokens = smallest.context_tokens;
        if self.feasible(&PlanRequest {
            context_tokens,
            ..request.clone()
        }) {
            return BindingConstraint::Context;
        }
        if request.cache_tokens.is_some()
            && self.feasible(&self.with_cache_tokens(request.footprint.page_tokens))
        {
            return BindingConstraint::CacheTokens;
        }
        if self.feasible(&PlanRequest {
            batch: 1,
            ..request.clone()
        }) {
            return BindingConstraint::Batch;
        }
        if self.feasible(&PlanRequest {
            chunk_tokens: 1,
            ..request.clone()
        }) {
            return BindingConstraint::Chunk;
        }
        if self.feasible(&smallest) {
            return BindingConstraint::CacheAndWorkspace;
        }
        self.weights_constraint(&smallest)
    }

    /// The constraint when even the smallest request does not fit.
    fn weights_constraint(&self, smallest: &PlanRequest<'_>) -> BindingConstraint {
        let limits = Bytes::checked_sum(self.slots.iter().map(|slot| slot.limit));
        let limits = limits.unwrap_or(Bytes::MAX);
        let largest_limit = self
            .slots
            .iter()
            .map(|slot| slot.limit)
            .max()
            .unwrap_or_default();
        let Ok(chain) = chain(smallest) else {
            return BindingConstraint::Weights {
                needed: Bytes::MAX,
                limits,
            };
        };
        let step = step_limits(smallest, shortest_context(smallest.footprint));
        let cost = |parts| {
            chain
                .cost(&parts, &step)
                .map_or(Bytes::MAX, |cost| cost.total)
        };
        let needed = cost(0..chain.parts());
        if needed > limits {
            return BindingConstraint::Weights { needed, limits };
        }
        let last = chain.parts() - 1;
        let too_large = (0..=last).find(|&part| cost(part..part + 1) > largest_limit);
        match too_large {
            Some(part) => BindingConstraint::Part {
                part: match part {
                    0 => "the embedding".to_owned(),
                    _ if part == last => "the head".to_owned(),
                    _ => format!("layer {}", part - 1),
                },
                needed: cost(part..part + 1),
                largest_limit,
            },
            None => BindingConstraint::Division,
        }
    }

    /// Changes that make the request fit: each of a kind alone, then, if none of what is
    /// asked for can stay while one thing changes, several at once.
    fn alternatives(&self, devices: &[DeviceShortfall]) -> Vec<Alternative> {
        let smaller = [
            self.shorter_context(),
            self.smaller_pool(),
            self.fewer_sequences(),
            self.smaller_chunk(),
        ];
        let mut found: Vec<Alternative> = smaller.into_iter().flatten().collect();
        found.extend(self.smaller_caches());
        if found.is_empty() {
            found.extend(self.several_changes());
        }
        found.extend(self.lifted_limits());
        found.extend(self.more_memory(devices));
        found.extend(self.fewer_bits());
        found
    }

    /// The changed request with its plan, if it fits.
    fn alternative(
        &self,
        slots: &[Slot],
        request: &PlanRequest<'_>,
        changes: Vec<Change>,
    ) -> Option<Alternative> {
        let plan = place(slots, request).ok()??;
        Some(Alternative { changes, plan })
    }

    fn shorter_context(&self) -> Option<Alternative> {
        self.request.context_tokens?;
        let tokens = longest_context(&chain(self.request).ok()?, self.slots, self.request)?;
        let changed = PlanRequest {
            context_tokens: Some(tokens),
            ..self.request.clone()
        };
        self.alternative(self.slots, &changed, vec![Change::Context { tokens }])
    }

    fn smaller_pool(&self) -> Option<Alternative> {
        let page_tokens = self.request.footprint.page_tokens;
        let asked_pages = self.request.cache_tokens?.div_ceil(page_tokens);
        let with = |pages: u64| self.with_cache_tokens(pages.saturating_mul(page_tokens));
        let pages = largest(1, asked_pages, |pages| self.feasible(&with(pages)))?;
        let changed = with(pages);
        let tokens = changed.cache_tokens?;
        let mut changes = vec![Change::CacheTokens { tokens }];
        if let Some(tokens) = changed.context_tokens
            && self.request.context_tokens != changed.context_tokens
        {
            changes.push(Change::Context { tokens });
        }
        self.alternative(self.slots, &changed, changes)
    }

    fn fewer_sequences(&self) -> Option<Alternative> {
        let with = |batch| PlanRequest {
            batch,
            ..self.request.clone()
        };
        let sequences = largest(1, self.request.batch, |batch| self.feasible(&with(batch)))?;
        self.alternative(
            self.slots,
            &with(sequences),
            vec![Change::Batch { sequences }],
        )
    }

    fn smaller_chunk(&self) -> Option<Alternative> {
        let with = |chunk_tokens| PlanRequest {
            chunk_tokens,
            ..self.request.clone()
        };
        let tokens = largest(1, self.request.chunk_tokens, |chunk| {
            self.feasible(&with(chunk))
        })?;
        self.alternative(self.slots, &with(tokens), vec![Change::Chunk { tokens }])
    }

    fn smaller_caches(&self) -> Option<Alternative> {
        let change = |format| {
            let changed = PlanRequest {
                cache: format,
                ..self.request.clone()
            };
            self.alternative(self.slots, &changed, vec![Change::Cache { format }])
        };
        self.request
            .footprint
            .cache_formats()
            .filter(|format| *format != self.request.cache)
            .find_map(change)
    }

    /// The smallest cache, then the shortest context, then a batch, and only then a chunk
    /// as large as fits; finally the most tokens of cache and the longest context that all
    /// this leaves room for.
    fn several_changes(&self) -> Option<Alternative> {
        let asked = self.request;
        let mut changed = PlanRequest {
            batch: asked.batch,
            chunk_tokens: asked.chunk_tokens,
            ..self.smallest()
        };
        let with_batch = |batch| PlanRequest {
            batch,
            ..changed.clone()
        };
        let batch = largest(1, asked.batch, |batch| self.feasible(&with_batch(batch)));
        changed = with_batch(batch.unwrap_or(1));
        let with_chunk = |chunk_tokens| PlanRequest {
            chunk_tokens,
            ..changed.clone()
        };
        let chunk = largest(1, asked.chunk_tokens, |chunk| {
            self.feasible(&with_chunk(chunk))
        })?;
        changed = with_chunk(chunk);
        if let Some(tokens) = asked.cache_tokens {
            let page_tokens = asked.footprint.page_tokens;
            let with_pages = |pages: u64| PlanRequest {
                cache_tokens: Some(pages.saturating_mul(page_tokens)),
                ..changed.clone()
            };
            let most = tokens.div_ceil(page_tokens);
            let pages = largest(1, most, |pages| self.feasible(&with_pages(pages)))?;
            changed = with_pages(pages);
            if pages == most {
                // Where nothing changes, the words of the request stay.
                changed.cache_tokens = asked.cache_tokens;
            }
        }
        let longest = longest_context(&chain(&changed).ok()?, self.slots, &changed)?;
        let context = asked.context_tokens.map(|tokens| tokens.min(longest));
        changed.context_tokens = context;

        let mut changes = Vec::new();
        if let Some(tokens) = context.filter(|_| context != asked.context_tokens) {
            changes.push(Change::Context { tokens });
        }
        if changed.cache_tokens != asked.cache_tokens
            && let Some(tokens) = changed.cache_tokens
        {
            changes.push(Change::CacheTokens { tokens });
        }
        if changed.batch != asked.batch {
            changes.push(Change::Batch {
                sequences: changed.batch,
            });
        }
        if changed.chunk_tokens != asked.chunk_tokens {
            changes.push(Change::Chunk {
                tokens: changed.chunk_tokens,
            });
        }
        if changed.cache != asked.cache {
            changes.push(Change::Cache {
                format: changed.cache,
            });
        }
        self.alternative(self.slots, &changed, changes)
    }

    fn lifted_limits(&self) -> Option<Alternative> {
        let (free, slots) = self.without_limits()?;
        self.alternative(&slots, &free, vec![Change::WithoutLimits])
    }

    fn more_memory(&self, devices: &[DeviceShortfall]) -> Option<Alternative> {
        let usable = devices.iter().enumerate().filter(|(_, device)| {
            device.limited_by != LimitedBy::Excluded && device.needed != Bytes::MAX
        });
        let (index, least) = usable.min_by_key(|(_, device)| device.short_by)?;
        let mut slots = self.slots.to_vec();
        slots[index].limit = least.needed;
        let change = Change::MoreMemory {
            device: least.device.clone(),
            extra: least.short_by,
            limit: least.needed,
        };
        self.alternative(&slots, self.request, vec![change])
    }

    fn fewer_bits(&self) -> Option<Alternative> {
        let now_hundredths = self.request.footprint.layer_bits_per_weight_hundredths()?;
        let with = |bits: u64| {
            self.request
                .footprint
                .with_layer_bits_per_weight_hundredths(bits)
        };
        let feasible = |bits| {
            let footprint = with(bits);
            self.feasible(&PlanRequest {
                footprint: &footprint,
                ..self.request.clone()
            })
        };
        let at_most_hundredths = largest(FEWEST_BITS_HUNDREDTHS, now_hundredths, feasible)?;
        let footprint = with(at_most_hundredths);
        let changed = PlanRequest {
            footprint: &footprint,
            ..self.request.clone()
        };
        let change = Change::BitsPerWeight {
            at_most_hundredths,
            now_hundredths,
        };
        self.alternative(self.slots, &changed, vec![change])
    }
}
