//! What a cache has kept: read back, and held to what its format makes of keys and values.

use super::{Bench, CaseError, oracle};
use crate::quantised::GROUP;
use crate::{CacheShape, Device, HeadLayout, KvLayer};
use half::f16;
use oxllama_memory::ElementFormat;

/// A layer's cache on the host.
pub(super) struct Kept {
    shape: CacheShape,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl Kept {
    pub(super) fn read<D: Device>(
        bench: &Bench<'_, D>,
        cache: &KvLayer<D::Buffer>,
    ) -> Result<Self, CaseError> {
        let shape = cache.shape;
        let read = |buffer: &D::Buffer, page_bytes: usize| -> Result<_, CaseError> {
            let mut bytes = vec![0; shape.pages * page_bytes];
            bench.device.download(buffer, &mut bytes)?;
            Ok(bytes)
        };
        Ok(Self {
            shape,
            keys: read(&cache.keys, shape.key_page_bytes())?,
            values: read(&cache.values, shape.value_page_bytes())?,
        })
    }

    /// What attention should see where `key` was stored as the page's `token`; `None` when
    /// that is not what the format makes of it.
    pub(super) fn key(
        &self,
        page: usize,
        head: usize,
        token: usize,
        key: &[f64],
    ) -> Option<Vec<f64>> {
        let head_page = page * self.shape.kv_heads + head;
        kept_vector(self.shape.key_layout(), &self.keys, head_page, token, key)
    }

    /// As [`Self::key`].
    pub(super) fn value(
        &self,
        page: usize,
        head: usize,
        token: usize,
        value: &[f64],
    ) -> Option<Vec<f64>> {
        let head_page = page * self.shape.kv_heads + head;
        kept_vector(
            self.shape.value_layout(),
            &self.values,
            head_page,
            token,
            value,
        )
    }
}

fn kept_vector(
    layout: HeadLayout,
    cache: &[u8],
    head_page: usize,
    token: usize,
    vector: &[f64],
) -> Option<Vec<f64>> {
    match layout.format {
        // Compared by the results alone: the oracle's own rounding is the format.
        ElementFormat::F32 => return Some(vector.to_vec()),
        ElementFormat::F16 => {
            return Some(vector.iter().copied().map(oracle::round_to_f16).collect());
        }
        ElementFormat::Q8 | ElementFormat::Q4 => {}
    }
    let page = &cache[head_page * layout.page_bytes()..][..layout.page_bytes()];
    let half_range = f64::from(1_u8 << (layout.format.bits() - 1));
    let mut kept = Vec::with_capacity(vector.len());
    for (part, group) in vector.chunks_exact(GROUP).enumerate() {
        let at = layout.scale_offset(token) + part * size_of::<f16>();
        let scale = f16::from_le_bytes([page[at], page[at + 1]]).to_f64();
        let decoded = layout.load(page, token, part).map(f64::from);
        if !is_nearest(&oracle::hadamard(group), &decoded, scale, half_range) {
            return None;
        }
        kept.extend(oracle::hadamard(&decoded));
    }
    Some(kept)
}

/// Whether `kept` is what codes of `−half_range..half_range` make of a rotated group, up to the
/// rounding of what the device computed in f32: numbers in the middle between two codes, or
/// scales in the middle between two fp16 numbers, may go either way.
fn is_nearest(rotated: &[f64], kept: &[f64], scale: f64, half_range: f64) -> bool {
    let extreme = rotated.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
    // Half a unit of fp16 in the last place, and a little.
    if (scale.abs() * half_range - extreme).abs() > extreme * 5e-4 + half_range * 3e-8 {
        return false;
    }
    rotated.iter().zip(kept).all(|(&x, &kept)| {
        let wanted = (x / scale).clamp(-half_range, half_range - 1.0);
        (kept / scale - wanted).abs() <= 0.5 + 1e-3
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantised::{decode_group, encode_group, rotate_group};

    #[test]
    fn another_code_or_scale_or_no_rotation_is_found() {
        let group: [f32; GROUP] = std::array::from_fn(|i| ((i * i * 37) % 101) as f32 - 50.0);
        let wide = oracle::widen(&group);
        let rotated = oracle::hadamard(&wide);
        let mut narrow = group;
        rotate_group(&mut narrow);
        let (codes, scale) = encode_group::<16>(&narrow);
        let kept = oracle::widen(&decode_group(&codes, scale));
        let scale = scale.to_f64();
        assert!(is_nearest(&rotated, &kept, scale, 8.0));
        assert!(!is_nearest(&wide, &kept, scale, 8.0));
        assert!(!is_nearest(&rotated, &kept, scale * 1.01, 8.0));
        let mut other = kept.clone();
        other[9] += scale;
        assert!(!is_nearest(&rotated, &other, scale, 8.0));
    }
}
