//! What attention gives, made as the linear wants it that reads it: fp16 in its order. No kernel
//! between the two has to do that; the numbers are those of `prepare.cu`.

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::LinearOutput;

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

/// What passes between operations of a workspace.
#[derive(Debug, Default)]
pub(crate) struct Handover {
    reader: Option<Reader>,
    made: Option<Made>,
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

    /// Who reads what this operation gives. Whatever was made before has been read.
    pub(crate) fn reader(&mut self) -> Option<Reader> {
        self.made = None;
        self.reader.take()
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
        self.reader = None;
        let made = self.made.take();
        made.is_some_and(|made| made.serves(rows, linears))
    }
}
