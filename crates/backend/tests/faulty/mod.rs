//! The reference backend with one mistake in each of several operations: mistakes of the
//! kind that a fast backend is likely to make.

use oxllama_backend::reference::{ReferenceDevice, ReferenceLinear, ReferenceWorkspace};
use oxllama_backend::{
    Activation, AttentionArgs, AttentionOps, DeviceError, DeviceMemory, Draw, DrawLimits,
    ElementwiseOps, HostBuffer, LinearOps, LinearOutput, LogitArgs, Norm, NormOps, Rope, StepBatch,
    StepOps, Store, WorkspaceShape,
};
use oxllama_format::{LinearHeader, LinearSource};
use oxllama_memory::{Bytes, DeviceId, Reservation};

type Result = std::result::Result<(), DeviceError>;

/// Wraps the reference; see the operations for what is wrong with each.
pub(crate) struct FaultyDevice(pub(crate) ReferenceDevice);

impl DeviceMemory for FaultyDevice {
    type Buffer = HostBuffer;

    fn id(&self) -> &DeviceId {
        self.0.id()
    }

    fn allocate(&self, reservation: Reservation) -> std::result::Result<HostBuffer, DeviceError> {
        self.0.allocate(reservation)
    }

    fn release(&self, buffer: HostBuffer) -> Reservation {
        self.0.release(buffer)
    }

    fn upload(&self, source: &[u8], destination: &mut HostBuffer) -> Result {
        self.0.upload(source, destination)
    }

    fn download(&self, source: &HostBuffer, destination: &mut [u8]) -> Result {
        self.0.download(source, destination)
    }

    fn host_memory<'a>(&self, buffer: &'a mut HostBuffer) -> Option<&'a mut [u8]> {
        self.0.host_memory(buffer)
    }

    fn copy_from_peer(
        &self,
        peer: &Self,
        source: &HostBuffer,
        destination: &mut HostBuffer,
        bytes: usize,
    ) -> Result {
        self.0.copy_from_peer(&peer.0, source, destination, bytes)
    }

    fn copy_within(&self, buffer: &mut HostBuffer, from: usize, to: usize, bytes: usize) -> Result {
        self.0.copy_within(buffer, from, to, bytes)
    }
}

impl StepOps for FaultyDevice {
    type Workspace = ReferenceWorkspace;

    fn workspace_bytes(&self, shape: &WorkspaceShape) -> Bytes {
        self.0.workspace_bytes(shape)
    }

    fn create_workspace(
        &self,
        shape: &WorkspaceShape,
        reservation: Reservation,
    ) -> std::result::Result<ReferenceWorkspace, DeviceError> {
        self.0.create_workspace(shape, reservation)
    }

    /// Forgets top-p.
    fn begin_step(
        &self,
        batch: &StepBatch<'_>,
        ropes: &[Rope],
        workspace: &mut ReferenceWorkspace,
    ) -> Result {
        let draws: Vec<Draw> = batch
            .draws
            .iter()
            .map(|draw| Draw {
                top_p: 0.0,
                ..*draw
            })
            .collect();
        let batch = StepBatch {
            draws: &draws,
            ..*batch
        };
        self.0.begin_step(&batch, ropes, workspace)
    }
}

impl NormOps for FaultyDevice {
    /// The last element keeps its old value.
    fn norm(
        &self,
        norm: &Norm<HostBuffer>,
        x: &HostBuffer,
        out: &mut HostBuffer,
        rows: usize,
        workspace: &mut ReferenceWorkspace,
    ) -> Result {
        self.0.norm(norm, x, out, rows, workspace)?;
        let last = rows * norm.width - 1;
        out.as_mut_slice()[last] = x.as_slice::<f32>()[last];
        Ok(())
    }
}

impl LinearOps for FaultyDevice {
    type Linear = ReferenceLinear;

    fn linear_bytes(&self, header: &LinearHeader) -> Bytes {
        self.0.linear_bytes(header)
    }

    fn load_linear(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> std::result::Result<ReferenceLinear, DeviceError> {
        self.0.load_linear(source, reservation)
    }

    fn linear_shape(&self, weights: &ReferenceLinear) -> (usize, usize) {
        self.0.linear_shape(weights)
    }

    /// Forgets the scale.
    fn embed(
        &self,
        table: &ReferenceLinear,
        _scale: f32,
        out: &mut HostBuffer,
        workspace: &mut ReferenceWorkspace,
    ) -> Result {
        self.0.embed(table, 1.0, out, workspace)
    }

    /// The first result depends on the number of rows, by a unit in the last place.
    fn linear(
        &self,
        x: &HostBuffer,
        output: LinearOutput<'_, ReferenceLinear, HostBuffer>,
        store: Store,
        rows: usize,
        workspace: &mut ReferenceWorkspace,
    ) -> Result {
        let LinearOutput { weights, out } = output;
        let output = LinearOutput {
            weights,
            out: &mut *out,
        };
        self.0.linear(x, output, store, rows, workspace)?;
        // Not where the suite compares rows through a fused operation.
        if rows == 32 {
            let first = &mut out.as_mut_slice::<f32>()[0];
            *first = first.next_up();
        }
        Ok(())
    }
}

impl AttentionOps for FaultyDevice {
    /// A window is one position too long.
    fn attention(
        &self,
        args: AttentionArgs<'_, HostBuffer>,
        workspace: &mut ReferenceWorkspace,
    ) -> Result {
        let window = args.window.map(|window| window + 1);
        self.0
            .attention(AttentionArgs { window, ..args }, workspace)
    }
}

impl ElementwiseOps for FaultyDevice {
    /// Takes one GELU for the other.
    fn gate(
        &self,
        activation: Activation,
        gate: &mut HostBuffer,
        up: &HostBuffer,
        elements: usize,
    ) -> Result {
        let activation = match activation {
            Activation::GeluErf => Activation::GeluTanh,
            other => other,
        };
        self.0.gate(activation, gate, up, elements)
    }

    fn add(&self, x: &HostBuffer, scale: f32, out: &mut HostBuffer, elements: usize) -> Result {
        self.0.add(x, scale, out, elements)
    }

    fn gather_rows(
        &self,
        x: &HostBuffer,
        rows: &[u32],
        width: usize,
        out: &mut HostBuffer,
    ) -> Result {
        self.0.gather_rows(x, rows, width, out)
    }

    /// Forgets the scale.
    fn scatter_add_rows(
        &self,
        x: &HostBuffer,
        rows: &[u32],
        _scale: f32,
        width: usize,
        out: &mut HostBuffer,
    ) -> Result {
        self.0.scatter_add_rows(x, rows, 1.0, width, out)
    }

    /// Leaves the padding unmasked.
    fn finish_logits(&self, logits: &mut HostBuffer, args: LogitArgs) -> Result {
        let vocab_size = args.width;
        self.0
            .finish_logits(logits, LogitArgs { vocab_size, ..args })
    }

    fn draw_limits(&self, width: usize) -> Option<DrawLimits> {
        self.0.draw_limits(width)
    }

    fn draw_tokens(
        &self,
        logits: &mut HostBuffer,
        args: LogitArgs,
        workspace: &mut ReferenceWorkspace,
    ) -> Result {
        self.0.draw_tokens(logits, args, workspace)
    }

    fn drawn_tokens<'a>(
        &self,
        workspace: &'a mut ReferenceWorkspace,
    ) -> std::result::Result<&'a [u32], DeviceError> {
        self.0.drawn_tokens(workspace)
    }
}
