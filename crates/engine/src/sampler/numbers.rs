//! Arithmetic on blocks of logits, written so that the compiler turns it into vector code.

/// Logits that are looked at together; as many as a word of a mask has bits.
pub(super) const BLOCK: usize = 32;

/// A block; places without a token hold negative infinity.
pub(super) type Block = [f32; BLOCK];

const LANES: usize = 8;

/// The largest value (negative infinity if there is none), and whether any value is NaN or
/// positive infinity.
pub(super) fn highest(block: &Block) -> (f32, bool) {
    let mut highest = [f32::NEG_INFINITY; LANES];
    let mut is_number = [1u32; LANES];
    for values in block.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let value = values[lane];
            highest[lane] = if value > highest[lane] {
                value
            } else {
                highest[lane]
            };
            // False for NaN as well.
            is_number[lane] &= u32::from(value < f32::INFINITY);
        }
    }
    let highest = highest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (highest, is_number.contains(&0))
}

/// Below this, [`exp`] gives 0: less than the smallest normal f32.
pub(super) const LEAST_EXPONENT: f32 = -87.0;

/// e^x for x up to 0, with a relative error below 3e-7; 0 below [`LEAST_EXPONENT`].
///
/// 2^(x log2 e), the whole part as the exponent's bits and the fraction (-1/2 to 1/2) by the
/// series of e^(f ln 2) to the sixth power, which leaves 2e-8.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding this rounds to a whole number, which stands in the lowest bits of the sum.
    const ROUND: f32 = 12_582_912.0; // 1.5 x 2^23
    /// ln 2 in two parts: multiples of the first below 2^9 are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > LEAST_EXPONENT {
        x
    } else {
        LEAST_EXPONENT
    };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = clamped - whole * LN_2_HIGH - whole * LN_2_LOW;
    let series = 1.0 / 720.0;
    let series = series * rest + 1.0 / 120.0;
    let series = series * rest + 1.0 / 24.0;
    let series = series * rest + 1.0 / 6.0;
    let series = series * rest + 0.5;
    let series = series * rest + 1.0;
    let series = series * rest + 1.0;
    let exponent = (shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127))
        << 23;
    let power = f32::from_bits(exponent) * series;
    if x > LEAST_EXPONENT { power } else { 0.0 }
}

/// The sum of a block in a fixed order.
fn sum(values: &Block) -> f64 {
    let mut lanes = [0.0f32; LANES];
    for values in values.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] += values[lane];
        }
    }
    lanes.into_iter().map(f64::from).sum()
}

/// The sums of e^x and of x e^x over a block of x up to 0.
pub(super) fn mass_and_weighted(x: &Block) -> (f64, f64) {
    let mut weights = [0.0; BLOCK];
    let mut weighted = [0.0; BLOCK];
    for i in 0..BLOCK {
        let clamped = if x[i] > LEAST_EXPONENT {
            x[i]
        } else {
            LEAST_EXPONENT
        };
        weights[i] = exp(x[i]);
        weighted[i] = weights[i] * clamped;
    }
    (sum(&weights), sum(&weighted))
}

/// ln of the sum of e^l over `logits`; negative infinity if there are none.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let mut largest = f32::NEG_INFINITY;
    for_each_block(logits, |_, block| largest = largest.max(highest(block).0));
    if largest == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let mut mass = 0.0;
    for_each_block(logits, |_, block| {
        let mut weights = [0.0; BLOCK];
        for i in 0..BLOCK {
            weights[i] = exp(block[i] - largest);
        }
        mass += sum(&weights);
    });
    f64::from(largest) + mass.ln()
}

/// Calls `visit` with each block's number and values.
pub(super) fn for_each_block(logits: &[f32], mut visit: impl FnMut(usize, &Block)) {
    let (blocks, rest) = logits.as_chunks::<BLOCK>();
    for (index, block) in blocks.iter().enumerate() {
        visit(index, block);
    }
    if !rest.is_empty() {
        let mut last = [f32::NEG_INFINITY; BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        visit(blocks.len(), &last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for step in 0..=870_000 {
            let x = step as f32 * -1e-4;
            let expected = f64::from(x).exp();
            if x > LEAST_EXPONENT {
                let error = (f64::from(exp(x)) / expected - 1.0).abs();
                assert!(error < 3e-7, "e^{x}: error {error}");
            }
        }
        assert_eq!(exp(0.0), 1.0);
        for x in [LEAST_EXPONENT, -100.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
    }

    #[test]
    fn faults_are_seen_in_every_place() {
        for place in 0..BLOCK {
            for value in [f32::NAN, f32::INFINITY] {
                let mut block = [f32::NEG_INFINITY; BLOCK];
                assert_eq!(highest(&block), (f32::NEG_INFINITY, false));
                block[place] = 3.0;
                assert_eq!(highest(&block), (3.0, false));
                block[place] = value;
                assert!(highest(&block).1);
            }
        }
    }

    #[test]
    fn log_sum_exp_is_that_of_f64() {
        for length in [1, 31, 32, 33, 1000] {
            let logits: Vec<f32> = (0..length).map(|i| (i as f32 * 1.7).sin() * 20.0).collect();
            let expected = logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
            assert!((log_sum_exp(&logits) - expected).abs() < 1e-6);
        }
        assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
    }
}
