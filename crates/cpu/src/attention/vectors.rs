//! Vectors of the cache in any element format: written one by one, read as blocks of f32.

use std::ops::Range;

use half::f16;
use oxllama_backend::HeadLayout;
use oxllama_backend::quantised::{GROUP, encode_group, rotate_group};
use oxllama_memory::ElementFormat;

use super::scratch::padded;
use crate::float::{Element, HalfElement, SingleElement};
use crate::simd::{LANES, Simd};

/// Stores `head_dim` elements as the `token` of a head's page, rotated and rounded as the
/// format wants.
///
/// # Safety
/// As [`Simd`]'s; `page` has the layout's bytes, and nobody else touches this token.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(
    layout: HeadLayout,
    page: *mut u8,
    token: usize,
    vector: *const f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match layout.format {
            ElementFormat::F32 => store_plain::<S, SingleElement>(layout, page, token, vector),
            ElementFormat::F16 => store_plain::<S, HalfElement>(layout, page, token, vector),
            ElementFormat::Q8 => store_groups::<GROUP>(layout, page, token, vector),
            ElementFormat::Q4 => store_groups::<{ GROUP / 2 }>(layout, page, token, vector),
        }
    }
}

/// Reads `tokens` of a head's page into f32 `[tokens, padded]`. Quantised vectors stay rotated.
///
/// # Safety
/// As [`Simd`]'s; `page` has the layout's bytes and `out` has room.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(
    layout: HeadLayout,
    page: *const u8,
    tokens: Range<usize>,
    out: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match layout.format {
            ElementFormat::F32 => load_plain::<S, SingleElement>(layout, page, tokens, out),
            ElementFormat::F16 => load_plain::<S, HalfElement>(layout, page, tokens, out),
            ElementFormat::Q8 => load_groups::<S, GROUP>(layout, page, tokens, out),
            ElementFormat::Q4 => load_groups::<S, { GROUP / 2 }>(layout, page, tokens, out),
        }
    }
}

/// # Safety
/// As [`store`]'s.
#[inline(always)]
unsafe fn store_plain<S: Simd, E: Element>(
    layout: HeadLayout,
    page: *mut u8,
    token: usize,
    vector: *const f32,
) {
    for d in (0..layout.head_dim).step_by(LANES) {
        let count = (layout.head_dim - d).min(LANES);
        // SAFETY: the caller's contract.
        unsafe {
            let x = S::load_first(vector.add(d), count);
            E::store_first::<S>(page, token * layout.head_dim + d, x, count);
        }
    }
}

/// # Safety
/// As [`store`]'s; `head_dim` is whole groups.
#[inline(always)]
unsafe fn store_groups<const BYTES: usize>(
    layout: HeadLayout,
    page: *mut u8,
    token: usize,
    vector: *const f32,
) {
    for group in 0..layout.head_dim / GROUP {
        // SAFETY: the group exists in the vector and in the page.
        unsafe {
            let mut x = vector
                .add(group * GROUP)
                .cast::<[f32; GROUP]>()
                .read_unaligned();
            rotate_group(&mut x);
            let (codes, scale) = encode_group::<BYTES>(&x);
            let stored = page.add(layout.vector_offset(token) + group * BYTES);
            stored.cast::<[u8; BYTES]>().write_unaligned(codes);
            let stored_scale = page.add(layout.scale_offset(token)).cast::<f16>();
            stored_scale.add(group).write_unaligned(scale);
        }
    }
}

/// # Safety
/// As [`load`]'s.
#[inline(always)]
unsafe fn load_plain<S: Simd, E: Element>(
    layout: HeadLayout,
    page: *const u8,
    tokens: Range<usize>,
    out: *mut f32,
) {
    let (head_dim, padded) = (layout.head_dim, padded(layout.head_dim));
    for (row, token) in tokens.enumerate() {
        for d in (0..padded).step_by(LANES) {
            let from = token * head_dim + d;
            // SAFETY: the last, partial step reads what is left of the vector.
            unsafe {
                let x = if d + LANES <= head_dim {
                    E::load::<S>(page, from)
                } else {
                    E::load_first::<S>(page, from, head_dim - d)
                };
                S::store(out.add(row * padded + d), x);
            }
        }
    }
}

/// Codes and scales of neighbouring tokens follow one another, and so do their groups in `out`:
/// one loop over all groups.
///
/// # Safety
/// As [`load`]'s; `head_dim` is whole groups, so that rows of `out` are not padded.
#[inline(always)]
unsafe fn load_groups<S: Simd, const BYTES: usize>(
    layout: HeadLayout,
    page: *const u8,
    tokens: Range<usize>,
    out: *mut f32,
) {
    let groups = tokens.len() * (layout.head_dim / GROUP);
    // SAFETY: the groups exist; no more scales are read than there are groups.
    unsafe {
        let codes = page.add(layout.vector_offset(tokens.start));
        let stored_scales = page.add(layout.scale_offset(tokens.start)).cast::<u16>();
        for first in (0..groups).step_by(LANES) {
            let count = (groups - first).min(LANES);
            let from = stored_scales.add(first);
            let mut scales = [0.0_f32; LANES];
            let widened = if count == LANES {
                S::load_f16(from)
            } else {
                S::load_f16_first(from, count)
            };
            S::store(scales.as_mut_ptr(), widened);
            for (i, &scale) in scales.iter().enumerate().take(count) {
                let from = codes.add((first + i) * BYTES);
                let to = out.add((first + i) * GROUP);
                let scale = S::splat(scale);
                let (low, high) = load_codes::<S, BYTES>(from);
                S::store(to, S::mul(low, scale));
                S::store(to.add(LANES), S::mul(high, scale));
            }
        }
    }
}

/// The signed codes of one group.
///
/// # Safety
/// As [`Simd`]'s.
#[inline(always)]
unsafe fn load_codes<S: Simd, const BYTES: usize>(from: *const u8) -> (S::F, S::F) {
    static SIGNED: [f32; LANES] = [
        -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0,
    ];
    // SAFETY: the caller's contract.
    unsafe {
        if BYTES == GROUP {
            let zero = S::splat(128.0);
            let low = S::to_f32(S::load_u8(from));
            let high = S::to_f32(S::load_u8(from.add(LANES)));
            (S::sub(low, zero), S::sub(high, zero))
        } else {
            let table = SIGNED.as_ptr();
            let words = from.cast::<u32>();
            (
                S::lookup_nibbles(table, words),
                S::lookup_nibbles(table, words.add(2)),
            )
        }
    }
}
