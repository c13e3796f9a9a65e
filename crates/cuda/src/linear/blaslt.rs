//! Products of many rows by cuBLASLt, where it is installed.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtMatrixLayout_t, cublasStatus_t,
    cudaDataType, is_culib_present,
};
use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::DeviceError;

use super::scratch::LIBRARY_BYTES;
use crate::device::CudaDevice;
use crate::library;

/// Shapes whose algorithms are remembered; prompts may have any number of rows.
const MOST_SHAPES: usize = 4096;

/// `CUBLAS_OP_T` of the library's `cublasOperation_t`, which the bindings lack.
static TRANSPOSE: i32 = 1;

/// What is promised of addresses, at most.
const MOST_ALIGNMENT: u32 = 256;

/// `out[r, o] ← factor · Σ weights[o, i] x[r, i]`, plus `out[r, o]` if it accumulates.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub(crate) outputs: usize,
    pub(crate) rows: usize,
    /// Inputs of a row of either operand, padding included.
    pub(crate) inputs: usize,
    /// f32 from one row of `out` to the next.
    pub(crate) out_stride: usize,
    /// f16 `[outputs, inputs]`
    pub(crate) weights: CUdeviceptr,
    /// f16 `[rows, inputs]`
    pub(crate) x: CUdeviceptr,
    /// f32
    pub(crate) out: CUdeviceptr,
    pub(crate) factor: f32,
    pub(crate) accumulate: bool,
}

/// What an algorithm is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    outputs: usize,
    rows: usize,
    inputs: usize,
    out_stride: usize,
    /// Of `out`; the operands are at multiples of 256 bytes.
    alignment: u32,
}

impl Shape {
    fn of(product: &Product) -> Self {
        Self {
            outputs: product.outputs,
            rows: product.rows,
            inputs: product.inputs,
            out_stride: product.out_stride,
            alignment: 1 << product.out.trailing_zeros().min(MOST_ALIGNMENT.ilog2()),
        }
    }
}

/// The library's description of a shape. Its matrices are column-major: `outᵀ = weightsᵀᵀ · xᵀ`.
#[derive(Debug)]
struct Prepared {
    operation: cublasLtMatmulDesc_t,
    weights: cublasLtMatrixLayout_t,
    x: cublasLtMatrixLayout_t,
    out: cublasLtMatrixLayout_t,
    /// `None`: there is none for the shape.
    algorithm: Option<cublasLtMatmulAlgo_t>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // SAFETY: each was made once, or is null; failure to destroy one leaks it.
        unsafe {
            for layout in [self.weights, self.x, self.out] {
                if !layout.is_null() {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
            if !self.operation.is_null() {
                let _ = result::destroy_matmul_desc(self.operation);
            }
        }
    }
}

impl Prepared {
    fn new(handle: cublasLtHandle_t, shape: &Shape) -> Result<Self, CublasError> {
        let mut prepared = Self {
            operation: result::create_matmul_desc(
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cudaDataType::CUDA_R_32F,
            )?,
            weights: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            out: std::ptr::null_mut(),
            algorithm: None,
        };
        // SAFETY: the description is alive, the attribute is of the operation's type.
        unsafe {
            result::set_matmul_desc_attribute(
                prepared.operation,
                Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const TRANSPOSE).cast(),
                size_of_val(&TRANSPOSE),
            )?;
        }
        let matrix = |dtype, rows: usize, columns: usize, stride: usize| {
            result::create_matrix_layout(dtype, rows as u64, columns as u64, stride as i64)
        };
        let half = cudaDataType::CUDA_R_16F;
        prepared.weights = matrix(half, shape.inputs, shape.outputs, shape.inputs)?;
        prepared.x = matrix(half, shape.inputs, shape.rows, shape.inputs)?;
        let float = cudaDataType::CUDA_R_32F;
        prepared.out = matrix(float, shape.outputs, shape.rows, shape.out_stride)?;
        prepared.algorithm = prepared.choose(handle, shape)?;
        Ok(prepared)
    }

    fn choose(
        &self,
        handle: cublasLtHandle_t,
        shape: &Shape,
    ) -> Result<Option<cublasLtMatmulAlgo_t>, CublasError> {
        let preference = result::create_matmul_pref()?;
        let choose = || {
            let bytes = LIBRARY_BYTES as u64;
            // SAFETY: the preference is alive; the attributes are of these types.
            unsafe {
                result::set_matmul_pref_attribute(
                    preference,
                    Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    (&raw const bytes).cast(),
                    size_of_val(&bytes),
                )?;
                for attribute in [
                    Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                    Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                ] {
                    result::set_matmul_pref_attribute(
                        preference,
                        attribute,
                        (&raw const shape.alignment).cast(),
                        size_of_val(&shape.alignment),
                    )?;
                }
            }
            // SAFETY: all descriptions are alive.
            unsafe {
                result::get_matmul_algo_heuristic(
                    handle,
                    self.operation,
                    self.weights,
                    self.x,
                    self.out,
                    self.out,
                    preference,
                )
            }
        };
        let chosen = choose();
        // SAFETY: made above, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        match chosen {
            Ok(chosen) => Ok(Some(chosen.algo)),
            Err(CublasError(cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The library's state on one device.
#[derive(Debug)]
pub(crate) struct BlasLt {
    handle: cublasLtHandle_t,
    shapes: Mutex<HashMap<Shape, Prepared>>,
}

// SAFETY: the library allows one handle in several threads; descriptions are only read outside
// the lock that made them, by the thread that holds it.
unsafe impl Send for BlasLt {}
// SAFETY: as above.
unsafe impl Sync for BlasLt {}

impl BlasLt {
    /// Opens the library on the calling thread's context; `None` where it is not installed or
    /// refuses.
    pub(crate) fn open() -> Option<Self> {
        // Loaded here, from wherever it is, it is found by its name by the bindings, which
        // panic without it.
        library::open(&library::file_names("cublasLt", i32::MAX)).ok()?;
        // SAFETY: loads a library that is loaded.
        if !unsafe { is_culib_present() } {
            return None;
        }
        Some(Self {
            handle: result::create_handle().ok()?,
            shapes: Mutex::default(),
        })
    }

    /// Whether there is an algorithm for the product.
    pub(crate) fn can_multiply(
        &self,
        product: &Product,
        device: &CudaDevice,
    ) -> Result<bool, DeviceError> {
        let shape = Shape::of(product);
        let shapes = self.prepared(&shape, device)?;
        Ok(shapes
            .get(&shape)
            .is_some_and(|prepared| prepared.algorithm.is_some()))
    }

    /// The known shapes, `shape` among them.
    fn prepared(
        &self,
        shape: &Shape,
        device: &CudaDevice,
    ) -> Result<MutexGuard<'_, HashMap<Shape, Prepared>>, DeviceError> {
        let mut shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        if !shapes.contains_key(shape) {
            if shapes.len() >= MOST_SHAPES {
                shapes.clear();
            }
            device.context().bind()?;
            let prepared =
                Prepared::new(self.handle, shape).map_err(|error| failed(device, shape, error))?;
            shapes.insert(*shape, prepared);
        }
        Ok(shapes)
    }

    /// Enqueues a product that [`Self::can_multiply`].
    ///
    /// # Safety
    /// The addresses point to what [`Product`] says, `library` to [`LIBRARY_BYTES`], and all stay
    /// allocated until the device's stream has passed this.
    pub(crate) unsafe fn multiply(
        &self,
        product: &Product,
        library: CUdeviceptr,
        device: &CudaDevice,
    ) -> Result<(), DeviceError> {
        let shape = Shape::of(product);
        let shapes = self.prepared(&shape, device)?;
        let known = shapes.get(&shape);
        let Some((prepared, algorithm)) = known.and_then(|known| Some((known, known.algorithm?)))
        else {
            let status = cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED;
            return Err(failed(device, &shape, CublasError(status)));
        };
        let beta: f32 = if product.accumulate { 1.0 } else { 0.0 };
        let address = |at: CUdeviceptr| std::ptr::without_provenance_mut::<c_void>(at as usize);
        device.context().bind()?;
        // SAFETY: the descriptions are alive while the lock is held, and copied before the call
        // returns, as are the factors; the rest is the caller's promise.
        let multiplied = unsafe {
            result::matmul(
                self.handle,
                prepared.operation,
                (&raw const product.factor).cast(),
                (&raw const beta).cast(),
                address(product.weights),
                prepared.weights,
                address(product.x),
                prepared.x,
                address(product.out),
                prepared.out,
                address(product.out),
                prepared.out,
                &raw const algorithm,
                address(library),
                LIBRARY_BYTES,
                device.stream().handle().cast(),
            )
        };
        multiplied.map_err(|error| failed(device, &shape, error))
    }
}

impl Drop for BlasLt {
    fn drop(&mut self) {
        // SAFETY: made in `open`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn failed(device: &CudaDevice, shape: &Shape, error: impl Debug) -> DeviceError {
    DeviceError::Operation {
        device: device.context().id().clone(),
        operation: format!("cuBLASLt's product of {shape:?}"),
        reason: format!("{error:?}"),
    }
}
