//! What a device does besides arithmetic: memory, copies, and the frame of a step.

use oxllama_memory::{Bytes, DeviceId, Reservation};

use crate::{DeviceError, Rope, SequenceKey, StepBatch, WorkspaceShape};

/// Allocation and transfer.
pub trait DeviceMemory: Send + Sync + 'static {
    /// A piece of this device's memory. Holds its ledger entry; dropping it frees both.
    type Buffer: Send + Sync + 'static;

    /// Which device this is.
    fn id(&self) -> &DeviceId;

    /// Allocates exactly `reservation.bytes()`, zeroed.
    ///
    /// # Errors
    /// The reservation is for another device, or the system has less than the ledger thought.
    fn allocate(&self, reservation: Reservation) -> Result<Self::Buffer, DeviceError>;

    /// Frees a buffer and returns the room that it had, so that another can be made there
    /// before anyone else takes it.
    fn release(&self, buffer: Self::Buffer) -> Reservation;

    /// Copies host bytes to the start of `destination`.
    ///
    /// # Errors
    /// The device failed. `source` longer than `destination` is a caller's mistake and panics.
    fn upload(&self, source: &[u8], destination: &mut Self::Buffer) -> Result<(), DeviceError>;

    /// Copies the start of `source` to host bytes, after everything enqueued before it.
    ///
    /// # Errors
    /// The device failed. `destination` longer than `source` is a caller's mistake and panics.
    fn download(&self, source: &Self::Buffer, destination: &mut [u8]) -> Result<(), DeviceError>;

    /// The whole buffer where the host may read and write it in place, after everything
    /// enqueued before, aligned for f32: saves a copy of what the host reads anyway. `None`
    /// for memory that is not the host's.
    fn host_memory<'a>(&self, _buffer: &'a mut Self::Buffer) -> Option<&'a mut [u8]> {
        None
    }

    /// The first `elements` f32 of a buffer for the host to read and change: in place where
    /// there is [`Self::host_memory`], otherwise in `copy`, which must hold them then and may
    /// be empty if not.
    ///
    /// # Errors
    /// The device failed. A buffer or copy too short is a caller's mistake and panics.
    fn read_f32<'a>(
        &self,
        source: &'a mut Self::Buffer,
        elements: usize,
        copy: &'a mut [f32],
    ) -> Result<&'a mut [f32], DeviceError> {
        if let Some(copy) = copy.get_mut(..elements) {
            self.download(source, bytemuck::cast_slice_mut(copy))?;
        }
        let values = self.host_memory(source);
        let values = values.map_or(copy, bytemuck::cast_slice_mut);
        Ok(&mut values[..elements])
    }

    /// Copies the first `bytes` of a buffer of `peer`, a device of the same backend (perhaps
    /// this one): after everything enqueued on `peer` so far, and before what is enqueued there
    /// from here on.
    ///
    /// # Errors
    /// A device failed.
    fn copy_from_peer(
        &self,
        peer: &Self,
        source: &Self::Buffer,
        destination: &mut Self::Buffer,
        bytes: usize,
    ) -> Result<(), DeviceError>;

    /// Copies `bytes` bytes of `buffer` from byte `from` to byte `to` of it, in order with
    /// everything enqueued before and after.
    ///
    /// # Errors
    /// The device failed. Ranges past the buffer's end, or ranges that overlap, are a caller's
    /// mistake: the first panics, the second leaves `to` unspecified.
    fn copy_within(
        &self,
        buffer: &mut Self::Buffer,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<(), DeviceError>;
}

/// Scratch memory and the inputs of a step.
pub trait StepOps: DeviceMemory {
    /// The step's inputs on the device and all scratch that operations need beyond the
    /// caller's activations. Sized once; no operation allocates.
    type Workspace: Send + 'static;

    /// Bytes of a workspace for steps up to `shape`: exactly what [`Self::create_workspace`] takes.
    fn workspace_bytes(&self, shape: &WorkspaceShape) -> Bytes;

    /// Makes a workspace inside `reservation`, which must hold [`Self::workspace_bytes`].
    ///
    /// # Errors
    /// As [`DeviceMemory::allocate`], or the reservation has another size.
    fn create_workspace(
        &self,
        shape: &WorkspaceShape,
        reservation: Reservation,
    ) -> Result<Self::Workspace, DeviceError>;

    /// Bytes of the recordings that [`Self::sequence`] is to keep, of steps up to `shape` through
    /// `layers` layers: none on a device that records nothing.
    fn recording_bytes(&self, _shape: &WorkspaceShape, _layers: usize) -> Bytes {
        Bytes::ZERO
    }

    /// Lets [`Self::sequence`] keep recordings on `workspace`, as many as `room` holds. It records
    /// nothing before.
    ///
    /// # Errors
    /// The room is on another device.
    fn record_within(
        &self,
        _room: Reservation,
        _workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Whether operations return before they have run, so that several devices work at the same
    /// time for one thread that calls them.
    fn runs_by_itself(&self) -> bool {
        false
    }

    /// Whether all is well with what was enqueued, as far as is known: waits for nothing. For a
    /// device that others have waited for, so that nobody believes what it has not computed.
    ///
    /// # Errors
    /// The device failed in something enqueued before.
    fn check_enqueued(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Lets `steps` steps on `workspace` be under way at a time: [`Self::begin_step`] of one more
    /// waits until the first of them runs. At least two may, without this.
    ///
    /// # Errors
    /// The host has no memory for their inputs.
    fn allow_steps(
        &self,
        _steps: usize,
        _workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Takes over the inputs of a step: token ids, positions, page tables, and the cosines
    /// and sines of every row for each of `ropes` (attention names them by index).
    ///
    /// # Errors
    /// The step is larger than the workspace's shape.
    fn begin_step(
        &self,
        batch: &StepBatch<'_>,
        ropes: &[Rope],
        workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError>;

    /// Enqueues a step's operations by calling `enqueue`, or by replaying what an earlier call
    /// with an equal `key` on this workspace has enqueued: a device that records sequences need
    /// not be told each operation again. `None`: the operations depend on more than a key says.
    /// `enqueue` may be called twice, where what the first call enqueued cannot be recorded.
    ///
    /// # Errors
    /// Those of `enqueue`, and the device's own.
    fn sequence<E: From<DeviceError>>(
        &self,
        _key: Option<SequenceKey>,
        workspace: &mut Self::Workspace,
        mut enqueue: impl FnMut(&mut Self::Workspace) -> Result<(), E>,
    ) -> Result<(), E> {
        enqueue(workspace)
    }
}
