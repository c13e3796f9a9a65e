//! Draws of tokens from a step's logits.
//!
//! A draw is the definition's ([`Draw`]) but for the last bits of sums: a number within 1e-6 or so
//! of the border between two tokens may fall on the other side.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::{self, CUdeviceptr};
use oxllama_backend::{
    DeviceError, Draw, DrawKinds, DrawLimits, LogitArgs, LogitChange, StepBatch, WorkspaceShape,
};

use crate::buffer::CudaBuffer;
use crate::context::Context;
use crate::device::CudaDevice;
use crate::error::CudaUnavailable;
use crate::launch::Launch;
use crate::module::{Kernel, Modules};
use crate::step::aligned;
use crate::stream::{PinnedBuffer, Stream};

/// Most changes of a draw.
const MOST_CHANGES: usize = 1024;

/// Most tokens that top-k may keep.
const MOST_TOP_K: u32 = 1024;

/// Most columns of a row of logits: sums of weights stay below 2^64, and groups are few enough.
const MOST_COLUMNS: usize = 1 << 19;

/// Threads of a block; `THREADS` in `draws.cuh`.
const THREADS: usize = 512;

/// Logits of a block; `SLICE` in `draws.cuh`.
const SLICE: usize = 4096;

/// Groups of tokens of a row at most; `THREADS * OWN_GROUPS` in `draws.cuh`.
const MOST_GROUPS: usize = 2048;

/// Bytes of `DrawSlice` and `DrawSummary` of `draws.cuh`.
const PARTIAL_BYTES: usize = 16;

/// `DrawHeader` of `draws.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct DrawHeader {
    count: u32,
    first_row: u32,
    changes_at: u32,
    reserved: u32,
}

/// `DrawSettings` of `draws.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct DrawSettings {
    random: f64,
    cut_scale: f32,
    draw_scale: f32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    top_k: u32,
    drawable: u32,
    first_change: u32,
    change_count: u32,
    reserved: u32,
}

impl From<&Draw> for DrawSettings {
    fn from(draw: &Draw) -> Self {
        Self {
            random: draw.random,
            cut_scale: draw.cut_scale,
            draw_scale: draw.draw_scale,
            top_p: draw.top_p,
            min_p: draw.min_p,
            repetition_penalty: draw.repetition_penalty,
            frequency_penalty: draw.frequency_penalty,
            presence_penalty: draw.presence_penalty,
            top_k: draw.top_k,
            drawable: draw.vocab_size,
            first_change: draw.first_change,
            change_count: draw.change_count,
            reserved: 0,
        }
    }
}

/// `DrawArgs` of `draws.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct DrawArgs {
    logits: CUdeviceptr,
    header: CUdeviceptr,
    saved: CUdeviceptr,
    slices: CUdeviceptr,
    group_bests: CUdeviceptr,
    arrivals: CUdeviceptr,
    summaries: CUdeviceptr,
    drawn: CUdeviceptr,
    width: i32,
    slices_per_row: i32,
    group_lanes: i32,
    most_changes: i32,
}

/// The entries of `draw_best.cu` and `draw_random.cu`.
#[derive(Debug)]
pub(crate) struct DrawKernels {
    best: Kernel,
    random: Kernel,
}

impl DrawKernels {
    pub(crate) fn find(modules: &Modules) -> Result<Self, CudaUnavailable> {
        Ok(Self {
            best: modules.kernel("draw_best", "oxl_draw_best", 0)?,
            random: modules.kernel("draw_random", "oxl_draw_random", 0)?,
        })
    }
}

/// The largest draws from rows of `width` logits.
pub(crate) fn draw_limits(width: usize) -> Option<DrawLimits> {
    (width <= MOST_COLUMNS).then_some(DrawLimits {
        top_k: MOST_TOP_K,
        changes: MOST_CHANGES,
    })
}

/// Most draws of a step.
fn most_draws(shape: &WorkspaceShape) -> usize {
    let is_drawn_from = (1..=MOST_COLUMNS).contains(&shape.draw_width);
    if is_drawn_from { shape.sequences } else { 0 }
}

/// Words that a step's draws take at most among its inputs, at whose start they lie, with their
/// changes at the end.
pub(crate) fn most_words(shape: &WorkspaceShape) -> usize {
    let draws = most_draws(shape);
    let bytes = size_of::<DrawHeader>()
        + draws * size_of::<DrawSettings>()
        + draws * MOST_CHANGES * size_of::<LogitChange>();
    bytes / size_of::<u32>()
}

/// Words of the header and the settings of `batch`: none without draws.
pub(crate) fn settings_words(batch: &StepBatch<'_>) -> usize {
    let bytes = match batch.draws.len() {
        0 => 0,
        draws => size_of::<DrawHeader>() + draws * size_of::<DrawSettings>(),
    };
    bytes / size_of::<u32>()
}

/// Writes header and settings to the start of `words`; the changes will be at `changes_at`.
pub(crate) fn write_settings(batch: &StepBatch<'_>, changes_at: usize, words: &mut [u32]) {
    if batch.draws.is_empty() {
        return;
    }
    let header = DrawHeader {
        count: batch.draws.len() as u32,
        first_row: (batch.logit_rows.len() - batch.draws.len()) as u32,
        changes_at: changes_at as u32,
        reserved: 0,
    };
    let (start, rest) = words.split_at_mut(size_of::<DrawHeader>() / size_of::<u32>());
    start.copy_from_slice(bytemuck::cast_slice(&[header]));
    let sizes = rest.chunks_exact_mut(size_of::<DrawSettings>() / size_of::<u32>());
    for (words, draw) in sizes.zip(batch.draws) {
        words.copy_from_slice(bytemuck::cast_slice(&[DrawSettings::from(draw)]));
    }
}

/// How a row is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    slices: usize,
    /// Neighbouring threads whose tokens are one group.
    group_lanes: usize,
}

impl Cut {
    fn of(width: usize) -> Self {
        let slices = width.div_ceil(SLICE);
        let mut group_lanes = 4;
        while slices * THREADS / group_lanes > MOST_GROUPS {
            group_lanes *= 2;
        }
        Self {
            slices,
            group_lanes,
        }
    }

    fn groups(self) -> usize {
        self.slices * THREADS / self.group_lanes
    }
}

/// Where each array lies, in bytes from the scratch's start.
#[derive(Debug, Clone, Copy)]
struct ScratchLayout {
    saved: usize,
    slices: usize,
    group_bests: usize,
    arrivals: usize,
    summaries: usize,
    drawn: usize,
    end: usize,
}

impl ScratchLayout {
    fn of(shape: &WorkspaceShape) -> Self {
        let draws = most_draws(shape);
        let cut = Cut::of(shape.draw_width.min(MOST_COLUMNS));
        let mut end = 0;
        let mut place = |count: usize, bytes: usize| {
            let start = end;
            end += aligned(count * bytes);
            start
        };
        Self {
            saved: place(draws * MOST_CHANGES, size_of::<f32>()),
            slices: place(draws * cut.slices, PARTIAL_BYTES),
            group_bests: place(draws * cut.groups(), size_of::<u64>()),
            arrivals: place(draws, size_of::<u32>()),
            summaries: place(draws, PARTIAL_BYTES),
            drawn: place(draws, size_of::<u32>()),
            end,
        }
    }
}

/// Bytes of a [`DrawScratch`].
pub(crate) fn scratch_bytes(shape: &WorkspaceShape) -> usize {
    ScratchLayout::of(shape).end
}

/// The draws' scratch in a workspace.
#[derive(Debug)]
pub(crate) struct DrawScratch {
    layout: ScratchLayout,
    address: CUdeviceptr,
    most_draws: usize,
    width: usize,
    /// Results on their way to the host.
    results: PinnedBuffer,
    /// Of the current step.
    kinds: DrawKinds,
    /// Draws of the last step with logit rows.
    count: usize,
}

impl DrawScratch {
    /// Over [`scratch_bytes`] zeroed bytes at `address`, which is 256-byte aligned.
    pub(crate) fn new(
        context: &Arc<Context>,
        shape: &WorkspaceShape,
        address: CUdeviceptr,
    ) -> Result<Self, DeviceError> {
        let most_draws = most_draws(shape);
        Ok(Self {
            layout: ScratchLayout::of(shape),
            address,
            most_draws,
            width: shape.draw_width,
            results: PinnedBuffer::new(context, most_draws * size_of::<u32>())?,
            kinds: DrawKinds::None,
            count: 0,
        })
    }

    /// Takes note of a step's draws. What was drawn before stays, if the step wants nothing.
    pub(crate) fn begin(&mut self, batch: &StepBatch<'_>) {
        self.kinds = DrawKinds::of(batch.draws);
        if !batch.logit_rows.is_empty() {
            self.count = batch.draws.len();
        }
    }

    /// Whether a step's draws are made here at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.most_draws == 0
    }

    fn at(&self, offset: usize) -> CUdeviceptr {
        self.address + offset as u64
    }
}

impl CudaDevice {
    /// Enqueues the step's draws; `header` is where its inputs begin.
    pub(crate) fn enqueue_draws(
        &self,
        logits: &CudaBuffer,
        args: LogitArgs,
        header: CUdeviceptr,
        scratch: &DrawScratch,
    ) -> Result<(), DeviceError> {
        assert!(
            args.width <= scratch.width,
            "{} columns in a workspace made for {}",
            args.width,
            scratch.width
        );
        // One recording serves any number of draws: blocks beyond them end at once.
        let rows = args.rows.min(scratch.most_draws);
        let cut = Cut::of(args.width);
        let layout = &scratch.layout;
        let draw_args = DrawArgs {
            logits: logits.floats(args.rows * args.width),
            header,
            saved: scratch.at(layout.saved),
            slices: scratch.at(layout.slices),
            group_bests: scratch.at(layout.group_bests),
            arrivals: scratch.at(layout.arrivals),
            summaries: scratch.at(layout.summaries),
            drawn: scratch.at(layout.drawn),
            width: args.width as i32,
            slices_per_row: cut.slices as i32,
            group_lanes: cut.group_lanes as i32,
            most_changes: MOST_CHANGES as i32,
        };
        let launch = Launch {
            grid: [cut.slices, rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
        };
        let kernels = &self.kernels().draws;
        // SAFETY: the structure is the kernel's; the logits hold the rows, and the scratch was made
        // for as many draws and columns.
        unsafe { self.launch(kernels.best, launch, &draw_args) }?;
        if scratch.kinds == DrawKinds::Random {
            let launch = Launch::linear(rows, THREADS);
            // SAFETY: as above.
            unsafe { self.launch(kernels.random, launch, &draw_args) }?;
        }
        Ok(())
    }

    /// The tokens of the last step with logit rows, by way of a stream where they are there.
    pub(crate) fn read_draws<'a>(
        &self,
        stream: &Stream,
        scratch: &'a mut DrawScratch,
    ) -> Result<&'a [u32], DeviceError> {
        if scratch.count == 0 {
            return Ok(&[]);
        }
        let drawn = scratch.at(scratch.layout.drawn);
        let results = &mut scratch.results.as_mut_slice::<u32>()[..scratch.count];
        self.context().bind()?;
        // SAFETY: both ends hold the results; the wait below keeps them that long.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                results.as_mut_ptr().cast(),
                drawn,
                size_of_val(results),
                stream.handle(),
            )
        };
        self.context()
            .check(code, || "copying the drawn tokens".to_owned())?;
        stream.synchronize()?;
        Ok(results)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_into_few_enough_groups() {
        for width in [
            1,
            4096,
            4097,
            32_000,
            128_256,
            151_936,
            262_144,
            MOST_COLUMNS,
        ] {
            let cut = Cut::of(width);
            assert!(cut.slices * SLICE >= width && (cut.slices - 1) * SLICE < width);
            assert!((4..=32).contains(&cut.group_lanes) && cut.groups() <= MOST_GROUPS);
            assert!(cut.slices <= THREADS, "one thread adds up each slice");
        }
        assert_eq!(Cut::of(32_000).group_lanes, 4);
        assert_eq!(Cut::of(128_256).group_lanes, 8);
        assert_eq!(Cut::of(MOST_COLUMNS).group_lanes, 32);
    }

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<DrawHeader>(), 16);
        assert_eq!(size_of::<DrawSettings>(), 56);
        assert_eq!(size_of::<LogitChange>(), 16);
        assert_eq!(size_of::<DrawArgs>(), 8 * 8 + 4 * 4);
    }
}
