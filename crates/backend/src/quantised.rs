//! Keys and values in few bits: the one definition of the quantised cache formats.
//!
//! A head's vector is cut into groups of [`GROUP`] elements. Each group is
//!
//! 1. **rotated** by the normalised Walsh–Hadamard matrix H ([`rotate_group`]), which spreads
//!    an outlier over the whole group: keys after their norm and rotary embedding, values as
//!    they come;
//! 2. **scaled** by an fp16 number: with `b` bits and `e` the element of the largest magnitude,
//!    the scale is `e / −2^(b−1)`, so that `e` itself falls on the lowest code;
//! 3. **rounded**: code = `clamp(round(x / scale), −2^(b−1), 2^(b−1) − 1)`, ties to even, kept
//!    as the unsigned number `code + 2^(b−1)`.
//!
//! What is kept of an element is `code · scale`, exact in f32. On normally distributed groups
//! the signed scale has 22% less squared error at 4 bits than codes of `±(2^(b−1) − 1)` with
//! a positive one, at the same size.
//!
//! H is orthogonal and its own inverse, so attention never rotates a cached vector back:
//! `q · k = H q · H k` and `Σ p v = H Σ p H v`. It rotates the query before the scores and the
//! result after the sum.

use half::f16;
use oxllama_memory::ElementFormat;

use crate::PAGE_TOKENS;

/// Elements that are rotated together and share a scale.
pub const GROUP: usize = ElementFormat::GROUP as usize;

/// Replaces `x` by `H x`, where `H[i][j] = (−1)^popcount(i & j) / √GROUP`.
///
/// Sums of pairs at distance 1, 2, 4, 8, 16 in f32, then one product with the factor: every
/// backend that keeps this order stores the same bits.
#[inline]
pub fn rotate_group(x: &mut [f32; GROUP]) {
    const FACTOR: f32 = 0.176_776_69; // 1 / √32
    let mut distance = 1;
    while distance < GROUP {
        let before = *x;
        for (i, x) in x.iter_mut().enumerate() {
            let other = before[i ^ distance];
            *x = if i & distance == 0 {
                before[i] + other
            } else {
                other - before[i]
            };
        }
        distance *= 2;
    }
    for x in x {
        *x *= FACTOR;
    }
}

/// [`rotate_group`] of every group of `x`, whose length is a multiple of [`GROUP`].
#[inline]
pub fn rotate(x: &mut [f32]) {
    let (groups, rest) = x.as_chunks_mut();
    debug_assert!(rest.is_empty(), "{} elements past the groups", rest.len());
    for group in groups {
        rotate_group(group);
    }
}

/// Codes and scale of a rotated group, at 8 bits for 32 `BYTES` and at 4 for 16. Of 4-bit codes
/// the even element is in the low half of a byte.
///
/// A group whose scale is below fp16's smallest number is kept as zeros; one with anything that
/// is not a number as no numbers.
#[inline]
pub fn encode_group<const BYTES: usize>(x: &[f32; GROUP]) -> ([u8; BYTES], f16) {
    const { assert!(BYTES == GROUP || 2 * BYTES == GROUP) };
    let half_range = half_range::<BYTES>();
    // Numbers of one sign are ordered as their bits are; not-a-number comes above all.
    let (mut largest, mut magnitude) = (0_i32, 0_i32);
    for x in x {
        let bits = x.to_bits().cast_signed();
        largest = largest.max(bits);
        magnitude = magnitude.max(bits & i32::MAX);
    }
    let extreme = f32::from_bits(magnitude.cast_unsigned());
    let sign = if largest == magnitude { -1.0 } else { 1.0 };
    let most = f16::MAX.to_f32();
    let scale = f16::from_f32((sign * extreme / half_range).clamp(-most, most));
    let divisor = scale.to_f32();

    let mut codes = [half_range as u8; GROUP];
    if divisor != 0.0 {
        // Added to a small number, this leaves its nearest integer in the low bits.
        const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23
        for (code, x) in codes.iter_mut().zip(x) {
            let nearest = (x / divisor).clamp(-half_range, half_range - 1.0) + ROUND + half_range;
            *code = nearest.to_bits() as u8;
        }
    }
    let mut packed = [0; BYTES];
    if BYTES == GROUP {
        packed.copy_from_slice(&codes);
    } else {
        for (packed, pair) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
            *packed = pair[0] | pair[1] << 4;
        }
    }
    (packed, scale)
}

/// What [`encode_group`] has kept of a rotated group.
#[inline]
pub fn decode_group<const BYTES: usize>(codes: &[u8; BYTES], scale: f16) -> [f32; GROUP] {
    const { assert!(BYTES == GROUP || 2 * BYTES == GROUP) };
    let scale = scale.to_f32();
    let mut out = [0.0; GROUP];
    for (i, out) in out.iter_mut().enumerate() {
        let code = if BYTES == GROUP {
            codes[i]
        } else {
            codes[i / 2] >> (4 * (i % 2)) & 15
        };
        *out = (f32::from(code) - half_range::<BYTES>()) * scale;
    }
    out
}

/// `2^(b−1)`, which codes of `b` bits are stored above.
const fn half_range<const BYTES: usize>() -> f32 {
    if BYTES == GROUP { 128.0 } else { 8.0 }
}

/// How the vectors of one head lie in one page of keys or of values.
///
/// Plain formats: `[PAGE_TOKENS, head_dim]` elements. Quantised ones: the codes
/// `[PAGE_TOKENS, head_dim · bits / 8]` of all tokens, then their scales, fp16
/// `[PAGE_TOKENS, head_dim / GROUP]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadLayout {
    /// How an element is kept.
    pub format: ElementFormat,
    /// Elements of a vector: whole groups where the format is quantised.
    pub head_dim: usize,
}

impl HeadLayout {
    /// Bytes of a token's elements or codes.
    pub const fn vector_bytes(self) -> usize {
        self.head_dim * self.format.bits() as usize / 8
    }

    /// Bytes of a token's scales; zero in the plain formats.
    pub const fn scale_bytes(self) -> usize {
        if self.format.is_quantised() {
            self.head_dim / GROUP * size_of::<f16>()
        } else {
            0
        }
    }

    /// Bytes of one head in one page.
    pub const fn page_bytes(self) -> usize {
        PAGE_TOKENS * (self.vector_bytes() + self.scale_bytes())
    }

    /// Where the elements or codes of the page's `token` start, in bytes from the head's page.
    pub const fn vector_offset(self, token: usize) -> usize {
        token * self.vector_bytes()
    }

    /// Where its scales start.
    pub const fn scale_offset(self, token: usize) -> usize {
        PAGE_TOKENS * self.vector_bytes() + token * self.scale_bytes()
    }

    /// Keeps a vector of `head_dim` elements as the page's `token`, rotating it where the
    /// format is quantised. `page` is one head's page.
    pub fn store(self, page: &mut [u8], token: usize, vector: &[f32]) {
        let (vectors, scales) = page.split_at_mut(PAGE_TOKENS * self.vector_bytes());
        let stored = &mut vectors[self.vector_offset(token)..][..self.vector_bytes()];
        let scales = &mut scales[token * self.scale_bytes()..][..self.scale_bytes()];
        match self.format {
            ElementFormat::F32 => bytemuck::cast_slice_mut(stored).copy_from_slice(vector),
            ElementFormat::F16 => {
                for (stored, &x) in bytemuck::cast_slice_mut(stored).iter_mut().zip(vector) {
                    *stored = f16::from_f32(x).to_bits();
                }
            }
            ElementFormat::Q8 => store_groups::<GROUP>(vector, stored, scales),
            ElementFormat::Q4 => store_groups::<{ GROUP / 2 }>(vector, stored, scales),
        }
    }

    /// Elements `GROUP · part ..` of the page's `token`, as many as there are up to
    /// [`GROUP`], zeros after; still rotated where the format is quantised.
    pub fn load(self, page: &[u8], token: usize, part: usize) -> [f32; GROUP] {
        let count = (self.head_dim - part * GROUP).min(GROUP);
        let bits = self.format.bits() as usize;
        let from = self.vector_offset(token) + part * GROUP * bits / 8;
        let stored = &page[from..][..count * bits / 8];
        let scale = || {
            let from = self.scale_offset(token) + part * size_of::<f16>();
            f16::from_le_bytes([page[from], page[from + 1]])
        };
        let mut out = [0.0; GROUP];
        match self.format {
            ElementFormat::F32 => out[..count].copy_from_slice(bytemuck::cast_slice(stored)),
            ElementFormat::F16 => {
                for (out, &stored) in out.iter_mut().zip(bytemuck::cast_slice(stored)) {
                    *out = f16::from_bits(stored).to_f32();
                }
            }
            ElementFormat::Q8 => out = decode_group::<GROUP>(&whole(stored), scale()),
            ElementFormat::Q4 => out = decode_group::<{ GROUP / 2 }>(&whole(stored), scale()),
        }
        out
    }
}

/// The codes of a group; `stored` has as many bytes.
fn whole<const BYTES: usize>(stored: &[u8]) -> [u8; BYTES] {
    let mut codes = [0; BYTES];
    codes.copy_from_slice(stored);
    codes
}

fn store_groups<const BYTES: usize>(vector: &[f32], stored: &mut [u8], scales: &mut [u8]) {
    let stored = stored.chunks_exact_mut(BYTES);
    let scales = scales.chunks_exact_mut(size_of::<f16>());
    for ((group, stored), kept_scale) in vector.as_chunks().0.iter().zip(stored).zip(scales) {
        let mut rotated = *group;
        rotate_group(&mut rotated);
        let (codes, scale) = encode_group::<BYTES>(&rotated);
        stored.copy_from_slice(&codes);
        kept_scale.copy_from_slice(&scale.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers without a pattern, between −1 and 1.
    fn numbers(seed: u32) -> [f32; GROUP] {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
    }

    #[test]
    fn the_rotation_is_the_hadamard_matrix_and_its_own_inverse() {
        for j in 0..GROUP {
            let mut x = [0.0; GROUP];
            x[j] = 1.0;
            rotate_group(&mut x);
            for (i, &x) in x.iter().enumerate() {
                let sign = if (i & j).count_ones() % 2 == 0 {
                    1.0
                } else {
                    -1.0
                };
                assert_eq!(
                    x,
                    sign * (1.0_f64 / 32.0_f64.sqrt()) as f32,
                    "row {i}, column {j}"
                );
            }
        }
        let before = numbers(7);
        let mut x = before;
        rotate(&mut x);
        rotate(&mut x);
        for (x, before) in x.iter().zip(before) {
            assert!((x - before).abs() < 1e-6, "{x} was {before}");
        }
    }

    /// Holds the codes and scale of `x` to the formulas, in f64.
    fn check<const BYTES: usize>(x: &[f32; GROUP]) {
        let (codes, scale) = encode_group::<BYTES>(x);
        let half_range = f64::from(half_range::<BYTES>());
        let extreme = x
            .iter()
            .copied()
            .fold(0.0_f32, |e, x| if x.abs() > e.abs() { x } else { e });
        let expected = f16::from_f64(f64::from(extreme) / -half_range);
        assert_eq!(scale.to_f32().abs(), expected.to_f32().abs(), "{x:?}");
        let decoded = decode_group(&codes, scale);
        let scale = f64::from(scale.to_f32());
        for (&x, kept) in x.iter().zip(decoded) {
            let code = if scale == 0.0 {
                0.0
            } else {
                f64::from(x / scale as f32)
            };
            let code = code.clamp(-half_range, half_range - 1.0).round_ties_even();
            assert_eq!(f64::from(kept), code * scale, "{x} of {scale}");
        }
    }

    #[test]
    fn codes_and_scales_follow_the_formulas() {
        for seed in 0..1000 {
            for factor in [1.0, -300.0, 1e-6, 3e4] {
                let x = numbers(seed).map(|x| x * factor);
                check::<GROUP>(&x);
                check::<{ GROUP / 2 }>(&x);
            }
        }
        let integers = std::array::from_fn(|i| i as f32 - 16.0);
        check::<GROUP>(&integers);
        check::<{ GROUP / 2 }>(&integers);
        check::<{ GROUP / 2 }>(&[0.0; GROUP]);
        check::<GROUP>(&[1e-12; GROUP]);
    }

    #[test]
    fn what_is_too_large_is_capped_and_what_is_no_number_stays_none() {
        let (codes, scale) = encode_group::<GROUP>(&[1e30; GROUP]);
        assert_eq!(decode_group(&codes, scale), [128.0 * 65504.0; GROUP]);
        let mut x = numbers(1);
        x[5] = f32::NAN;
        let (codes, scale) = encode_group::<16>(&x);
        assert!(decode_group(&codes, scale).iter().all(|x| x.is_nan()));
    }

    #[test]
    fn a_page_keeps_each_token_in_its_place() {
        for format in [
            ElementFormat::F32,
            ElementFormat::F16,
            ElementFormat::Q8,
            ElementFormat::Q4,
        ] {
            let layout = HeadLayout {
                format,
                head_dim: 2 * GROUP,
            };
            // A multiple of 4: the page of f32 is aligned within a vector of u32.
            let mut page = vec![0_u32; layout.page_bytes() / 4];
            let page: &mut [u8] = bytemuck::cast_slice_mut(&mut page);
            let token = |token: usize| [numbers(token as u32), numbers(1000 + token as u32)];
            for index in (0..PAGE_TOKENS).rev() {
                layout.store(page, index, token(index).as_flattened());
            }
            for index in 0..PAGE_TOKENS {
                for (part, expected) in token(index).iter().enumerate() {
                    let mut kept = layout.load(page, index, part);
                    if format.is_quantised() {
                        rotate(&mut kept);
                    }
                    let tolerance = match format {
                        ElementFormat::F32 => 0.0,
                        ElementFormat::F16 => 3e-4,
                        ElementFormat::Q8 => 0.02,
                        ElementFormat::Q4 => 0.4,
                    };
                    for (kept, expected) in kept.iter().zip(expected) {
                        let error = (kept - expected).abs();
                        assert!(error <= tolerance, "{format:?} {kept} was {expected}");
                    }
                }
            }
        }
    }
}
