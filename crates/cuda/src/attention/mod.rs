//! Attention over the paged cache.
//!
//! `cache.cu` norms and rotates heads and stores keys and values; then one of four kernels
//! attends: `attention_split.cu` splits a sequence among blocks where it has few rows in the
//! step, `attention_walk.cu` walks through it where it has many, `attention_groups.cu` does that on
//! Hopper for pages of fp16, and `attention_exact.cu` serves caches of f32. Where every sequence has
//! one row, the first of them does it all. A row's bits depend on its own sequence alone, and up to
//! 4,096 tokens not on which of the first three computes it.

mod arguments;
mod launch;
mod split;
mod tiles;

use std::ops::Range;

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::{
    AttentionArgs, AttentionOps, CacheShape, DeviceError, HeadNorm, RopeStyle, WorkspaceShape,
};
use oxllama_memory::CacheFormat;

use crate::buffer::CudaBuffer;
use crate::context::GpuInfo;
use crate::device::CudaDevice;
use crate::error::CudaUnavailable;
use crate::launch::Launch;
use crate::linear::{Made, Reader};
use crate::module::{Kernel, Modules};
use crate::prepare::{RowLayout, norm_number};
use crate::step::{CudaWorkspace, StepInputs};
use arguments::{AttendArgs, AttendExactArgs, AttendSplitArgs, CacheArgs, StepHeads};
use launch::{
    HeadTiles, PADDED_HEAD_DIMS, Ring, ScratchLayout, format_number, head_dim_index,
    is_fp16_in_units, is_whole, score_factors,
};
use split::{SplitGrid, SplitMemory};
use tiles::SPLIT_HEADS;
pub(crate) use tiles::{Tile, Tiles};

/// Warps of a block of `oxl_cache_...`, each of which treats some heads of a row.
const CACHE_WARPS: usize = 4;

/// Heads of a warp, at most.
const MOST_HEADS_OF_WARP: usize = 8;

/// Warps for each multiprocessor that there are at least before a warp has several heads.
const CACHE_WARPS_OF_MULTIPROCESSOR: usize = 64;

/// Dimensions of a head up to which `oxl_cache_128` keeps it.
const SHORT_HEAD_DIM: usize = 128;

/// Threads of a block of every kernel here, but for those by warp groups.
const THREADS: usize = 128;

/// Threads of theirs: `attention_groups.cu`.
const GROUPS_THREADS: usize = 384;

/// The entries of attention's units; those of several head dimensions as
/// [`PADDED_HEAD_DIMS`] orders them.
#[derive(Debug)]
pub(crate) struct AttentionKernels {
    /// For heads up to [`SHORT_HEAD_DIM`], and longer ones.
    cache: [Kernel; 2],
    split: [Kernel; 3],
    /// The same over quantised pages.
    codes: [Kernel; 3],
    walk: [Kernel; 3],
    /// For heads up to 64 and 128 dimensions of fp16, where there are such kernels.
    groups: Option<[Kernel; 2]>,
    exact: Kernel,
}

impl AttentionKernels {
    pub(crate) fn find(modules: &Modules, gpu: &GpuInfo) -> Result<Self, CudaUnavailable> {
        let shared_bytes = gpu.shared_per_block.get() as usize;
        let split = |name| modules.kernel("attention_split", name, shared_bytes);
        let walk = |name| modules.kernel("attention_walk", name, shared_bytes);
        let groups = [("oxl_attend_groups_64", 64), ("oxl_attend_groups_128", 128)];
        let groups = groups.map(|(name, padded)| (name, Ring::groups(padded).shared_bytes));
        Ok(Self {
            cache: [
                modules.kernel("cache", "oxl_cache_128", 0)?,
                modules.kernel("cache", "oxl_cache_256", 0)?,
            ],
            split: [
                split("oxl_attend_split_64")?,
                split("oxl_attend_split_128")?,
                split("oxl_attend_split_256")?,
            ],
            codes: [
                split("oxl_attend_codes_64")?,
                split("oxl_attend_codes_128")?,
                split("oxl_attend_codes_256")?,
            ],
            walk: [
                walk("oxl_attend_walk_64")?,
                walk("oxl_attend_walk_128")?,
                walk("oxl_attend_walk_256")?,
            ],
            groups: modules.kernels_if_any("attention_groups", groups)?,
            exact: modules.kernel("attention_exact", "oxl_attend_exact", 0)?,
        })
    }
}

/// Bytes of attention's scratch in a workspace for steps up to `shape`.
pub(crate) fn scratch_bytes(shape: &WorkspaceShape) -> usize {
    ScratchLayout::of(shape).end
}

/// Attention's scratch in a workspace.
#[derive(Debug)]
pub(crate) struct AttentionScratch {
    layout: ScratchLayout,
    address: CUdeviceptr,
    /// The current step's rows.
    pub(crate) tiles: Tiles,
}

impl AttentionScratch {
    /// Over [`scratch_bytes`] zeroed bytes at `address`, which is 256-byte aligned.
    pub(crate) fn new(shape: &WorkspaceShape, address: CUdeviceptr) -> Self {
        Self {
            layout: ScratchLayout::of(shape),
            address,
            tiles: Tiles::new(
                shape.rows,
                shape.sequences,
                shape.heads / shape.kv_heads.max(1),
                shape.head_dim,
            ),
        }
    }

    fn at(&self, offset: usize) -> CUdeviceptr {
        self.address + offset as u64
    }
}

/// A call's extents, checked.
#[derive(Debug, Clone, Copy)]
struct Extents {
    cache: CacheShape,
    heads: usize,
    rows: usize,
    /// Index into [`PADDED_HEAD_DIMS`].
    index: usize,
    window: i32,
    score_factor: f32,
    cap_factor: f32,
}

impl Extents {
    fn padded(&self) -> usize {
        PADDED_HEAD_DIMS[self.index]
    }

    fn group(&self) -> usize {
        self.heads / self.cache.kv_heads
    }

    fn is_exact(&self) -> bool {
        self.cache.format == CacheFormat::F32
    }
}

impl AttentionOps for CudaDevice {
    fn attention(
        &self,
        args: AttentionArgs<'_, CudaBuffer>,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let reader = workspace.handover.reader();
        let inputs = &workspace.inputs;
        let scratch = &workspace.attention;
        let extents = self.check_attention(&args, inputs, scratch)?;
        let can_split = !extents.is_exact() && self.can_split(&extents);
        let is_fresh = can_split && scratch.tiles.is_one_row_each();
        let heads = Self::step_heads(&args, &extents, inputs, is_fresh);
        if heads.is_fresh == 0 {
            self.prepare_cache(&args, &heads, &extents, inputs, scratch)?;
        }
        if extents.is_exact() {
            return self.attend_exact(&args, &extents, inputs);
        }
        let tiles = &scratch.tiles;
        if !can_split {
            let all = 0..tiles.split() + tiles.walked();
            return self.attend_walk(&args, all, &extents, inputs, scratch);
        }
        // Every sequence has one row then: there are no long runs to walk through.
        let layout = self.row_layout(extents.rows);
        let ordered = reader
            .filter(|reader| heads.is_fresh != 0 && Self::may_order(reader, &extents))
            .filter(|_| layout == RowLayout::Plain)
            .and_then(|reader| {
                let scratch = &workspace.linear;
                let out = scratch.activations(0, extents.rows, reader.width, layout)?;
                Some((reader, out))
            });
        self.attend_split(&args, (heads, ordered), &extents, inputs, scratch)?;
        if let Some((reader, made)) = ordered {
            workspace.handover.leave(Made {
                source: args.out.address(),
                rows: extents.rows,
                reader,
                made,
            });
            return Ok(());
        }
        let long = tiles.split()..tiles.split() + tiles.walked();
        self.attend_walk(&args, long, &extents, inputs, scratch)
    }
}

impl CudaDevice {
    /// Refuses what the kernels or the workspace cannot do.
    fn check_attention(
        &self,
        args: &AttentionArgs<'_, CudaBuffer>,
        inputs: &StepInputs,
        scratch: &AttentionScratch,
    ) -> Result<Extents, DeviceError> {
        let cache = args.cache.shape;
        let refused = |reason: String| DeviceError::Operation {
            device: self.context().id().clone(),
            operation: "attention".to_owned(),
            reason,
        };
        let head_dim = cache.head_dim;
        let index = head_dim_index(head_dim).filter(|_| is_whole(&cache));
        let Some(index) = index else {
            return Err(refused(format!(
                "heads have {head_dim} dimensions; the kernels take even numbers up to 256, \
                 and multiples of 32 in a cache of {}",
                cache.format
            )));
        };
        let limits = inputs.shape;
        let group = args.heads / cache.kv_heads.max(1);
        for (what, found, limit) in [
            ("query heads", args.heads, limits.heads),
            ("query heads of a kv head", group, scratch.tiles.group()),
            ("dimensions of a head", head_dim, limits.head_dim),
        ] {
            if found > limit {
                return Err(DeviceError::StepTooLarge {
                    device: self.context().id().clone(),
                    what,
                    found,
                    limit,
                });
            }
        }
        let (score_factor, cap_factor) = score_factors(args.scale, args.softcap);
        let window = |window: usize| window.clamp(1, i32::MAX as usize) as i32;
        Ok(Extents {
            cache,
            heads: args.heads,
            rows: inputs.rows,
            index,
            window: args.window.map_or(0, window),
            score_factor,
            cap_factor,
        })
    }

    /// Whether results can be written as a linear wants them.
    fn may_order(reader: &Reader, extents: &Extents) -> bool {
        let head_dim = extents.cache.head_dim;
        let width = extents.heads * head_dim;
        reader.width == width && head_dim.is_multiple_of(4)
    }

    /// What the step's rows bring, and how it is normed and rotated.
    fn step_heads(
        args: &AttentionArgs<'_, CudaBuffer>,
        extents: &Extents,
        inputs: &StepInputs,
        is_fresh: bool,
    ) -> StepHeads {
        let CacheShape {
            kv_heads, head_dim, ..
        } = extents.cache;
        let (query_width, key_width) = (extents.heads * head_dim, kv_heads * head_dim);
        let rows = extents.rows;
        let weight = |norm: Option<&HeadNorm<CudaBuffer>>, width: usize| {
            norm.map_or(0, |norm| norm.weight.floats(width))
        };
        let kind =
            |norm: Option<&HeadNorm<CudaBuffer>>| norm.map_or(0, |norm| norm_number(norm.kind));
        let epsilon = |norm: Option<&HeadNorm<CudaBuffer>>| norm.map_or(0.0, |norm| norm.epsilon);
        let rope = args
            .rope
            .map(|rope| (inputs.ropes[rope], inputs.angles(rope)));
        StepHeads {
            queries: args.queries.floats(rows * query_width),
            keys: args.keys.floats(rows * key_width),
            values: args.values.floats(rows * key_width),
            query_weight: weight(args.query_norm, query_width),
            key_weight: weight(args.key_norm, key_width),
            angles: rope.map_or(0, |(_, angles)| angles),
            query_epsilon: epsilon(args.query_norm),
            key_epsilon: epsilon(args.key_norm),
            query_norm: kind(args.query_norm),
            key_norm: kind(args.key_norm),
            rope_style: rope.map_or(0, |(layout, _)| rope_number(layout.style)),
            rope_pairs: rope.map_or(0, |(layout, _)| layout.pairs as i32),
            angle_pairs: (inputs.shape.rotary_dim / 2) as i32,
            is_fresh: i32::from(is_fresh),
        }
    }

    /// Norms and rotates queries and keys, and stores keys and values.
    fn prepare_cache(
        &self,
        args: &AttentionArgs<'_, CudaBuffer>,
        heads: &StepHeads,
        extents: &Extents,
        inputs: &StepInputs,
        scratch: &AttentionScratch,
    ) -> Result<(), DeviceError> {
        let CacheShape {
            kv_heads, head_dim, ..
        } = extents.cache;
        let rows = extents.rows;
        let heads_of_row = extents.heads + 2 * kv_heads;
        let enough = CACHE_WARPS_OF_MULTIPROCESSOR * self.info().multiprocessors;
        let heads_of_warp = (rows * heads_of_row / enough).clamp(1, MOST_HEADS_OF_WARP);
        let kernel_args = CacheArgs {
            queries: heads.queries,
            keys: heads.keys,
            values: heads.values,
            queries_f16: if extents.is_exact() {
                0
            } else {
                scratch.at(scratch.layout.queries)
            },
            key_pages: args.cache.keys.address(),
            value_pages: args.cache.values.address(),
            query_weight: heads.query_weight,
            key_weight: heads.key_weight,
            angles: heads.angles,
            positions: inputs.positions(),
            row_sequences: inputs.row_sequences(),
            page_tables: inputs.page_tables(),
            query_epsilon: heads.query_epsilon,
            key_epsilon: heads.key_epsilon,
            rows: rows as i32,
            heads: extents.heads as i32,
            kv_heads: kv_heads as i32,
            head_dim: head_dim as i32,
            padded_head_dim: extents.padded() as i32,
            key_format: format_number(extents.cache.format.keys()),
            value_format: format_number(extents.cache.format.values()),
            query_norm: heads.query_norm,
            key_norm: heads.key_norm,
            rope_style: heads.rope_style,
            rope_pairs: heads.rope_pairs,
            angle_pairs: heads.angle_pairs,
            table_stride: inputs.shape.pages_per_sequence as i32,
            heads_of_warp: heads_of_warp as i32,
        };
        let warps = rows * heads_of_row.div_ceil(heads_of_warp);
        let launch = Launch::linear(warps.div_ceil(CACHE_WARPS), THREADS);
        let [short, long] = self.kernels().attention.cache;
        let kernel = if head_dim <= SHORT_HEAD_DIM {
            short
        } else {
            long
        };
        // SAFETY: the structure is the kernel's; buffers and scratch hold what was asked of them
        // above, and the step's positions lie in pages that its tables name.
        unsafe { self.launch(kernel, launch, &kernel_args) }
    }

    /// What both kernels on tensor cores take.
    fn attend_args(
        args: &AttentionArgs<'_, CudaBuffer>,
        extents: &Extents,
        inputs: &StepInputs,
        scratch: &AttentionScratch,
        (heads, ring): (HeadTiles, Ring),
    ) -> AttendArgs {
        let head_dim = extents.cache.head_dim;
        AttendArgs {
            queries: scratch.at(scratch.layout.queries),
            key_pages: args.cache.keys.address(),
            value_pages: args.cache.values.address(),
            out: args.out.floats(extents.rows * extents.heads * head_dim),
            partial_out: scratch.at(scratch.layout.partial_out),
            partial_state: scratch.at(scratch.layout.partial_state),
            counters: scratch.at(scratch.layout.counters),
            tiles: inputs.tiles(),
            page_tables: inputs.page_tables(),
            score_factor: extents.score_factor,
            cap_factor: extents.cap_factor,
            window: extents.window,
            heads: extents.heads as i32,
            kv_heads: extents.cache.kv_heads as i32,
            head_dim: head_dim as i32,
            heads_per_tile: heads.heads_per_tile as i32,
            head_tiles: heads.head_tiles as i32,
            group: extents.group() as i32,
            inverse_heads: heads.inverse() as i32,
            key_format: format_number(extents.cache.format.keys()),
            value_format: format_number(extents.cache.format.values()),
            table_stride: inputs.shape.pages_per_sequence as i32,
            most_pieces: scratch.layout.most_pieces as i32,
            slots: ring.slots as i32,
            slot_bytes: ring.slot_bytes as i32,
        }
    }

    /// Rows of short runs; their results go to `ordered` instead, if it is given, for its reader.
    fn attend_split(
        &self,
        args: &AttentionArgs<'_, CudaBuffer>,
        (heads, ordered): (StepHeads, Option<(Reader, CUdeviceptr)>),
        extents: &Extents,
        inputs: &StepInputs,
        scratch: &AttentionScratch,
    ) -> Result<(), DeviceError> {
        let gpu = self.info();
        let split = SplitGrid::of(
            (scratch.tiles.split(), scratch.tiles.split_rows()),
            &extents.cache,
            extents.group(),
            &scratch.layout,
            gpu,
        );
        let own_heads = (heads.is_fresh != 0).then_some(split.heads.heads_per_tile);
        let blocks = split.blocks_of_multiprocessor;
        let memory = SplitMemory::of(&extents.cache, extents.padded(), own_heads, blocks, gpu);
        let memory = memory.ok_or_else(|| self.too_little_shared(extents))?;
        let launch = Launch {
            grid: split.grid,
            block: [THREADS, 1, 1],
            shared_bytes: memory.ring.shared_bytes,
        };
        let tiling = (split.heads, memory.ring);
        let kernel_args = AttendSplitArgs {
            attend: Self::attend_args(args, extents, inputs, scratch, tiling),
            heads,
            ordered_out: ordered.map_or(0, |(_, out)| out),
            out_places: ordered.map_or(0, |(reader, _)| reader.order.places.unwrap_or(0)),
            staging_at: memory.staging_at as i32,
            tiles_at: memory.tiles_at as i32,
            tiles_alone: split.tiles_alone as i32,
            unused: 0,
        };
        let kernels = &self.kernels().attention;
        let of_format = if extents.cache.format.is_quantised() {
            &kernels.codes
        } else {
            &kernels.split
        };
        // SAFETY: the structure is the kernel's; `check_attention` has held the call to the
        // extents that the scratch was made for, partial results are only used by as many
        // rows as it has room for, and the step's positions lie in pages that its tables name.
        unsafe { self.launch(of_format[extents.index], launch, &kernel_args) }
    }

    /// Whether a multiprocessor has room for the splitting kernel; else all rows are walked through.
    fn can_split(&self, extents: &Extents) -> bool {
        let heads = HeadTiles::of(extents.group(), SPLIT_HEADS).heads_per_tile;
        [None, Some(heads)].into_iter().all(|heads| {
            SplitMemory::of(&extents.cache, extents.padded(), heads, 1, self.info()).is_some()
        })
    }

    /// Rows of long runs, and of all where [`Self::can_split`] says no.
    fn attend_walk(
        &self,
        args: &AttentionArgs<'_, CudaBuffer>,
        tiles: Range<usize>,
        extents: &Extents,
        inputs: &StepInputs,
        scratch: &AttentionScratch,
    ) -> Result<(), DeviceError> {
        let kernels = &self.kernels().attention;
        let groups = kernels.groups.filter(|_| is_fp16_in_units(&extents.cache));
        let groups = groups.and_then(|groups| groups.get(extents.index).copied());
        let heads = HeadTiles::of(extents.group(), scratch.tiles.block_heads());
        let blocks = tiles.len() * extents.cache.kv_heads * heads.head_tiles;
        let (kernel, threads, ring) = if let Some(kernel) = groups {
            (kernel, GROUPS_THREADS, Ring::groups(extents.padded()))
        } else {
            let ring = Ring::walk(&extents.cache, extents.padded(), self.info());
            let ring = ring.ok_or_else(|| self.too_little_shared(extents))?;
            (kernels.walk[extents.index], THREADS, ring)
        };
        let launch = Launch {
            shared_bytes: ring.shared_bytes,
            ..Launch::linear(blocks, threads)
        };
        let mut kernel_args = Self::attend_args(args, extents, inputs, scratch, (heads, ring));
        kernel_args.tiles += (tiles.start * size_of::<Tile>()) as u64;
        // SAFETY: as for the rows of short runs.
        unsafe { self.launch(kernel, launch, &kernel_args) }
    }

    /// Rows over a cache of f32.
    fn attend_exact(
        &self,
        args: &AttentionArgs<'_, CudaBuffer>,
        extents: &Extents,
        inputs: &StepInputs,
    ) -> Result<(), DeviceError> {
        let elements = extents.rows * extents.heads * extents.cache.head_dim;
        let kernel_args = AttendExactArgs {
            queries: args.queries.floats(elements),
            key_pages: args.cache.keys.address(),
            value_pages: args.cache.values.address(),
            out: args.out.floats(elements),
            positions: inputs.positions(),
            row_sequences: inputs.row_sequences(),
            page_tables: inputs.page_tables(),
            score_factor: extents.score_factor,
            cap_factor: extents.cap_factor,
            window: extents.window,
            heads: extents.heads as i32,
            kv_heads: extents.cache.kv_heads as i32,
            head_dim: extents.cache.head_dim as i32,
            table_stride: inputs.shape.pages_per_sequence as i32,
            unused: 0,
        };
        let launch = Launch {
            grid: [extents.rows, extents.heads, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
        };
        // SAFETY: as for the other kernels; no scratch is used.
        unsafe { self.launch(self.kernels().attention.exact, launch, &kernel_args) }
    }

    fn too_little_shared(&self, extents: &Extents) -> DeviceError {
        DeviceError::Operation {
            device: self.context().id().clone(),
            operation: "attention".to_owned(),
            reason: format!(
                "heads of {} dimensions need more shared memory than the {} of this GPU",
                extents.cache.head_dim,
                self.info().shared_per_block
            ),
        }
    }
}

/// The kernels' number of a style; `ROPE_*` in `cache.cu`.
fn rope_number(style: RopeStyle) -> i32 {
    match style {
        RopeStyle::Halves => 1,
        RopeStyle::Interleaved => 2,
    }
}
