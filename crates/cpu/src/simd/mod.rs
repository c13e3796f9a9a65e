//! Sixteen lanes of f32 or i32, whatever the machine calls them.
//!
//! Every kernel is written once over [`Simd`] and compiled for each level by
//! [`per_isa!`](crate::isa::per_isa). Sixteen lanes on every level keep the order of sums, and
//! with it the bits of results, the same between them.
//!
//! # Safety
//! All functions of [`Simd`] are unsafe for one reason each: the type's instructions must exist
//! on this machine (`per_isa!` sees to that), and pointers must be valid for the lanes read or
//! written. No pointer needs any alignment beyond its element's.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Lanes of a vector on every level.
pub(crate) const LANES: usize = 16;

/// One level's vectors.
pub(crate) trait Simd: Copy + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen 32-bit lanes: i32, or pairs of i16, as the operation says.
    type I: Copy;
    /// Tiles of sixteen outputs that the many-row kernel keeps in registers at once.
    const TILES: usize;
    /// Rows that it keeps.
    const ROWS: usize;
    /// Whether unpacking a block is unrolled, so that shifts are by constants. Not where a vector
    /// is sixteen scalars: the code would grow by a third of a megabyte.
    const UNROLL: bool;

    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::F;
    /// Sixteen consecutive elements.
    unsafe fn load(from: *const f32) -> Self::F;
    /// The first `count` of sixteen, zero after; reads no more than `count`.
    unsafe fn load_first(from: *const f32, count: usize) -> Self::F;
    /// Sixteen f16, widened.
    unsafe fn load_f16(from: *const u16) -> Self::F;
    /// The first `count` f16, widened, zero after; reads no more than `count`.
    unsafe fn load_f16_first(from: *const u16, count: usize) -> Self::F;
    /// `base[index[i]]` for sixteen indices.
    unsafe fn gather(base: *const f32, index: *const u32) -> Self::F;
    /// Writes sixteen elements.
    unsafe fn store(to: *mut f32, x: Self::F);
    /// Writes the first `count`.
    unsafe fn store_first(to: *mut f32, x: Self::F, count: usize);
    /// Writes the first `count`, rounded to the nearest f16, ties to even.
    unsafe fn store_f16_first(to: *mut u16, x: Self::F, count: usize);

    /// `a + b`
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// `a − b`
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b`
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once where the machine can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The smaller.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `|a|`
    unsafe fn abs(a: Self::F) -> Self::F;
    /// `2^round(a)` for `a` in −126..=127.
    unsafe fn exp2_rounded(a: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `x` where `key >= threshold`, zero elsewhere.
    unsafe fn zero_below(x: Self::F, key: Self::F, threshold: f32) -> Self::F;
    /// Lanes `start..end` of `x`, the others `other`.
    unsafe fn select_range(x: Self::F, other: f32, start: usize, end: usize) -> Self::F;
    /// Sum of the lanes: halves are added until one is left.
    unsafe fn reduce_add(a: Self::F) -> f32;
    /// Largest lane.
    unsafe fn reduce_max(a: Self::F) -> f32;
    /// Lane `i` is [`Self::reduce_add`] of `rows[i]`.
    unsafe fn reduce_add_each(rows: &[Self::F; LANES]) -> Self::F;

    /// All lanes `x`.
    unsafe fn splat_i32(x: i32) -> Self::I;
    /// Sixteen consecutive 32-bit elements.
    unsafe fn load_i32(from: *const i32) -> Self::I;
    /// Sixteen bytes, widened.
    unsafe fn load_u8(from: *const u8) -> Self::I;
    /// Writes sixteen 32-bit elements.
    unsafe fn store_i32(to: *mut i32, x: Self::I);
    /// `a + b`
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I;
    /// `a − b`
    unsafe fn sub_i32(a: Self::I, b: Self::I) -> Self::I;
    /// `a · b`, low 32 bits.
    unsafe fn mul_i32(a: Self::I, b: Self::I) -> Self::I;
    /// `a & b`
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    /// `(a & mask) | b`
    unsafe fn and_or(a: Self::I, mask: Self::I, b: Self::I) -> Self::I;
    /// 16-bit lanes shifted towards the low end by `bits` < 16, zeros in. Constant after inlining.
    unsafe fn shift_right_16(a: Self::I, bits: u32) -> Self::I;
    /// 16-bit lanes shifted towards the high end by `bits` < 16, zeros in.
    unsafe fn shift_left_16(a: Self::I, bits: u32) -> Self::I;
    /// `sum + a.low · b.low + a.high · b.high` on signed 16-bit halves, exact unless the sum wraps.
    unsafe fn dot_16(sum: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// To the nearest f32, ties to even.
    unsafe fn to_f32(a: Self::I) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn to_i32(a: Self::F) -> Self::I;
    /// Writes the lanes as sixteen i16, saturated.
    unsafe fn store_i16(to: *mut i16, x: Self::I);
    /// Sum of the lanes (wrapping).
    unsafe fn reduce_add_i32(a: Self::I) -> i32;

    /// Lane `i` is `table[nibble i]` of two words with eight nibbles each, low nibble first.
    unsafe fn lookup_nibbles(table: *const f32, words: *const u32) -> Self::F;
    /// Asks for the cache line of an address, which need not be valid.
    unsafe fn prefetch(address: *const u8);
}
