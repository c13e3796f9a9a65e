//! What each warp of `units.cuh` does of a matrix, written down once at load.
//!
//! K is cut into one *range* a warp, and a range into *units*: up to four neighbouring blocks of
//! one group, which a warp copies and multiplies at a time.

use super::layout::{BlockInfo, UNIT_BYTES};
use super::plan::{MOST_WARPS, Plan};

/// `WarpRange` of `units.cuh`: units, BLOCK_UNIT_BYTES before the range's in a tile, bytes of it
/// in a tile, nothing.
type WarpRange = [u32; 4];

/// `Unit` of `units.cuh`.
type Unit = [u32; 2];

/// Units of a run, at most: their number has seven bits.
const MOST_RUN_UNITS: u32 = 127;

/// `KIND_GPTQ` of `units.cuh`.
const KIND_GPTQ: u32 = 1;

/// Bytes of the table of a matrix of `blocks` blocks, at most: whatever the device's plan.
pub(crate) fn most_table_bytes(blocks: usize) -> usize {
    MOST_WARPS * size_of::<WarpRange>() + (blocks + MOST_WARPS) * size_of::<Unit>()
}

/// Blocks of a full unit; `unit_blocks` in `units.cuh`.
fn unit_blocks(bits: u32) -> usize {
    match bits {
        0..=4 => 4,
        5..=8 => 2,
        _ => 1,
    }
}

/// What warps do of a matrix.
pub(crate) struct RangeTable {
    /// The words of `range_table` (tiles.cuh): [`WarpRange`] for every range, then the units of
    /// each, padded to the longest range's blocks.
    pub(crate) words: Vec<u32>,
    /// Units of the range that has most of them.
    pub(crate) range_units: usize,
}

impl RangeTable {
    pub(crate) fn new(blocks: &[BlockInfo], plan: Plan, is_gptq: bool) -> Self {
        let mut ranges: Vec<WarpRange> = Vec::new();
        let mut words: Vec<u32> = Vec::new();
        let mut range_units = 0;
        let mut first_unit = 0;
        for range in 0..plan.ranges {
            let (start, end) = (plan.range_start(range), plan.range_start(range + 1));
            let mut units = units_of(blocks, start, end, is_gptq);
            let block_units: u32 = blocks[start..end].iter().map(|block| block[0] >> 24).sum();
            ranges.push([
                units.len() as u32,
                first_unit,
                block_units * UNIT_BYTES as u32,
                0,
            ]);
            first_unit += block_units;
            range_units = range_units.max(units.len());
            units.resize(plan.range_blocks, Unit::default());
            words.extend(units.into_iter().flatten());
        }
        Self {
            words: ranges.into_iter().flatten().chain(words).collect(),
            range_units,
        }
    }
}

/// The units of the range of blocks from `start` to `end`.
fn units_of(blocks: &[BlockInfo], start: usize, end: usize, is_gptq: bool) -> Vec<Unit> {
    let mut units = Vec::new();
    let mut at = start;
    while at < end {
        let [group_and_bits, end_and_scale] = blocks[at];
        let (group, bits) = (group_and_bits & 0xff_ffff, group_and_bits >> 24);
        let group_end = end.min((end_and_scale & 0xffff) as usize);
        let most = unit_blocks(bits);
        // Counted from the group's end, so that what is short comes first.
        let count = (group_end - at - 1) % most + 1;
        at += count;
        let kind = if is_gptq { KIND_GPTQ } else { bits };
        let ends_range = u32::from(at == end);
        units.push([
            kind | (count as u32) << 8 | ends_range << 11 | (end_and_scale & 0xffff_0000),
            (count as u32 * bits) | (group << 12),
        ]);
    }
    // From the last on: a unit that looks like the next one runs on with it.
    let mut next: (u32, u32) = (0, 0);
    for [shape, place] in units.iter_mut().rev() {
        let looks = *shape & 0x7ff;
        let run = match next {
            (of_next, run) if of_next == looks && run < MOST_RUN_UNITS => run + 1,
            _ => 1,
        };
        *place |= run << 5;
        next = (looks, run);
    }
    units
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::linear::layout::{Group, block_table};

    /// Groups of every width, of one to five blocks.
    fn mixed_groups() -> Vec<Group> {
        let widths = [8, 8, 6, 6, 5, 5, 4, 4, 4, 4, 3, 3, 2, 2];
        let lengths = [2, 3, 1, 4, 4, 2, 4, 4, 1, 5, 2, 1, 3, 4];
        let group = |(bits, blocks)| Group {
            bits,
            blocks,
            largest_scale: f16::from_f32(bits as f32),
        };
        widths.into_iter().zip(lengths).map(group).collect()
    }

    #[test]
    fn units_cover_every_block_once() {
        let groups = mixed_groups();
        let blocks = block_table(&groups);
        for shared_bytes in [89 * 1024, 217 * 1024] {
            let plan = Plan::of(blocks.len(), shared_bytes);
            let RangeTable {
                words: table,
                range_units,
            } = RangeTable::new(&blocks, plan, false);
            assert!(table.len() * 4 <= most_table_bytes(blocks.len()));
            let (ranges, units) = table.split_at(plan.ranges * 4);
            let mut next = 0;
            let mut tile_units = 0;
            for (range, units) in ranges.chunks(4).zip(units.chunks(2 * plan.range_blocks)) {
                assert_eq!(range[1], tile_units);
                let mut bytes = 0;
                assert!(range[0] as usize <= range_units);
                let mut run = (0, 0);
                for unit in units.chunks(2).take(range[0] as usize) {
                    let [group_and_bits, end_and_scale] = blocks[next];
                    let (bits, count) = (unit[0] & 0xff, unit[0] >> 8 & 7);
                    assert_eq!(bits, group_and_bits >> 24);
                    assert_eq!(unit[1] >> 12, group_and_bits & 0xff_ffff);
                    assert_eq!(unit[0] >> 16, end_and_scale >> 16);
                    assert_eq!(unit[1] & 31, count * bits);
                    assert!(count * bits * UNIT_BYTES as u32 <= 2048);
                    bytes += count * bits * UNIT_BYTES as u32;
                    // A run goes on with units that look alike, until it ends.
                    if run.0 > 0 {
                        assert_eq!((run.0, run.1), (unit[1] >> 5 & 127, unit[0] & 0x7ff));
                    }
                    run = ((unit[1] >> 5 & 127) - 1, unit[0] & 0x7ff);
                    next += count as usize;
                    let group_end = (end_and_scale & 0xffff) as usize;
                    assert!(next <= group_end, "a unit lies in one group");
                    assert_eq!(unit[0] >> 11 & 1 == 1, bytes == range[2]);
                }
                assert_eq!(run.0, 0, "runs end with their range");
                assert_eq!(bytes, range[2]);
                tile_units += range[2] / UNIT_BYTES as u32;
            }
            assert_eq!(next, blocks.len());
        }
    }

    #[test]
    fn quantised_blocks_without_their_own_kind_say_so() {
        let groups = [Group {
            bits: 4,
            blocks: 8,
            largest_scale: f16::ONE,
        }];
        let blocks = block_table(&groups);
        let plan = Plan::of(blocks.len(), 217 * 1024);
        let table = RangeTable::new(&blocks, plan, true);
        assert_eq!(table.words[4 * plan.ranges] & 0xff, KIND_GPTQ);
    }

    #[test]
    fn long_runs_are_split() {
        let groups = [Group {
            bits: 4,
            blocks: 1200,
            largest_scale: f16::ONE,
        }];
        let units = units_of(&block_table(&groups), 0, 1200, false);
        let runs: Vec<u32> = units.iter().map(|unit| unit[1] >> 5 & 127).collect();
        assert_eq!(runs.len(), 300);
        let mut at = 0;
        while at < runs.len() {
            assert!((1..=MOST_RUN_UNITS).contains(&runs[at]));
            at += runs[at] as usize;
        }
        assert_eq!(at, runs.len());
    }
}
