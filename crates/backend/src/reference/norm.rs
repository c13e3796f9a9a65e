//! Normalisations.

use super::{ReferenceDevice, ReferenceWorkspace};
use crate::{DeviceError, HostBuffer, Norm, NormKind, NormOps};

/// `out = norm(x) · weight`, over one row or one head.
pub(super) fn normalize(kind: NormKind, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let (mean, scale) = mean_and_scale(kind, x, epsilon);
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = (x - mean) * scale * weight;
    }
}

/// As [`normalize`], in place.
pub(super) fn normalize_in_place(kind: NormKind, x: &mut [f32], weight: &[f32], epsilon: f32) {
    let (mean, scale) = mean_and_scale(kind, x, epsilon);
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = (*x - mean) * scale * weight;
    }
}

/// What is subtracted from `x` (nothing for RMS), and what the difference is multiplied by.
/// The sums are taken in f64, so that long rows of one sign lose nothing.
fn mean_and_scale(kind: NormKind, x: &[f32], epsilon: f32) -> (f32, f32) {
    let width = x.len() as f64;
    let mean = match kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => x.iter().map(|&x| f64::from(x)).sum::<f64>() / width,
    };
    let square = |&x: &f32| (f64::from(x) - mean) * (f64::from(x) - mean);
    let mean_square = x.iter().map(square).sum::<f64>() / width;
    let scale = 1.0 / (mean_square + f64::from(epsilon)).sqrt();
    (mean as f32, scale as f32)
}

impl NormOps for ReferenceDevice {
    fn norm(
        &self,
        norm: &Norm<HostBuffer>,
        x: &HostBuffer,
        out: &mut HostBuffer,
        rows: usize,
        _workspace: &mut ReferenceWorkspace,
    ) -> Result<(), DeviceError> {
        let width = norm.width;
        let weight = &norm.weight.as_slice()[..width];
        let x_rows = x.as_slice()[..rows * width].chunks_exact(width);
        let out_rows = out.as_mut_slice()[..rows * width].chunks_exact_mut(width);
        for (x, out) in x_rows.zip(out_rows) {
            normalize(norm.kind, x, weight, norm.epsilon, out);
            if let Some(bias) = &norm.bias {
                for (out, &bias) in out.iter_mut().zip(&bias.as_slice::<f32>()[..width]) {
                    *out += bias;
                }
            }
        }
        Ok(())
    }
}
