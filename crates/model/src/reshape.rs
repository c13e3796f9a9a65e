//! Another size or format of a loaded model's cache, as one transaction.

use oxllama_backend::{CacheShape, Device, KvLayer};
use oxllama_memory::{Bytes, CacheFormat, Ledger, Purpose, Reservation};

use crate::ModelError;
use crate::decoder::{Layer, Stage};

/// What the cache of a loaded model shall become; see
/// [`Runner::reshape_cache`](crate::Runner::reshape_cache).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheRequest {
    /// Tokens of all sequences together, rounded up to whole pages; `None`: as many as now.
    pub tokens: Option<u64>,
    /// The format; `None`: the present one.
    pub format: Option<CacheFormat>,
}

/// Why a cache has not been reshaped.
pub(crate) struct NotReshaped {
    pub(crate) error: ModelError,
    /// Whether the cache is as large as it was. If not, it is unusable until it is reshaped.
    pub(crate) is_restored: bool,
}

/// Gives every layer of `stages` an empty cache of `shape`.
///
/// What the cache grows by is reserved on every device before anything is touched, and what it
/// shrinks by goes back to the ledger after the last new buffer has been made: nobody else can
/// take what an undoing would need.
pub(crate) fn reshape<D: Device>(
    stages: &mut [Stage<D>],
    shape: CacheShape,
    ledger: &Ledger,
    owner: &str,
) -> Result<(), NotReshaped> {
    let missing = |stage: &Stage<D>, needed: Bytes, room: Bytes| {
        let present = room.saturating_add(held_bytes(stage));
        let missing = needed.saturating_sub(present);
        ledger.reserve(stage.device.id(), owner, Purpose::KvCache, missing)
    };
    let growth = stages.iter().map(|stage| {
        let needed = layer_bytes(shape).saturating_mul(stage.layers.len() as u64);
        missing(stage, needed, Bytes::ZERO)
    });
    let mut rooms = growth
        .collect::<Result<Vec<Reservation>, _>>()
        .map_err(|shortfall| NotReshaped {
            error: shortfall.into(),
            is_restored: true,
        })?;
    let old: Vec<(Vec<CacheShape>, Bytes)> = stages
        .iter()
        .map(|stage| (layer_shapes(stage), held_bytes(stage)))
        .collect();
    for last in 0..stages.len() {
        let shapes = vec![shape; stages[last].layers.len()];
        let Err(error) = exchange(&mut stages[last], &mut rooms[last], &shapes) else {
            continue;
        };
        let mut is_restored = true;
        for ((stage, room), (shapes, bytes)) in
            stages.iter_mut().zip(&mut rooms).zip(&old).take(last + 1)
        {
            // A buffer that could not be made has given its room back.
            if let Ok(lost) = missing(stage, *bytes, room.bytes()) {
                take_in(room, lost);
            }
            is_restored &= exchange(stage, room, shapes).is_ok();
        }
        return Err(NotReshaped { error, is_restored });
    }
    Ok(())
}

fn layer_shapes<D: Device>(stage: &Stage<D>) -> Vec<CacheShape> {
    stage.layers.iter().map(|layer| layer.cache.shape).collect()
}

fn layer_bytes(shape: CacheShape) -> Bytes {
    shape.key_bytes().saturating_add(shape.value_bytes())
}

/// Bytes of the caches of a device's layers.
fn held_bytes<D: Device>(stage: &Stage<D>) -> Bytes {
    let layers = stage.layers.iter();
    layers.fold(Bytes::ZERO, |sum, layer| {
        sum.saturating_add(layer_bytes(layer.cache.shape))
    })
}

/// Frees the caches of all layers of a device into `room`, then makes new ones of `shapes` from
/// it. After an error some layers have caches of other shapes.
fn exchange<D: Device>(
    stage: &mut Stage<D>,
    room: &mut Reservation,
    shapes: &[CacheShape],
) -> Result<(), ModelError> {
    let Stage { device, layers, .. } = stage;
    let no_pages = |shape: &CacheShape| CacheShape { pages: 0, ..*shape };
    for (layer, shape) in layers.iter_mut().zip(shapes) {
        replace(device, layer, no_pages(shape), room)?;
    }
    for (layer, shape) in layers.iter_mut().zip(shapes) {
        replace(device, layer, *shape, room)?;
    }
    Ok(())
}

/// Makes a cache of `shape` from `room`, which takes in the layer's old one.
fn replace<D: Device>(
    device: &D,
    layer: &mut Layer<D>,
    shape: CacheShape,
    room: &mut Reservation,
) -> Result<(), ModelError> {
    let mut allocate = |bytes| {
        let part = room.split(bytes);
        let part = part.map_err(|source| ModelError::PlanTooSmall {
            device: device.id().clone(),
            purpose: Purpose::KvCache,
            what: "a layer's cache".to_owned(),
            source: Box::new(source),
        })?;
        Ok::<_, ModelError>(device.allocate(part)?)
    };
    let cache = KvLayer {
        shape,
        keys: allocate(shape.key_bytes())?,
        values: allocate(shape.value_bytes())?,
    };
    let old = std::mem::replace(&mut layer.cache, cache);
    for buffer in [old.keys, old.values] {
        take_in(room, device.release(buffer));
    }
    Ok(())
}

/// Adds `part`, which is of the same owner, purpose and device, to `room`.
fn take_in(room: &mut Reservation, part: Reservation) {
    let merged = room.merge(part);
    debug_assert!(merged.is_ok(), "all parts of a cache are booked alike");
}
