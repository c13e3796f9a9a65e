//! Element-wise and row-wise operations, and rows of the embedding.

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::{Activation, DeviceError, DrawLimits, ElementwiseOps, LogitArgs};

use crate::buffer::CudaBuffer;
use crate::device::CudaDevice;
use crate::draw::draw_limits;
use crate::error::CudaUnavailable;
use crate::launch::Launch;
use crate::module::{Kernel, Modules};
use crate::prepare::activation_number;
use crate::step::CudaWorkspace;

/// Threads of a block, each of which treats four elements.
const THREADS: usize = 256;

/// Threads of a block of `oxl_embed`, each of which treats eight elements.
const EMBED_THREADS: usize = 128;

/// Row indices that travel with one launch; `MOST_ROW_INDICES` in `elementwise.cu`.
const MOST_ROW_INDICES: usize = 256;

/// The entries of `elementwise.cu`.
#[derive(Debug)]
pub(crate) struct ElementwiseKernels {
    pub(crate) norm: Kernel,
    gate: Kernel,
    add: Kernel,
    gather_rows: Kernel,
    gather_indexed: Kernel,
    scatter_add_rows: Kernel,
    finish_logits: Kernel,
    embed: Kernel,
}

impl ElementwiseKernels {
    pub(crate) fn find(modules: &Modules) -> Result<Self, CudaUnavailable> {
        let kernel = |name| modules.kernel("elementwise", name, 0);
        Ok(Self {
            norm: kernel("oxl_norm")?,
            gate: kernel("oxl_gate")?,
            add: kernel("oxl_add")?,
            gather_rows: kernel("oxl_gather_rows")?,
            gather_indexed: kernel("oxl_gather_indexed")?,
            scatter_add_rows: kernel("oxl_scatter_add_rows")?,
            finish_logits: kernel("oxl_finish_logits")?,
            embed: kernel("oxl_embed")?,
        })
    }
}

/// `GateArgs` of `elementwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GateArgs {
    gate: CUdeviceptr,
    up: CUdeviceptr,
    elements: u64,
    activation: i32,
    reserved: i32,
}

/// `AddArgs` of `elementwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AddArgs {
    x: CUdeviceptr,
    out: CUdeviceptr,
    elements: u64,
    scale: f32,
    reserved: i32,
}

/// `RowsArgs` of `elementwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RowsArgs {
    x: CUdeviceptr,
    out: CUdeviceptr,
    width: i32,
    scale: f32,
    rows: [u32; MOST_ROW_INDICES],
}

/// `GatherIndexedArgs` of `elementwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GatherIndexedArgs {
    x: CUdeviceptr,
    out: CUdeviceptr,
    indices: CUdeviceptr,
    width: i32,
    reserved: i32,
}

/// `FinishLogitsArgs` of `elementwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct FinishLogitsArgs {
    logits: CUdeviceptr,
    width: i32,
    vocab_size: i32,
    scale: f32,
    softcap: f32,
}

/// `EmbedArgs` of `elementwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct EmbedArgs {
    token_ids: CUdeviceptr,
    table: CUdeviceptr,
    out: CUdeviceptr,
    width: i32,
    blocks: i32,
    tokens: u32,
    scale: f32,
}

/// A table of embeddings: a linear of fp16 weights whose outputs are tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EmbedTable {
    /// f16, in the layout of linears: `[outputs / 32, inputs / 32, 4, 32, 8]`, both rounded up;
    /// 16-byte aligned.
    pub(crate) weights: CUdeviceptr,
    /// The table's outputs.
    pub(crate) tokens: usize,
    /// The table's inputs, in their own order.
    pub(crate) width: usize,
}

/// Blocks of [`THREADS`] threads of four elements for each of `rows` rows.
fn row_launch(rows: usize, width: usize) -> Launch {
    Launch {
        grid: [rows, width.div_ceil(4 * THREADS), 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
    }
}

/// The same for elements that are no rows.
fn element_launch(elements: usize) -> Launch {
    Launch::linear(elements.div_ceil(4 * THREADS), THREADS)
}

/// Indices as a launch takes them: pieces of up to [`MOST_ROW_INDICES`] with the number of rows
/// before, how many there are, and the rest zeros.
fn index_pieces(
    rows: &[u32],
) -> impl Iterator<Item = (usize, usize, [u32; MOST_ROW_INDICES])> + '_ {
    let pieces = rows.chunks(MOST_ROW_INDICES).enumerate();
    pieces.map(|(index, piece)| {
        let mut indices = [0; MOST_ROW_INDICES];
        indices[..piece.len()].copy_from_slice(piece);
        (index * MOST_ROW_INDICES, piece.len(), indices)
    })
}

/// Rows that a buffer must have so that all of `rows` lie in it.
fn rows_reached(rows: &[u32]) -> usize {
    rows.iter().max().map_or(0, |&last| last as usize + 1)
}

impl CudaDevice {
    /// `out[r, :] = scale · table[token_ids[r], :]` for the step's rows, f32 `[rows, width]`;
    /// tokens past the table read its first.
    ///
    /// # Safety
    /// What the addresses of `table` point to is as large as it says and stays allocated until
    /// the stream has passed this.
    pub(crate) unsafe fn launch_embed(
        &self,
        table: EmbedTable,
        scale: f32,
        out: &mut CudaBuffer,
        workspace: &CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let rows = workspace.inputs.rows;
        let args = EmbedArgs {
            token_ids: workspace.inputs.token_ids(),
            table: table.weights,
            out: out.floats(rows * table.width),
            width: table.width as i32,
            blocks: table.width.div_ceil(32) as i32,
            tokens: table.tokens as u32,
            scale,
        };
        let launch = Launch {
            grid: [rows, table.width.div_ceil(8 * EMBED_THREADS), 1],
            block: [EMBED_THREADS, 1, 1],
            shared_bytes: 0,
        };
        // SAFETY: the structure is the kernel's; the workspace has the rows' tokens, `out` holds
        // the rows, and the rest is the caller's promise.
        unsafe { self.launch(self.kernels().elementwise.embed, launch, &args) }
    }
}

impl ElementwiseOps for CudaDevice {
    fn gate(
        &self,
        activation: Activation,
        gate: &mut CudaBuffer,
        up: &CudaBuffer,
        elements: usize,
    ) -> Result<(), DeviceError> {
        let args = GateArgs {
            gate: gate.floats(elements),
            up: up.floats(elements),
            elements: elements as u64,
            activation: activation_number(activation),
            reserved: 0,
        };
        let kernel = self.kernels().elementwise.gate;
        // SAFETY: the structure is the kernel's; both buffers hold the elements.
        unsafe { self.launch(kernel, element_launch(elements), &args) }
    }

    fn add(
        &self,
        x: &CudaBuffer,
        scale: f32,
        out: &mut CudaBuffer,
        elements: usize,
    ) -> Result<(), DeviceError> {
        let args = AddArgs {
            x: x.floats(elements),
            out: out.floats(elements),
            elements: elements as u64,
            scale,
            reserved: 0,
        };
        let kernel = self.kernels().elementwise.add;
        // SAFETY: the structure is the kernel's; both buffers hold the elements.
        unsafe { self.launch(kernel, element_launch(elements), &args) }
    }

    fn gather_rows(
        &self,
        x: &CudaBuffer,
        rows: &[u32],
        width: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let x = x.floats(rows_reached(rows) * width);
        let out = out.floats(rows.len() * width);
        for (before, count, rows) in index_pieces(rows) {
            let args = RowsArgs {
                x,
                out: out + (before * width * size_of::<f32>()) as u64,
                width: width as i32,
                scale: 1.0,
                rows,
            };
            let kernel = self.kernels().elementwise.gather_rows;
            // SAFETY: the structure is the kernel's; both buffers hold the rows that it touches.
            unsafe { self.launch(kernel, row_launch(count, width), &args) }?;
        }
        Ok(())
    }

    fn gather_logit_rows(
        &self,
        x: &CudaBuffer,
        rows: &[u32],
        width: usize,
        out: &mut CudaBuffer,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let args = GatherIndexedArgs {
            x: x.floats(workspace.inputs.rows * width),
            out: out.floats(rows.len() * width),
            indices: workspace.inputs.logit_row_indices(),
            width: width as i32,
            reserved: 0,
        };
        let kernel = self.kernels().elementwise.gather_indexed;
        // SAFETY: the structure is the kernel's; `begin_step` has held the indices to the
        // step's rows, all of which `x` holds.
        unsafe { self.launch(kernel, row_launch(rows.len(), width), &args) }
    }

    fn scatter_add_rows(
        &self,
        x: &CudaBuffer,
        rows: &[u32],
        scale: f32,
        width: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let x = x.floats(rows.len() * width);
        let out = out.floats(rows_reached(rows) * width);
        for (before, count, rows) in index_pieces(rows) {
            let args = RowsArgs {
                x: x + (before * width * size_of::<f32>()) as u64,
                out,
                width: width as i32,
                scale,
                rows,
            };
            let kernel = self.kernels().elementwise.scatter_add_rows;
            // SAFETY: the structure is the kernel's; both buffers hold the rows that it touches.
            unsafe { self.launch(kernel, row_launch(count, width), &args) }?;
        }
        Ok(())
    }

    fn finish_logits(&self, logits: &mut CudaBuffer, args: LogitArgs) -> Result<(), DeviceError> {
        if args.scale == 1.0 && args.softcap.is_none() && args.vocab_size == args.width {
            return Ok(());
        }
        let launch = row_launch(args.rows, args.width);
        let args = FinishLogitsArgs {
            logits: logits.floats(args.rows * args.width),
            width: args.width as i32,
            vocab_size: args.vocab_size as i32,
            scale: args.scale,
            softcap: args.softcap.unwrap_or(0.0),
        };
        // SAFETY: the structure is the kernel's; the buffer holds the logits.
        unsafe { self.launch(self.kernels().elementwise.finish_logits, launch, &args) }
    }

    fn draw_limits(&self, width: usize) -> Option<DrawLimits> {
        draw_limits(width)
    }

    fn draw_tokens(
        &self,
        logits: &mut CudaBuffer,
        args: LogitArgs,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let header = workspace.inputs.packed();
        self.enqueue_draws(logits, args, header, &workspace.draws)
    }

    fn read_logits<'a>(
        &self,
        logits: &'a mut CudaBuffer,
        elements: usize,
        copy: &'a mut [f32],
        workspace: &mut CudaWorkspace,
    ) -> Result<&'a mut [f32], DeviceError> {
        let stream = self.results_stream(&workspace.results)?;
        let copy = &mut copy[..elements];
        self.download_on(stream, logits, bytemuck::cast_slice_mut(copy))?;
        Ok(copy)
    }

    fn drawn_tokens<'a>(&self, workspace: &'a mut CudaWorkspace) -> Result<&'a [u32], DeviceError> {
        let stream = self.results_stream(&workspace.results)?;
        self.read_draws(stream, &mut workspace.draws)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_cut_into_pieces_in_order() {
        for count in [0, 1, 255, 256, 257, 1000] {
            let rows: Vec<u32> = (0..count).map(|row| 7 * row + 3).collect();
            let mut seen = Vec::new();
            for (before, count, indices) in index_pieces(&rows) {
                assert_eq!(before, seen.len());
                seen.extend_from_slice(&indices[..count]);
            }
            assert_eq!(seen, rows);
            assert_eq!(
                rows_reached(&rows) as u32,
                count.saturating_sub(1) * 7 + 4 * u32::from(count > 0)
            );
        }
    }

    #[test]
    fn launches_cover_all_elements() {
        for elements in [0, 1, 1023, 1024, 1025, 300_000_000] {
            let blocks = element_launch(elements).grid[0];
            assert!(blocks * 4 * THREADS >= elements);
            assert!(blocks.saturating_sub(1) * 4 * THREADS < elements.max(1));
        }
        for width in [1, 37, 1024, 1025, 128_256] {
            let [rows, blocks, _] = row_launch(3, width).grid;
            assert_eq!((rows, blocks), (3, width.div_ceil(1024)));
        }
    }

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<GateArgs>(), 32);
        assert_eq!(size_of::<AddArgs>(), 32);
        assert_eq!(size_of::<RowsArgs>(), 24 + 4 * MOST_ROW_INDICES);
        assert_eq!(size_of::<GatherIndexedArgs>(), 32);
        assert_eq!(size_of::<FinishLogitsArgs>(), 24);
        assert_eq!(size_of::<EmbedArgs>(), 40);
    }
}
