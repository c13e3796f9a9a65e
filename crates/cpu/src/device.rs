//! [`CpuDevice`]: the backend's operations on the kernels.

use std::sync::Arc;

use oxllama_backend::{
    Activation, DeviceError, DeviceMemory, ElementwiseOps, GatedLinear, HostBuffer, LinearOps,
    LinearOutput, LogitArgs, Norm, NormLinears, NormOps, Rope, StepBatch, StepOps, Store,
    WorkspaceShape,
};
use oxllama_format::{LinearHeader, LinearSource};
use oxllama_memory::{Bytes, DeviceId, Reservation};

use crate::float::embed_row;
use crate::linear::{self, CpuLinear, Weights};
use crate::pool::SpinPool;
use crate::products::{Input, MOST_TARGETS, Products, Target};
use crate::rowwise::{RowNorm, add_scaled, gate, norm_row, scale_and_cap};
use crate::step::{self, CpuWorkspace};
use crate::{Isa, SharedPointer};

/// Elements below which an element-wise operation is not worth sharing out.
const PARALLEL_ELEMENTS: usize = 16 * 1024;

/// How a CPU device runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads, the caller's included; `None`: as many as the process may use cores.
    pub threads: Option<usize>,
    /// Highest instruction set to use; `None`: [`Isa::select`]. Never above what the machine has.
    pub isa: Option<Isa>,
}

/// The processor, or a virtual slice of its memory, as a device.
#[derive(Debug, Clone)]
pub struct CpuDevice {
    id: DeviceId,
    pub(crate) isa: Isa,
    pub(crate) pool: Arc<SpinPool>,
}

impl CpuDevice {
    /// A device that takes reservations made on `id`, with threads of its own.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(id: DeviceId, options: CpuOptions) -> std::io::Result<Self> {
        let threads = options.threads.unwrap_or_else(SpinPool::default_threads);
        let pool = Arc::new(SpinPool::new(threads)?);
        Ok(Self::with_pool(id, options.isa, pool))
    }

    /// As [`Self::new`], on threads that other devices use as well.
    pub fn with_pool(id: DeviceId, isa: Option<Isa>, pool: Arc<SpinPool>) -> Self {
        let isa = isa.map_or_else(Isa::select, |isa| isa.min(Isa::detect()));
        Self { id, isa, pool }
    }

    /// The threads, to share with another device.
    pub fn pool(&self) -> &Arc<SpinPool> {
        &self.pool
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `work(start, end)` over parts of `0..items`, in parallel if there are many elements.
    fn share_out(&self, items: usize, elements: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        if elements < PARALLEL_ELEMENTS {
            work(0, items);
        } else {
            self.pool.run(&|team| {
                let share = team.share(items);
                work(share.start, share.end);
            });
        }
    }

    /// Multiplies the rows of `x` by every target.
    fn products(
        &self,
        input: Input,
        (x, prepared): (*const f32, *mut f32),
        targets: &[Target<'_>],
        add: Option<f32>,
        rows: usize,
        workspace: &mut CpuWorkspace,
    ) {
        let Some(first) = targets.first() else { return };
        let in_features = first.linear.in_features;
        let products = Products {
            isa: self.isa,
            input,
            x,
            prepared,
            rows,
            in_features,
            targets,
            add,
            scratch: workspace.scratch(rows, in_features, self.pool.threads()),
        };
        if rows > 0 {
            // SAFETY: the operation has checked its buffers' lengths and borrowed them; the
            // scratch has room for these rows, features and threads.
            self.pool.run(&|team| unsafe { products.run(team) });
        }
    }
}

/// The start of a buffer that must hold `elements` f32.
///
/// # Panics
/// If it is shorter: a caller's mistake.
pub(crate) fn read(buffer: &HostBuffer, elements: usize) -> *const f32 {
    buffer.as_slice::<f32>()[..elements].as_ptr()
}

/// As [`read`], to write.
pub(crate) fn write(buffer: &mut HostBuffer, elements: usize) -> *mut f32 {
    buffer.as_mut_slice::<f32>()[..elements].as_mut_ptr()
}

/// A norm as the kernels take it.
fn row_norm(norm: &Norm<HostBuffer>) -> RowNorm {
    RowNorm {
        kind: norm.kind,
        weight: read(&norm.weight, norm.width),
        bias: norm
            .bias
            .as_ref()
            .map_or(std::ptr::null(), |bias| read(bias, norm.width)),
        epsilon: norm.epsilon,
        width: norm.width,
    }
}

fn added(store: Store) -> Option<f32> {
    match store {
        Store::Overwrite => None,
        Store::Add { scale } => Some(scale),
    }
}

impl DeviceMemory for CpuDevice {
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
        destination.as_mut_slice::<u8>()[..source.len()].copy_from_slice(source);
        Ok(())
    }

    fn download(&self, source: &HostBuffer, destination: &mut [u8]) -> Result<(), DeviceError> {
        destination.copy_from_slice(&source.as_slice::<u8>()[..destination.len()]);
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

impl StepOps for CpuDevice {
    type Workspace = CpuWorkspace;

    fn workspace_bytes(&self, shape: &WorkspaceShape) -> Bytes {
        step::workspace_bytes(shape, self.pool.threads())
    }

    fn create_workspace(
        &self,
        shape: &WorkspaceShape,
        reservation: Reservation,
    ) -> Result<CpuWorkspace, DeviceError> {
        CpuWorkspace::new(&self.id, shape, self.pool.threads(), reservation)
    }

    fn begin_step(
        &self,
        batch: &StepBatch<'_>,
        ropes: &[Rope],
        workspace: &mut CpuWorkspace,
    ) -> Result<(), DeviceError> {
        workspace.begin(&self.id, batch, ropes)
    }
}

impl NormOps for CpuDevice {
    fn norm(
        &self,
        norm: &Norm<HostBuffer>,
        x: &HostBuffer,
        out: &mut HostBuffer,
        rows: usize,
        _workspace: &mut CpuWorkspace,
    ) -> Result<(), DeviceError> {
        let width = norm.width;
        let x = SharedPointer(read(x, rows * width).cast_mut());
        let out = SharedPointer(write(out, rows * width));
        let norm = SharedPointer(row_norm(norm));
        self.share_out(rows, rows * width, &|start, end| {
            for row in start..end {
                // SAFETY: the row exists in both, and belongs to this thread alone.
                unsafe {
                    let to = out.get().add(row * width);
                    norm_row(self.isa, norm.get(), x.get().add(row * width), to);
                }
            }
        });
        Ok(())
    }
}

impl LinearOps for CpuDevice {
    type Linear = CpuLinear;

    fn linear_bytes(&self, header: &LinearHeader) -> Bytes {
        linear::device_bytes(header)
    }

    fn load_linear(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> Result<CpuLinear, DeviceError> {
        linear::load(&self.id, self.isa, source, reservation)
    }

    fn linear_shape(&self, weights: &CpuLinear) -> (usize, usize) {
        (weights.in_features, weights.out_features)
    }

    fn embed(
        &self,
        table: &CpuLinear,
        scale: f32,
        out: &mut HostBuffer,
        workspace: &mut CpuWorkspace,
    ) -> Result<(), DeviceError> {
        let Weights::Float(weights) = table.weights() else {
            panic!("an embedding table is a float linear");
        };
        let width = weights.in_features;
        let tokens = workspace.token_ids();
        let out = write(out, tokens.len() * width);
        for (row, &token) in tokens.iter().enumerate() {
            let token = token as usize;
            let known = if token < weights.out_features {
                token
            } else {
                0
            };
            // SAFETY: the table has the row, and `out` one for every token.
            unsafe { embed_row(self.isa, &weights, known, scale, out.add(row * width)) };
        }
        Ok(())
    }

    fn linear(
        &self,
        x: &HostBuffer,
        output: LinearOutput<'_, CpuLinear, HostBuffer>,
        store: Store,
        rows: usize,
        workspace: &mut CpuWorkspace,
    ) -> Result<(), DeviceError> {
        let linear = output.weights;
        let target = Target {
            linear,
            out: write(output.out, rows * linear.out_features),
        };
        let x = (read(x, rows * linear.in_features), std::ptr::null_mut());
        self.products(Input::Plain, x, &[target], added(store), rows, workspace);
        Ok(())
    }

    fn norm_linears(
        &self,
        args: NormLinears<'_, CpuLinear, HostBuffer>,
        workspace: &mut CpuWorkspace,
    ) -> Result<(), DeviceError> {
        let rows = args.rows;
        for linears in args.linears.chunks_mut(MOST_TARGETS) {
            let first = linears[0].weights;
            let in_features = first.in_features;
            assert!(
                linears
                    .iter()
                    .all(|output| output.weights.in_features == in_features),
                "linears that share an input have one width"
            );
            let mut targets = [Target {
                linear: first,
                out: std::ptr::null_mut(),
            }; MOST_TARGETS];
            for (target, output) in targets.iter_mut().zip(linears.iter_mut()) {
                let elements = rows * output.weights.out_features;
                *target = Target {
                    linear: output.weights,
                    out: write(output.out, elements),
                };
            }
            let (input, prepared) = match args.norm {
                Some(norm) => {
                    assert_eq!(norm.width, in_features, "a norm is as wide as its linears");
                    let prepared = write(args.normed, rows * in_features);
                    (Input::Norm(row_norm(norm)), prepared)
                }
                None => (Input::Plain, std::ptr::null_mut()),
            };
            let x = (read(args.x, rows * in_features), prepared);
            let targets = &targets[..linears.len()];
            self.products(input, x, targets, None, rows, workspace);
        }
        Ok(())
    }

    fn gated_linear(
        &self,
        args: GatedLinear<'_, CpuLinear, HostBuffer>,
        workspace: &mut CpuWorkspace,
    ) -> Result<(), DeviceError> {
        let (linear, rows) = (args.weights, args.rows);
        let inputs = rows * linear.in_features;
        let target = Target {
            linear,
            out: write(args.out, rows * linear.out_features),
        };
        let input = Input::Gated {
            activation: args.activation,
            up: read(args.up, inputs),
        };
        let gate = write(args.gate, inputs);
        let x = (gate.cast_const(), gate);
        self.products(input, x, &[target], added(args.store), rows, workspace);
        Ok(())
    }
}

impl ElementwiseOps for CpuDevice {
    fn gate(
        &self,
        activation: Activation,
        gate_values: &mut HostBuffer,
        up: &HostBuffer,
        elements: usize,
    ) -> Result<(), DeviceError> {
        let up = SharedPointer(read(up, elements).cast_mut());
        let out = SharedPointer(write(gate_values, elements));
        self.share_out(elements, elements, &|start, end| {
            // SAFETY: the range exists in both, and belongs to this thread alone.
            unsafe {
                let out = out.get().add(start);
                let up = up.get().add(start);
                gate(self.isa, activation, out, up, out, end - start);
            }
        });
        Ok(())
    }

    fn add(
        &self,
        x: &HostBuffer,
        scale: f32,
        out: &mut HostBuffer,
        elements: usize,
    ) -> Result<(), DeviceError> {
        let x = SharedPointer(read(x, elements).cast_mut());
        let out = SharedPointer(write(out, elements));
        self.share_out(elements, elements, &|start, end| {
            // SAFETY: as above.
            unsafe {
                let out = out.get().add(start);
                add_scaled(self.isa, x.get().add(start), scale, out, end - start);
            }
        });
        Ok(())
    }

    fn gather_rows(
        &self,
        x: &HostBuffer,
        rows: &[u32],
        width: usize,
        out: &mut HostBuffer,
    ) -> Result<(), DeviceError> {
        x.gather_rows(rows, width, out);
        Ok(())
    }

    fn scatter_add_rows(
        &self,
        x: &HostBuffer,
        rows: &[u32],
        scale: f32,
        width: usize,
        out: &mut HostBuffer,
    ) -> Result<(), DeviceError> {
        x.scatter_add_rows(rows, scale, width, out);
        Ok(())
    }

    fn finish_logits(&self, logits: &mut HostBuffer, args: LogitArgs) -> Result<(), DeviceError> {
        let LogitArgs {
            rows,
            width,
            vocab_size,
            scale,
            softcap,
        } = args;
        let elements = rows * width;
        let values = &mut logits.as_mut_slice::<f32>()[..elements];
        if scale != 1.0 || softcap.is_some() {
            let values = SharedPointer(values.as_mut_ptr());
            self.share_out(elements, elements, &|start, end| {
                // SAFETY: the range exists and belongs to this thread alone.
                unsafe {
                    let values = values.get().add(start);
                    scale_and_cap(self.isa, values, scale, softcap, end - start);
                }
            });
        }
        if vocab_size < width {
            for row in logits.as_mut_slice::<f32>()[..elements].chunks_exact_mut(width) {
                row[vocab_size..].fill(f32::NEG_INFINITY);
            }
        }
        Ok(())
    }
}
