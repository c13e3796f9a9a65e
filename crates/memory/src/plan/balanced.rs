//! The placement with the least step time on unequal devices.

use std::ops::Range;

use super::fill::fill;

/// The contiguous placement in which the slowest device is as fast as possible: `fits`
/// as in [`fill`], `seconds(device, run)` the time of one step, which must not shrink as
/// a run grows. `None` when nothing fits.
///
/// A bound on the time is one more condition on each run, so [`fill`] decides whether
/// a placement within a bound exists. The bound is bisected over the bit patterns of
/// floating-point numbers, which are ordered like the numbers: at most 64 rounds, and
/// the result is the exact least bound, not an approximation.
pub(super) fn balanced(
    parts: usize,
    devices: usize,
    fits: impl Fn(usize, &Range<usize>) -> bool,
    seconds: impl Fn(usize, &Range<usize>) -> f64,
) -> Option<Vec<Range<usize>>> {
    let is_complete =
        |runs: &[Range<usize>]| runs.last().is_some_and(|last_run| last_run.end == parts);
    let mut best = fill(parts, devices, &fits);
    if !is_complete(&best) {
        return None;
    }
    let slowest = |runs: &[Range<usize>]| {
        runs.iter()
            .enumerate()
            .map(|(device, run)| seconds(device, run))
            .fold(0.0, f64::max)
    };
    let mut low = 0_u64;
    let mut high = slowest(&best).to_bits();
    while low < high {
        let middle = low + (high - low) / 2;
        let bound = f64::from_bits(middle);
        let runs = fill(parts, devices, |device, run| {
            seconds(device, run) <= bound && fits(device, run)
        });
        if is_complete(&runs) {
            // The true maximum is at most the bound: skip to it.
            high = middle.min(slowest(&runs).to_bits());
            best = runs;
        } else {
            low = middle + 1;
        }
    }
    Some(best)
}
