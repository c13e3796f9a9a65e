//! [`Simd`] on 512-bit registers.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "each function is one or a few instructions under the trait's contract"
)]

use std::arch::x86_64::*;

use super::{LANES, Simd};

/// AVX-512 F, BW, VL and DQ, and with `VNNI` its 16-bit dot product.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>;

/// The mask of the first `count` lanes.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    debug_assert!(count <= LANES);
    ((1_u32 << count) - 1) as __mmask16
}

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    type F = __m512;
    type I = __m512i;
    const TILES: usize = 2;
    const ROWS: usize = 8;
    const UNROLL: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        _mm512_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> __m512 {
        _mm512_maskz_loadu_ps(first(count), from)
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
    }
    #[inline(always)]
    unsafe fn load_f16_first(from: *const u16, count: usize) -> __m512 {
        _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from.cast()))
    }
    #[inline(always)]
    unsafe fn gather(base: *const f32, index: *const u32) -> __m512 {
        _mm512_i32gather_ps::<4>(_mm512_loadu_si512(index.cast()), base)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m512) {
        _mm512_storeu_ps(to, x);
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, x: __m512, count: usize) {
        _mm512_mask_storeu_ps(to, first(count), x);
    }
    #[inline(always)]
    unsafe fn store_f16_first(to: *mut u16, x: __m512, count: usize) {
        let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
        _mm256_mask_storeu_epi16(to.cast(), first(count), half);
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        _mm512_abs_ps(a)
    }
    #[inline(always)]
    unsafe fn exp2_rounded(a: __m512) -> __m512 {
        let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
    }
    #[inline(always)]
    unsafe fn zero_below(x: __m512, key: __m512, threshold: f32) -> __m512 {
        let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(key, _mm512_set1_ps(threshold));
        _mm512_maskz_mov_ps(keep, x)
    }
    #[inline(always)]
    unsafe fn select_range(x: __m512, other: f32, start: usize, end: usize) -> __m512 {
        let keep = first(end) & !first(start);
        _mm512_mask_mov_ps(_mm512_set1_ps(other), keep, x)
    }
    #[inline(always)]
    unsafe fn reduce_add(a: __m512) -> f32 {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
    #[inline(always)]
    unsafe fn reduce_max(a: __m512) -> f32 {
        _mm512_reduce_max_ps(a)
    }
    #[inline(always)]
    unsafe fn reduce_add_each(rows: &[__m512; LANES]) -> __m512 {
        // Each step adds halves of two vectors side by side, so that one vector carries twice
        // as many rows: 16 vectors to 8, 4, 2, 1. The comments name row and lane.
        let mut eights = [_mm512_setzero_ps(); 8];
        for (row, eight) in eights.iter_mut().enumerate() {
            // [row: lanes 0..8 | row + 8: lanes 0..8] + the same of lanes 8..16
            let low = _mm512_shuffle_f32x4::<0x44>(rows[row], rows[row + 8]);
            let high = _mm512_shuffle_f32x4::<0xEE>(rows[row], rows[row + 8]);
            *eight = _mm512_add_ps(low, high);
        }
        let mut fours = [_mm512_setzero_ps(); 4];
        for (row, four) in fours.iter_mut().enumerate() {
            // 128-bit parts: [row, row + 8, row + 4, row + 12]
            let low = _mm512_shuffle_f32x4::<0x88>(eights[row], eights[row + 4]);
            let high = _mm512_shuffle_f32x4::<0xDD>(eights[row], eights[row + 4]);
            *four = _mm512_add_ps(low, high);
        }
        let mut twos = [_mm512_setzero_ps(); 2];
        for (row, two) in twos.iter_mut().enumerate() {
            // in each part: [row 0, row 1, row + 2 0, row + 2 1]
            let low = _mm512_shuffle_ps::<0x44>(fours[row], fours[row + 2]);
            let high = _mm512_shuffle_ps::<0xEE>(fours[row], fours[row + 2]);
            *two = _mm512_add_ps(low, high);
        }
        // in each part: [row, row + 2, row + 1, row + 3]
        let even = _mm512_shuffle_ps::<0x88>(twos[0], twos[1]);
        let odd = _mm512_shuffle_ps::<0xDD>(twos[0], twos[1]);
        let order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
        _mm512_permutexvar_ps(order, _mm512_add_ps(even, odd))
    }

    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> __m512i {
        _mm512_loadu_si512(from.cast())
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> __m512i {
        _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))
    }
    #[inline(always)]
    unsafe fn store_i32(to: *mut i32, x: __m512i) {
        _mm512_storeu_si512(to.cast(), x);
    }
    #[inline(always)]
    unsafe fn add_i32(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn sub_i32(a: __m512i, b: __m512i) -> __m512i {
        _mm512_sub_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn mul_i32(a: __m512i, b: __m512i) -> __m512i {
        _mm512_mullo_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn and_or(a: __m512i, mask: __m512i, b: __m512i) -> __m512i {
        // Truth table of (a & mask) | b, a the highest index bit.
        _mm512_ternarylogic_epi32::<0b1110_1010>(a, mask, b)
    }
    #[inline(always)]
    unsafe fn shift_right_16(a: __m512i, bits: u32) -> __m512i {
        _mm512_srl_epi16(a, _mm_cvtsi32_si128(bits as i32))
    }
    #[inline(always)]
    unsafe fn shift_left_16(a: __m512i, bits: u32) -> __m512i {
        _mm512_sll_epi16(a, _mm_cvtsi32_si128(bits as i32))
    }
    #[inline(always)]
    unsafe fn dot_16(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        if VNNI {
            _mm512_dpwssd_epi32(sum, a, b)
        } else {
            _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
        }
    }
    #[inline(always)]
    unsafe fn to_f32(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn to_i32(a: __m512) -> __m512i {
        _mm512_cvtps_epi32(a)
    }
    #[inline(always)]
    unsafe fn store_i16(to: *mut i16, x: __m512i) {
        _mm256_storeu_si256(to.cast(), _mm512_cvtsepi32_epi16(x));
    }
    #[inline(always)]
    unsafe fn reduce_add_i32(a: __m512i) -> i32 {
        _mm512_reduce_add_epi32(a)
    }

    #[inline(always)]
    unsafe fn lookup_nibbles(table: *const f32, words: *const u32) -> __m512 {
        let low = _mm512_set1_epi32(words.read_unaligned() as i32);
        let both = _mm512_mask_set1_epi32(low, 0xFF00, words.add(1).read_unaligned() as i32);
        let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        // The permutation reads the low four bits of an index only, so no mask is needed.
        _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), _mm512_loadu_ps(table))
    }
    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
}
