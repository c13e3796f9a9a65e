//! Element-wise functions, normalisations and rotations, sixteen lanes at a time.

use oxllama_backend::{Activation, NormKind, RopeStyle};

use crate::isa::per_isa;
use crate::simd::{LANES, Simd};

/// `e^x` to about one unit in the last place; 0 below −87.3, and as at 88 above that.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2, and e^r by its Taylor series to the seventh power,
/// whose remainder is below 6e-9.
///
/// # Safety
/// As [`Simd`]'s.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    const LOWEST: f32 = -87.3;
    // SAFETY: vector arithmetic only.
    unsafe {
        let clamped = S::max(S::min(x, S::splat(88.0)), S::splat(LOWEST));
        let n = S::round(S::mul(clamped, S::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, the first short enough for n times it to be exact.
        let r = S::fma(n, S::splat(-0.693_359_4), clamped);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut sum = S::splat(1.0 / 5040.0);
        for factor in [
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5,
            1.0,
            1.0,
        ] {
            sum = S::fma(sum, r, S::splat(factor));
        }
        S::zero_below(S::mul(sum, S::exp2_rounded(n)), x, LOWEST)
    }
}

/// `tanh x = 1 − 2 / (e^2x + 1)`, absolute error about 1e-7.
///
/// # Safety
/// As [`Simd`]'s.
#[inline(always)]
pub(crate) unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: vector arithmetic only.
    unsafe {
        let one = S::splat(1.0);
        let power = exp::<S>(S::add(x, x));
        S::sub(one, S::div(S::splat(2.0), S::add(power, one)))
    }
}

/// `erf x` by Abramowitz and Stegun 7.1.26, absolute error below 2e-7.
///
/// # Safety
/// As [`Simd`]'s.
#[inline(always)]
unsafe fn erf<S: Simd>(x: S::F) -> S::F {
    // SAFETY: vector arithmetic only.
    unsafe {
        let one = S::splat(1.0);
        let magnitude = S::abs(x);
        let t = S::div(one, S::fma(S::splat(0.327_591_1), magnitude, one));
        let mut sum = S::splat(1.061_405_4);
        for factor in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
            sum = S::fma(sum, t, S::splat(factor));
        }
        let square = S::mul(magnitude, S::sub(S::splat(0.0), magnitude));
        let tail = S::mul(S::mul(sum, t), exp::<S>(square));
        let positive = S::sub(one, tail);
        // The sign of x, taken over by adding and subtracting: odd function.
        let negative = S::sub(S::splat(0.0), positive);
        let is_positive = S::zero_below(one, x, 0.0);
        S::fma(S::sub(positive, negative), is_positive, negative)
    }
}

/// # Safety
/// As [`Simd`]'s.
#[inline(always)]
unsafe fn activate<S: Simd>(activation: Activation, x: S::F) -> S::F {
    // SAFETY: vector arithmetic only.
    unsafe {
        let one = S::splat(1.0);
        match activation {
            Activation::Silu => {
                let power = exp::<S>(S::sub(S::splat(0.0), x));
                S::div(x, S::add(one, power))
            }
            Activation::GeluTanh => {
                let cube = S::mul(S::mul(x, x), x);
                let inner = S::fma(S::splat(0.044_715), cube, x);
                let inner = S::mul(S::splat(0.797_884_6), inner);
                S::mul(S::mul(S::splat(0.5), x), S::add(one, tanh::<S>(inner)))
            }
            Activation::GeluErf => {
                let inner = S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2));
                S::mul(S::mul(S::splat(0.5), x), S::add(one, erf::<S>(inner)))
            }
        }
    }
}

per_isa! {
    /// `out[i] = activation(gate[i]) · up[i]`; `out` may be `gate`.
    ///
    /// # Safety
    /// All three have `elements` elements.
    pub(crate) unsafe fn gate(
        activation: Activation,
        gate: *const f32,
        up: *const f32,
        out: *mut f32,
        elements: usize,
    ) = gate_generic;
}

#[inline(always)]
unsafe fn gate_generic<S: Simd>(
    activation: Activation,
    gate: *const f32,
    up: *const f32,
    out: *mut f32,
    elements: usize,
) {
    for i in (0..elements).step_by(LANES) {
        let count = (elements - i).min(LANES);
        // SAFETY: `count` elements are left.
        unsafe {
            let x = S::load_first(gate.add(i), count);
            let y = S::mul(
                activate::<S>(activation, x),
                S::load_first(up.add(i), count),
            );
            S::store_first(out.add(i), y, count);
        }
    }
}

per_isa! {
    /// `out[i] += scale · x[i]`
    ///
    /// # Safety
    /// Both have `elements` elements.
    pub(crate) unsafe fn add_scaled(x: *const f32, scale: f32, out: *mut f32, elements: usize)
        = add_scaled_generic;
}

#[inline(always)]
unsafe fn add_scaled_generic<S: Simd>(x: *const f32, scale: f32, out: *mut f32, elements: usize) {
    for i in (0..elements).step_by(LANES) {
        let count = (elements - i).min(LANES);
        // SAFETY: `count` elements are left.
        unsafe {
            let out = out.add(i);
            let sum = S::fma(
                S::splat(scale),
                S::load_first(x.add(i), count),
                S::load_first(out, count),
            );
            S::store_first(out, sum, count);
        }
    }
}

per_isa! {
    /// `x = cap · tanh(scale · x / cap)`, or `scale · x` without a cap.
    ///
    /// # Safety
    /// `x` has `elements` elements.
    pub(crate) unsafe fn scale_and_cap(
        x: *mut f32,
        scale: f32,
        softcap: Option<f32>,
        elements: usize,
    ) = scale_and_cap_generic;
}

#[inline(always)]
unsafe fn scale_and_cap_generic<S: Simd>(
    x: *mut f32,
    scale: f32,
    softcap: Option<f32>,
    elements: usize,
) {
    for i in (0..elements).step_by(LANES) {
        let count = (elements - i).min(LANES);
        // SAFETY: `count` elements are left.
        unsafe {
            let value = S::mul(S::load_first(x.add(i), count), S::splat(scale));
            S::store_first(x.add(i), cap::<S>(value, softcap), count);
        }
    }
}

/// `c · tanh(x / c)` if there is a cap.
///
/// # Safety
/// As [`Simd`]'s.
#[inline(always)]
pub(crate) unsafe fn cap<S: Simd>(x: S::F, softcap: Option<f32>) -> S::F {
    match softcap {
        // SAFETY: vector arithmetic only.
        Some(cap) => unsafe {
            let cap = S::splat(cap);
            S::mul(cap, tanh::<S>(S::div(x, cap)))
        },
        None => x,
    }
}

/// A normalisation of rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowNorm {
    /// Formula.
    pub(crate) kind: NormKind,
    /// `[width]`
    pub(crate) weight: *const f32,
    /// `[width]`, or null.
    pub(crate) bias: *const f32,
    /// Added to the mean square or variance.
    pub(crate) epsilon: f32,
    /// Elements of a row.
    pub(crate) width: usize,
}

per_isa! {
    /// `out = norm(x)` for one row; `out` may be `x`.
    ///
    /// # Safety
    /// All parts have the norm's width.
    pub(crate) unsafe fn norm_row(norm: RowNorm, x: *const f32, out: *mut f32)
        = norm_row_generic;
}

/// # Safety
/// As [`norm_row`]'s.
#[inline(always)]
pub(crate) unsafe fn norm_row_generic<S: Simd>(norm: RowNorm, x: *const f32, out: *mut f32) {
    let width = norm.width;
    // SAFETY: every step keeps within the width.
    unsafe {
        let mean = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => {
                let mut sum = S::splat(0.0);
                for i in (0..width).step_by(LANES) {
                    sum = S::add(sum, S::load_first(x.add(i), (width - i).min(LANES)));
                }
                S::reduce_add(sum) / width as f32
            }
        };
        let mut squares = [S::splat(0.0); 2];
        for (step, i) in (0..width).step_by(LANES).enumerate() {
            let count = (width - i).min(LANES);
            let centred = S::sub(S::load_first(x.add(i), count), S::splat(mean));
            let centred = S::select_range(centred, 0.0, 0, count);
            squares[step % 2] = S::fma(centred, centred, squares[step % 2]);
        }
        let square = S::reduce_add(S::add(squares[0], squares[1])) / width as f32;
        let factor = S::splat(1.0 / (square + norm.epsilon).sqrt());
        for i in (0..width).step_by(LANES) {
            let count = (width - i).min(LANES);
            let centred = S::sub(S::load_first(x.add(i), count), S::splat(mean));
            let mut y = S::mul(
                S::mul(centred, factor),
                S::load_first(norm.weight.add(i), count),
            );
            if !norm.bias.is_null() {
                y = S::add(y, S::load_first(norm.bias.add(i), count));
            }
            S::store_first(out.add(i), y, count);
        }
    }
}

/// Cosines and sines of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowRope {
    /// `[pairs]`
    pub(crate) cosines: *const f32,
    /// `[pairs]`
    pub(crate) sines: *const f32,
    /// Half of the rotated dimensions.
    pub(crate) pairs: usize,
    /// Which dimensions form a pair.
    pub(crate) style: RopeStyle,
}

/// Rotates the first `2 · pairs` dimensions of a head in place.
///
/// # Safety
/// As [`Simd`]'s; the head has that many dimensions.
#[inline(always)]
pub(crate) unsafe fn rotate<S: Simd>(rope: &RowRope, head: *mut f32) {
    let pairs = rope.pairs;
    // SAFETY: every access is below `2 · pairs`, or `pairs` for the tables.
    unsafe {
        match rope.style {
            RopeStyle::Halves => {
                for i in (0..pairs).step_by(LANES) {
                    let count = (pairs - i).min(LANES);
                    let cosine = S::load_first(rope.cosines.add(i), count);
                    let sine = S::load_first(rope.sines.add(i), count);
                    let first = S::load_first(head.add(i), count);
                    let second = S::load_first(head.add(pairs + i), count);
                    let rotated = S::sub(S::mul(first, cosine), S::mul(second, sine));
                    S::store_first(head.add(i), rotated, count);
                    let rotated = S::add(S::mul(second, cosine), S::mul(first, sine));
                    S::store_first(head.add(pairs + i), rotated, count);
                }
            }
            RopeStyle::Interleaved => {
                for i in 0..pairs {
                    let (cosine, sine) = (*rope.cosines.add(i), *rope.sines.add(i));
                    let (first, second) = (*head.add(2 * i), *head.add(2 * i + 1));
                    *head.add(2 * i) = first * cosine - second * sine;
                    *head.add(2 * i + 1) = second * cosine + first * sine;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    /// Largest difference to `exact` over a sweep, as absolute error divided by `1 + |exact|`.
    fn worst(isa: Isa, activation: Activation, exact: impl Fn(f64) -> f64) -> f64 {
        let x: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.005).collect();
        let ones = vec![1.0_f32; x.len()];
        let mut out = vec![0.0_f32; x.len()];
        // SAFETY: equal lengths.
        unsafe {
            gate(
                isa,
                activation,
                x.as_ptr(),
                ones.as_ptr(),
                out.as_mut_ptr(),
                x.len(),
            );
        }
        x.iter()
            .zip(&out)
            .map(|(&x, &y)| {
                let exact = exact(f64::from(x));
                (f64::from(y) - exact).abs() / (1.0 + exact.abs())
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn activations_are_accurate() {
        for isa in Isa::available() {
            let silu = worst(isa, Activation::Silu, |x| x / (1.0 + (-x).exp()));
            assert!(silu < 3e-7, "{isa:?} silu {silu}");
            let tanh = worst(isa, Activation::GeluTanh, |x| {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            });
            assert!(tanh < 5e-7, "{isa:?} tanh {tanh}");
        }
    }

    #[test]
    fn gelu_erf_matches_known_values() {
        // erf to twelve digits from published tables.
        let known = [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813),
            (1.0, 0.842_700_792_950),
        ];
        for isa in Isa::available() {
            for (z, erf) in known {
                for sign in [1.0_f64, -1.0] {
                    let x = (sign * z * std::f64::consts::SQRT_2) as f32;
                    let mut out = [0.0_f32];
                    // SAFETY: one element each.
                    unsafe {
                        let kind = Activation::GeluErf;
                        gate(isa, kind, &raw const x, [1.0].as_ptr(), out.as_mut_ptr(), 1);
                    }
                    let exact = 0.5 * f64::from(x) * (1.0 + sign * erf);
                    assert!((f64::from(out[0]) - exact).abs() < 4e-7, "{isa:?} at {x}");
                }
            }
        }
    }

    #[test]
    fn large_magnitudes_stay_finite() {
        for isa in Isa::available() {
            for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
                let x = [-1e4_f32, -200.0, 200.0, 1e4];
                let mut out = [0.0_f32; 4];
                // SAFETY: equal lengths.
                unsafe {
                    gate(
                        isa,
                        activation,
                        x.as_ptr(),
                        [1.0; 4].as_ptr(),
                        out.as_mut_ptr(),
                        4,
                    );
                }
                assert!(
                    out[0].abs() < 1e-3 && out[1].abs() < 1e-3,
                    "{isa:?} {out:?}"
                );
                assert_eq!(out[2..], x[2..], "{isa:?} {activation:?}");
            }
        }
    }
}
