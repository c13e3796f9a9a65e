//! The order in which quantised weights lie in memory, and how they get there.
//!
//! A *tile* is sixteen outputs. Its codes come in blocks of 32 input rows, all blocks of a tile
//! one after the other, so that a thread that computes some tiles streams one range of memory.
//! Within a block of `b` bits there are `b` vectors of sixteen 32-bit words, one lane for each
//! output. A word holds codes of two neighbouring rows at a time: of the even row in its low
//! half, of the odd row in its high half, so that a shift and a mask of 16-bit lanes leave a pair
//! that multiplies a pair of activations. Widths that do not divide 16 are split into planes
//! that do: 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1, the plane of the low bits first. So a weight takes
//! exactly the bits that the file stores.

use crate::isa::per_isa;
use crate::simd::{LANES, Simd};

/// Outputs of a tile.
pub(crate) const TILE: usize = LANES;
/// Input rows of a block.
pub(crate) const BLOCK_ROWS: usize = 32;
/// Most blocks whose integer sums cannot leave i32: 255 · 32767 · 128 < 2³¹.
pub(crate) const SEGMENT_BLOCKS: usize = 4;

/// A run of blocks with one width and one scale per output: a group, or a part of a long one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub(crate) bits: u32,
    /// Blocks, 1 to [`SEGMENT_BLOCKS`].
    pub(crate) blocks: usize,
    /// The group whose scales apply.
    pub(crate) group: usize,
    /// First block of the segment, counted over the whole matrix.
    pub(crate) first_block: usize,
}

/// Appends a group's segments.
pub(crate) fn push_group(segments: &mut Vec<Segment>, bits: u32, group: usize, rows: usize) {
    let mut first_block = segments
        .last()
        .map_or(0, |last| last.first_block + last.blocks);
    let mut left = rows / BLOCK_ROWS;
    while left > 0 {
        let blocks = left.min(SEGMENT_BLOCKS);
        segments.push(Segment {
            bits,
            blocks,
            group,
            first_block,
        });
        first_block += blocks;
        left -= blocks;
    }
}

/// Words of one block of a tile.
pub(crate) const fn block_words(bits: u32) -> usize {
    bits as usize * TILE
}

/// The planes of a width: bits and position of each, low bits first.
const fn planes(bits: u32) -> &'static [(u32, u32)] {
    match bits {
        8 => &[(8, 0)],
        6 => &[(4, 0), (2, 4)],
        5 => &[(4, 0), (1, 4)],
        4 => &[(4, 0)],
        3 => &[(2, 0), (1, 2)],
        _ => &[(2, 0)],
    }
}

/// Where a matrix's stored words are and where its blocks go.
#[derive(Clone, Copy)]
pub(crate) struct Repack {
    /// `[bits, columns]` words as EXL2 stores 32 rows: each column a bit stream.
    pub(crate) words: *const u32,
    /// Columns of the source.
    pub(crate) columns: usize,
    /// The block's place in the first tile.
    pub(crate) block: *mut u32,
    /// Words from one tile to the next.
    pub(crate) tile_words: usize,
}

per_isa! {
    /// Repacks one block of 32 rows for all tiles. Columns past the last whole tile are padded
    /// with zero codes.
    ///
    /// # Safety
    /// `words` holds `bits · columns` words, and every tile has room for the block.
    pub(crate) unsafe fn repack_block(bits: u32, repack: Repack) = repack_block_generic;
}

#[inline(always)]
unsafe fn repack_block_generic<S: Simd>(bits: u32, repack: Repack) {
    // SAFETY: the caller's contract.
    unsafe {
        match bits {
            8 => repack_tiles::<S, 8>(repack),
            6 => repack_tiles::<S, 6>(repack),
            5 => repack_tiles::<S, 5>(repack),
            4 => repack_tiles::<S, 4>(repack),
            3 => repack_tiles::<S, 3>(repack),
            _ => repack_tiles::<S, 2>(repack),
        }
    }
}

#[inline(always)]
unsafe fn repack_tiles<S: Simd, const BITS: usize>(repack: Repack) {
    let Repack {
        words,
        columns,
        block,
        tile_words,
    } = repack;
    for tile in 0..columns.div_ceil(TILE) {
        let width = (columns - tile * TILE).min(TILE);
        let mut source = [[0_u32; LANES]; BITS];
        // SAFETY: word row `row` has `columns` words, of which `width` are left from this tile
        // on; the tile's block has BITS vectors.
        unsafe {
            for (row, source) in source.iter_mut().enumerate() {
                let from = words.add(row * columns + tile * TILE);
                if width == TILE {
                    *source = from.cast::<[u32; LANES]>().read_unaligned();
                } else {
                    std::ptr::copy_nonoverlapping(from, source.as_mut_ptr(), width);
                }
            }
            let packed = pack_lanes::<BITS>(&source);
            let to = block.add(tile * tile_words);
            to.cast::<[[u32; LANES]; BITS]>().write_unaligned(packed);
        }
    }
}

/// Bit streams down 32 rows, sixteen side by side, to planes of row pairs.
#[inline(always)]
fn pack_lanes<const BITS: usize>(source: &[[u32; LANES]; BITS]) -> [[u32; LANES]; BITS] {
    let mut packed = [[0_u32; LANES]; BITS];
    let mask = (1_u32 << BITS) - 1;
    for row in 0..BLOCK_ROWS {
        let (word, shift) = (row * BITS / 32, row * BITS % 32);
        let mut codes = source[word];
        for code in &mut codes {
            *code >>= shift;
        }
        if shift + BITS > 32 {
            for (code, high) in codes.iter_mut().zip(source[word + 1]) {
                *code |= high << (32 - shift);
            }
        }
        let mut first_word = 0;
        for &(plane_bits, position) in planes(BITS as u32) {
            let pairs_per_word = 16 / plane_bits as usize;
            let pair = row / 2;
            let to_word = first_word + pair / pairs_per_word;
            let to_bit = (pair % pairs_per_word) as u32 * plane_bits + 16 * (row as u32 % 2);
            let plane_mask = (1_u32 << plane_bits) - 1;
            for (out, code) in packed[to_word].iter_mut().zip(codes) {
                *out |= (((code & mask) >> position) & plane_mask) << to_bit;
            }
            first_word += plane_bits as usize;
        }
    }
    packed
}

/// A field of `bits` bits at bit `at` of each half of a word.
///
/// # Safety
/// As [`Simd`]'s; `block` holds the word's vector.
#[inline(always)]
unsafe fn field<S: Simd>(block: *const i32, word: u32, bits: u32, at: u32) -> S::I {
    // SAFETY: the caller's contract.
    unsafe {
        let words = S::load_i32(block.add(word as usize * LANES));
        let mask = S::splat_i32(((1_i32 << bits) - 1) * 0x0001_0001);
        if at == 0 {
            S::and(words, mask)
        } else if at + bits == 16 {
            S::shift_right_16(words, at)
        } else {
            S::and(S::shift_right_16(words, at), mask)
        }
    }
}

/// A higher plane's field, moved from bit `from` to bit `to` of its half and merged over `low`.
///
/// # Safety
/// As [`Simd`]'s; `words` points to a vector.
#[inline(always)]
unsafe fn merge<S: Simd>(low: S::I, words: *const i32, bits: u32, from: u32, to: u32) -> S::I {
    // SAFETY: the caller's contract.
    unsafe {
        let words = S::load_i32(words);
        let mask = S::splat_i32((((1_i32 << bits) - 1) << to) * 0x0001_0001);
        let moved = if from > to {
            S::shift_right_16(words, from - to)
        } else if from < to {
            S::shift_left_16(words, to - from)
        } else {
            words
        };
        S::and_or(moved, mask, low)
    }
}

/// The codes of rows `2 j` and `2 j + 1` of a block as 16-bit halves, for sixteen outputs.
///
/// (No closures here: they would not be inlined into functions with other target features.)
///
/// # Safety
/// As [`Simd`]'s; `block` holds the block's `16 · BITS` words.
#[inline(always)]
pub(crate) unsafe fn pair<S: Simd, const BITS: u32>(block: *const i32, j: u32) -> S::I {
    // SAFETY: word indices stay below BITS.
    unsafe {
        match BITS {
            8 => field::<S>(block, j / 2, 8, 8 * (j % 2)),
            6 => {
                let low = field::<S>(block, j / 4, 4, 4 * (j % 4));
                let high = block.add((4 + j as usize / 8) * LANES);
                merge::<S>(low, high, 2, 2 * (j % 8), 4)
            }
            5 => {
                let low = field::<S>(block, j / 4, 4, 4 * (j % 4));
                merge::<S>(low, block.add(4 * LANES), 1, j, 4)
            }
            4 => field::<S>(block, j / 4, 4, 4 * (j % 4)),
            3 => {
                let low = field::<S>(block, j / 8, 2, 2 * (j % 8));
                merge::<S>(low, block.add(2 * LANES), 1, j, 2)
            }
            _ => field::<S>(block, j / 8, 2, 2 * (j % 8)),
        }
    }
}

/// Repeats a block of statements for the pairs 0 to 15 of a block: with constants, which become
/// immediate shifts, where the level unrolls.
macro_rules! for_each_pair {
    ($level:ty, $j:ident, $body:block) => {
        if <$level>::UNROLL {
            $crate::pack::for_each_pair!(@ $j, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        } else {
            for $j in 0..16_u32 {
                $body
            }
        }
    };
    (@ $j:ident, $body:block, $($n:literal)*) => {
        $( { let $j: u32 = $n; $body } )*
    };
}
pub(crate) use for_each_pair;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    /// Unpacks a block to its pairs, through the kernels' own function.
    unsafe fn pairs_generic<S: Simd>(bits: u32, block: *const i32, out: *mut i32) {
        macro_rules! unpack {
            ($bits:literal) => {
                for_each_pair!(S, j, {
                    // SAFETY: the test passes a whole block and room for sixteen vectors.
                    unsafe {
                        S::store_i32(out.add(j as usize * LANES), pair::<S, $bits>(block, j));
                    }
                })
            };
        }
        match bits {
            8 => unpack!(8),
            6 => unpack!(6),
            5 => unpack!(5),
            4 => unpack!(4),
            3 => unpack!(3),
            _ => unpack!(2),
        }
    }
    per_isa! {
        unsafe fn pairs(bits: u32, block: *const i32, out: *mut i32) = pairs_generic;
    }

    #[test]
    fn every_code_comes_back_in_its_lane_and_half() {
        for isa in Isa::available() {
            for bits in [2_u32, 3, 4, 5, 6, 8] {
                for columns in [8_usize, 16, 24, 32] {
                    check_block(isa, bits, columns);
                }
            }
        }
    }

    fn check_block(isa: Isa, bits: u32, columns: usize) {
        let code = |row: usize, column: usize| {
            ((row * 37 + column * 11 + row * column) as u32) & ((1 << bits) - 1)
        };
        let mut words = vec![0_u32; bits as usize * columns];
        for column in 0..columns {
            for bit in 0..32 * bits as usize {
                let set = code(bit / bits as usize, column) >> (bit % bits as usize) & 1;
                words[bit / 32 * columns + column] |= set << (bit % 32);
            }
        }
        let tiles = columns.div_ceil(TILE);
        let tile_words = block_words(bits);
        let mut packed = vec![0_u32; tiles * tile_words];
        let repack = Repack {
            words: words.as_ptr(),
            columns,
            block: packed.as_mut_ptr(),
            tile_words,
        };
        // SAFETY: the buffers have the sizes that the contract asks for.
        unsafe { repack_block(isa, bits, repack) };
        for tile in 0..tiles {
            let mut out = [0_i32; 16 * LANES];
            // SAFETY: a whole block in, sixteen vectors out.
            unsafe {
                let block = packed.as_ptr().add(tile * tile_words).cast();
                pairs(isa, bits, block, out.as_mut_ptr());
            }
            for row in 0..BLOCK_ROWS {
                for lane in 0..TILE {
                    let column = tile * TILE + lane;
                    let expected = if column < columns {
                        code(row, column)
                    } else {
                        0
                    };
                    let found = out[row / 2 * LANES + lane] as u32 >> (16 * (row % 2)) & 0xFFFF;
                    assert_eq!(found, expected, "{isa:?} {bits} bits, row {row}, {column}");
                }
            }
        }
    }

    #[test]
    fn long_groups_are_cut_into_segments() {
        let mut segments = Vec::new();
        push_group(&mut segments, 8, 0, 32);
        push_group(&mut segments, 4, 1, 320);
        let blocks: Vec<usize> = segments.iter().map(|segment| segment.blocks).collect();
        assert_eq!(blocks, [1, 4, 4, 2]);
        assert_eq!(segments[3].first_block, 9);
    }
}
