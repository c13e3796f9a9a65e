//! Draws the next tokens on the device, for settings that it knows.
//!
//! What it knows: repetition, frequency and presence penalties (with their decay), logit bias,
//! then temperature (first or last), top-k up to [`MOST_TOP_K`], top-p and min-p, in that
//! order, and a plain draw. A DRY penalty is a bias as well, once the host has found it. All
//! else (masks of a grammar, XTC, mirostat, typical, top-a, tail-free, top-n-sigma, smoothing,
//! dynamic temperature, skew, another order, the most likely tokens beside the drawn one) is
//! the host's.
//!
//! A draw is the host's for the same number, but for two things. Sums of weights are rounded in
//! different places, so a number within 1e-6 or so of the border between two tokens may fall
//! on the other side. And where nothing is cut, tokens beyond the first 64 ranks are passed in
//! the order of their ids, changed ones among them, while the host passes those last.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::{self, CUdeviceptr};
use oxllama_backend::DeviceError;
use oxllama_memory::{Bytes, Reservation};

use crate::buffer::CudaBuffer;
use crate::device::CudaDevice;
use crate::error::CudaUnavailable;
use crate::launch::Launch;
use crate::module::{Kernel, Modules};
use crate::step::aligned;
use crate::stream::{Event, PinnedBuffer};

/// Most tokens that top-k may keep.
pub const MOST_TOP_K: u32 = 1024;

/// Most columns of a row of logits: sums of weights stay below 2^64, and groups are few enough.
pub const MOST_SAMPLED_COLUMNS: usize = 1 << 19;

/// What [`SampledToken::token_id`] is where nothing can be drawn: a logit that may be drawn is
/// NaN or positive infinity, or none is finite.
pub const NO_TOKEN: u32 = u32::MAX;

/// Threads of a block; `THREADS` in `sampling.cuh`.
const THREADS: usize = 512;

/// Logits of a block; `SLICE` in `sampling.cuh`.
const SLICE: usize = 4096;

/// Groups of tokens of a row at most; `THREADS * OWN_GROUPS` in `sampling.cuh`.
const MOST_GROUPS: usize = 2048;

/// How one row is drawn; `SampleRow` in `sampling.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct SampleRow {
    /// The draw, in 0..1.
    pub random: f64,
    /// 1 / temperature as it acts before the cuts: 1 where temperature comes last.
    pub cut_scale: f32,
    /// 1 / temperature of the draw. 0: the most likely token is taken.
    pub draw_scale: f32,
    /// Keep the smallest set of most likely tokens with this share; off unless in 0..1.
    pub top_p: f32,
    /// Drop tokens below this share of the best one's probability; 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// Keep this many, up to [`MOST_TOP_K`]; 0 is off.
    pub top_k: u32,
    /// Where the row's changes begin in the list of all.
    pub first_change: u32,
    /// How many they are.
    pub change_count: u32,
}

/// A token whose logit is changed; a row names none twice. `SampleChange` in `sampling.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct SampleChange {
    /// The token; without effect where it is none that can be drawn.
    pub token_id: u32,
    /// Share of the penalties that its newest occurrence has: 1 in range, 0 if it did not occur.
    pub strongest: f32,
    /// Shares of all its occurrences together.
    pub total: f32,
    /// Added at last; negative infinity forbids the token.
    pub bias: f32,
}

/// A row's result; `Sampled` in `sampling.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct SampledToken {
    /// The token, or [`NO_TOKEN`].
    pub token_id: u32,
    /// ln of its probability by the softmax of the logits before any change.
    pub logprob: f32,
}

/// Extents of the largest step of a [`CudaSampler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerShape {
    /// Rows of logits.
    pub rows: usize,
    /// Columns of a row, padding included; at most [`MOST_SAMPLED_COLUMNS`].
    pub width: usize,
    /// Changes of all rows together.
    pub changes: usize,
}

/// The logits of a step.
#[derive(Debug)]
pub struct SampleLogits<'a> {
    /// f32 `[rows, width]`; the same afterwards.
    pub logits: &'a mut CudaBuffer,
    /// Columns of a row, padding included.
    pub width: usize,
    /// Columns that the log probability counts.
    pub vocab_size: usize,
    /// Ids below are drawn; at most `vocab_size`.
    pub drawable: usize,
}

/// `SampleArgs` of `sampling.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct SampleArgs {
    logits: CUdeviceptr,
    rows: CUdeviceptr,
    changes: CUdeviceptr,
    saved: CUdeviceptr,
    slices: CUdeviceptr,
    group_bests: CUdeviceptr,
    arrivals: CUdeviceptr,
    summaries: CUdeviceptr,
    sampled: CUdeviceptr,
    width: i32,
    columns: i32,
    drawable: i32,
    slices_per_row: i32,
    group_lanes: i32,
    reserved: i32,
}

/// The entries of `sample_look.cu` and `sample_draw.cu`.
#[derive(Debug)]
pub(crate) struct SampleKernels {
    look: Kernel,
    draw: Kernel,
}

impl SampleKernels {
    pub(crate) fn find(modules: &Modules) -> Result<Self, CudaUnavailable> {
        Ok(Self {
            look: modules.kernel("sample_look", "oxl_sample_look", 0)?,
            draw: modules.kernel("sample_draw", "oxl_sample_draw", 0)?,
        })
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

/// Where each array lies in the sampler's memory, in bytes from its start.
#[derive(Debug, Clone, Copy)]
struct Offsets {
    /// Copied from the host: rows, then changes.
    rows: usize,
    changes: usize,
    saved: usize,
    slices: usize,
    group_bests: usize,
    arrivals: usize,
    summaries: usize,
    sampled: usize,
    end: usize,
}

impl Offsets {
    fn of(shape: &SamplerShape) -> Self {
        /// `SampleSlice` and `SampleSummary` of `sampling.cuh`.
        const SLICE_BYTES: usize = 24;
        const SUMMARY_BYTES: usize = 24;
        let cut = Cut::of(shape.width);
        let mut end = 0;
        let mut place = |count: usize, bytes: usize| {
            let start = end;
            end += aligned(count * bytes);
            start
        };
        Self {
            rows: place(shape.rows, size_of::<SampleRow>()),
            changes: place(shape.changes, size_of::<SampleChange>()),
            saved: place(shape.changes, size_of::<f32>()),
            slices: place(shape.rows * cut.slices, SLICE_BYTES),
            group_bests: place(shape.rows * cut.groups(), size_of::<u64>()),
            arrivals: place(shape.rows, size_of::<u32>()),
            summaries: place(shape.rows, SUMMARY_BYTES),
            sampled: place(shape.rows, size_of::<SampledToken>()),
            end,
        }
    }
}

/// Memory and settings of sampling on one device.
#[derive(Debug)]
pub struct CudaSampler {
    shape: SamplerShape,
    offsets: Offsets,
    memory: CudaBuffer,
    /// Rows and changes on their way to the device.
    staging: PinnedBuffer,
    copied: Event,
    /// Results on their way back.
    results: PinnedBuffer,
    sampled: Event,
    /// Rows of the last [`Self::sample`].
    rows: usize,
}

impl CudaSampler {
    /// Bytes of the device that a sampler takes.
    pub fn bytes(shape: &SamplerShape) -> Bytes {
        Bytes::from_usize(Offsets::of(shape).end)
    }

    /// A sampler inside `reservation`, which must hold [`Self::bytes`]. A width above
    /// [`MOST_SAMPLED_COLUMNS`] is a caller's mistake and panics.
    ///
    /// # Errors
    /// The reservation has another size or device, or memory is short.
    pub fn new(
        device: &CudaDevice,
        shape: &SamplerShape,
        reservation: Reservation,
    ) -> Result<Self, DeviceError> {
        assert!(
            shape.width <= MOST_SAMPLED_COLUMNS,
            "{} columns, at most {MOST_SAMPLED_COLUMNS}",
            shape.width
        );
        let needed = Self::bytes(shape);
        if reservation.bytes() != needed {
            return Err(DeviceError::ReservationSize {
                device: device.context().id().clone(),
                what: "a sampler".to_owned(),
                needed,
                reserved: reservation.bytes(),
            });
        }
        let offsets = Offsets::of(shape);
        let mut memory = CudaBuffer::allocate(device.context(), reservation)?;
        // The arrivals begin at zero, and each launch leaves them so.
        memory.clear(device.stream())?;
        Ok(Self {
            shape: *shape,
            offsets,
            memory,
            staging: PinnedBuffer::new(device.context(), offsets.saved - offsets.rows)?,
            copied: Event::new(device.context())?,
            results: PinnedBuffer::new(device.context(), offsets.end - offsets.sampled)?,
            sampled: Event::new(device.context())?,
            rows: 0,
        })
    }

    /// Enqueues the draw of a token for each of `rows`, from the row of logits at its place, and
    /// the copy of the results to the host. More rows, columns or changes than the sampler was
    /// made for are a caller's mistake and panic.
    ///
    /// # Errors
    /// The device failed.
    pub fn sample(
        &mut self,
        device: &CudaDevice,
        logits: SampleLogits<'_>,
        rows: &[SampleRow],
        changes: &[SampleChange],
    ) -> Result<(), DeviceError> {
        self.check(&logits, rows, changes);
        self.rows = rows.len();
        if rows.is_empty() {
            return Ok(());
        }
        self.stage(device, rows, changes)?;
        let cut = Cut::of(logits.width);
        let (memory, offsets) = (&self.memory, &self.offsets);
        let args = SampleArgs {
            logits: logits.logits.floats(rows.len() * logits.width),
            rows: memory.at(offsets.rows),
            changes: memory.at(offsets.changes),
            saved: memory.at(offsets.saved),
            slices: memory.at(offsets.slices),
            group_bests: memory.at(offsets.group_bests),
            arrivals: memory.at(offsets.arrivals),
            summaries: memory.at(offsets.summaries),
            sampled: memory.at(offsets.sampled),
            width: logits.width as i32,
            columns: logits.vocab_size as i32,
            drawable: logits.drawable as i32,
            slices_per_row: cut.slices as i32,
            group_lanes: cut.group_lanes as i32,
            reserved: 0,
        };
        let launch = Launch {
            grid: [cut.slices, rows.len(), 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
        };
        let kernels = &device.kernels().sample;
        // SAFETY: the structure is the kernel's; the logits hold the rows, and `check` has held
        // the arrays to the extents that the memory was made for.
        unsafe { device.launch(kernels.look, launch, &args) }?;
        if rows.iter().any(|row| row.draw_scale > 0.0) {
            let launch = Launch::linear(rows.len(), THREADS);
            // SAFETY: as above.
            unsafe { device.launch(kernels.draw, launch, &args) }?;
        }
        // The copy that was made to here last.
        self.sampled.synchronize()?;
        let results = &mut self.results.as_mut_slice::<SampledToken>()[..rows.len()];
        device.context().bind()?;
        // SAFETY: both ends hold the results, and live as long as the sampler, which waits for
        // the event before it reads them.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                results.as_mut_ptr().cast(),
                self.memory.at(self.offsets.sampled),
                size_of_val(results),
                device.stream().handle(),
            )
        };
        device
            .context()
            .check(code, || "copying the drawn tokens".to_owned())?;
        self.sampled.record(device.stream())
    }

    /// The tokens of the last [`Self::sample`], row by row; waits for them, not for what was
    /// enqueued after.
    ///
    /// # Errors
    /// The device failed.
    pub fn tokens(&self) -> Result<&[SampledToken], DeviceError> {
        self.sampled.synchronize()?;
        Ok(&self.results.as_slice()[..self.rows])
    }

    fn check(&self, logits: &SampleLogits<'_>, rows: &[SampleRow], changes: &[SampleChange]) {
        let shape = &self.shape;
        assert!(
            rows.len() <= shape.rows
                && logits.width <= shape.width
                && changes.len() <= shape.changes,
            "{} rows of {} columns with {} changes for {shape:?}",
            rows.len(),
            logits.width,
            changes.len()
        );
        assert!(
            logits.drawable <= logits.vocab_size && logits.vocab_size <= logits.width,
            "{} of {} tokens in {} columns",
            logits.drawable,
            logits.vocab_size,
            logits.width
        );
        for row in rows {
            let end = row.first_change as usize + row.change_count as usize;
            assert!(
                row.top_k <= MOST_TOP_K && end <= changes.len(),
                "{row:?} of {} changes",
                changes.len()
            );
        }
    }

    /// Copies rows and changes to the device, from page-locked memory.
    fn stage(
        &mut self,
        device: &CudaDevice,
        rows: &[SampleRow],
        changes: &[SampleChange],
    ) -> Result<(), DeviceError> {
        // The copies that were made from here last.
        self.copied.synchronize()?;
        let changes_at = self.offsets.changes - self.offsets.rows;
        let bytes = self.staging.as_mut_slice::<u8>();
        let row_bytes: &[u8] = bytemuck::cast_slice(rows);
        let change_bytes: &[u8] = bytemuck::cast_slice(changes);
        bytes[..row_bytes.len()].copy_from_slice(row_bytes);
        bytes[changes_at..][..change_bytes.len()].copy_from_slice(change_bytes);
        // One copy: the rows' unused room costs less than a second one.
        let used = if changes.is_empty() {
            row_bytes.len()
        } else {
            changes_at + change_bytes.len()
        };
        device.context().bind()?;
        // SAFETY: the device's memory holds the arrays of the largest step; the staging memory is
        // written again only after the event below.
        let code = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.memory.at(self.offsets.rows),
                bytes.as_ptr().cast(),
                used,
                device.stream().handle(),
            )
        };
        device
            .context()
            .check(code, || "copying a step's sampling settings".to_owned())?;
        self.copied.record(device.stream())
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
            MOST_SAMPLED_COLUMNS,
        ] {
            let cut = Cut::of(width);
            assert!(cut.slices * SLICE >= width && (cut.slices - 1) * SLICE < width);
            assert!((4..=32).contains(&cut.group_lanes) && cut.groups() <= MOST_GROUPS);
            assert!(cut.slices <= THREADS, "one thread adds up each slice");
        }
        assert_eq!(Cut::of(32_000).group_lanes, 4);
        assert_eq!(Cut::of(128_256).group_lanes, 8);
        assert_eq!(Cut::of(MOST_SAMPLED_COLUMNS).group_lanes, 32);
    }

    #[test]
    fn arrays_do_not_overlap_and_are_aligned() {
        let shape = SamplerShape {
            rows: 33,
            width: 151_936,
            changes: 1001,
        };
        let offsets = Offsets::of(&shape);
        let cut = Cut::of(shape.width);
        let parts = [
            (offsets.rows, 33 * size_of::<SampleRow>()),
            (offsets.changes, 1001 * size_of::<SampleChange>()),
            (offsets.saved, 1001 * 4),
            (offsets.slices, 33 * cut.slices * 24),
            (offsets.group_bests, 33 * cut.groups() * 8),
            (offsets.arrivals, 33 * 4),
            (offsets.summaries, 33 * 24),
            (offsets.sampled, 33 * 8),
            (offsets.end, 0),
        ];
        for pair in parts.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
            assert_eq!(pair[0].0 % 256, 0);
        }
    }

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<SampleRow>(), 48);
        assert_eq!(size_of::<SampleChange>(), 16);
        assert_eq!(size_of::<SampledToken>(), 8);
        assert_eq!(size_of::<SampleArgs>(), 9 * 8 + 6 * 4);
    }
}
