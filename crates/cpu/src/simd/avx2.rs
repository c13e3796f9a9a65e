//! [`Simd`] on pairs of 256-bit registers: lanes 0..8 and 8..16.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "each function is one or a few instructions under the trait's contract"
)]

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Simd};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// Sixteen f32: lanes 0..8, lanes 8..16.
pub(crate) type F = (__m256, __m256);
/// Sixteen 32-bit lanes likewise.
pub(crate) type I = (__m256i, __m256i);

/// Both halves through one function.
macro_rules! both {
    ($function:ident, $a:expr) => {
        ($function($a.0), $function($a.1))
    };
    ($function:ident, $a:expr, $b:expr) => {
        ($function($a.0, $b.0), $function($a.1, $b.1))
    };
}

/// Lane masks of the first `count` lanes.
#[inline(always)]
unsafe fn first(count: usize) -> I {
    let count = _mm256_set1_epi32(count as i32);
    let low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
    (
        _mm256_cmpgt_epi32(count, low),
        _mm256_cmpgt_epi32(count, high),
    )
}

impl Simd for Avx2 {
    type F = F;
    type I = I;
    const TILES: usize = 1;
    const ROWS: usize = 4;
    const UNROLL: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        (_mm256_set1_ps(x), _mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> F {
        (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)))
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> F {
        let mask = first(count);
        (
            _mm256_maskload_ps(from, mask.0),
            _mm256_maskload_ps(from.wrapping_add(8), mask.1),
        )
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> F {
        (
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
        )
    }
    #[inline(always)]
    unsafe fn load_f16_first(from: *const u16, count: usize) -> F {
        let mut padded = [0_u16; LANES];
        std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), count);
        Self::load_f16(padded.as_ptr())
    }
    #[inline(always)]
    unsafe fn gather(base: *const f32, index: *const u32) -> F {
        (
            _mm256_i32gather_ps::<4>(base, _mm256_loadu_si256(index.cast())),
            _mm256_i32gather_ps::<4>(base, _mm256_loadu_si256(index.add(8).cast())),
        )
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: F) {
        _mm256_storeu_ps(to, x.0);
        _mm256_storeu_ps(to.add(8), x.1);
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, x: F, count: usize) {
        let mask = first(count);
        _mm256_maskstore_ps(to, mask.0, x.0);
        _mm256_maskstore_ps(to.wrapping_add(8), mask.1, x.1);
    }
    #[inline(always)]
    unsafe fn store_f16_first(to: *mut u16, x: F, count: usize) {
        let mut padded = [f16::ZERO; LANES];
        let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.0);
        let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.1);
        _mm_storeu_si128(padded.as_mut_ptr().cast(), low);
        _mm_storeu_si128(padded.as_mut_ptr().add(8).cast(), high);
        std::ptr::copy_nonoverlapping(padded.as_ptr().cast(), to, count);
    }

    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        (
            _mm256_fmadd_ps(a.0, b.0, c.0),
            _mm256_fmadd_ps(a.1, b.1, c.1),
        )
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        let sign = Self::splat(-0.0);
        both!(_mm256_andnot_ps, sign, a)
    }
    #[inline(always)]
    unsafe fn exp2_rounded(a: F) -> F {
        let exponent = Self::add_i32(Self::to_i32(a), Self::splat_i32(127));
        (
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent.0)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent.1)),
        )
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        (
            _mm256_round_ps::<NEAREST>(a.0),
            _mm256_round_ps::<NEAREST>(a.1),
        )
    }
    #[inline(always)]
    unsafe fn zero_below(x: F, key: F, threshold: f32) -> F {
        let threshold = _mm256_set1_ps(threshold);
        (
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(key.0, threshold), x.0),
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(key.1, threshold), x.1),
        )
    }
    #[inline(always)]
    unsafe fn select_range(x: F, other: f32, start: usize, end: usize) -> F {
        let other = _mm256_set1_ps(other);
        let keep = both!(_mm256_andnot_si256, first(start), first(end));
        (
            _mm256_blendv_ps(other, x.0, _mm256_castsi256_ps(keep.0)),
            _mm256_blendv_ps(other, x.1, _mm256_castsi256_ps(keep.1)),
        )
    }
    #[inline(always)]
    unsafe fn reduce_add(a: F) -> f32 {
        let eight = _mm256_add_ps(a.0, a.1);
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
    #[inline(always)]
    unsafe fn reduce_max(a: F) -> f32 {
        let eight = _mm256_max_ps(a.0, a.1);
        let four = _mm_max_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
    #[inline(always)]
    unsafe fn reduce_add_each(rows: &[F; LANES]) -> F {
        (reduce_add_eight(&rows[..8]), reduce_add_eight(&rows[8..]))
    }

    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> I {
        (_mm256_set1_epi32(x), _mm256_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> I {
        (
            _mm256_loadu_si256(from.cast()),
            _mm256_loadu_si256(from.add(8).cast()),
        )
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> I {
        (
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast())),
        )
    }
    #[inline(always)]
    unsafe fn store_i32(to: *mut i32, x: I) {
        _mm256_storeu_si256(to.cast(), x.0);
        _mm256_storeu_si256(to.add(8).cast(), x.1);
    }
    #[inline(always)]
    unsafe fn add_i32(a: I, b: I) -> I {
        both!(_mm256_add_epi32, a, b)
    }
    #[inline(always)]
    unsafe fn sub_i32(a: I, b: I) -> I {
        both!(_mm256_sub_epi32, a, b)
    }
    #[inline(always)]
    unsafe fn mul_i32(a: I, b: I) -> I {
        both!(_mm256_mullo_epi32, a, b)
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        both!(_mm256_and_si256, a, b)
    }
    #[inline(always)]
    unsafe fn and_or(a: I, mask: I, b: I) -> I {
        let masked = Self::and(a, mask);
        both!(_mm256_or_si256, masked, b)
    }
    #[inline(always)]
    unsafe fn shift_right_16(a: I, bits: u32) -> I {
        let count = _mm_cvtsi32_si128(bits as i32);
        (_mm256_srl_epi16(a.0, count), _mm256_srl_epi16(a.1, count))
    }
    #[inline(always)]
    unsafe fn shift_left_16(a: I, bits: u32) -> I {
        let count = _mm_cvtsi32_si128(bits as i32);
        (_mm256_sll_epi16(a.0, count), _mm256_sll_epi16(a.1, count))
    }
    #[inline(always)]
    unsafe fn dot_16(sum: I, a: I, b: I) -> I {
        Self::add_i32(sum, both!(_mm256_madd_epi16, a, b))
    }
    #[inline(always)]
    unsafe fn to_f32(a: I) -> F {
        both!(_mm256_cvtepi32_ps, a)
    }
    #[inline(always)]
    unsafe fn to_i32(a: F) -> I {
        both!(_mm256_cvtps_epi32, a)
    }
    #[inline(always)]
    unsafe fn store_i16(to: *mut i16, x: I) {
        // Packing works within 128-bit parts; the permutation puts them in order.
        let packed = _mm256_packs_epi32(x.0, x.1);
        _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
    }
    #[inline(always)]
    unsafe fn reduce_add_i32(a: I) -> i32 {
        let mut lanes = [0_i32; LANES];
        Self::store_i32(lanes.as_mut_ptr(), a);
        lanes.into_iter().fold(0, i32::wrapping_add)
    }

    #[inline(always)]
    unsafe fn lookup_nibbles(table: *const f32, words: *const u32) -> F {
        let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        let table = Self::load(table);
        let mut out = [table.0; 2];
        for (half, out) in out.iter_mut().enumerate() {
            let word = _mm256_set1_epi32(words.add(half).read_unaligned() as i32);
            let index = _mm256_srlv_epi32(word, shifts);
            let low = _mm256_permutevar8x32_ps(table.0, index);
            let high = _mm256_permutevar8x32_ps(table.1, index);
            // Bit 3 of the nibble picks the half of the table; moved to the sign for the blend.
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
            *out = _mm256_blendv_ps(low, high, upper);
        }
        (out[0], out[1])
    }
    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
}

/// Sums of eight vectors, halves first, as [`Simd::reduce_add`] adds them.
#[inline(always)]
unsafe fn reduce_add_eight(rows: &[F]) -> __m256 {
    let mut fours = [_mm256_setzero_ps(); 4];
    for (row, four) in fours.iter_mut().enumerate() {
        let a = _mm256_add_ps(rows[row].0, rows[row].1);
        let b = _mm256_add_ps(rows[row + 4].0, rows[row + 4].1);
        // 128-bit parts: [row, row + 4]
        let low = _mm256_permute2f128_ps::<0x20>(a, b);
        let high = _mm256_permute2f128_ps::<0x31>(a, b);
        *four = _mm256_add_ps(low, high);
    }
    let mut twos = [_mm256_setzero_ps(); 2];
    for (row, two) in twos.iter_mut().enumerate() {
        // in each part: [row 0, row 1, row + 2 0, row + 2 1]
        let low = _mm256_shuffle_ps::<0x44>(fours[row], fours[row + 2]);
        let high = _mm256_shuffle_ps::<0xEE>(fours[row], fours[row + 2]);
        *two = _mm256_add_ps(low, high);
    }
    // in each part: [row, row + 2, row + 1, row + 3]
    let even = _mm256_shuffle_ps::<0x88>(twos[0], twos[1]);
    let odd = _mm256_shuffle_ps::<0xDD>(twos[0], twos[1]);
    let order = _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7);
    _mm256_permutevar8x32_ps(_mm256_add_ps(even, odd), order)
}
