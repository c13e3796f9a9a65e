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

/// The words of `range_table` (tiles.cuh): [`WarpRange`] for every range, then the units of each,
/// padded to the longest range's blocks.
pub(crate) fn range_table(blocks: &[BlockInfo], plan: Plan, is_gptq: bool) -> Vec<u32> {
    let mut ranges: Vec<WarpRange> = Vec::new();
    let mut units: Vec<Unit> = Vec::new();
    let mut first_unit = 0;
    for range in 0..plan.ranges {
        let end = plan.range_start(range + 1);
        let start = plan.range_start(range);
        let before = units.len();
        let mut at = start;
        let mut block_units = 0;
        while at < end {
            let [group_and_bits, end_and_scale] = blocks[at];
            let (group, bits) = (group_and_bits & 0xff_ffff, group_and_bits >> 24);
            let group_end = end.min((end_and_scale & 0xffff) as usize);
            let most = unit_blocks(bits);
            // Counted from the group's end, so that what is short comes first.
            let count = (group_end - at - 1) % most + 1;
            let kind = if is_gptq { KIND_GPTQ } else { bits };
            let ends_group = u32::from(at + count == group_end);
            let ends_range = u32::from(at + count == end);
            let bytes = count as u32 * bits * UNIT_BYTES as u32;
            units.push([
                kind | (count as u32) << 8
                    | ends_group << 11
                    | ends_range << 12
                    | (end_and_scale & 0xffff_0000),
                bytes | group << 12,
            ]);
            block_units += count as u32 * bits;
            at += count;
        }
        let count = (units.len() - before) as u32;
        ranges.push([count, first_unit, block_units * UNIT_BYTES as u32, 0]);
        first_unit += block_units;
        units.resize(before + plan.range_blocks, Unit::default());
    }
    let units = units.into_iter().flatten();
    ranges.into_iter().flatten().chain(units).collect()
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
            let table = range_table(&blocks, plan, false);
            assert!(table.len() * 4 <= most_table_bytes(blocks.len()));
            let (ranges, units) = table.split_at(plan.ranges * 4);
            let mut next = 0;
            let mut tile_units = 0;
            for (range, units) in ranges.chunks(4).zip(units.chunks(2 * plan.range_blocks)) {
                assert_eq!(range[1], tile_units);
                let mut bytes = 0;
                for unit in units.chunks(2).take(range[0] as usize) {
                    let [group_and_bits, end_and_scale] = blocks[next];
                    let (bits, count) = (unit[0] & 0xff, unit[0] >> 8 & 7);
                    assert_eq!(bits, group_and_bits >> 24);
                    assert_eq!(unit[1] >> 12, group_and_bits & 0xff_ffff);
                    assert_eq!(unit[0] >> 16, end_and_scale >> 16);
                    assert_eq!(unit[1] & 0xfff, count * bits * UNIT_BYTES as u32);
                    assert!(unit[1] & 0xfff <= 2048);
                    bytes += unit[1] & 0xfff;
                    next += count as usize;
                    let group_end = (end_and_scale & 0xffff) as usize;
                    assert!(next <= group_end, "a unit lies in one group");
                    let ends = next == group_end || bytes == range[2];
                    assert_eq!(unit[0] >> 11 & 1 == 1, ends);
                    assert_eq!(unit[0] >> 12 & 1 == 1, bytes == range[2]);
                }
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
        let table = range_table(&blocks, plan, true);
        assert_eq!(table[4 * plan.ranges] & 0xff, KIND_GPTQ);
    }
}
