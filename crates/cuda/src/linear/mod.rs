//! Linear weights on the device, and products with them.

mod blaslt;
mod handover;
mod host;
mod launch;
mod layout;
mod load;
mod many;
mod order;
mod plan;
mod ranges;
mod scratch;

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::{
    Activation, DeviceError, GatedLinear, LinearOps, LinearOutput, NormLinears, Store,
};
use oxllama_format::{LinearHeader, LinearSource};
use oxllama_memory::{Bytes, Reservation};

use crate::buffer::CudaBuffer;
use crate::device::CudaDevice;
use crate::elementwise::EmbedTable;
use crate::prepare::{MOST_PREPARED, Prepare, PreparedRows, RowLayout};
use crate::step::CudaWorkspace;
use crate::stream::PinnedBuffer;
pub(crate) use blaslt::{BlasLt, Product};
use handover::{AnnouncedGate, Gated};
pub(crate) use handover::{Handover, Made, Reader};
pub(crate) use launch::LinearKernels;
use launch::{Finish, GatedRows, Operand, most_range_units};
use layout::{Layout, TileMatrix};
pub(crate) use load::LoaderPool;
pub(crate) use many::ROWS_OF_CHUNK;
use order::Order;
use plan::{LaunchShape, Plan};
pub(crate) use scratch::{LIBRARY_BYTES, LinearScratch};

/// Matrices of one launch; `MOST_MATRICES` in `linear.cu`.
pub(crate) const MOST_MATRICES: usize = 5;

/// Weights in the device's layout, in one allocation.
#[derive(Debug)]
pub struct CudaLinear {
    in_features: usize,
    out_features: usize,
    layout: Layout,
    plan: Plan,
    /// Units of the range that has most of them.
    range_units: usize,
    /// Bits of the widest weights.
    widest_bits: u32,
    matrix: TileMatrix,
    order: Order,
    /// f32 `[out_features]`
    bias: Option<CUdeviceptr>,
    /// Where all of it lies.
    _memory: LinearMemory,
}

/// Memory that kernels read weights from, kept for as long as they do.
#[derive(Debug)]
enum LinearMemory {
    Device(#[expect(dead_code, reason = "held, not read")] CudaBuffer),
    /// Page-locked, which the device reads over the bus.
    Host(#[expect(dead_code, reason = "held, not read")] (PinnedBuffer, Reservation)),
}

/// Which orders of inputs a run of linears needs.
#[derive(Debug, Default)]
struct Orders {
    distinct: [Order; MOST_PREPARED],
    count: usize,
}

impl Orders {
    /// The place of `weights`' order among at most `most`; `None` if it would be one more.
    fn slot_of(&mut self, weights: &CudaLinear, most: usize) -> Option<usize> {
        let known = &self.distinct[..self.count];
        let is_same = |order: &Order| order.is_same(&weights.order);
        if let Some(slot) = known.iter().position(is_same) {
            return Some(slot);
        }
        let slot = self.count;
        if slot == most {
            return None;
        }
        self.distinct[slot] = weights.order;
        self.count += 1;
        Some(slot)
    }
}

impl CudaDevice {
    /// `out_i ← finish(W_i · x + bias_i)` for linears that read one input, which `rows` says how
    /// to make unless the operation before has; its outputs and padding are filled in here.
    fn multiply_shared(
        &self,
        rows: Prepare<'_>,
        linears: &mut [LinearOutput<'_, CudaLinear, CudaBuffer>],
        finish: Finish,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let made = workspace.handover.made(&rows, linears);
        let scratch = &workspace.linear;
        if rows.rows > scratch.rows {
            return Err(self.too_many_rows(rows.rows, scratch));
        }
        let most_orders = if rows.rows > self.many_rows().few_rows() {
            1
        } else {
            MOST_PREPARED
        };
        let mut rest = linears;
        while !rest.is_empty() && rows.rows > 0 {
            let mut orders = Orders::default();
            let mut slots = [0; MOST_MATRICES];
            let mut count = 0;
            for (slot, output) in slots.iter_mut().zip(&*rest) {
                match orders.slot_of(output.weights, most_orders) {
                    Some(found) => *slot = found,
                    None => break,
                }
                count += 1;
            }
            let (group, later) = rest.split_at_mut(count);
            rest = later;
            self.multiply_group((rows, made), &orders, group, &slots, finish, scratch)?;
        }
        Ok(())
    }

    /// How gate and up can be multiplied in one launch that leaves their gated product, if they can.
    fn gating(
        &self,
        linears: &[LinearOutput<'_, CudaLinear, CudaBuffer>],
        rows: usize,
        announced: AnnouncedGate,
        scratch: &LinearScratch,
    ) -> Option<Finish> {
        let AnnouncedGate { activation, reader } = announced;
        let [gate, up] = linears else {
            return None;
        };
        let (gate, up) = (gate.weights, up.weights);
        let width = gate.out_features;
        let is_pair = up.out_features == width && up.order.is_same(&gate.order);
        if !is_pair || activation == Activation::GeluErf {
            return None;
        }
        if self.row_layout(rows) == RowLayout::Chunks {
            let takes_halves = self.kernels().prepare.takes_halves(width);
            return takes_halves.then_some(Finish::Gate(activation, GatedRows::InPlace));
        }
        let shape = LaunchShape {
            rows,
            matrices: 2,
            tiles: gate.layout.tiles + up.layout.tiles,
            range_units: most_range_units([gate, up].into_iter()),
            is_gated: true,
        };
        let reader = reader.filter(|reader| reader.width == width)?;
        gate.plan.divide(shape, self.limits())?;
        let inputs = RowLayout::Plain.padded_width(gate.in_features);
        let rows = GatedRows::For {
            reader,
            out: scratch.next_activations(rows, width, inputs)?,
        };
        Some(Finish::Gate(activation, rows))
    }

    fn too_many_rows(&self, found: usize, scratch: &LinearScratch) -> DeviceError {
        DeviceError::StepTooLarge {
            device: self.context().id().clone(),
            what: "rows of a linear, or inputs",
            found,
            limit: scratch.rows,
        }
    }

    /// The same for linears of few enough orders of inputs, in one launch each of preparation,
    /// unless the rows are made already (all of one order), and product.
    fn multiply_group(
        &self,
        (mut rows, made): (Prepare<'_>, Option<CUdeviceptr>),
        orders: &Orders,
        group: &mut [LinearOutput<'_, CudaLinear, CudaBuffer>],
        slots: &[usize; MOST_MATRICES],
        finish: Finish,
        scratch: &LinearScratch,
    ) -> Result<(), DeviceError> {
        let first = group[0].weights;
        rows.layout = self.row_layout(rows.rows);
        rows.padded_width = rows.layout.padded_width(first.in_features);
        let mut prepared = [PreparedRows {
            permutation: None,
            out: 0,
        }; MOST_PREPARED];
        for (slot, prepared) in prepared[..orders.count].iter_mut().enumerate() {
            let out = scratch.activations(slot, rows.rows, rows.padded_width, rows.layout);
            prepared.permutation = orders.distinct[slot].permutation;
            let out = out.ok_or_else(|| self.too_many_rows(rows.rows, scratch))?;
            prepared.out = made.unwrap_or(out);
        }
        let unused = Operand {
            weights: first,
            x: 0,
            out: 0,
        };
        let mut operands = [unused; MOST_MATRICES];
        for ((operand, output), &slot) in operands.iter_mut().zip(&mut *group).zip(slots) {
            assert_eq!(
                output.weights.in_features, rows.width,
                "linears of one input"
            );
            *operand = Operand {
                weights: output.weights,
                x: prepared[slot].out,
                out: output.out.floats(rows.rows * output.weights.out_features),
            };
        }
        // SAFETY: the scratch holds the rows of every order; permutations belong to weights of
        // this width; outputs hold as many rows, and all of it outlives the step.
        unsafe {
            if made.is_none() {
                self.prepare(rows, &prepared[..orders.count])?;
            }
            self.multiply(&operands[..group.len()], rows.rows, finish, scratch)
        }
    }
}

/// Rows as they come.
fn plain_rows(x: &CudaBuffer, rows: usize, width: usize) -> Prepare<'_> {
    Prepare {
        x,
        gate: None,
        norm: None,
        rows,
        width,
        padded_width: 0,
        layout: RowLayout::Plain,
        is_half: false,
    }
}

impl LinearOps for CudaDevice {
    type Linear = CudaLinear;

    fn linear_bytes(&self, header: &LinearHeader) -> Bytes {
        Bytes::from_usize(Layout::new(header).total)
    }

    fn load_linear(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> Result<CudaLinear, DeviceError> {
        self.load(source, reservation)
    }

    fn host_embedding_bytes(&self, header: &LinearHeader) -> Option<Bytes> {
        Some(self.linear_bytes(header))
    }

    fn load_host_embedding(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> Result<CudaLinear, DeviceError> {
        self.load_on_host(source, reservation)
    }

    fn linear_shape(&self, weights: &CudaLinear) -> (usize, usize) {
        (weights.in_features, weights.out_features)
    }

    fn embed(
        &self,
        table: &CudaLinear,
        scale: f32,
        out: &mut CudaBuffer,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        assert!(
            table.layout.is_float(),
            "an embedding is a linear of floats"
        );
        let rows = EmbedTable {
            weights: table.matrix.weights,
            tokens: table.out_features,
            width: table.in_features,
        };
        // SAFETY: the table is a loaded matrix of floats of these extents.
        unsafe { self.launch_embed(rows, scale * table.matrix.scale, out, workspace) }
    }

    fn linear(
        &self,
        x: &CudaBuffer,
        output: LinearOutput<'_, CudaLinear, CudaBuffer>,
        store: Store,
        rows: usize,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let rows = plain_rows(x, rows, output.weights.in_features);
        self.multiply_shared(rows, &mut [output], Finish::Store(store), workspace)
    }

    fn norm_linears(
        &self,
        args: NormLinears<'_, CudaLinear, CudaBuffer>,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let Some(first) = args.linears.first() else {
            return Ok(());
        };
        let rows = Prepare {
            norm: args.norm,
            ..plain_rows(args.x, args.rows, first.weights.in_features)
        };
        let announced = workspace.handover.gate();
        let gating = announced.and_then(|announced| {
            self.gating(args.linears, args.rows, announced, &workspace.linear)
        });
        let finish = gating.unwrap_or(Finish::Store(Store::Overwrite));
        self.multiply_shared(rows, args.linears, finish, workspace)?;
        let gate = &args.linears[0];
        let source = gate.out.address();
        match finish {
            Finish::Store(_) => {}
            Finish::Gate(_, GatedRows::InPlace) => workspace.handover.leave_gated(Gated {
                gate: source,
                rows: args.rows,
                width: gate.weights.out_features,
            }),
            Finish::Gate(_, GatedRows::For { reader, out }) => workspace.handover.leave(Made {
                source,
                rows: args.rows,
                reader,
                made: out,
            }),
        }
        Ok(())
    }

    fn announce_reader(&self, weights: &CudaLinear, workspace: &mut CudaWorkspace) {
        workspace.handover.announce(weights);
    }

    fn announce_gate(
        &self,
        activation: Activation,
        weights: &CudaLinear,
        workspace: &mut CudaWorkspace,
    ) {
        workspace.handover.announce_gate(activation, weights);
    }

    fn gated_linear(
        &self,
        args: GatedLinear<'_, CudaLinear, CudaBuffer>,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let width = args.weights.in_features;
        let gated = Gated {
            gate: args.gate.address(),
            rows: args.rows,
            width,
        };
        let rows = if workspace.handover.has_gated(gated) {
            Prepare {
                is_half: true,
                ..plain_rows(args.gate, args.rows, width)
            }
        } else if workspace.handover.has_rows(args.gate.address(), args.rows) {
            plain_rows(args.gate, args.rows, width)
        } else {
            Prepare {
                gate: Some((args.activation, &*args.gate)),
                ..plain_rows(args.up, args.rows, width)
            }
        };
        let output = LinearOutput {
            weights: args.weights,
            out: args.out,
        };
        self.multiply_shared(rows, &mut [output], Finish::Store(args.store), workspace)
    }
}
