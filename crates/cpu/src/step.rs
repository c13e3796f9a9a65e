//! A step's inputs and the scratch of all operations, in one buffer.

use oxllama_backend::{
    DeviceError, HostBuffer, PAGE_TOKENS, Rope, RopeStyle, StepBatch, WorkspaceShape,
};
use oxllama_memory::{Bytes, DeviceId, Reservation};

use crate::attention::AttentionScratch;
use crate::integer::{IntegerRows, ROW_ACCUMULATORS, STAGING_WORDS, Scratch};
use crate::pack::BLOCK_ROWS;
use crate::quantise::QuantisedRow;
use crate::rowwise::RowRope;
use crate::simd::LANES;

/// Every part starts at a multiple of this, so that no two threads share a cache line.
const ALIGNMENT: usize = 64;
/// Rows that the kernel for many rows takes at once: their activations stay in the second-level
/// cache while a thread's tiles pass by.
pub(crate) const ROW_BLOCK: usize = 256;

/// Byte offsets of a workspace's parts.
#[derive(Debug, Clone, Copy)]
struct Layout {
    token_ids: usize,
    positions: usize,
    row_sequences: usize,
    page_tables: usize,
    /// f32 `[ropes, 2, rows, rotary_dim / 2]`: cosines, then sines.
    angles: usize,
    quantised: Quantised,
    first_thread: usize,
    thread_bytes: usize,
    /// From a thread's start.
    thread_row: usize,
    thread_quantised: Quantised,
    thread_staging: usize,
    thread_accumulators: usize,
    thread_attention: usize,
    total: usize,
}

/// Offsets of quantised rows.
#[derive(Debug, Clone, Copy)]
struct Quantised {
    values: usize,
    sums: usize,
    scales: usize,
}

/// Hands out consecutive aligned parts.
struct Parts(usize);

impl Parts {
    fn take(&mut self, bytes: usize) -> usize {
        let start = self.0;
        self.0 = (start + bytes).next_multiple_of(ALIGNMENT);
        start
    }

    fn quantised(&mut self, rows: usize, in_features: usize) -> Quantised {
        Quantised {
            values: self.take(rows * in_features * 2),
            sums: self.take(rows * in_features / BLOCK_ROWS * 4),
            scales: self.take(rows * 4),
        }
    }
}

impl Layout {
    fn new(shape: &WorkspaceShape, threads: usize) -> Self {
        let in_features = shape.max_in_features.next_multiple_of(BLOCK_ROWS);
        let mut parts = Parts(0);
        let token_ids = parts.take(shape.rows * 4);
        let positions = parts.take(shape.rows * 4);
        let row_sequences = parts.take(shape.rows * 4);
        let page_tables = parts.take(shape.sequences * shape.pages_per_sequence * 4);
        let angles = parts.take(shape.ropes * 2 * shape.rows * (shape.rotary_dim / 2) * 4);
        let quantised = parts.quantised(shape.rows, in_features);
        let first_thread = parts.0;
        let mut own = Parts(0);
        let thread_row = own.take(in_features * 4);
        let thread_quantised = own.quantised(1, in_features);
        let thread_staging = own.take(STAGING_WORDS * 4);
        let thread_accumulators = own.take(shape.rows.min(ROW_BLOCK) * ROW_ACCUMULATORS * 4);
        let attention = AttentionScratch::elements(
            shape.heads,
            shape.kv_heads.max(1),
            shape.head_dim.next_multiple_of(LANES),
        );
        let thread_attention = own.take(attention * 4);
        Self {
            token_ids,
            positions,
            row_sequences,
            page_tables,
            angles,
            quantised,
            first_thread,
            thread_bytes: own.0,
            thread_row,
            thread_quantised,
            thread_staging,
            thread_accumulators,
            thread_attention,
            total: first_thread + threads * own.0,
        }
    }
}

/// Bytes of a workspace for steps up to `shape`.
pub(crate) fn workspace_bytes(shape: &WorkspaceShape, threads: usize) -> Bytes {
    Bytes::from_usize(Layout::new(shape, threads).total)
}

/// A step's inputs and all scratch.
#[derive(Debug)]
pub struct CpuWorkspace {
    memory: HostBuffer,
    layout: Layout,
    pub(crate) shape: WorkspaceShape,
    threads: usize,
    rows: usize,
    sequences: usize,
    pages_per_sequence: usize,
    /// One past the largest page that a row of the step reads or writes.
    pub(crate) pages_used: usize,
    /// Rotated pairs of a head and their style, by rope.
    ropes: Vec<(usize, RopeStyle)>,
}

impl CpuWorkspace {
    pub(crate) fn new(
        device: &DeviceId,
        shape: &WorkspaceShape,
        threads: usize,
        reservation: Reservation,
    ) -> Result<Self, DeviceError> {
        let layout = Layout::new(shape, threads);
        let needed = Bytes::from_usize(layout.total);
        if reservation.bytes() != needed {
            return Err(DeviceError::ReservationSize {
                device: device.clone(),
                what: "a workspace".to_owned(),
                needed,
                reserved: reservation.bytes(),
            });
        }
        Ok(Self {
            memory: HostBuffer::allocate(device, reservation)?,
            layout,
            shape: *shape,
            threads,
            rows: 0,
            sequences: 0,
            pages_per_sequence: 0,
            pages_used: 0,
            ropes: Vec::with_capacity(shape.ropes),
        })
    }

    /// Copies a step's inputs and computes its cosines and sines.
    pub(crate) fn begin(
        &mut self,
        device: &DeviceId,
        batch: &StepBatch<'_>,
        ropes: &[Rope],
    ) -> Result<(), DeviceError> {
        self.shape.check(device, batch, ropes)?;
        let rows = batch.rows();
        self.rows = rows;
        self.sequences = batch.sequences();
        self.pages_per_sequence = batch.pages_per_sequence;
        self.pages_used = pages_used(batch);
        let layout = self.layout;
        self.words(layout.token_ids, rows)
            .copy_from_slice(batch.token_ids);
        self.words(layout.positions, rows)
            .copy_from_slice(batch.positions);
        self.words(layout.row_sequences, rows)
            .copy_from_slice(batch.row_sequences);
        let pages = self.sequences * self.pages_per_sequence;
        self.words(layout.page_tables, pages)
            .copy_from_slice(&batch.page_tables[..pages]);
        self.ropes.clear();
        for (index, rope) in ropes.iter().enumerate() {
            let pairs = rope.inverse_frequencies.len();
            self.ropes.push((pairs, rope.style));
            let start = self.angles_start(index);
            let memory = self.memory.as_mut_slice::<f32>();
            let (cosines, sines) = memory[start..][..2 * rows * pairs].split_at_mut(rows * pairs);
            let rotated = cosines.chunks_exact_mut(pairs.max(1));
            let rotated = rotated.zip(sines.chunks_exact_mut(pairs.max(1)));
            for (&position, (cosines, sines)) in batch.positions.iter().zip(rotated) {
                let pairs = cosines.iter_mut().zip(sines);
                for (frequency, (cosine, sine)) in rope.inverse_frequencies.iter().zip(pairs) {
                    let (sin, cos) = (position as f32 * frequency).sin_cos();
                    *cosine = cos * rope.attention_factor;
                    *sine = sin * rope.attention_factor;
                }
            }
        }
        Ok(())
    }

    fn words(&mut self, at: usize, count: usize) -> &mut [u32] {
        &mut self.memory.as_mut_slice::<u32>()[at / 4..][..count]
    }

    /// First f32 of a rope's tables.
    fn angles_start(&self, rope: usize) -> usize {
        let most = 2 * self.shape.rows * (self.shape.rotary_dim / 2);
        self.layout.angles / 4 + rope * most
    }

    fn inputs(&self, at: usize, count: usize) -> &[u32] {
        &self.memory.as_slice::<u32>()[at / 4..][..count]
    }

    /// The step's rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn token_ids(&self) -> &[u32] {
        self.inputs(self.layout.token_ids, self.rows)
    }

    pub(crate) fn positions(&self) -> &[u32] {
        self.inputs(self.layout.positions, self.rows)
    }

    pub(crate) fn row_sequences(&self) -> &[u32] {
        self.inputs(self.layout.row_sequences, self.rows)
    }

    pub(crate) fn page_tables(&self) -> &[u32] {
        self.inputs(
            self.layout.page_tables,
            self.sequences * self.pages_per_sequence,
        )
    }

    pub(crate) fn pages_per_sequence(&self) -> usize {
        self.pages_per_sequence
    }

    /// Rotation tables of the first row.
    ///
    /// # Panics
    /// If the step has no such rope.
    pub(crate) fn rope(&self, index: usize) -> RowRope {
        let (pairs, style) = self.ropes[index];
        let tables = &self.memory.as_slice::<f32>()[self.angles_start(index)..];
        let (cosines, rest) = tables.split_at(self.rows * pairs);
        RowRope {
            cosines: cosines.as_ptr(),
            sines: rest[..self.rows * pairs].as_ptr(),
            pairs,
            style,
        }
    }

    /// The scratch that threads share and have for themselves.
    ///
    /// # Panics
    /// If `rows` or `in_features` exceed the shape: a caller's mistake.
    pub(crate) fn scratch(
        &mut self,
        rows: usize,
        in_features: usize,
        threads: usize,
    ) -> StepScratch {
        assert!(
            rows <= self.shape.rows
                && in_features <= self.shape.max_in_features
                && threads <= self.threads,
            "{rows} rows of {in_features} features on {threads} threads exceed the workspace"
        );
        StepScratch {
            base: self.memory.as_mut_slice::<u8>().as_mut_ptr(),
            layout: self.layout,
        }
    }
}

/// One past the largest page that a row of the step reads or writes.
fn pages_used(batch: &StepBatch<'_>) -> usize {
    let rows = batch.row_sequences.iter().zip(batch.positions);
    rows.flat_map(|(&sequence, &position)| {
        let table = sequence as usize * batch.pages_per_sequence;
        &batch.page_tables[table..=table + position as usize / PAGE_TOKENS]
    })
    .max()
    .map_or(0, |&page| page as usize + 1)
}

/// Raw scratch, to be shared by the threads of a region.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepScratch {
    base: *mut u8,
    layout: Layout,
}

// SAFETY: a region's threads use disjoint rows of the shared part and only their own thread's
// part; whoever dereferences the pointers answers for that.
unsafe impl Send for StepScratch {}
// SAFETY: as above.
unsafe impl Sync for StepScratch {}

impl StepScratch {
    fn at(&self, offset: usize) -> *mut u8 {
        self.base.wrapping_add(offset)
    }

    fn own(&self, thread: usize, offset: usize) -> *mut u8 {
        self.at(self.layout.first_thread + thread * self.layout.thread_bytes + offset)
    }

    fn rows_at(base: *mut u8, parts: &Quantised, in_features: usize, rows: usize) -> IntegerRows {
        IntegerRows {
            values: base.wrapping_add(parts.values).cast(),
            sums: base.wrapping_add(parts.sums).cast(),
            scales: base.wrapping_add(parts.scales).cast(),
            in_features,
            rows,
        }
    }

    /// Quantised rows that all threads read.
    pub(crate) fn shared_rows(&self, in_features: usize, rows: usize) -> IntegerRows {
        Self::rows_at(self.base, &self.layout.quantised, in_features, rows)
    }

    /// A quantised row of this thread's own.
    pub(crate) fn own_row(&self, thread: usize, in_features: usize) -> IntegerRows {
        let base = self.own(thread, 0);
        Self::rows_at(base, &self.layout.thread_quantised, in_features, 1)
    }

    /// f32 row of this thread's own.
    pub(crate) fn own_f32(&self, thread: usize) -> *mut f32 {
        self.own(thread, self.layout.thread_row).cast()
    }

    /// This thread's scratch for many rows.
    pub(crate) fn integer(&self, thread: usize) -> Scratch {
        Scratch {
            staging: self.own(thread, self.layout.thread_staging).cast(),
            accumulators: self.own(thread, self.layout.thread_accumulators).cast(),
        }
    }

    /// This thread's scratch for attention.
    pub(crate) fn attention(&self, thread: usize) -> *mut f32 {
        self.own(thread, self.layout.thread_attention).cast()
    }
}

/// Where row `row` of quantised rows is written.
pub(crate) fn row_of(rows: &IntegerRows, row: usize) -> QuantisedRow {
    let blocks = rows.in_features / BLOCK_ROWS;
    QuantisedRow {
        values: rows.values.wrapping_add(row * rows.in_features).cast_mut(),
        sums: rows.sums.wrapping_add(row * blocks).cast_mut(),
        scale: rows.scales.wrapping_add(row).cast_mut(),
    }
}
