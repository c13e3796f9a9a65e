//! Arithmetic on blocks of logits, written so that the compiler turns it into vector code.

/// Logits that are looked at together; as many as a word of a mask has bits.
pub(super) const BLOCK: usize = 32;

/// A block; places without a token hold negative infinity.
pub(super) type Block = [f32; BLOCK];

/// Values that vector code takes at once, on the machines that matter.
pub(super) const LANES: usize = 8;

/// Tokens that are looked at together first: [`LANES`] groups of [`BLOCK`] tokens, in turns.
pub(super) const SPAN: usize = LANES * BLOCK;

/// A span; places without a token hold negative infinity.
pub(super) type Span = [f32; SPAN];

/// The larger one; unlike `f32::max` it is a single instruction.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The largest value of each group, and whether the span is suspicious: surely if any value is
/// NaN or positive infinity, in which case the largest means nothing, and perhaps if there are
/// huge values.
#[inline]
pub(super) fn highest(span: &Span) -> ([f32; LANES], bool) {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut sums = [0.0; LANES];
    for values in span.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            largest[lane] = larger(values[lane], largest[lane]);
            sums[lane] += values[lane];
        }
    }
    // A sum is NaN for NaN, and for infinities of both signs.
    let sum: f32 = sums.into_iter().sum();
    (largest, sum.is_nan() || sum == f32::INFINITY)
}

/// Whether any value is NaN or positive infinity.
pub(super) fn has_fault(span: &Span) -> bool {
    span.iter().any(|x| x.is_nan() || *x == f32::INFINITY)
}

/// The block with negative infinity where `word` has no bit.
pub(super) fn masked(block: &Block, word: u32) -> Block {
    const BITS: [u32; BLOCK] = {
        let mut bits = [0; BLOCK];
        let mut place = 0;
        while place < BLOCK {
            bits[place] = 1 << place;
            place += 1;
        }
        bits
    };
    let mut masked = *block;
    for place in 0..BLOCK {
        if word & BITS[place] == 0 {
            masked[place] = f32::NEG_INFINITY;
        }
    }
    masked
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
    let clamped = larger(x, LEAST_EXPONENT);
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

/// The sum of x e^x over a block of x up to 0.
pub(super) fn weighted_sum(x: &Block) -> f64 {
    sum(&x.map(|x| exp(x) * larger(x, LEAST_EXPONENT)))
}

/// The sum of e^x over a block of x up to 0.
pub(super) fn mass(x: &Block) -> f64 {
    sum(&x.map(exp))
}

/// ln of the sum of e^l over `logits`; negative infinity if there are none.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, larger);
    if largest == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let mut total = 0.0;
    for_each_chunk(logits, |_, block: &Block| {
        total += mass(&block.map(|logit| logit - largest));
    });
    f64::from(largest) + total.ln()
}

/// Calls `visit` with the number and the values of each `SIZE` values; the last are filled up
/// with negative infinity.
pub(super) fn for_each_chunk<const SIZE: usize>(
    values: &[f32],
    mut visit: impl FnMut(usize, &[f32; SIZE]),
) {
    let (chunks, rest) = values.as_chunks::<SIZE>();
    for (index, chunk) in chunks.iter().enumerate() {
        visit(index, chunk);
    }
    if !rest.is_empty() {
        visit(chunks.len(), &filled_up(rest));
    }
}

/// The first `SIZE` values, filled up with negative infinity.
pub(super) fn filled_up<const SIZE: usize>(values: &[f32]) -> [f32; SIZE] {
    values.first_chunk().copied().unwrap_or_else(|| {
        let mut filled = [f32::NEG_INFINITY; SIZE];
        filled[..values.len()].copy_from_slice(values);
        filled
    })
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
        const NOTHING: Span = [f32::NEG_INFINITY; SPAN];
        assert_eq!(highest(&NOTHING), ([f32::NEG_INFINITY; LANES], false));
        for place in 0..SPAN {
            let mut span = NOTHING;
            span[place] = 3.0;
            let mut largest = [f32::NEG_INFINITY; LANES];
            largest[place % LANES] = 3.0;
            assert_eq!(highest(&span), (largest, false));
            for value in [f32::NAN, f32::INFINITY] {
                span[place] = value;
                assert!(highest(&span).1 && has_fault(&span));
            }
        }
        assert!(highest(&[f32::MAX; SPAN]).1 && !has_fault(&[f32::MAX; SPAN]));
    }

    #[test]
    fn masks_forbid_by_their_bits() {
        for place in 0..BLOCK {
            let forbidden = masked(&[1.0; BLOCK], !(1 << place));
            let expected = |at| if at == place { f32::NEG_INFINITY } else { 1.0 };
            assert_eq!(forbidden, std::array::from_fn(expected));
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
