//! Products of unquantised weights and f32 activations.
//!
//! Every (row, output) is one dot product: lane `l` sums the inputs `l, l + 16, …` in order,
//! then the lanes are added halves first. How many rows and outputs share the registers changes
//! nothing in that order.

use crate::integer::Finish;
use crate::isa::per_isa;
use crate::pack::TILE;
use crate::simd::{LANES, Simd};

/// How elements lie in memory: weights, keys and values.
pub(crate) trait Element: 'static {
    /// Bytes of one.
    const BYTES: usize;

    /// Sixteen elements from element `index` on.
    ///
    /// # Safety
    /// As [`Simd`]'s.
    unsafe fn load<S: Simd>(base: *const u8, index: usize) -> S::F;

    /// `count` elements from element `index` on, zeros after.
    ///
    /// # Safety
    /// As [`Simd`]'s.
    unsafe fn load_first<S: Simd>(base: *const u8, index: usize, count: usize) -> S::F;

    /// Writes `count` elements from element `index` on.
    ///
    /// # Safety
    /// As [`Simd`]'s.
    unsafe fn store_first<S: Simd>(base: *mut u8, index: usize, x: S::F, count: usize);
}

/// Elements of IEEE half precision.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HalfElement;

/// Elements of IEEE single precision.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SingleElement;

impl Element for HalfElement {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(base: *const u8, index: usize) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { S::load_f16(base.cast::<u16>().add(index)) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(base: *const u8, index: usize, count: usize) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { S::load_f16_first(base.cast::<u16>().add(index), count) }
    }
    #[inline(always)]
    unsafe fn store_first<S: Simd>(base: *mut u8, index: usize, x: S::F, count: usize) {
        // SAFETY: the caller's contract.
        unsafe { S::store_f16_first(base.cast::<u16>().add(index), x, count) }
    }
}

impl Element for SingleElement {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd>(base: *const u8, index: usize) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { S::load(base.cast::<f32>().add(index)) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(base: *const u8, index: usize, count: usize) -> S::F {
        // SAFETY: the caller's contract.
        unsafe { S::load_first(base.cast::<f32>().add(index), count) }
    }
    #[inline(always)]
    unsafe fn store_first<S: Simd>(base: *mut u8, index: usize, x: S::F, count: usize) {
        // SAFETY: the caller's contract.
        unsafe { S::store_first(base.cast::<f32>().add(index), x, count) }
    }
}

/// An unquantised matrix in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FloatWeights {
    /// `[out_features, in_features]`
    pub(crate) values: *const u8,
    /// Whether elements are f16; f32 otherwise.
    pub(crate) half: bool,
    /// Input features (K).
    pub(crate) in_features: usize,
    /// Output features (N).
    pub(crate) out_features: usize,
    /// What every weight is multiplied by.
    pub(crate) scale: f32,
}

per_isa! {
    /// `rows` rows of f32 `x` times the tiles of outputs `first_tile..end_tile`.
    ///
    /// # Safety
    /// The matrix, the rows and the output have the extents they state; nobody else touches
    /// these tiles' outputs.
    pub(crate) unsafe fn float_rows(
        weights: &FloatWeights,
        x: *const f32,
        rows: usize,
        first_tile: usize,
        end_tile: usize,
        finish: Finish,
    ) = float_rows_generic;
}

#[inline(always)]
unsafe fn float_rows_generic<S: Simd>(
    weights: &FloatWeights,
    x: *const f32,
    rows: usize,
    first_tile: usize,
    end_tile: usize,
    finish: Finish,
) {
    for tile in first_tile..end_tile {
        // SAFETY: the caller's contract.
        unsafe {
            if weights.half {
                tile_rows::<S, HalfElement>(weights, x, rows, tile, &finish);
            } else {
                tile_rows::<S, SingleElement>(weights, x, rows, tile, &finish);
            }
        }
    }
}

/// All rows times one tile, in the largest register blocks that the level has room for.
///
/// # Safety
/// As [`float_rows`]'s.
#[inline(always)]
unsafe fn tile_rows<S: Simd, E: Element>(
    weights: &FloatWeights,
    x: *const f32,
    rows: usize,
    tile: usize,
    finish: &Finish,
) {
    let k = weights.in_features;
    let outputs = (weights.out_features - tile * TILE).min(TILE);
    // SAFETY: rows and outputs exist.
    unsafe {
        let values = weights.values.add(tile * TILE * k * E::BYTES);
        let mut row = 0;
        if S::ROWS == 8 {
            while row + 4 <= rows {
                block::<S, E, 4, 4>(
                    weights,
                    values,
                    x.add(row * k),
                    outputs,
                    (row, tile),
                    finish,
                );
                row += 4;
            }
        }
        if S::ROWS >= 4 {
            while row + 2 <= rows {
                block::<S, E, 2, 2>(
                    weights,
                    values,
                    x.add(row * k),
                    outputs,
                    (row, tile),
                    finish,
                );
                row += 2;
            }
        }
        while row < rows {
            block::<S, E, 1, 4>(
                weights,
                values,
                x.add(row * k),
                outputs,
                (row, tile),
                finish,
            );
            row += 1;
        }
    }
}

/// `R` rows times one tile, `O` outputs at a time.
///
/// # Safety
/// As [`float_rows`]'s; `values` is the tile's first row of weights, `x` the first of the rows.
#[inline(always)]
unsafe fn block<S: Simd, E: Element, const R: usize, const O: usize>(
    weights: &FloatWeights,
    values: *const u8,
    x: *const f32,
    outputs: usize,
    (row, tile): (usize, usize),
    finish: &Finish,
) {
    let k = weights.in_features;
    let mut results = [[0.0_f32; TILE]; R];
    // SAFETY: outputs past the last are replaced by the first, whose result is then unused.
    unsafe {
        for first in (0..outputs).step_by(O) {
            let mut from = [values; O];
            for (o, from) in from.iter_mut().enumerate() {
                if first + o < outputs {
                    *from = values.add((first + o) * k * E::BYTES);
                }
            }
            let sums = dots::<S, E, R, O>(&from, x, k);
            for r in 0..R {
                for o in 0..O {
                    results[r][first + o] = S::reduce_add(sums[r][o]);
                }
            }
        }
        let scale = S::splat(weights.scale);
        for (r, result) in results.iter().enumerate() {
            let y = S::mul(S::load(result.as_ptr()), scale);
            finish.store::<S>(row + r, tile * TILE, y);
        }
    }
}

/// The lanes' partial sums of `R · O` dot products of length `k`.
///
/// # Safety
/// As [`Simd`]'s; `from` are `O` rows of weights and `x` is `R` rows of `k` elements.
#[inline(always)]
unsafe fn dots<S: Simd, E: Element, const R: usize, const O: usize>(
    from: &[*const u8; O],
    x: *const f32,
    k: usize,
) -> [[S::F; O]; R] {
    // SAFETY: the last, partial step reads `k % 16` elements.
    unsafe {
        let mut sums = [[S::splat(0.0); O]; R];
        let whole = k / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            let mut w = [S::splat(0.0); O];
            for o in 0..O {
                w[o] = E::load::<S>(from[o], i);
            }
            for r in 0..R {
                let x = S::load(x.add(r * k + i));
                for o in 0..O {
                    sums[r][o] = S::fma(w[o], x, sums[r][o]);
                }
            }
        }
        if whole < k {
            for o in 0..O {
                let w = E::load_first::<S>(from[o], whole, k - whole);
                for r in 0..R {
                    let x = S::load_first(x.add(r * k + whole), k - whole);
                    sums[r][o] = S::fma(w, x, sums[r][o]);
                }
            }
        }
        sums
    }
}

per_isa! {
    /// `out = scale · weights[row]`, the row times the matrix's own scale.
    ///
    /// # Safety
    /// The row exists and `out` has room for it.
    pub(crate) unsafe fn embed_row(
        weights: &FloatWeights,
        row: usize,
        scale: f32,
        out: *mut f32,
    ) = embed_row_generic;
}

#[inline(always)]
unsafe fn embed_row_generic<S: Simd>(
    weights: &FloatWeights,
    row: usize,
    scale: f32,
    out: *mut f32,
) {
    let k = weights.in_features;
    // SAFETY: the caller's contract.
    unsafe {
        let scale = S::splat(scale * weights.scale);
        for i in (0..k).step_by(LANES) {
            let count = (k - i).min(LANES);
            let at = row * k + i;
            let value = if weights.half {
                HalfElement::load_first::<S>(weights.values, at, count)
            } else {
                SingleElement::load_first::<S>(weights.values, at, count)
            };
            S::store_first(out.add(i), S::mul(value, scale), count);
        }
    }
}
