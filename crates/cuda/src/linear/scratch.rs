//! The memory that products need beside their operands, as a part of the workspace.

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::WorkspaceShape;

use super::layout::{BLOCK_INPUTS, TILE_OUTPUTS};
use super::plan::{most_partials, partial_bytes};
use crate::prepare::{MOST_PREPARED, RowLayout};
use crate::step::aligned;

/// How products of more than a few rows are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ManyRows {
    /// With weights as they are stored (`linear_many.cu`).
    Stored,
    /// With weights unpacked to fp16, by the library.
    Unpacked,
    /// As few rows are, some at a time.
    Few,
}

impl ManyRows {
    /// Rows up to which the kernels of few rows multiply, 32 at a time.
    pub(crate) fn few_rows(self) -> usize {
        match self {
            // From 49 rows on the other kernels take as long or less in all shapes that were measured (codellama-34b: 64
            // rows 20.1 instead of 28.0 ms a step), at 33 as long or more in three of four.
            Self::Stored => 48,
            // Four readings of 4-bit weights (later ones mostly from the second-level cache) are fewer
            // bytes than unpacking them to fp16 and reading those.
            Self::Unpacked | Self::Few => 128,
        }
    }

    /// How products take so many rows.
    pub(crate) fn layout(self, rows: usize) -> RowLayout {
        match self {
            Self::Stored if rows > self.few_rows() => RowLayout::Chunks,
            _ => RowLayout::Plain,
        }
    }
}

/// Most bytes of weights that are unpacked at a time.
const MOST_UNPACKED_BYTES: usize = 64 << 20;

/// What the library may use for its own.
pub(crate) const LIBRARY_BYTES: usize = 32 << 20;

const HALF: usize = 2;

/// Where each part starts, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parts {
    activations: usize,
    activation_bytes: usize,
    partials: usize,
    counters: usize,
    unpacked: usize,
    unpacked_bytes: usize,
    library: usize,
    end: usize,
}

impl Parts {
    fn of(shape: &WorkspaceShape, many_rows: ManyRows) -> Self {
        let inputs = shape.max_in_features.next_multiple_of(BLOCK_INPUTS);
        let outputs = shape.max_out_features.next_multiple_of(TILE_OUTPUTS);
        // Several orders of inputs at a time of few rows, one of more.
        let few_rows = many_rows.few_rows();
        let rows = shape.rows.max(MOST_PREPARED * shape.rows.min(few_rows));
        let has_many = shape.rows > few_rows;
        let layout = many_rows.layout(shape.rows);
        let most_places = layout.places(shape.rows, layout.padded_width(inputs));
        let elements = most_places.max(rows * inputs);
        let activation_bytes = aligned(elements * HALF) + MOST_PREPARED * aligned(1);
        let partials = most_partials(shape.max_out_features);
        let uses_library = has_many && many_rows == ManyRows::Unpacked;
        let tile_bytes = TILE_OUTPUTS * inputs * HALF;
        let unpacked_bytes = match uses_library {
            true => MOST_UNPACKED_BYTES.clamp(tile_bytes, tile_bytes.max(outputs * inputs * HALF)),
            false => 0,
        };
        let mut end = 0;
        let mut part = |bytes: usize| {
            let start = end;
            end = start + aligned(bytes);
            start
        };
        Self {
            activations: part(activation_bytes),
            activation_bytes,
            partials: part(partials * partial_bytes(shape.rows)),
            counters: part(partials * size_of::<u32>()),
            unpacked: part(unpacked_bytes),
            unpacked_bytes,
            library: part(if uses_library { LIBRARY_BYTES } else { 0 }),
            end,
        }
    }
}

/// The products' scratch on the device. All zero before the first product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LinearScratch {
    address: CUdeviceptr,
    parts: Parts,
    /// Rows that there is room for.
    pub(crate) rows: usize,
    /// Tiles' sums of parts of K that there is room for, and counters.
    pub(crate) partials: usize,
}

impl LinearScratch {
    /// Bytes that products of steps up to `shape` need.
    pub(crate) fn bytes(shape: &WorkspaceShape, many_rows: ManyRows) -> usize {
        Parts::of(shape, many_rows).end
    }

    /// The same bytes, from `address` on.
    pub(crate) fn new(shape: &WorkspaceShape, many_rows: ManyRows, address: CUdeviceptr) -> Self {
        Self {
            address,
            parts: Parts::of(shape, many_rows),
            rows: shape.rows,
            partials: most_partials(shape.max_out_features),
        }
    }

    fn at(&self, offset: usize) -> CUdeviceptr {
        self.address + offset as u64
    }

    /// Where fp16 rows of one order of inputs go; `slot` is 0 for more than a few
    /// ([`ManyRows::few_rows`]). `None` if there is no room.
    pub(crate) fn activations(
        &self,
        slot: usize,
        rows: usize,
        padded_width: usize,
        layout: RowLayout,
    ) -> Option<CUdeviceptr> {
        let bytes = aligned(layout.places(rows, padded_width) * HALF);
        let start = slot * bytes;
        (start + bytes <= self.parts.activation_bytes)
            .then(|| self.at(self.parts.activations + start))
    }

    /// Where f16 `[rows, width]` for the next product go, beside rows of one order that this product reads, `inputs`
    /// places each. `None` if there is no room.
    pub(crate) fn next_activations(
        &self,
        rows: usize,
        width: usize,
        inputs: usize,
    ) -> Option<CUdeviceptr> {
        let start = self
            .parts
            .activation_bytes
            .checked_sub(aligned(rows * width * HALF))?;
        (aligned(rows * inputs * HALF) <= start).then(|| self.at(self.parts.activations + start))
    }

    /// f32 `[partials, 32 rows or fewer, 32]`
    pub(crate) fn partial_sums(&self) -> CUdeviceptr {
        self.at(self.parts.partials)
    }

    /// u32 `[partials]`
    pub(crate) fn counters(&self) -> CUdeviceptr {
        self.at(self.parts.counters)
    }

    /// Where unpacked weights go, and how many tiles of a matrix at a time.
    pub(crate) fn unpacked(&self, padded_inputs: usize) -> (CUdeviceptr, usize) {
        let tiles = self.parts.unpacked_bytes / (TILE_OUTPUTS * padded_inputs * HALF);
        (self.at(self.parts.unpacked), tiles)
    }

    /// [`LIBRARY_BYTES`] where there are unpacked weights.
    pub(crate) fn library(&self) -> CUdeviceptr {
        self.at(self.parts.library)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(rows: usize, max_in_features: usize, max_out_features: usize) -> WorkspaceShape {
        WorkspaceShape {
            rows,
            sequences: 1,
            pages_per_sequence: 1,
            max_in_features,
            max_out_features,
            draw_width: 0,
            heads: 1,
            kv_heads: 1,
            head_dim: 32,
            rotary_dim: 0,
            ropes: 0,
        }
    }

    #[test]
    fn there_is_room_for_every_order_of_few_rows_and_one_of_many() {
        for (rows, inputs) in [
            (1, 1),
            (1, 50),
            (33, 37),
            (64, 4096),
            (65, 4096),
            (2048, 11008),
        ] {
            let shape = shape(rows, inputs, 64);
            for many_rows in [ManyRows::Stored, ManyRows::Unpacked, ManyRows::Few] {
                let scratch = LinearScratch::new(&shape, many_rows, 0);
                for rows in [1, 2, 8, 33, 64, 128, rows] {
                    if rows <= shape.rows {
                        let is_many = rows > many_rows.few_rows();
                        let layout = many_rows.layout(rows);
                        let padded = layout.padded_width(inputs);
                        let slots = if is_many { 1 } else { MOST_PREPARED };
                        for slot in 0..slots {
                            let found = scratch.activations(slot, rows, padded, layout);
                            let bytes = layout.places(rows, padded) * HALF;
                            let end = found.map(|start| start as usize + bytes);
                            assert!(end.is_some_and(|end| end <= scratch.parts.partials));
                        }
                        if !is_many {
                            // What the next product reads lies beside what this one does.
                            let start = scratch.next_activations(rows, padded, padded);
                            let start = start.map(|start| start as usize);
                            let bytes = rows * padded * HALF;
                            assert!(start.is_some_and(|start| start >= bytes));
                            assert!(
                                start.is_some_and(|start| start + bytes <= scratch.parts.partials)
                            );
                        }
                    }
                }
                let padded = RowLayout::Plain.padded_width(inputs);
                let found = scratch.activations(0, rows + 600, padded, RowLayout::Plain);
                assert_eq!(found, None);
                assert_eq!(LinearScratch::bytes(&shape, many_rows), scratch.parts.end);
            }
        }
    }

    #[test]
    fn unpacked_weights_are_at_least_a_tile_and_at_most_the_widest_matrix() {
        let tiles = |inputs, outputs| {
            let shape = shape(129, inputs, outputs);
            let scratch = LinearScratch::new(&shape, ManyRows::Unpacked, 0);
            let padded = inputs.next_multiple_of(32);
            (scratch.unpacked(padded).1, scratch.parts.unpacked_bytes)
        };
        assert_eq!(tiles(4096, 128_256), (256, MOST_UNPACKED_BYTES));
        assert_eq!(tiles(64, 96), (3, 96 * 64 * 2));
        assert_eq!(tiles(1 << 21, 64).0, 1);
        for (rows, many_rows) in [
            (128, ManyRows::Unpacked),
            (2048, ManyRows::Stored),
            (2048, ManyRows::Few),
        ] {
            let scratch = LinearScratch::new(&shape(rows, 4096, 4096), many_rows, 0);
            assert_eq!(scratch.parts.unpacked_bytes, 0);
        }
    }
}
