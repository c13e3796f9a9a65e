//! Models and devices of the planner's tests.
#![allow(dead_code, reason = "every test file uses its own part of this")]

use oxllama_memory::{
    Bytes, CacheFormat, DeviceId, DeviceInfo, DeviceRole, Inventory, LayerFootprint,
    ModelFootprint, PlanRequest, Policy, StepLimits, WorkspaceModel,
};

/// CUDA devices of these sizes.
pub(crate) fn inventory(sizes: &[Bytes]) -> Inventory {
    let device = |(index, &size): (usize, &Bytes)| {
        DeviceInfo::new(
            DeviceId::cuda(index as u32),
            format!("device {index}"),
            size,
        )
    };
    Inventory::new(sizes.iter().enumerate().map(device).collect()).unwrap()
}

pub(crate) fn gib(sizes: &[u64]) -> Inventory {
    let sizes: Vec<Bytes> = sizes.iter().copied().map(Bytes::from_gib).collect();
    inventory(&sizes)
}

/// A request for the longest context with one sequence, filled in order.
pub(crate) fn request<'a>(
    footprint: &'a ModelFootprint,
    workspace: &'a dyn WorkspaceModel,
) -> PlanRequest<'a> {
    PlanRequest {
        footprint,
        workspace,
        context_tokens: None,
        cache_tokens: None,
        batch: 1,
        chunk_tokens: 512,
        cache: CacheFormat::F16,
        policy: Policy::Fill,
        caps: Vec::new(),
        excluded: Vec::new(),
    }
}

/// A model of the shape of Llama 3.1 70B at so many hundredths of a bit: 80 layers,
/// hidden size 8192, 8 kv heads of 128, vocabulary 128256, embedding in fp16, head at
/// 6 bits.
pub(crate) fn llama_70b(bits_hundredths: u64) -> ModelFootprint {
    let (hidden, intermediate, kv_width, vocabulary) = (8192_u64, 28672, 1024, 128_256);
    let weight_elements = hidden * (2 * hidden + 2 * kv_width) + 3 * hidden * intermediate;
    let layer = LayerFootprint {
        weights: Bytes(weight_elements * bits_hundredths / 800),
        weight_elements,
        kv_elements_per_token: 2 * kv_width,
    };
    ModelFootprint {
        name: "llama-70b".to_owned(),
        embedding: Bytes(vocabulary * hidden * 2),
        final_norm: Bytes(hidden * 2),
        head: Bytes(vocabulary * hidden * 6 / 8),
        head_tied_to_embedding: false,
        layers: vec![layer; 80],
        max_context_tokens: 131_072,
        page_tokens: 256,
        quantisable_cache: true,
    }
}

/// Hidden states, the widest intermediate result, and logits of one row per sequence.
pub(crate) fn llama_70b_workspace(role: &DeviceRole, limits: &StepLimits) -> Bytes {
    let hidden = limits.chunk_tokens * 8192 * 2 * 4;
    let intermediate = if role.layers.is_empty() {
        0
    } else {
        limits.chunk_tokens * 28672 * 2 * 2
    };
    let logits = if role.last {
        limits.batch * 128_256 * 4
    } else {
        0
    };
    Bytes(hidden + intermediate + logits)
}
