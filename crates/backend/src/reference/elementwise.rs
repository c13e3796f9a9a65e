//! Element-wise and row-wise operations.

use super::{ReferenceDevice, ReferenceWorkspace};
use crate::{Activation, DeviceError, DrawLimits, ElementwiseOps, HostBuffer, LogitArgs};

/// `activation(x)`, computed in f64: these functions cancel near zero.
fn activate(activation: Activation, x: f32) -> f32 {
    let x = f64::from(x);
    let y = match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::GeluErf => 0.5 * x * erfc(-x * std::f64::consts::FRAC_1_SQRT_2),
    };
    y as f32
}

/// The complementary error function, `1 − erf(x)`, with a relative error below 1e-9.
///
/// Near zero by the Maclaurin series of erf; beyond, by the continued fraction
/// `erfc(x) = exp(−x²) / (√π · (x + (1/2) / (x + (2/2) / (x + (3/2) / …))))`, x > 0
/// (Abramowitz and Stegun 7.1.5 and 7.1.14).
fn erfc(x: f64) -> f64 {
    const SERIES_LIMIT: f64 = 2.0;
    if x.abs() < SERIES_LIMIT {
        let mut power = x;
        let mut sum = x;
        for n in 1..60 {
            power *= -x * x / f64::from(n);
            sum += power / f64::from(2 * n + 1);
        }
        return 1.0 - std::f64::consts::FRAC_2_SQRT_PI * sum;
    }
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let mut denominator = x;
    for n in (1..80).rev() {
        denominator = x + f64::from(n) / 2.0 / denominator;
    }
    (-x * x).exp() * 0.5 * std::f64::consts::FRAC_2_SQRT_PI / denominator
}

impl ElementwiseOps for ReferenceDevice {
    fn gate(
        &self,
        activation: Activation,
        gate: &mut HostBuffer,
        up: &HostBuffer,
        elements: usize,
    ) -> Result<(), DeviceError> {
        let gate = &mut gate.as_mut_slice::<f32>()[..elements];
        for (gate, &up) in gate.iter_mut().zip(&up.as_slice::<f32>()[..elements]) {
            *gate = activate(activation, *gate) * up;
        }
        Ok(())
    }

    fn add(
        &self,
        x: &HostBuffer,
        scale: f32,
        out: &mut HostBuffer,
        elements: usize,
    ) -> Result<(), DeviceError> {
        let out = &mut out.as_mut_slice::<f32>()[..elements];
        for (out, &x) in out.iter_mut().zip(&x.as_slice::<f32>()[..elements]) {
            *out += scale * x;
        }
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
        let logits = &mut logits.as_mut_slice::<f32>()[..args.rows * args.width];
        for row in logits.chunks_exact_mut(args.width) {
            let (tokens, padding) = row.split_at_mut(args.vocab_size);
            for logit in tokens {
                *logit *= args.scale;
                if let Some(cap) = args.softcap {
                    *logit = cap * (*logit / cap).tanh();
                }
            }
            padding.fill(f32::NEG_INFINITY);
        }
        Ok(())
    }

    fn draw_limits(&self, _width: usize) -> Option<DrawLimits> {
        Some(DrawLimits {
            top_k: u32::MAX,
            changes: usize::MAX,
        })
    }

    fn draw_tokens(
        &self,
        logits: &mut HostBuffer,
        args: LogitArgs,
        workspace: &mut ReferenceWorkspace,
    ) -> Result<(), DeviceError> {
        let logits = &logits.as_slice::<f32>()[..args.rows * args.width];
        workspace.draws.run(logits, args.width);
        Ok(())
    }

    fn drawn_tokens<'a>(
        &self,
        workspace: &'a mut ReferenceWorkspace,
    ) -> Result<&'a [u32], DeviceError> {
        Ok(&workspace.draws.drawn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erfc_matches_tabulated_values() {
        // Abramowitz and Stegun, table 7.1, and the symmetry erfc(-x) = 2 - erfc(x).
        for (x, erf) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916_0),
            (0.5, 0.520_499_877_8),
            (1.0, 0.842_700_792_9),
            (1.5, 0.966_105_146_5),
            (1.98, 0.994_892_000_4),
        ] {
            assert!((1.0 - erfc(x) - erf).abs() < 1e-10, "erf({x})");
            assert!((erfc(-x) - 1.0 - erf).abs() < 1e-10, "erf(-{x})");
        }
        // Either side of the change of method agrees.
        let (below, above) = (erfc(2.0 - 1e-12), erfc(2.0));
        assert!((below / above - 1.0).abs() < 1e-9, "{below} and {above}");
    }
}
