//! What an operation gives, made as the next one wants it; the numbers are those of `prepare.cu`.
//! Attention leaves fp16 in the order of the linear that reads it, so that no kernel between the two has
//! to do that; gate and up projections leave their gated product, a quarter of their bytes: of few rows in that
//! order as well.

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

impl Reader {
    fn of(weights: &CudaLinear) -> Option<Self> {
        let width = weights.in_features;
        // The rest of a last block would have to be filled in.
        let is_whole = width.is_multiple_of(BLOCK_INPUTS);
        is_whole.then_some(Self {
            order: weights.order,
            width,
        })
    }
}

/// Rows that the operation before has made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made {
    /// The buffer that they would have gone to.
    pub(crate) source: CUdeviceptr,
    pub(crate) rows: usize,
    pub(crate) reader: Reader,
    /// f16 `[rows, width]`, in the reader's order.
    pub(crate) made: CUdeviceptr,
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

/// What becomes of gate and up.
#[derive(Debug, Clone, Copy)]
pub(super) struct AnnouncedGate {
    pub(super) activation: Activation,
    /// Who reads the product; `None` where nothing can be made for it.
    pub(super) reader: Option<Reader>,
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
    gate: Option<AnnouncedGate>,
    gated: Option<Gated>,
}

impl Handover {
    /// Takes note of who reads what the next operation gives.
    pub(crate) fn announce(&mut self, weights: &CudaLinear) {
        self.reader = Reader::of(weights);
    }

    /// Takes note that the next operation is gate and up, and of what becomes of them.
    pub(super) fn announce_gate(&mut self, activation: Activation, weights: &CudaLinear) {
        self.gate = Some(AnnouncedGate {
            activation,
            reader: Reader::of(weights),
        });
    }

    /// What becomes of gate and up, if they are this operation.
    pub(super) fn gate(&mut self) -> Option<AnnouncedGate> {
        self.gate.take()
    }

    /// Whether the operation before has made these rows for who reads them.
    pub(super) fn has_rows(&self, source: CUdeviceptr, rows: usize) -> bool {
        self.made
            .is_some_and(|made| (made.source, made.rows) == (source, rows))
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

    /// Where the rows to multiply are, if they have been made already. What has been announced is not for this
    /// operation.
    pub(crate) fn made(
        &mut self,
        rows: &Prepare<'_>,
        linears: &[LinearOutput<'_, CudaLinear, CudaBuffer>],
    ) -> Option<CUdeviceptr> {
        let made = self.made;
        *self = Self::default();
        let made = made.filter(|made| made.serves(rows, linears));
        made.map(|made| made.made)
    }
}
