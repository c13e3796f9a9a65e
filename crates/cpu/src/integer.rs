//! Products of quantised weights and 16-bit activations.
//!
//! Within a segment of at most 128 rows products are summed as integers, exactly; each segment's
//! sum is multiplied by its scale and added in f32, in the order of segments. Both kernels, the
//! one for a single row and the one for many, do precisely that for every (row, output), so a
//! row's bits do not depend on how many rows there are.

use crate::isa::per_isa;
use crate::pack::{BLOCK_ROWS, SEGMENT_BLOCKS, Segment, TILE, block_words, for_each_pair, pair};
use crate::simd::{LANES, Simd};

/// 16-bit pairs of a block's rows.
const PAIRS: usize = BLOCK_ROWS / 2;
/// i32 elements that unpacked segments of [`Simd::TILES`] tiles take at most.
pub(crate) const STAGING_WORDS: usize = 2 * SEGMENT_BLOCKS * PAIRS * LANES;
/// f32 accumulators that the kernel for many rows needs for each row.
pub(crate) const ROW_ACCUMULATORS: usize = 2 * LANES;

/// What a segment's integers are multiplied by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scales {
    /// EXL2: the zero point is half the range of codes.
    Exl2 {
        /// `[tiles, groups]` pairs of words with eight 4-bit codes each.
        codes: *const u32,
        /// `[groups, 16]`: the scale of every code.
        tables: *const f32,
    },
    /// GPTQ.
    Gptq {
        /// `[tiles, groups, 16]` f16.
        scales: *const u16,
        /// `[tiles, groups, 16]`: what is subtracted from codes.
        zeros: *const u8,
    },
}

/// A quantised matrix in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IntegerWeights<'a> {
    /// Blocks, see [`crate::pack`].
    pub(crate) codes: *const i32,
    /// 32-bit words of a tile's blocks.
    pub(crate) tile_words: usize,
    /// Runs of one width and scale, in order.
    pub(crate) segments: &'a [Segment],
    /// Groups of scales.
    pub(crate) groups: usize,
    /// Their scales.
    pub(crate) scales: Scales,
}

/// Quantised rows, one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IntegerRows {
    /// `[rows, in_features]`
    pub(crate) values: *const i16,
    /// `[rows, in_features / 32]`
    pub(crate) sums: *const i32,
    /// `[rows]`
    pub(crate) scales: *const f32,
    /// Input features.
    pub(crate) in_features: usize,
    /// Rows.
    pub(crate) rows: usize,
}

/// Where results go and what is done with them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finish {
    /// `[rows, width]`
    pub(crate) out: *mut f32,
    /// Outputs of a row.
    pub(crate) width: usize,
    /// `[tiles · 16]`, or null.
    pub(crate) bias: *const f32,
    /// `Some(s)`: `out += s · y`, else `out = y`.
    pub(crate) add: Option<f32>,
}

impl Finish {
    /// Stores sixteen results of `row` from output `first` on; those past the width are padding.
    ///
    /// # Safety
    /// As [`Simd`]'s; `out` and `bias` have the extents they state.
    #[inline(always)]
    pub(crate) unsafe fn store<S: Simd>(&self, row: usize, first: usize, y: S::F) {
        // SAFETY: the count keeps within the row.
        unsafe {
            let count = (self.width - first).min(LANES);
            let out = self.out.add(row * self.width + first);
            let mut y = y;
            if !self.bias.is_null() {
                y = S::add(y, S::load(self.bias.add(first)));
            }
            if count == LANES {
                if let Some(scale) = self.add {
                    y = S::fma(S::splat(scale), y, S::load(out));
                }
                S::store(out, y);
            } else {
                if let Some(scale) = self.add {
                    y = S::fma(S::splat(scale), y, S::load_first(out, count));
                }
                S::store_first(out, y, count);
            }
        }
    }
}

/// A group's scales and zero points for one tile.
struct TileScale<S: Simd> {
    scale: S::F,
    /// `None`: the same for all lanes, and already in the sums.
    zero: Option<S::I>,
}

/// # Safety
/// As [`Simd`]'s; `tile` and `segment.group` exist.
#[inline(always)]
unsafe fn tile_scale<S: Simd>(
    weights: &IntegerWeights<'_>,
    tile: usize,
    group: usize,
) -> TileScale<S> {
    let index = tile * weights.groups + group;
    // SAFETY: indices within the extents that `Scales` states.
    unsafe {
        match weights.scales {
            Scales::Exl2 { codes, tables } => TileScale {
                scale: S::lookup_nibbles(tables.add(group * LANES), codes.add(index * 2)),
                zero: None,
            },
            Scales::Gptq { scales, zeros } => TileScale {
                scale: S::load_f16(scales.add(index * LANES)),
                zero: Some(S::load_u8(zeros.add(index * LANES))),
            },
        }
    }
}

/// Σ of a row's activations over a segment.
///
/// # Safety
/// `sums` has an element for each of the matrix's blocks.
#[inline(always)]
unsafe fn segment_sum(sums: *const i32, segment: &Segment) -> i32 {
    let mut total = 0;
    for block in 0..segment.blocks {
        // SAFETY: the segment's blocks exist.
        total += unsafe { *sums.add(segment.first_block + block) };
    }
    total
}

/// What the integer sum starts from: minus the zero point's part where it is one for all lanes.
#[inline(always)]
fn initial_sum(weights: &IntegerWeights<'_>, segment: &Segment, activations: i32) -> i32 {
    match weights.scales {
        Scales::Exl2 { .. } => -(activations << (segment.bits - 1)),
        Scales::Gptq { .. } => 0,
    }
}

/// `scale · (sum − zero · activations) + accumulator`
///
/// # Safety
/// As [`Simd`]'s.
#[inline(always)]
unsafe fn accumulate<S: Simd>(
    scale: &TileScale<S>,
    mut sum: S::I,
    activations: i32,
    accumulator: S::F,
) -> S::F {
    // SAFETY: vector arithmetic only.
    unsafe {
        if let Some(zero) = scale.zero {
            sum = S::sub_i32(sum, S::mul_i32(zero, S::splat_i32(activations)));
        }
        S::fma(scale.scale, S::to_f32(sum), accumulator)
    }
}

/// Bytes ahead of the stream that are asked for. Measured on two cores of a server processor, share
/// of the read bandwidth in decode: 512 bytes 60%, 2 KiB 63%, 6 KiB 71%, 12 KiB 70%, 24 KiB 66%.
const PREFETCH_BYTES: usize = 6144;

/// Σ code · activation over `blocks` blocks for sixteen outputs, from `initial` on.
///
/// # Safety
/// As [`Simd`]'s; `codes` and `x` hold the blocks.
#[inline(always)]
unsafe fn dot_blocks<S: Simd, const BITS: u32>(
    codes: *const i32,
    x: *const i32,
    blocks: usize,
    initial: i32,
) -> S::I {
    // SAFETY: blocks are consecutive in both.
    unsafe {
        let zero = S::splat_i32(0);
        let mut sums = [S::splat_i32(initial), zero, zero, zero];
        for block in 0..blocks {
            let codes = codes.add(block * block_words(BITS));
            let x = x.add(block * PAIRS);
            for line in 0..BITS as usize {
                S::prefetch(codes.cast::<u8>().wrapping_add(PREFETCH_BYTES + line * 64));
            }
            for_each_pair!(S, j, {
                let activations = S::splat_i32(x.add(j as usize).read_unaligned());
                let sum = &mut sums[j as usize % 4];
                *sum = S::dot_16(*sum, pair::<S, BITS>(codes, j), activations);
            });
        }
        S::add_i32(S::add_i32(sums[0], sums[1]), S::add_i32(sums[2], sums[3]))
    }
}

per_isa! {
    /// One row times the tiles `first_tile..end_tile`.
    ///
    /// # Safety
    /// The matrix, the row and the output have the extents they state; nobody else touches these
    /// tiles' outputs.
    pub(crate) unsafe fn one_row(
        weights: &IntegerWeights<'_>,
        rows: IntegerRows,
        row: usize,
        first_tile: usize,
        end_tile: usize,
        finish: Finish,
    ) = one_row_generic;
}

#[inline(always)]
unsafe fn one_row_generic<S: Simd>(
    weights: &IntegerWeights<'_>,
    rows: IntegerRows,
    row: usize,
    first_tile: usize,
    end_tile: usize,
    finish: Finish,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let x = rows.values.add(row * rows.in_features).cast::<i32>();
        let sums = rows.sums.add(row * (rows.in_features / BLOCK_ROWS));
        let row_scale = S::splat(*rows.scales.add(row));
        for tile in first_tile..end_tile {
            let mut codes = weights.codes.add(tile * weights.tile_words);
            let mut accumulator = S::splat(0.0);
            for segment in weights.segments {
                let activations = segment_sum(sums, segment);
                let initial = initial_sum(weights, segment, activations);
                let x = x.add(segment.first_block * PAIRS);
                let blocks = segment.blocks;
                let sum = match segment.bits {
                    8 => dot_blocks::<S, 8>(codes, x, blocks, initial),
                    6 => dot_blocks::<S, 6>(codes, x, blocks, initial),
                    5 => dot_blocks::<S, 5>(codes, x, blocks, initial),
                    4 => dot_blocks::<S, 4>(codes, x, blocks, initial),
                    3 => dot_blocks::<S, 3>(codes, x, blocks, initial),
                    _ => dot_blocks::<S, 2>(codes, x, blocks, initial),
                };
                codes = codes.add(blocks * block_words(segment.bits));
                let scale = tile_scale::<S>(weights, tile, segment.group);
                accumulator = accumulate::<S>(&scale, sum, activations, accumulator);
            }
            finish.store::<S>(row, tile * TILE, S::mul(accumulator, row_scale));
        }
    }
}

/// One thread's scratch for [`many_rows`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scratch {
    /// [`STAGING_WORDS`] elements.
    pub(crate) staging: *mut i32,
    /// [`ROW_ACCUMULATORS`] for each row.
    pub(crate) accumulators: *mut f32,
}

per_isa! {
    /// Any number of rows times the tiles `first_tile..end_tile`.
    ///
    /// # Safety
    /// As [`one_row`]'s; `scratch` is this thread's own and large enough for `rows.rows`.
    pub(crate) unsafe fn many_rows(
        weights: &IntegerWeights<'_>,
        rows: IntegerRows,
        first_tile: usize,
        end_tile: usize,
        finish: Finish,
        scratch: Scratch,
    ) = many_rows_generic;
}

#[inline(always)]
unsafe fn many_rows_generic<S: Simd>(
    weights: &IntegerWeights<'_>,
    rows: IntegerRows,
    first_tile: usize,
    end_tile: usize,
    finish: Finish,
    scratch: Scratch,
) {
    let mut tile = first_tile;
    // SAFETY: the caller's contract.
    unsafe {
        if S::TILES == 2 {
            while tile + 2 <= end_tile {
                tile_rows::<S, 2>(weights, &rows, tile, &finish, &scratch);
                tile += 2;
            }
        }
        while tile < end_tile {
            tile_rows::<S, 1>(weights, &rows, tile, &finish, &scratch);
            tile += 1;
        }
    }
}

/// All rows times `T` neighbouring tiles: each segment is unpacked once and used for every row.
///
/// # Safety
/// As [`many_rows`]'s.
#[inline(always)]
unsafe fn tile_rows<S: Simd, const T: usize>(
    weights: &IntegerWeights<'_>,
    rows: &IntegerRows,
    tile: usize,
    finish: &Finish,
    scratch: &Scratch,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let accumulators = scratch.accumulators;
        std::ptr::write_bytes(accumulators, 0, rows.rows * T * LANES);
        let mut codes = weights.codes.add(tile * weights.tile_words);
        for segment in weights.segments {
            for t in 0..T {
                let from = codes.add(t * weights.tile_words);
                unpack_segment::<S, T>(segment, from, scratch.staging.add(t * LANES));
            }
            codes = codes.add(segment.blocks * block_words(segment.bits));
            let scales: [TileScale<S>; T] =
                std::array::from_fn(|t| tile_scale::<S>(weights, tile + t, segment.group));
            let step = Step {
                weights,
                rows,
                segment,
                staging: scratch.staging,
                accumulators,
            };
            let mut row = 0;
            if S::ROWS == 8 {
                while row + 8 <= rows.rows {
                    step.run::<S, T, 8>(row, &scales);
                    row += 8;
                }
            }
            if S::ROWS >= 4 {
                while row + 4 <= rows.rows {
                    step.run::<S, T, 4>(row, &scales);
                    row += 4;
                }
            }
            while row + 2 <= rows.rows {
                step.run::<S, T, 2>(row, &scales);
                row += 2;
            }
            if row < rows.rows {
                step.run::<S, T, 1>(row, &scales);
            }
        }
        for row in 0..rows.rows {
            let row_scale = S::splat(*rows.scales.add(row));
            for t in 0..T {
                let sum = S::load(accumulators.add((row * T + t) * LANES));
                finish.store::<S>(row, (tile + t) * TILE, S::mul(sum, row_scale));
            }
        }
    }
}

/// A segment's codes as pairs, one vector every `T`.
///
/// # Safety
/// As [`Simd`]'s; `codes` holds the segment's blocks, `out` has room for its pairs.
#[inline(always)]
unsafe fn unpack_segment<S: Simd, const T: usize>(
    segment: &Segment,
    codes: *const i32,
    out: *mut i32,
) {
    macro_rules! unpack {
        ($bits:literal) => {
            for block in 0..segment.blocks {
                // SAFETY: the segment's blocks are consecutive.
                unsafe {
                    let codes = codes.add(block * block_words($bits));
                    let out = out.add(block * PAIRS * T * LANES);
                    for_each_pair!(S, j, {
                        let to = out.add(j as usize * T * LANES);
                        S::store_i32(to, pair::<S, $bits>(codes, j));
                    });
                }
            }
        };
    }
    match segment.bits {
        8 => unpack!(8),
        6 => unpack!(6),
        5 => unpack!(5),
        4 => unpack!(4),
        3 => unpack!(3),
        _ => unpack!(2),
    }
}

/// One unpacked segment against the rows.
struct Step<'a> {
    weights: &'a IntegerWeights<'a>,
    rows: &'a IntegerRows,
    segment: &'a Segment,
    /// `[pairs, T, 16]`
    staging: *const i32,
    /// `[rows, T, 16]`
    accumulators: *mut f32,
}

impl Step<'_> {
    /// `R` rows from `row` on.
    ///
    /// # Safety
    /// As [`many_rows`]'s; the rows exist.
    #[inline(always)]
    unsafe fn run<S: Simd, const T: usize, const R: usize>(
        &self,
        row: usize,
        scales: &[TileScale<S>; T],
    ) {
        let in_features = self.rows.in_features;
        let blocks_of_row = in_features / BLOCK_ROWS;
        // SAFETY: rows and segment exist, so every index below is within its extent.
        unsafe {
            let mut activations = [0_i32; R];
            let mut x = [std::ptr::null::<i32>(); R];
            let mut sums = [[S::splat_i32(0); T]; R];
            for r in 0..R {
                let sums_of_row = self.rows.sums.add((row + r) * blocks_of_row);
                activations[r] = segment_sum(sums_of_row, self.segment);
                let initial = initial_sum(self.weights, self.segment, activations[r]);
                sums[r] = [S::splat_i32(initial); T];
                let values = self.rows.values.add((row + r) * in_features);
                x[r] = values.cast::<i32>().add(self.segment.first_block * PAIRS);
            }
            for p in 0..self.segment.blocks * PAIRS {
                let mut codes = [S::splat_i32(0); T];
                for (t, codes) in codes.iter_mut().enumerate() {
                    *codes = S::load_i32(self.staging.add((p * T + t) * LANES));
                }
                for r in 0..R {
                    let x = S::splat_i32(x[r].add(p).read_unaligned());
                    for t in 0..T {
                        sums[r][t] = S::dot_16(sums[r][t], codes[t], x);
                    }
                }
            }
            for r in 0..R {
                for t in 0..T {
                    let at = self.accumulators.add(((row + r) * T + t) * LANES);
                    let sum = accumulate::<S>(&scales[t], sums[r][t], activations[r], S::load(at));
                    S::store(at, sum);
                }
            }
        }
    }
}
