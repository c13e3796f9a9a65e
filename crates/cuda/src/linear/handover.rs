//! What an operation gives, made as the next one wants it; the numbers are those of `prepare.cu`.
//! Attention leaves fp16 in the order of the linear that reads it, so that no kernel between the two has
//! to do that; gate and up projections leave their gated product, a quarter of their bytes.

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::{Activation, LinearOutput};

use super::layout::BLOCK_INPUTS;
use super::{CudaLinear, Order};
use crate::buffer::CudaBuffer;
use crate::prepare::Prepare;

/// The linear that reads what the next operation gives.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader {
    pub(crate) order: Order,
    /// Elements of a row: whole blocks.
    pub(crate) width: usize,
}

/// Rows that the operation before has made, in the scratch where prepared ones would be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made {
    /// The buffer that they would have gone to.
    pub(crate) source: CUdeviceptr,
    pub(crate) rows: usize,
    pub(crate) reader: Reader,
}

impl Made {
    /// Whether they are what `linears` are to multiply, which `rows` says how to make.
    fn serves(
        &self,
        rows: &Prepare<'_>,
        linears: &[LinearOutput<'_, CudaLinear, CudaBuffer>],
    ) -> bool {
        let input = (rows.x.address(), rows.rows, rows.width);
        let is_plain = rows.gate.is_none() && rows.norm.is_none();
        let has_order = |output: &LinearOutput<'_, CudaLinear, CudaBuffer>| {
            output.weights.order.is_same(&self.reader.order)
        };
        is_plain
            && input == (self.source, self.rows, self.reader.width)
            && linears.iter().all(has_order)
    }
}

/// `activation(gate) ⊙ up` as f16 `[rows, width]`, in the buffer that the gate was to go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gated {
    pub(super) gate: CUdeviceptr,
    pub(super) rows: usize,
    pub(super) width: usize,
}

/// What passes between operations of a workspace.
#[derive(Debug, Default)]
pub(crate) struct Handover {
    reader: Option<Reader>,
    made: Option<Made>,
    gate: Option<Activation>,
    gated: Option<Gated>,
}

impl Handover {
    /// Takes note of who reads what the next operation gives.
    pub(crate) fn announce(&mut self, weights: &CudaLinear) {
        let width = weights.in_features;
        // The rest of a last block would have to be filled in.
        let is_whole = width.is_multiple_of(BLOCK_INPUTS);
        self.reader = is_whole.then_some(Reader {
            order: weights.order,
            width,
        });
    }

    /// Takes note that the next operation is gate and up, and the activation.
    pub(super) fn announce_gate(&mut self, activation: Activation) {
        self.gate = Some(activation);
    }

    /// The activation, if this operation is gate and up.
    pub(super) fn gate(&mut self) -> Option<Activation> {
        self.gate.take()
    }

    /// Takes note of a gated product.
    pub(super) fn leave_gated(&mut self, gated: Gated) {
        self.gated = Some(gated);
    }

    /// Whether this is what the operation before has left.
    pub(super) fn has_gated(&mut self, gated: Gated) -> bool {
        self.gated.take() == Some(gated)
    }

    /// Who reads what this operation gives. Whatever was made before has been read.
    pub(crate) fn reader(&mut self) -> Option<Reader> {
        let reader = self.reader.take();
        *self = Self::default();
        reader
    }

    /// Takes note of rows that the operation has made.
    pub(crate) fn leave(&mut self, made: Made) {
        self.made = Some(made);
    }

    /// Whether the rows to multiply have been made already. What has been announced is not for this
    /// operation.
    pub(crate) fn has_made(
        &mut self,
        rows: &Prepare<'_>,
        linears: &[LinearOutput<'_, CudaLinear, CudaBuffer>],
    ) -> bool {
        let made = self.made;
        *self = Self::default();
        made.is_some_and(|made| made.serves(rows, linears))
    }
}
