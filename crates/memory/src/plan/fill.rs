//! The order of ExLlamaV2: each device in turn as full as possible.

use std::ops::Range;

/// Gives each of `devices` in order the longest run of the remaining parts that
/// `fits(device, run)` accepts, possibly none. All parts are placed when the last run
/// ends at `parts`.
///
/// If a run that fits still fits with parts removed from either end, no other contiguous
/// placement gets further: by induction, wherever another placement has arrived after
/// some device, this one has too, and the rest of the other's next run, being a part of
/// a run that fits, fits here as well. The same property lets the end be found by
/// bisection.
pub(super) fn fill(
    parts: usize,
    devices: usize,
    fits: impl Fn(usize, &Range<usize>) -> bool,
) -> Vec<Range<usize>> {
    let mut start = 0;
    let mut runs = Vec::with_capacity(devices);
    for device in 0..devices {
        let end = largest(start as u64, parts as u64, |end| {
            fits(device, &(start..end as usize))
        })
        .map_or(start, |end| end as usize);
        runs.push(start..end);
        start = end;
    }
    runs
}

/// [`fill`] from the end: where the run of each device would start if the devices
/// behind it, from the last on, were filled first with the last parts.
/// Returns, per device, the first part that the devices behind it can take.
pub(super) fn covered_from_behind(
    parts: usize,
    devices: usize,
    fits: impl Fn(usize, &Range<usize>) -> bool,
) -> Vec<usize> {
    let mut covered = vec![parts; devices];
    for device in (1..devices).rev() {
        let end = covered[device];
        let taken = largest(0, end as u64, |count| {
            fits(device, &(end - count as usize..end))
        })
        .map_or(0, |count| count as usize);
        covered[device - 1] = end - taken;
    }
    covered
}

/// The largest of `low..=high` that `holds`, given that whatever lies below a value that
/// holds does too; `None` when not even `low` holds.
pub(super) fn largest(low: u64, high: u64, holds: impl Fn(u64) -> bool) -> Option<u64> {
    if low > high || !holds(low) {
        return None;
    }
    let (mut held, mut untried) = (low, high);
    while held < untried {
        let middle = held + (untried - held).div_ceil(2);
        if holds(middle) {
            held = middle;
        } else {
            untried = middle - 1;
        }
    }
    Some(held)
}
