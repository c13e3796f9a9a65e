//! Buffers, and the inputs of a step.

use oxllama_memory::{Bytes, DeviceId, Reservation};

use super::ReferenceDevice;
use super::draw::StepDraws;
use crate::{
    DeviceError, DeviceMemory, HostBuffer, PAGE_TOKENS, Rope, RopeStyle, StepBatch, StepOps,
    WorkspaceShape,
};

impl DeviceMemory for ReferenceDevice {
    type Buffer = HostBuffer;

    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn allocate(&self, reservation: Reservation) -> Result<HostBuffer, DeviceError> {
        HostBuffer::allocate(&self.id, reservation)
    }

    fn release(&self, buffer: HostBuffer) -> Reservation {
        buffer.into_reservation()
    }

    fn upload(&self, source: &[u8], destination: &mut HostBuffer) -> Result<(), DeviceError> {
        destination.as_mut_slice()[..source.len()].copy_from_slice(source);
        Ok(())
    }

    fn download(&self, source: &HostBuffer, destination: &mut [u8]) -> Result<(), DeviceError> {
        destination.copy_from_slice(&source.as_slice()[..destination.len()]);
        Ok(())
    }

    fn host_memory<'a>(&self, buffer: &'a mut HostBuffer) -> Option<&'a mut [u8]> {
        Some(buffer.as_mut_slice())
    }

    fn copy_from_peer(
        &self,
        _peer: &Self,
        source: &HostBuffer,
        destination: &mut HostBuffer,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        destination.as_mut_slice::<u8>()[..bytes].copy_from_slice(&source.as_slice()[..bytes]);
        Ok(())
    }

    fn copy_within(
        &self,
        buffer: &mut HostBuffer,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        buffer
            .as_mut_slice::<u8>()
            .copy_within(from..from + bytes, to);
        Ok(())
    }
}

/// How one rope of the current step pairs up dimensions.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeLayout {
    pub(super) style: RopeStyle,
    /// Rotated pairs of a head.
    pub(super) pairs: usize,
}

/// The inputs of the current step and the scratch of attention.
#[derive(Debug)]
pub struct ReferenceWorkspace {
    pub(super) inputs: StepInputs,
    pub(super) draws: StepDraws,
    /// f32 `[pages_per_sequence * PAGE_TOKENS]`: the scores of one row and head.
    pub(super) scores: HostBuffer,
}

/// The inputs of the current step.
#[derive(Debug)]
pub(super) struct StepInputs {
    shape: WorkspaceShape,
    /// u32: `[rows]` token ids, `[rows]` positions, `[rows]` sequences, then
    /// `[sequences, pages_per_sequence]` pages; extents are those of `shape`.
    arrays: HostBuffer,
    /// f32 `[ropes, rows, 2, rotary_dim / 2]`: cosines, then sines.
    angles: HostBuffer,
    /// Rows of the current step.
    rows: usize,
    /// Ropes of the current step.
    ropes: Vec<RopeLayout>,
}

/// Elements of a workspace's three buffers.
struct Extents {
    arrays: usize,
    angles: usize,
    scores: usize,
}

impl Extents {
    fn of(shape: &WorkspaceShape) -> Self {
        Self {
            arrays: 3 * shape.rows + shape.sequences * shape.pages_per_sequence,
            angles: shape.ropes * shape.rows * 2 * (shape.rotary_dim / 2),
            scores: shape.pages_per_sequence * PAGE_TOKENS,
        }
    }
}

/// Bytes of `elements` elements of `u32` or `f32`.
fn words(elements: usize) -> Bytes {
    Bytes::from_usize(elements * size_of::<u32>())
}

impl StepOps for ReferenceDevice {
    type Workspace = ReferenceWorkspace;

    fn workspace_bytes(&self, shape: &WorkspaceShape) -> Bytes {
        let extents = Extents::of(shape);
        words(extents.arrays + extents.angles + extents.scores)
    }

    fn create_workspace(
        &self,
        shape: &WorkspaceShape,
        reservation: Reservation,
    ) -> Result<ReferenceWorkspace, DeviceError> {
        let extents = Extents::of(shape);
        let what = || "a workspace".to_owned();
        let sizes = [extents.arrays, extents.angles, extents.scores].map(words);
        let [arrays, angles, scores] = self.allocate_parts(what, sizes, reservation)?;
        let draws = StepDraws::new(shape);
        let inputs = StepInputs {
            shape: *shape,
            arrays,
            angles,
            rows: 0,
            ropes: Vec::with_capacity(shape.ropes),
        };
        Ok(ReferenceWorkspace {
            inputs,
            draws,
            scores,
        })
    }

    fn begin_step(
        &self,
        batch: &StepBatch<'_>,
        ropes: &[Rope],
        workspace: &mut ReferenceWorkspace,
    ) -> Result<(), DeviceError> {
        let inputs = &mut workspace.inputs;
        let shape = inputs.shape;
        let rows = batch.rows();
        let pages = batch.pages_per_sequence;
        shape.check(&self.id, batch, ropes)?;
        workspace.draws.begin(batch);

        inputs.rows = rows;
        let arrays = inputs.arrays.as_mut_slice::<u32>();
        let (token_ids, arrays) = arrays.split_at_mut(shape.rows);
        let (positions, arrays) = arrays.split_at_mut(shape.rows);
        let (row_sequences, page_tables) = arrays.split_at_mut(shape.rows);
        token_ids[..rows].copy_from_slice(batch.token_ids);
        positions[..rows].copy_from_slice(batch.positions);
        row_sequences[..rows].copy_from_slice(batch.row_sequences);
        for sequence in 0..batch.sequences() {
            page_tables[sequence * shape.pages_per_sequence..][..pages]
                .copy_from_slice(&batch.page_tables[sequence * pages..][..pages]);
        }

        inputs.ropes.clear();
        for (index, rope) in ropes.iter().enumerate() {
            inputs.ropes.push(RopeLayout {
                style: rope.style,
                pairs: rope.inverse_frequencies.len(),
            });
            for (row, &position) in batch.positions.iter().enumerate() {
                let (cosines, sines) = inputs.angles_mut(index, row);
                for (pair, &frequency) in rope.inverse_frequencies.iter().enumerate() {
                    // The angle is defined as an f32 product; its cosine is then taken as
                    // exactly as f64 allows, since angles reach tens of thousands.
                    let angle = f64::from(position as f32 * frequency);
                    cosines[pair] = angle.cos() as f32 * rope.attention_factor;
                    sines[pair] = angle.sin() as f32 * rope.attention_factor;
                }
            }
        }
        Ok(())
    }
}

impl ReferenceDevice {
    /// Divides `reservation` into buffers of `sizes`, which must use it up.
    pub(super) fn allocate_parts<const PARTS: usize>(
        &self,
        what: impl FnOnce() -> String,
        sizes: [Bytes; PARTS],
        mut reservation: Reservation,
    ) -> Result<[HostBuffer; PARTS], DeviceError> {
        let needed = Bytes::checked_sum(sizes).unwrap_or(Bytes::MAX);
        if needed != reservation.bytes() {
            return Err(DeviceError::ReservationSize {
                device: self.id.clone(),
                what: what(),
                needed,
                reserved: reservation.bytes(),
            });
        }
        let mut parts = Vec::with_capacity(PARTS);
        for size in sizes {
            let Ok(part) = reservation.split(size) else {
                unreachable!("the sizes add up to what is reserved");
            };
            parts.push(self.allocate(part)?);
        }
        let Ok(parts) = <[HostBuffer; PARTS]>::try_from(parts) else {
            unreachable!("one buffer was made of every size");
        };
        Ok(parts)
    }
}

impl StepInputs {
    /// Rows of the current step.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// u32 `[rows]`
    pub(super) fn token_ids(&self) -> &[u32] {
        &self.arrays.as_slice()[..self.rows]
    }

    /// The position of `row` in its sequence.
    pub(super) fn position(&self, row: usize) -> usize {
        self.arrays.as_slice::<u32>()[self.shape.rows + row] as usize
    }

    /// u32 `[pages_per_sequence]`: the pages of the sequence of `row`.
    pub(super) fn pages(&self, row: usize) -> &[u32] {
        let arrays = self.arrays.as_slice::<u32>();
        let sequence = arrays[2 * self.shape.rows + row] as usize;
        let start = 3 * self.shape.rows + sequence * self.shape.pages_per_sequence;
        &arrays[start..][..self.shape.pages_per_sequence]
    }

    /// How the rope `index` of the current step pairs up dimensions.
    pub(super) fn rope(&self, index: usize) -> RopeLayout {
        self.ropes[index]
    }

    /// Cosines and sines of `row` for the rope `index`, f32 `[rotary_dim / 2]` each.
    pub(super) fn angles(&self, index: usize, row: usize) -> (&[f32], &[f32]) {
        let pairs = self.shape.rotary_dim / 2;
        let start = (index * self.shape.rows + row) * 2 * pairs;
        self.angles.as_slice()[start..][..2 * pairs].split_at(pairs)
    }

    fn angles_mut(&mut self, index: usize, row: usize) -> (&mut [f32], &mut [f32]) {
        let pairs = self.shape.rotary_dim / 2;
        let start = (index * self.shape.rows + row) * 2 * pairs;
        self.angles.as_mut_slice()[start..][..2 * pairs].split_at_mut(pairs)
    }
}
