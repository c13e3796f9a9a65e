//! What a GPU gives at most, measured: the bounds that speeds are quoted against.

use std::time::Instant;

use cudarc::driver::sys::CUdeviceptr;
use oxllama_backend::DeviceError;
use oxllama_memory::Reservation;

use crate::buffer::CudaBuffer;
use crate::device::CudaDevice;
use crate::launch::Launch;
use crate::linear::{LIBRARY_BYTES, Product};

/// Threads of a block of `oxl_read_all`, and 16-byte loads of each.
const THREADS: usize = 512;
const LOADS: usize = 8;

/// How often the memory is read in one measurement.
const PASSES: usize = 5;

/// `ReadAllArgs` of `ceilings.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct ReadAllArgs {
    pub(crate) memory: CUdeviceptr,
    pub(crate) result: CUdeviceptr,
    pub(crate) pieces: i64,
}

/// `FillRandomArgs` of `ceilings.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct FillRandomArgs {
    memory: CUdeviceptr,
    elements: i64,
}

/// Rows, columns and depth of the product that is measured.
const MATRIX_WIDTH: usize = 8192;

impl CudaDevice {
    /// Bytes a second at which the device reads its memory, the best of a few passes over a
    /// buffer of `reservation`, which should be far larger than its caches (a gigabyte or more).
    ///
    /// # Errors
    /// Allocation fails, or the device does.
    pub fn measure_read_bandwidth(&self, reservation: Reservation) -> Result<f64, DeviceError> {
        const PIECE: usize = 16;
        let mut buffer = CudaBuffer::allocate(self.context(), reservation)?;
        buffer.clear(self.stream())?;
        let pieces = buffer.length() / PIECE;
        let args = ReadAllArgs {
            memory: buffer.address(),
            result: buffer.address(),
            pieces: pieces as i64,
        };
        let launch = Launch::linear(pieces.div_ceil(THREADS * LOADS), THREADS);
        let mut best = f64::INFINITY;
        // The first pass loads the kernel.
        for _ in 0..=PASSES {
            self.synchronize()?;
            let start = Instant::now();
            for _ in 0..PASSES {
                // SAFETY: the structure is the kernel's; the buffer holds the pieces and lives
                // until the wait below.
                unsafe { self.launch(self.kernels().read_all, launch, &args) }?;
            }
            self.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok((PASSES * pieces * PIECE) as f64 / best)
    }

    /// Multiplications and additions a second of a large product of fp16 matrices by cuBLASLt,
    /// inside a buffer of `reservation` (600 MiB or more); `None` where that library is not
    /// installed or the buffer is too small.
    ///
    /// # Errors
    /// Allocation fails, or the device does.
    pub fn measure_matrix_rate(
        &self,
        reservation: Reservation,
    ) -> Result<Option<f64>, DeviceError> {
        const ELEMENTS: usize = MATRIX_WIDTH * MATRIX_WIDTH;
        const HALVES: usize = ELEMENTS * size_of::<u16>();
        const LIBRARY_AT: usize = 4 * HALVES;
        let buffer = CudaBuffer::allocate(self.context(), reservation)?;
        let Some(library) = self.blaslt() else {
            return Ok(None);
        };
        if buffer.length() < LIBRARY_AT + LIBRARY_BYTES {
            return Ok(None);
        }
        let fill = FillRandomArgs {
            memory: buffer.address(),
            elements: 2 * ELEMENTS as i64,
        };
        let launch = Launch::linear(2 * ELEMENTS / (8 * 256), 256);
        // SAFETY: the structure is the kernel's; the buffer holds both operands.
        unsafe { self.launch(self.kernels().fill_random, launch, &fill) }?;
        let product = Product {
            outputs: MATRIX_WIDTH,
            rows: MATRIX_WIDTH,
            inputs: MATRIX_WIDTH,
            out_stride: MATRIX_WIDTH,
            weights: buffer.address(),
            x: buffer.at(HALVES),
            out: buffer.at(2 * HALVES),
            factor: 1.0,
            accumulate: false,
        };
        let mut best = f64::INFINITY;
        for _ in 0..=PASSES {
            self.synchronize()?;
            let start = Instant::now();
            for _ in 0..PASSES {
                // SAFETY: the buffer holds operands, result and the library's scratch one
                // after the other, and lives until the wait below.
                unsafe { library.multiply(&product, buffer.at(LIBRARY_AT), self) }?;
            }
            self.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(Some((PASSES * 2 * MATRIX_WIDTH * ELEMENTS) as f64 / best))
    }
}
