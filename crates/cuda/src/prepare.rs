//! Rows as linears take them: fp16, normed or gated, in the order of a linear's inputs.

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::{Activation, DeviceError, Norm, NormKind};

use crate::buffer::CudaBuffer;
use crate::context::GpuInfo;
use crate::device::CudaDevice;
use crate::error::CudaUnavailable;
use crate::launch::Launch;
use crate::linear::ROWS_OF_CHUNK;
use crate::module::{Kernel, Modules};

/// Most outputs of one launch; `MOST_PREPARED` in `prepare.cu`.
pub(crate) const MOST_PREPARED: usize = 3;

/// Threads of a block of `oxl_prepare`, each of which writes four places, and of
/// `oxl_prepare_gather` where there are rows for all multiprocessors.
const THREADS: usize = 256;

/// Most threads of a block of `oxl_prepare_gather`.
const GATHER_THREADS: usize = 768;

/// Shared memory of a block that is not a row's: sums.
const STATIC_SHARED_BYTES: usize = 1024;

/// How fp16 rows of a linear's inputs lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowLayout {
    /// `[rows, padded_width]`
    Plain,
    /// `[padded_width / 64, rows rounded up to `[`ROWS_OF_CHUNK`]`, 64]`, within which places have the
    /// order of `chunks.cuh`.
    Chunks,
}

impl RowLayout {
    /// Places of a row of so many elements, zeros at the end.
    pub(crate) fn padded_width(self, width: usize) -> usize {
        width.next_multiple_of(match self {
            Self::Plain => 32,
            Self::Chunks => 64,
        })
    }

    /// Places of all of `rows` rows.
    pub(crate) fn places(self, rows: usize, padded_width: usize) -> usize {
        padded_width
            * match self {
                Self::Plain => rows,
                Self::Chunks => rows.next_multiple_of(ROWS_OF_CHUNK),
            }
    }
}

/// What [`CudaDevice::prepare`] makes fp16 rows of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prepare<'a> {
    /// f32 `[rows, width]`; or f16
    pub(crate) x: &'a CudaBuffer,
    /// Whether `x` is f16, of a width that [`PrepareKernels::takes_halves`]: with [`RowLayout::Chunks`], no gate and
    /// no norm.
    pub(crate) is_half: bool,
    /// f32 `[rows, width]`: the rows are `activation(gate) ⊙ x`.
    pub(crate) gate: Option<(Activation, &'a CudaBuffer)>,
    /// Applied at last; of `width` elements.
    pub(crate) norm: Option<&'a Norm<CudaBuffer>>,
    /// How many rows.
    pub(crate) rows: usize,
    /// Elements of a row.
    pub(crate) width: usize,
    /// Places of a row of fp16 ([`RowLayout::padded_width`]); zeros from `width` on.
    pub(crate) padded_width: usize,
    /// How they lie.
    pub(crate) layout: RowLayout,
}

/// One linear's input.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PreparedRows {
    /// u32 `[width]`, 16-byte aligned: which element each place takes. `None`: its own.
    ///
    /// Like norms' weights it is read before earlier kernels have ended: it must have been
    /// written before the step.
    pub(crate) permutation: Option<CUdeviceptr>,
    /// f16 rows, 128-byte aligned.
    pub(crate) out: CUdeviceptr,
}

/// `PrepareArgs` of `prepare.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct PrepareArgs {
    x: CUdeviceptr,
    gate: CUdeviceptr,
    norm_weight: CUdeviceptr,
    norm_bias: CUdeviceptr,
    permutations: [CUdeviceptr; MOST_PREPARED],
    outs: [CUdeviceptr; MOST_PREPARED],
    width: i32,
    padded_width: i32,
    norm_kind: i32,
    activation: i32,
    epsilon: f32,
    row_stride: i32,
}

/// The entries of `prepare.cu` for one layout of rows.
#[derive(Debug)]
struct Entries {
    spread: Kernel,
    gather: Kernel,
    row: Kernel,
    wide_row: Kernel,
}

/// The entries of `prepare.cu`.
#[derive(Debug)]
pub(crate) struct PrepareKernels {
    plain: Entries,
    chunks: Entries,
    gather_halves: Kernel,
    /// The widest row that `row` can hold.
    widest_row: usize,
}

impl PrepareKernels {
    pub(crate) fn find(modules: &Modules, gpu: &GpuInfo) -> Result<Self, CudaUnavailable> {
        let shared_bytes = gpu.shared_per_block.get() as usize - STATIC_SHARED_BYTES;
        let entries = |[spread, gather, row, wide_row]: [&'static str; 4]| {
            Ok(Entries {
                spread: modules.kernel("prepare", spread, 0)?,
                gather: modules.kernel("prepare", gather, shared_bytes)?,
                row: modules.kernel("prepare", row, shared_bytes)?,
                wide_row: modules.kernel("prepare", wide_row, 0)?,
            })
        };
        Ok(Self {
            plain: entries([
                "oxl_prepare",
                "oxl_prepare_gather",
                "oxl_prepare_row",
                "oxl_prepare_wide_row",
            ])?,
            chunks: entries([
                "oxl_prepare_chunks",
                "oxl_prepare_gather_chunks",
                "oxl_prepare_row_chunks",
                "oxl_prepare_wide_row_chunks",
            ])?,
            gather_halves: modules.kernel("prepare", "oxl_prepare_gather_halves", shared_bytes)?,
            // Whole vectors of four.
            widest_row: shared_bytes / 16 * 4,
        })
    }

    /// Whether rows of so many f16 can be prepared.
    pub(crate) fn takes_halves(&self, width: usize) -> bool {
        width.is_multiple_of(32) && width <= self.widest_row
    }
}

/// Which entry prepares the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// Several blocks a row, which read what they write: no norm.
    Spread,
    /// A block has the row in shared memory as fp16: no norm.
    Gather,
    /// Each block has the row in shared memory: a norm.
    Row,
    /// Each block reads the row again where it needs it: a norm of very wide rows.
    WideRow,
}

/// Threads of a block that owns a row of `width` elements: eight elements each, until there
/// are no more threads. A norm's sums are added in an order that depends on this number.
pub(crate) fn row_threads(width: usize) -> usize {
    width.div_ceil(8).next_multiple_of(32).clamp(32, 1024)
}

/// What the choice of an entry and its launch depend on.
#[derive(Debug, Clone, Copy)]
struct Shape {
    rows: usize,
    width: usize,
    padded_width: usize,
    outputs: usize,
    has_norm: bool,
    is_permuted: bool,
    is_half: bool,
}

/// The entry for such rows, and its launch.
///
/// What a row becomes does not depend on the entry where there is no norm, and the entry for a
/// norm depends on the width alone.
fn plan(shape: &Shape, widest_row: usize) -> (Entry, Launch) {
    /// Up to so many rows and numbers, random reads from the L2 cost less than the wait for a whole
    /// row, not least because small blocks find room beside a product's.
    const FEW_ROWS: usize = 16;
    const FEW_ELEMENTS: usize = 1 << 18;
    /// From here on there is a row for every multiprocessor, and what counts is how many rows each
    /// can have under way; with fewer, several blocks share a row.
    const MANY_ROWS: usize = 128;
    let fits = shape.width <= widest_row;
    let is_little = shape.rows <= FEW_ROWS && shape.rows * shape.width <= FEW_ELEMENTS;
    let entry = if shape.has_norm {
        if fits { Entry::Row } else { Entry::WideRow }
    } else if shape.is_half || shape.is_permuted && !is_little && fits {
        Entry::Gather
    } else {
        Entry::Spread
    };
    // Blocks that would otherwise not be there each write a part of a row: fewer where each of them
    // computes the whole row's activations again.
    let most_blocks = if shape.has_norm { 128 } else { 64 };
    let slices = (shape.padded_width / 1024).min(most_blocks / shape.rows.max(1));
    let (blocks, threads) = match entry {
        Entry::Spread => (shape.padded_width.div_ceil(4 * THREADS), THREADS),
        Entry::Gather if shape.rows >= MANY_ROWS => (1, THREADS),
        Entry::Gather => (
            slices.clamp(1, 8),
            row_threads(shape.width).min(GATHER_THREADS),
        ),
        Entry::Row | Entry::WideRow => (slices.clamp(1, 8), row_threads(shape.width)),
    };
    let shared_bytes = match entry {
        Entry::Gather => shape.width.next_multiple_of(4) * size_of::<u16>(),
        Entry::Row => shape.width.next_multiple_of(4) * size_of::<f32>(),
        Entry::Spread | Entry::WideRow => 0,
    };
    let launch = Launch {
        grid: [shape.rows, blocks, shape.outputs],
        block: [threads, 1, 1],
        shared_bytes,
    };
    (entry, launch)
}

/// As `rows.cuh` numbers them.
pub(crate) fn activation_number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::GeluErf => 2,
    }
}

/// As `rows.cuh` numbers them.
pub(crate) fn norm_number(kind: NormKind) -> i32 {
    match kind {
        NormKind::Rms => 0,
        NormKind::Layer => 1,
    }
}

/// Address of a norm's bias, zero without.
pub(crate) fn bias_address(norm: &Norm<CudaBuffer>) -> CUdeviceptr {
    let bias = norm.bias.as_ref();
    bias.map_or(0, |bias| bias.floats(norm.width))
}

impl CudaDevice {
    /// Writes `args`' rows as fp16 to each of `outputs`, one to [`MOST_PREPARED`], in one launch:
    /// clamped to ±65,504, NaN kept.
    ///
    /// # Safety
    /// What the addresses of `outputs` point to is as large as they say and stays allocated
    /// until the stream has passed this; permutations are below the width.
    pub(crate) unsafe fn prepare(
        &self,
        args: Prepare<'_>,
        outputs: &[PreparedRows],
    ) -> Result<(), DeviceError> {
        assert_eq!(
            args.padded_width,
            args.layout.padded_width(args.width),
            "places of rows of {} elements",
            args.width
        );
        assert!(
            args.gate.is_none() || args.norm.is_none(),
            "rows are gated or normed"
        );
        assert!(
            !args.is_half || args.layout == RowLayout::Chunks && args.gate.is_none(),
            "halves are gated"
        );
        let elements = args.rows * args.width;
        let (activation, gate) = args.gate.map_or((0, 0), |(activation, gate)| {
            (activation_number(activation), gate.floats(elements))
        });
        let (norm_weight, norm_bias) = args.norm.map_or((0, 0), |norm| {
            assert_eq!(norm.width, args.width, "a norm of another width");
            (norm.weight.floats(norm.width), bias_address(norm))
        });
        let kernels = &self.kernels().prepare;
        let shape = Shape {
            rows: args.rows,
            width: args.width,
            padded_width: args.padded_width,
            outputs: outputs.len(),
            has_norm: args.norm.is_some(),
            is_permuted: outputs.iter().any(|output| output.permutation.is_some()),
            is_half: args.is_half,
        };
        let (entry, launch) = plan(&shape, kernels.widest_row);
        let entries = match args.layout {
            RowLayout::Plain => &kernels.plain,
            RowLayout::Chunks => &kernels.chunks,
        };
        let kernel = match entry {
            Entry::Spread => entries.spread,
            Entry::Gather if args.is_half => kernels.gather_halves,
            Entry::Gather => entries.gather,
            Entry::Row => entries.row,
            Entry::WideRow => entries.wide_row,
        };
        let mut permutations = [0; MOST_PREPARED];
        let mut outs = [0; MOST_PREPARED];
        for (index, output) in outputs.iter().enumerate() {
            permutations[index] = output.permutation.unwrap_or(0);
            outs[index] = output.out;
        }
        let args = PrepareArgs {
            x: args.x.floats(elements),
            gate,
            norm_weight,
            norm_bias,
            permutations,
            outs,
            width: args.width as i32,
            padded_width: args.padded_width as i32,
            norm_kind: args.norm.map_or(0, |norm| norm_number(norm.kind)),
            activation,
            epsilon: args.norm.map_or(0.0, |norm| norm.epsilon),
            row_stride: args.rows.next_multiple_of(ROWS_OF_CHUNK) as i32,
        };
        // SAFETY: the structure is the kernel's; buffers hold what was asked of them above, and
        // the rest is the caller's promise.
        unsafe { self.launch(kernel, launch, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As on a GPU with 99 KiB a block.
    const WIDEST_ROW: usize = (99 * 1024 - STATIC_SHARED_BYTES) / 16 * 4;

    fn shape(rows: usize, width: usize) -> Shape {
        Shape {
            rows,
            width,
            padded_width: width.next_multiple_of(32),
            outputs: 1,
            has_norm: true,
            is_permuted: true,
            is_half: false,
        }
    }

    #[test]
    fn a_norms_entry_and_threads_depend_on_the_width_alone() {
        for width in [1, 37, 576, 4096, 5120, 11_008, 25_088, 65_536] {
            let (entry, launch) = plan(&shape(1, width), WIDEST_ROW);
            for rows in [2, 8, 9, 64, 65, 4096] {
                let (other_entry, other_launch) = plan(&shape(rows, width), WIDEST_ROW);
                assert_eq!(
                    (other_entry, other_launch.block),
                    (entry, launch.block),
                    "{rows} rows of {width}"
                );
            }
        }
        assert_eq!(plan(&shape(1, 25_088), WIDEST_ROW).0, Entry::Row);
        assert_eq!(plan(&shape(1, 25_092), WIDEST_ROW).0, Entry::WideRow);
    }

    #[test]
    fn every_launch_covers_its_rows_within_the_limits() {
        for has_norm in [false, true] {
            for is_permuted in [false, true] {
                for rows in [1, 3, 8, 9, 32, 100, 128, 129, 70_000] {
                    for width in [1, 50, 1024, 4096, 14_336, 28_672, 65_536] {
                        let shape = Shape {
                            has_norm,
                            is_permuted,
                            ..shape(rows, width)
                        };
                        let (entry, launch) = plan(&shape, WIDEST_ROW);
                        let [x, y, z] = launch.grid;
                        assert_eq!((x, z), (rows, 1), "{shape:?}");
                        assert!((1..=65_535).contains(&y), "{shape:?}: {launch:?}");
                        assert!(launch.block[0] % 32 == 0 && launch.block[0] <= 1024);
                        assert!(launch.shared_bytes <= 98 * 1024, "{shape:?}: {launch:?}");
                        match entry {
                            Entry::Spread => {
                                assert!(!has_norm && 4 * THREADS * y >= shape.padded_width);
                            }
                            Entry::Gather => {
                                assert!(!has_norm && y <= shape.padded_width / 4);
                                assert!(launch.block[0] <= GATHER_THREADS);
                                assert!(launch.shared_bytes >= width * size_of::<u16>());
                            }
                            // Every slice has places: they are dealt in fours.
                            Entry::Row => {
                                assert!(has_norm && y <= shape.padded_width / 4);
                                assert!(launch.shared_bytes >= width * size_of::<f32>());
                            }
                            Entry::WideRow => assert!(has_norm && width > WIDEST_ROW),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_without_a_norm_are_spread_over_blocks() {
        let shape = |rows, is_permuted| Shape {
            has_norm: false,
            is_permuted,
            ..shape(rows, 11_008)
        };
        assert_eq!(plan(&shape(1, true), WIDEST_ROW).0, Entry::Spread);
        assert_eq!(plan(&shape(16, true), WIDEST_ROW).0, Entry::Spread);
        let wide = Shape {
            width: 22_016,
            padded_width: 22_016,
            ..shape(16, true)
        };
        assert_eq!(plan(&wide, WIDEST_ROW).0, Entry::Gather);
        let (entry, launch) = plan(&shape(32, true), WIDEST_ROW);
        assert_eq!((entry, launch.grid), (Entry::Gather, [32, 2, 1]));
        assert_eq!(plan(&shape(128, true), WIDEST_ROW).0, Entry::Gather);
        assert_eq!(plan(&shape(64, false), WIDEST_ROW).0, Entry::Spread);
    }

    #[test]
    fn the_structure_has_the_kernels_size() {
        assert_eq!(size_of::<PrepareArgs>(), 10 * 8 + 6 * 4);
    }
}
