//! Activations as 16-bit integers with one scale per row.
//!
//! A row is gathered in the order of the weights' packed rows, divided by its largest magnitude
//! over 32767 and rounded to nearest. The sum of every 32 integers is kept beside them, as
//! weights are stored with a zero point: Σ (c − z) x = Σ c x − z Σ x.

use crate::isa::per_isa;
use crate::pack::BLOCK_ROWS;
use crate::simd::{LANES, Simd};

/// Largest magnitude of a quantised activation.
const LARGEST: f32 = 32767.0;
/// Rows whose largest magnitude is below this are zero: its reciprocal would overflow.
const SMALLEST: f32 = 1e-30;

/// Where a quantised row goes.
#[derive(Clone, Copy)]
pub(crate) struct QuantisedRow {
    /// `[in_features]`
    pub(crate) values: *mut i16,
    /// `[in_features / 32]`: sums of 32 neighbours.
    pub(crate) sums: *mut i32,
    /// What the integers are multiplied by.
    pub(crate) scale: *mut f32,
}

per_isa! {
    /// Quantises `x[permutation[i]]`, or `x[i]` if `permutation` is null.
    ///
    /// # Safety
    /// `x` has `in_features` elements, a multiple of 32, and `permutation` as many indices below
    /// that; `row`'s parts have room.
    pub(crate) unsafe fn quantise(
        x: *const f32,
        permutation: *const u32,
        in_features: usize,
        row: QuantisedRow,
    ) = quantise_generic;
}

#[inline(always)]
unsafe fn quantise_generic<S: Simd>(
    x: *const f32,
    permutation: *const u32,
    in_features: usize,
    row: QuantisedRow,
) {
    // SAFETY: the caller's contract; every access is below `in_features`.
    unsafe {
        let mut largest = [S::splat(0.0); 2];
        for i in (0..in_features).step_by(BLOCK_ROWS) {
            largest[0] = S::max(S::abs(S::load(x.add(i))), largest[0]);
            largest[1] = S::max(S::abs(S::load(x.add(i + LANES))), largest[1]);
        }
        let largest = S::reduce_max(S::max(largest[0], largest[1]));
        if largest < SMALLEST {
            std::ptr::write_bytes(row.values, 0, in_features);
            std::ptr::write_bytes(row.sums, 0, in_features / BLOCK_ROWS);
            *row.scale = 0.0;
            return;
        }
        *row.scale = largest / LARGEST;
        let inverse = S::splat(LARGEST / largest);
        for block in 0..in_features / BLOCK_ROWS {
            let i = block * BLOCK_ROWS;
            let (low, high) = if permutation.is_null() {
                (S::load(x.add(i)), S::load(x.add(i + LANES)))
            } else {
                (
                    S::gather(x, permutation.add(i)),
                    S::gather(x, permutation.add(i + LANES)),
                )
            };
            let low = S::to_i32(S::mul(low, inverse));
            let high = S::to_i32(S::mul(high, inverse));
            S::store_i16(row.values.add(i), low);
            S::store_i16(row.values.add(i + LANES), high);
            *row.sums.add(block) = S::reduce_add_i32(S::add_i32(low, high));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    fn run(isa: Isa, x: &[f32], permutation: Option<&[u32]>) -> (Vec<i16>, Vec<i32>, f32) {
        let mut values = vec![1_i16; x.len()];
        let mut sums = vec![1_i32; x.len() / BLOCK_ROWS];
        let mut scale = 1.0;
        let row = QuantisedRow {
            values: values.as_mut_ptr(),
            sums: sums.as_mut_ptr(),
            scale: &raw mut scale,
        };
        let permutation = permutation.map_or(std::ptr::null(), <[u32]>::as_ptr);
        // SAFETY: lengths match the contract.
        unsafe { quantise(isa, x.as_ptr(), permutation, x.len(), row) };
        (values, sums, scale)
    }

    #[test]
    fn values_are_within_half_a_step_on_every_level() {
        let x: Vec<f32> = (0..96)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013)
            .collect();
        let permutation: Vec<u32> = (0..96).map(|i| (i * 5 + 3) % 96).collect();
        let portable = run(Isa::Portable, &x, Some(&permutation));
        for isa in Isa::available() {
            let (values, sums, scale) = run(isa, &x, Some(&permutation));
            assert_eq!(
                (&values, &sums, scale),
                (&portable.0, &portable.1, portable.2)
            );
            for (value, &from) in values.iter().zip(&permutation) {
                let back = f32::from(*value) * scale;
                assert!((back - x[from as usize]).abs() <= scale * 0.501);
            }
            for (sum, block) in sums.iter().zip(values.chunks(BLOCK_ROWS)) {
                assert_eq!(
                    *sum,
                    block.iter().map(|&value| i32::from(value)).sum::<i32>()
                );
            }
        }
    }

    #[test]
    fn zero_and_tiny_rows_are_zero() {
        for isa in Isa::available() {
            for x in [vec![0.0_f32; 32], vec![1e-38; 32]] {
                assert_eq!(run(isa, &x, None), (vec![0; 32], vec![0], 0.0));
            }
        }
    }
}
