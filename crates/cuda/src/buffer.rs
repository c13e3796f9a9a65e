//! Pieces of a GPU's memory.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr};
use oxllama_backend::DeviceError;
use oxllama_memory::{Bytes, Reservation};

use crate::context::Context;
use crate::stream::Stream;

/// A piece of a GPU's memory that holds its ledger entry for as long as it lives.
#[derive(Debug)]
pub struct CudaBuffer {
    context: Arc<Context>,
    /// Zero for an empty buffer.
    address: CUdeviceptr,
    /// `None` only while the buffer is taken apart.
    reservation: Option<Reservation>,
}

impl CudaBuffer {
    /// Allocates exactly what `reservation` holds; the contents are unspecified.
    pub(crate) fn allocate(
        context: &Arc<Context>,
        reservation: Reservation,
    ) -> Result<Self, DeviceError> {
        if reservation.device() != context.id() {
            return Err(DeviceError::WrongDevice {
                device: context.id().clone(),
                reserved_on: reservation.device().clone(),
            });
        }
        context.bind()?;
        let bytes = reservation.bytes();
        let too_long = |error: std::num::TryFromIntError| DeviceError::Allocation {
            device: context.id().clone(),
            bytes,
            reason: error.to_string(),
        };
        let length = usize::try_from(bytes.get()).map_err(too_long)?;
        let mut address = 0;
        if length > 0 {
            // SAFETY: the context is current; the function only writes the address.
            let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, length) };
            context.check(code, || format!("allocating {bytes}"))?;
        }
        Ok(Self {
            context: Arc::clone(context),
            address,
            reservation: Some(reservation),
        })
    }

    /// Bytes of the buffer.
    pub fn size(&self) -> Bytes {
        self.reservation
            .as_ref()
            .map_or(Bytes::ZERO, Reservation::bytes)
    }

    /// [`Self::size`] as the host counts.
    pub(crate) fn length(&self) -> usize {
        // The buffer was allocated, so its length fits.
        self.size().get() as usize
    }

    /// Where it starts, as kernels take it: 256-byte aligned.
    pub(crate) fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// The address of byte `offset`.
    pub(crate) fn at(&self, offset: usize) -> CUdeviceptr {
        debug_assert!(offset <= self.length(), "{offset} of {}", self.length());
        self.address + offset as u64
    }

    /// [`Self::address`] of a buffer that holds at least `elements` f32; a shorter one is a
    /// caller's mistake and panics.
    pub(crate) fn floats(&self, elements: usize) -> CUdeviceptr {
        let found = self.length() / size_of::<f32>();
        assert!(elements <= found, "{elements} f32 in a buffer of {found}");
        self.address
    }

    /// Sets every byte to zero, in the stream's order.
    pub(crate) fn clear(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        if self.address == 0 {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: the memory is ours and as long as is said.
        let code = unsafe { sys::cuMemsetD8Async(self.address, 0, self.length(), stream.handle()) };
        self.context.check(code, || "clearing memory".to_owned())
    }

    /// Frees the memory and returns the room that it had.
    pub(crate) fn into_reservation(mut self) -> Reservation {
        let Some(reservation) = self.reservation.take() else {
            unreachable!("a buffer has its reservation until it is taken apart");
        };
        reservation
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        self.context.give_back(|| {
            // SAFETY: allocated in `allocate` and freed once; the driver waits for kernels that
            // are still using it.
            unsafe { sys::cuMemFree_v2(self.address) }
        });
    }
}
