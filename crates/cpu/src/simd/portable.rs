//! [`Simd`] in plain Rust: arrays of sixteen lanes that the compiler vectorises as it can.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "only pointers make these unsafe, under the trait's contract"
)]

use half::f16;

use super::{LANES, Simd};

/// No instructions beyond the compilation target's.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn map<T: Copy, U: Copy + Default>(a: [T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    let mut out = [U::default(); LANES];
    for (out, a) in out.iter_mut().zip(a) {
        *out = f(a);
    }
    out
}

#[inline(always)]
fn zip<T: Copy + Default>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = f(a, b);
    }
    out
}

/// Signed 16-bit halves of a lane, low first.
#[inline(always)]
fn halves(lane: i32) -> (i32, i32) {
    (i32::from(lane as i16), lane >> 16)
}

// The integer operations that the unrolled kernels are made of are calls here: inlined, one
// kernel came to 300 kB of code and most of the crate's compile time, and was no faster for
// spilling every array to the stack.
impl Simd for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    const TILES: usize = 1;
    const ROWS: usize = 2;
    const UNROLL: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        from.cast::<Self::F>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self::F {
        let mut out = [0.0; LANES];
        for (i, out) in out.iter_mut().enumerate().take(count) {
            *out = *from.add(i);
        }
        out
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        Self::load_f16_first(from, LANES)
    }
    #[inline(always)]
    unsafe fn load_f16_first(from: *const u16, count: usize) -> Self::F {
        let mut out = [0.0; LANES];
        for (i, out) in out.iter_mut().enumerate().take(count) {
            *out = f16::from_bits(*from.add(i)).to_f32();
        }
        out
    }
    #[inline(always)]
    unsafe fn gather(base: *const f32, index: *const u32) -> Self::F {
        let mut out = [0.0; LANES];
        for (i, out) in out.iter_mut().enumerate() {
            *out = *base.add(*index.add(i) as usize);
        }
        out
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::F) {
        to.cast::<Self::F>().write_unaligned(x);
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, x: Self::F, count: usize) {
        for (i, &x) in x.iter().enumerate().take(count) {
            *to.add(i) = x;
        }
    }
    #[inline(always)]
    unsafe fn store_f16_first(to: *mut u16, x: Self::F, count: usize) {
        for (i, &x) in x.iter().enumerate().take(count) {
            *to.add(i) = f16::from_f32(x).to_bits();
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // `mul_add` without the instruction is a library call of some twenty times the cost.
        Self::add(Self::mul(a, b), c)
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, f32::max)
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, f32::min)
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        map(a, f32::abs)
    }
    #[inline(always)]
    unsafe fn exp2_rounded(a: Self::F) -> Self::F {
        map(a, |a| {
            f32::from_bits(((a.round_ties_even() as i32 + 127) as u32) << 23)
        })
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        map(a, f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn zero_below(x: Self::F, key: Self::F, threshold: f32) -> Self::F {
        zip(x, key, |x, key| if key < threshold { 0.0 } else { x })
    }
    #[inline(always)]
    unsafe fn select_range(x: Self::F, other: f32, start: usize, end: usize) -> Self::F {
        let mut out = [other; LANES];
        out[start..end].copy_from_slice(&x[start..end]);
        out
    }
    #[inline(always)]
    unsafe fn reduce_add(mut a: Self::F) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn reduce_add_each(rows: &[Self::F; LANES]) -> Self::F {
        let mut out = [0.0; LANES];
        for (out, &row) in out.iter_mut().zip(rows) {
            *out = Self::reduce_add(row);
        }
        out
    }

    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> Self::I {
        from.cast::<Self::I>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::I {
        map(from.cast::<[u8; LANES]>().read_unaligned(), i32::from)
    }
    #[inline(always)]
    unsafe fn store_i32(to: *mut i32, x: Self::I) {
        to.cast::<Self::I>().write_unaligned(x);
    }
    #[inline(always)]
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn sub_i32(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    unsafe fn mul_i32(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_mul)
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(never)]
    unsafe fn and_or(a: Self::I, mask: Self::I, b: Self::I) -> Self::I {
        zip(zip(a, mask, |a, mask| a & mask), b, |a, b| a | b)
    }
    #[inline(never)]
    unsafe fn shift_right_16(a: Self::I, bits: u32) -> Self::I {
        let keep = (0xFFFF_u32 >> bits) * 0x0001_0001;
        map(a, |a| ((a as u32 >> bits) & keep) as i32)
    }
    #[inline(never)]
    unsafe fn shift_left_16(a: Self::I, bits: u32) -> Self::I {
        let keep = ((0xFFFF_u32 << bits) & 0xFFFF) * 0x0001_0001;
        map(a, |a| (((a as u32) << bits) & keep) as i32)
    }
    #[inline(never)]
    unsafe fn dot_16(sum: Self::I, a: Self::I, b: Self::I) -> Self::I {
        let products = zip(a, b, |a, b| {
            let (a_low, a_high) = halves(a);
            let (b_low, b_high) = halves(b);
            (a_low * b_low).wrapping_add(a_high * b_high)
        });
        Self::add_i32(sum, products)
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> Self::F {
        map(a, |a| a as f32)
    }
    #[inline(always)]
    unsafe fn to_i32(a: Self::F) -> Self::I {
        map(a, |a| a.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn store_i16(to: *mut i16, x: Self::I) {
        let narrow = map(x, |x| {
            x.clamp(i32::from(i16::MIN), i32::from(i16::MAX)) as i16
        });
        to.cast::<[i16; LANES]>().write_unaligned(narrow);
    }
    #[inline(always)]
    unsafe fn reduce_add_i32(a: Self::I) -> i32 {
        a.into_iter().fold(0, i32::wrapping_add)
    }

    #[inline(always)]
    unsafe fn lookup_nibbles(table: *const f32, words: *const u32) -> Self::F {
        let mut out = [0.0; LANES];
        for (i, out) in out.iter_mut().enumerate() {
            let word = words.add(i / 8).read_unaligned();
            *out = *table.add(((word >> (4 * (i % 8))) & 15) as usize);
        }
        out
    }
    #[inline(always)]
    unsafe fn prefetch(_address: *const u8) {}
}
