//! Matrix products.

use half::f16;
use oxllama_format::{LinearHeader, LinearSource};
use oxllama_memory::{Bytes, Reservation};

use super::{ReferenceDevice, ReferenceWorkspace};
use crate::{DeviceError, HostBuffer, LinearOps, LinearOutput, Store};

/// Outputs that are computed side by side: the weights of one input for all of them are
/// adjacent, so that the compiler can turn the loop over them into vector instructions.
const LANES: usize = 16;

/// Rows that are computed side by side, to read each weight once for all of them.
const ROW_BLOCK: usize = 4;

/// The weights of [`LANES`] neighbouring outputs for one input.
type Lanes = [f32; LANES];

/// A linear as `f32` weights.
#[derive(Debug)]
pub struct ReferenceLinear {
    in_features: usize,
    out_features: usize,
    /// f32 `[out_features / LANES (rounded up), in_features, LANES]`: panels of outputs.
    /// Each weight is rounded to fp16 first, as every format but BF16 and F32 has it anyway.
    weights: HostBuffer,
    /// f32 `[out_features]`, or empty.
    bias: HostBuffer,
}

impl ReferenceLinear {
    /// f32 `[in_features]` of [`Lanes`]: the weights of outputs `index * LANES ..`.
    fn panel(&self, index: usize) -> &[Lanes] {
        &self.weights.as_slice()[index * self.in_features..][..self.in_features]
    }

    /// The bias of an output, zero for a linear without.
    fn bias(&self, output: usize) -> f32 {
        self.bias.as_slice().get(output).copied().unwrap_or(0.0)
    }
}

/// A weight as the reference uses it: rounded to fp16, unless that would make it infinite
/// (BF16 and F32 files may hold such values).
fn round_weight(weight: f32) -> f32 {
    let rounded = f16::from_f32(weight).to_f32();
    if rounded.is_finite() { rounded } else { weight }
}

/// `x · panel` for `ROWS` rows: each sum over the inputs in ascending order, whatever the
/// number of rows.
fn multiply_panel<const ROWS: usize>(panel: &[Lanes], x: [&[f32]; ROWS]) -> [Lanes; ROWS] {
    let x = x.map(|row| &row[..panel.len()]);
    let mut sums = [[0.0; LANES]; ROWS];
    for (input, weights) in panel.iter().enumerate() {
        for (row, sums) in sums.iter_mut().enumerate() {
            let x = x[row][input];
            for (sum, &weight) in sums.iter_mut().zip(weights) {
                *sum += x * weight;
            }
        }
    }
    sums
}

/// Where the results of a product go.
struct Target<'a> {
    weights: &'a ReferenceLinear,
    store: Store,
    /// f32 `[rows, out_features]`
    out: &'a mut [f32],
}

impl Target<'_> {
    /// Multiplies `ROWS` rows of `x` (f32 `[ROWS, in_features]`), the first of which is row
    /// `first_row` of the output, by one panel.
    fn multiply<const ROWS: usize>(&mut self, panel: usize, x: &[f32], first_row: usize) {
        let in_features = self.weights.in_features;
        let rows = std::array::from_fn(|row| &x[row * in_features..][..in_features]);
        let sums = multiply_panel::<ROWS>(self.weights.panel(panel), rows);
        for (row, sums) in sums.iter().enumerate() {
            let start = (first_row + row) * self.weights.out_features;
            let out = &mut self.out[start..][..self.weights.out_features];
            let first_output = panel * LANES;
            for (lane, (out, sum)) in out[first_output..].iter_mut().zip(sums).enumerate() {
                let y = sum + self.weights.bias(first_output + lane);
                match self.store {
                    Store::Overwrite => *out = y,
                    Store::Add { scale } => *out += scale * y,
                }
            }
        }
    }
}

impl LinearOps for ReferenceDevice {
    type Linear = ReferenceLinear;

    fn linear_bytes(&self, header: &LinearHeader) -> Bytes {
        let [weights, bias] = part_sizes(header);
        weights.saturating_add(bias)
    }

    fn load_linear(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> Result<ReferenceLinear, DeviceError> {
        let header = source.header();
        let (in_features, out_features) = (header.in_features, header.out_features);
        let what = || format!("a linear of {in_features} x {out_features}");
        let sizes = part_sizes(&header);
        let [mut weights, mut bias] = self.allocate_parts(what, sizes, reservation)?;
        let panels = weights.as_mut_slice::<Lanes>();
        let mut put = |input: usize, output: usize, weight: f32| {
            let lanes = &mut panels[output / LANES * in_features + input];
            lanes[output % LANES] = round_weight(weight);
        };
        match source {
            LinearSource::Exl2(linear) => put_inputs(&linear.decode_f16(), out_features, put),
            LinearSource::Gptq(linear) => put_inputs(&linear.decode_f16(), out_features, put),
            LinearSource::Float(linear) => {
                let mut row = vec![0.0; in_features];
                for output in 0..out_features {
                    linear.row_f32(output, &mut row);
                    for (input, &weight) in row.iter().enumerate() {
                        put(input, output, weight);
                    }
                }
            }
        }
        if let Some(values) = source.bias() {
            bias.as_mut_slice().copy_from_slice(&values);
        }
        Ok(ReferenceLinear {
            in_features,
            out_features,
            weights,
            bias,
        })
    }

    fn linear_shape(&self, weights: &ReferenceLinear) -> (usize, usize) {
        (weights.in_features, weights.out_features)
    }

    fn embed(
        &self,
        table: &ReferenceLinear,
        scale: f32,
        out: &mut HostBuffer,
        workspace: &mut ReferenceWorkspace,
    ) -> Result<(), DeviceError> {
        let width = table.in_features;
        let out_rows = out.as_mut_slice::<f32>().chunks_exact_mut(width);
        for (&token_id, out) in workspace.inputs.token_ids().iter().zip(out_rows) {
            let token = token_id as usize;
            let token = if token < table.out_features { token } else { 0 };
            for (out, lanes) in out.iter_mut().zip(table.panel(token / LANES)) {
                *out = scale * lanes[token % LANES];
            }
        }
        Ok(())
    }

    fn linear(
        &self,
        x: &HostBuffer,
        output: LinearOutput<'_, ReferenceLinear, HostBuffer>,
        store: Store,
        rows: usize,
        _workspace: &mut ReferenceWorkspace,
    ) -> Result<(), DeviceError> {
        let weights = output.weights;
        let x = &x.as_slice::<f32>()[..rows * weights.in_features];
        let mut target = Target {
            weights,
            store,
            out: &mut output.out.as_mut_slice()[..rows * weights.out_features],
        };
        for panel in 0..weights.out_features.div_ceil(LANES) {
            for first_row in (0..rows).step_by(ROW_BLOCK) {
                let x = &x[first_row * weights.in_features..];
                match rows - first_row {
                    1 => target.multiply::<1>(panel, x, first_row),
                    2 => target.multiply::<2>(panel, x, first_row),
                    3 => target.multiply::<3>(panel, x, first_row),
                    _ => target.multiply::<ROW_BLOCK>(panel, x, first_row),
                }
            }
        }
        Ok(())
    }
}

/// Bytes of the weights and of the bias.
fn part_sizes(header: &LinearHeader) -> [Bytes; 2] {
    let panels = header.out_features.div_ceil(LANES);
    let panel = Bytes::from_usize(size_of::<Lanes>()).saturating_mul(header.in_features as u64);
    let bias = if header.bias { header.out_features } else { 0 };
    [
        panel.saturating_mul(panels as u64),
        Bytes::from_usize(size_of::<f32>()).saturating_mul(bias as u64),
    ]
}

/// Hands out `weights`, fp16 `[in_features, out_features]`, one by one.
fn put_inputs(weights: &[f16], out_features: usize, mut put: impl FnMut(usize, usize, f32)) {
    for (input, weights) in weights.chunks_exact(out_features).enumerate() {
        for (output, weight) in weights.iter().enumerate() {
            put(input, output, weight.to_f32());
        }
    }
}
