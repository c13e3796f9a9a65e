//! Enqueues products of fp16 rows in packed order with loaded weights.

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::{Activation, DeviceError, Store};

use super::blaslt::Product;
use super::handover::Reader;
use super::layout::{TILE_OUTPUTS, TileMatrix};
use super::many::ManyKernels;
use super::plan::{
    CLUSTER_PARTS, CLUSTER_WARPS, Division, Kind, LaunchShape, Limits, ROWS_OF_TILE,
    most_shared_bytes,
};
use super::scratch::{LinearScratch, ManyRows};
use super::{CudaLinear, MOST_MATRICES};
use crate::context::GpuInfo;
use crate::device::CudaDevice;
use crate::error::CudaUnavailable;
use crate::launch::Launch;
use crate::module::{Kernel, Modules};
use crate::prepare::{RowLayout, activation_number};

/// Warps of a block of `oxl_dequantise`, and the blocks of weights that one takes.
const DEQUANTISE_WARPS: usize = 8;
const DEQUANTISE_BLOCKS: usize = 4;

/// Threads of a block of `oxl_add_bias`.
const BIAS_THREADS: usize = 256;

/// Most blocks of a grid's second extent.
const MOST_GRID_ROWS: usize = 65_535;

/// `LinearMatrix` of `linear.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct LinearMatrix {
    matrix: TileMatrix,
    x: CUdeviceptr,
    bias: CUdeviceptr,
    out: CUdeviceptr,
    out_features: i32,
    first_item: i32,
    reserved: [i32; 2],
}

/// `LinearArgs` of `linear.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct LinearArgs {
    partials: CUdeviceptr,
    counters: CUdeviceptr,
    gated: CUdeviceptr,
    gated_places: CUdeviceptr,
    matrix_count: i32,
    rows: i32,
    accumulate: i32,
    store_scale: f32,
    ranges_shift: i32,
    first_item: i32,
    items: i32,
    blocks: i32,
    range_blocks: i32,
    range_units: i32,
    tile_buffers: i32,
    parts_shift: i32,
    part_blocks: i32,
    gate: i32,
    matrices: [LinearMatrix; MOST_MATRICES],
}

/// `DequantiseArgs` of `dequantise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct DequantiseArgs {
    matrix: TileMatrix,
    out: CUdeviceptr,
    first_tile: i32,
    tiles: i32,
}

/// `AddBiasArgs` of `dequantise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AddBiasArgs {
    bias: CUdeviceptr,
    out: CUdeviceptr,
    rows: i32,
    width: i32,
    scale: f32,
    reserved: i32,
}

/// The entries of `linear.cu`, `linear_parts.cu`, `dequantise.cu` and `repack.cu`.
#[derive(Debug)]
pub(crate) struct LinearKernels {
    /// Up to 8 rows, whose activations a multiprocessor has room for.
    few: Kernel,
    /// The same of gate and up.
    few_gated: Kernel,
    /// Up to 8, 16, 24 and 32 rows.
    parts: [Kernel; 4],
    /// The same by clusters, where there are such kernels.
    cluster: Option<ClusterKernels>,
    /// More than [`ManyRows::few_rows`], where there are such kernels.
    pub(super) many: Option<ManyKernels>,
    dequantise: Kernel,
    add_bias: Kernel,
    pub(super) repack_exl2: Kernel,
    pub(super) repack_gptq: Kernel,
    pub(super) repack_float: Kernel,
    pub(super) repack_exl2_scales: Kernel,
    pub(super) repack_gptq_scales: Kernel,
}

impl LinearKernels {
    pub(crate) fn find(modules: &Modules, gpu: &GpuInfo) -> Result<Self, CudaUnavailable> {
        let shared_bytes = most_shared_bytes(gpu);
        let parts = |name| modules.kernel("linear_parts", name, shared_bytes);
        let repack = |name| modules.kernel("repack", name, 0);
        Ok(Self {
            few: modules.kernel("linear", "oxl_linear_few", shared_bytes)?,
            few_gated: modules.kernel("linear", "oxl_linear_few_gated", shared_bytes)?,
            parts: [
                parts("oxl_linear_8")?,
                parts("oxl_linear_16")?,
                parts("oxl_linear_24")?,
                parts("oxl_linear_32")?,
            ],
            cluster: ClusterKernels::find(modules, gpu)?,
            many: ManyKernels::find(modules, gpu)?,
            dequantise: modules.kernel("dequantise", "oxl_dequantise", 0)?,
            add_bias: modules.kernel("dequantise", "oxl_add_bias", 0)?,
            repack_exl2: repack("oxl_repack_exl2")?,
            repack_gptq: repack("oxl_repack_gptq")?,
            repack_float: repack("oxl_repack_float")?,
            repack_exl2_scales: repack("oxl_repack_exl2_scales")?,
            repack_gptq_scales: repack("oxl_repack_gptq_scales")?,
        })
    }

    /// `None` for a cluster where the GPU has no such kernels: no division is one there ([`Limits::clusters`]).
    fn of_division(&self, division: Division, is_gated: bool) -> Option<Kernel> {
        let row_tiles = division.rows.div_ceil(ROWS_OF_TILE);
        match division.kind {
            Kind::Few { .. } if is_gated => Some(self.few_gated),
            Kind::Few { .. } => Some(self.few),
            Kind::Parts {
                in_cluster: false, ..
            } => Some(self.parts[row_tiles - 1]),
            Kind::Parts { .. } if is_gated => Some(self.cluster?.gated),
            Kind::Parts { .. } => Some(self.cluster?.kernels[row_tiles - 2]),
        }
    }
}

/// The entries of `linear_cluster.cu`.
#[derive(Debug, Clone, Copy)]
struct ClusterKernels {
    /// 9 to 16, 24 and 32 rows.
    kernels: [Kernel; 3],
    /// 9 to 16 rows of gate and up.
    gated: Kernel,
    /// Clusters that run at once.
    clusters: usize,
}

impl ClusterKernels {
    /// `None` where the GPU has no such kernels: they are made for compute capability 9.0 alone.
    fn find(modules: &Modules, gpu: &GpuInfo) -> Result<Option<Self>, CudaUnavailable> {
        let shared_bytes = most_shared_bytes(gpu);
        let names = [
            "oxl_linear_cluster_16",
            "oxl_linear_cluster_24",
            "oxl_linear_cluster_32",
        ];
        let gated = [("oxl_linear_cluster_gated_16", shared_bytes)];
        let names = names.map(|name| (name, shared_bytes));
        let (Some(kernels), Some([gated])) = (
            modules.kernels_if_any("linear_cluster", names)?,
            modules.kernels_if_any("linear_cluster", gated)?,
        ) else {
            return Ok(None);
        };
        // All take a multiprocessor each.
        let threads = 32 * CLUSTER_WARPS;
        let clusters = modules.most_clusters(kernels[0], CLUSTER_PARTS, threads, shared_bytes)?;
        Ok(Some(Self {
            kernels,
            gated,
            clusters,
        }))
    }
}

/// One matrix of a group, its rows and where the result goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) weights: &'a CudaLinear,
    /// f16 rows, in the matrix' packed order.
    pub(crate) x: CUdeviceptr,
    /// f32 `[rows, out_features]`
    pub(crate) out: CUdeviceptr,
}

impl LinearMatrix {
    /// An operand whose first column tiles, or runs of them, are the launch's `first_item`.
    pub(super) fn of(operand: &Operand<'_>, first_item: usize) -> Self {
        let weights = operand.weights;
        Self {
            matrix: weights.matrix,
            x: operand.x,
            bias: weights.bias.unwrap_or(0),
            out: operand.out,
            out_features: weights.out_features as i32,
            first_item: first_item as i32,
            reserved: [0; 2],
        }
    }
}

/// What becomes of products.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Finish {
    Store(Store),
    /// Of gate and up, `activation(gate) ⊙ up` is stored as f16 `[rows, out_features]`
    /// (`CudaDevice::gating`).
    Gate(Activation, GatedRows),
}

/// Where gated products go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GatedRows {
    /// To the gate's output: of many rows.
    InPlace,
    /// To memory of its own, in the order of who reads them: of few rows.
    For { reader: Reader, out: CUdeviceptr },
}

/// `(1 if the output keeps its old contents, factor of the product)`
pub(super) fn store_numbers(store: Store) -> (i32, f32) {
    match store {
        Store::Overwrite => (0, 1.0),
        Store::Add { scale } => (1, scale),
    }
}

/// Units of the range that has most of them, of all weights.
pub(super) fn most_range_units<'a>(weights: impl Iterator<Item = &'a CudaLinear>) -> usize {
    weights
        .map(|weights| weights.range_units)
        .max()
        .unwrap_or(0)
}

/// The matrices of launches from `first_row` on, and their column tiles.
fn matrices_of(
    operands: &[Operand<'_>],
    first_row: usize,
) -> ([LinearMatrix; MOST_MATRICES], usize) {
    let mut matrices = [LinearMatrix::default(); MOST_MATRICES];
    let mut tiles = 0;
    for (target, operand) in matrices.iter_mut().zip(operands) {
        let weights = operand.weights;
        let layout = &weights.layout;
        let x_bytes = first_row * layout.padded_inputs() * 2;
        let out_bytes = first_row * weights.out_features * 4;
        let from_row = Operand {
            x: operand.x + x_bytes as u64,
            out: operand.out + out_bytes as u64,
            ..*operand
        };
        *target = LinearMatrix::of(&from_row, tiles);
        tiles += layout.tiles;
    }
    (matrices, tiles)
}

impl CudaDevice {
    /// What launches of products may take.
    pub(super) fn limits(&self) -> Limits {
        // No other code has these kernels.
        let linear = &self.kernels().linear;
        let is_hopper = linear.many.is_some();
        let clusters = linear.cluster.map_or(0, |cluster| cluster.clusters);
        Limits::of(self.info(), is_hopper, clusters)
    }

    /// How products take so many rows.
    pub(crate) fn row_layout(&self, rows: usize) -> RowLayout {
        self.many_rows().layout(rows)
    }

    /// How products of more than [`ManyRows::few_rows`] rows are computed.
    pub(crate) fn many_rows(&self) -> ManyRows {
        if self.kernels().linear.many.is_some() {
            ManyRows::Stored
        } else if self.blaslt().is_some() {
            ManyRows::Unpacked
        } else {
            ManyRows::Few
        }
    }

    /// `out ← finish(W · x + bias)` for one to [`MOST_MATRICES`] matrices and `rows` rows each.
    ///
    /// # Safety
    /// The operands' addresses point to what they say, for `rows` rows, which lie as
    /// [`Self::row_layout`] says, and stay allocated until the stream has passed this.
    pub(super) unsafe fn multiply(
        &self,
        operands: &[Operand<'_>],
        rows: usize,
        finish: Finish,
        scratch: &LinearScratch,
    ) -> Result<(), DeviceError> {
        if let Some(kernels) = &self.kernels().linear.many
            && self.row_layout(rows) == RowLayout::Chunks
        {
            // SAFETY: the caller's promise.
            return unsafe { self.multiply_many(kernels, operands, rows, finish) };
        }
        if rows <= self.many_rows().few_rows() {
            // SAFETY: the caller's promise.
            return unsafe { self.multiply_few(operands, rows, finish, scratch) };
        }
        let Finish::Store(store) = finish else {
            unreachable!("gated products of {rows} rows, which are no chunks");
        };
        for operand in operands {
            // SAFETY: the caller's promise.
            if !unsafe { self.multiply_unpacked(operand, rows, store, scratch)? } {
                let operand = std::slice::from_ref(operand);
                // SAFETY: as above.
                unsafe { self.multiply_few(operand, rows, finish, scratch)? };
            }
        }
        Ok(())
    }

    /// Multiplies weights as they are stored, some rows at a time.
    ///
    /// # Safety
    /// As [`Self::multiply`].
    unsafe fn multiply_few(
        &self,
        operands: &[Operand<'_>],
        rows: usize,
        finish: Finish,
        scratch: &LinearScratch,
    ) -> Result<(), DeviceError> {
        let (store, (gate, gated, gated_places)) = match finish {
            Finish::Store(store) => (store, (0, 0, 0)),
            Finish::Gate(activation, GatedRows::For { reader, out }) => {
                let places = reader.order.places.unwrap_or(0);
                (
                    Store::Overwrite,
                    (activation_number(activation), out, places),
                )
            }
            Finish::Gate(_, GatedRows::InPlace) => {
                unreachable!("gated products of {rows} rows in place, which are no chunks")
            }
        };
        let (accumulate, store_scale) = store_numbers(store);
        // All matrices have as many inputs.
        let plan = operands[0].weights.plan;
        let range_units = most_range_units(operands.iter().map(|operand| operand.weights));
        let limits = self.limits();
        let mut first_row = 0;
        while first_row < rows {
            let (matrices, tiles) = matrices_of(operands, first_row);
            let shape = LaunchShape {
                rows: rows - first_row,
                matrices: operands.len(),
                tiles,
                range_units,
                is_gated: matches!(finish, Finish::Gate(..)),
            };
            let Some(division) = plan.divide(shape, limits) else {
                assert!(
                    operands.len() > 1 && first_row == 0,
                    "what cannot be divided is not loaded"
                );
                // Their tables do not fit together.
                for operand in operands {
                    // SAFETY: the caller's promise.
                    unsafe { self.multiply_few(&[*operand], rows, finish, scratch)? };
                }
                return Ok(());
            };
            let (tile_buffers, parts, part_blocks) = match division.kind {
                Kind::Few { tile_buffers } => (tile_buffers, 1, 0),
                Kind::Parts {
                    parts, part_blocks, ..
                } => (0, parts, part_blocks),
            };
            let args = LinearArgs {
                partials: scratch.partial_sums(),
                counters: scratch.counters(),
                gated,
                gated_places,
                matrix_count: operands.len() as i32,
                rows: division.rows as i32,
                accumulate,
                store_scale,
                ranges_shift: plan.ranges.ilog2() as i32,
                first_item: 0,
                items: tiles as i32,
                blocks: plan.blocks as i32,
                range_blocks: plan.range_blocks as i32,
                range_units: range_units as i32,
                tile_buffers: tile_buffers as i32,
                parts_shift: parts.ilog2() as i32,
                part_blocks: part_blocks as i32,
                gate,
                matrices,
            };
            // SAFETY: the caller's promise.
            unsafe { self.launch_division((division, shape.is_gated), args, scratch)? };
            first_row += division.rows;
        }
        Ok(())
    }

    /// Launches a product over all of `args`' tiles: at once, or as many at a time as there is room
    /// for partial sums.
    ///
    /// # Safety
    /// As [`Self::multiply`], of what `args` names.
    unsafe fn launch_division(
        &self,
        (division, is_gated): (Division, bool),
        mut args: LinearArgs,
        scratch: &LinearScratch,
    ) -> Result<(), DeviceError> {
        let kernel = self
            .kernels()
            .linear
            .of_division(division, is_gated)
            .expect("a division has a kernel");
        let tiles = args.items as usize;
        let (parts, most_tiles) = match division.kind {
            Kind::Few { .. } => (1, tiles),
            Kind::Parts {
                in_cluster: false,
                parts: parts @ 2..,
                ..
            } => (parts, scratch.partials / parts),
            Kind::Parts { parts, .. } => (parts, tiles),
        };
        // Of gate and of up a CTA has as many.
        let tiles_apart = if is_gated { 2 } else { 1 };
        for first_tile in (0..tiles).step_by(most_tiles) {
            let items = (tiles - first_tile).min(most_tiles);
            args.first_item = first_tile as i32;
            args.items = items as i32;
            let launch = Launch {
                shared_bytes: division.shared_bytes,
                ..Launch::linear(
                    parts * division.shares.min(items / tiles_apart),
                    division.warps * 32,
                )
            };
            // SAFETY: the structure is the kernel's; its partial sums have room; the rest is the
            // caller's promise.
            unsafe { self.launch(kernel, launch, &args)? };
        }
        Ok(())
    }

    /// Unpacks the weights to fp16, some tiles at a time, and lets the library multiply them.
    /// False, and nothing is done, where it cannot.
    ///
    /// # Safety
    /// As [`Self::multiply`].
    unsafe fn multiply_unpacked(
        &self,
        operand: &Operand<'_>,
        rows: usize,
        store: Store,
        scratch: &LinearScratch,
    ) -> Result<bool, DeviceError> {
        let weights = operand.weights;
        let layout = &weights.layout;
        let inputs = layout.padded_inputs();
        let (unpacked, most_tiles) = scratch.unpacked(inputs);
        let Some(library) = self.blaslt().filter(|_| most_tiles > 0) else {
            return Ok(false);
        };
        let (accumulate, scale) = store_numbers(store);
        for first_tile in (0..layout.tiles).step_by(most_tiles) {
            let tiles = (layout.tiles - first_tile).min(most_tiles);
            let first = first_tile * TILE_OUTPUTS;
            let product = Product {
                outputs: (weights.out_features - first).min(tiles * TILE_OUTPUTS),
                rows,
                inputs,
                out_stride: weights.out_features,
                weights: unpacked,
                x: operand.x,
                out: operand.out + (first * size_of::<f32>()) as u64,
                factor: scale * weights.matrix.scale,
                accumulate: accumulate != 0,
            };
            // Whether it can is asked for all pieces before the first is done: a later one
            // differs in its number of outputs alone, and whole tiles are no harder.
            let can = library.can_multiply(&product, self)?;
            if !can && first_tile == 0 {
                return Ok(false);
            }
            let args = DequantiseArgs {
                matrix: weights.matrix,
                out: unpacked,
                first_tile: first_tile as i32,
                tiles: tiles as i32,
            };
            let warps = tiles * layout.blocks.div_ceil(DEQUANTISE_BLOCKS);
            let launch = Launch::linear(warps.div_ceil(DEQUANTISE_WARPS), DEQUANTISE_WARPS * 32);
            // SAFETY: the structure is the kernel's; the scratch holds as many tiles.
            unsafe { self.launch(self.kernels().linear.dequantise, launch, &args)? };
            // SAFETY: the scratch holds the library's part; the rest is the caller's promise.
            unsafe { library.multiply(&product, scratch.library(), self)? };
        }
        if let Some(bias) = weights.bias {
            let args = AddBiasArgs {
                bias,
                out: operand.out,
                rows: rows as i32,
                width: weights.out_features as i32,
                scale,
                reserved: 0,
            };
            let launch = Launch {
                grid: [
                    weights.out_features.div_ceil(BIAS_THREADS),
                    rows.min(MOST_GRID_ROWS),
                    1,
                ],
                block: [BIAS_THREADS, 1, 1],
                shared_bytes: 0,
            };
            // SAFETY: the structure is the kernel's; the rest is the caller's promise.
            unsafe { self.launch(self.kernels().linear.add_bias, launch, &args)? };
        }
        Ok(true)
    }
}
