//! Normalisations to f32.

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::{DeviceError, Norm, NormOps};

use crate::buffer::CudaBuffer;
use crate::device::CudaDevice;
use crate::launch::Launch;
use crate::prepare::{bias_address, norm_number, row_threads};
use crate::step::CudaWorkspace;

/// `NormArgs` of `elementwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct NormArgs {
    x: CUdeviceptr,
    weight: CUdeviceptr,
    bias: CUdeviceptr,
    out: CUdeviceptr,
    width: i32,
    kind: i32,
    epsilon: f32,
    reserved: i32,
}

impl NormOps for CudaDevice {
    fn norm(
        &self,
        norm: &Norm<CudaBuffer>,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
        rows: usize,
        _workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let elements = rows * norm.width;
        let args = NormArgs {
            x: x.floats(elements),
            weight: norm.weight.floats(norm.width),
            bias: bias_address(norm),
            out: out.floats(elements),
            width: norm.width as i32,
            kind: norm_number(norm.kind),
            epsilon: norm.epsilon,
            reserved: 0,
        };
        let launch = Launch::linear(rows, row_threads(norm.width));
        // SAFETY: the structure is the kernel's; the buffers hold what was asked of them above.
        unsafe { self.launch(self.kernels().elementwise.norm, launch, &args) }
    }
}
