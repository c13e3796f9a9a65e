//! Device memory that is host memory: what the reference and CPU backends allocate.

use bytemuck::Pod;
use memmap2::MmapMut;
use oxllama_memory::{Bytes, DeviceId, Reservation};

use crate::DeviceError;

/// Zeroed host memory that holds its ledger entry for as long as it lives.
///
/// Anonymous mappings rather than the heap: pages are given back to the system on drop, and
/// untouched ones cost nothing, so that planned and actual bytes can be compared.
#[derive(Debug)]
pub struct HostBuffer {
    /// `None` for an empty buffer, which the system cannot map.
    memory: Option<MmapMut>,
    reservation: Reservation,
}

impl HostBuffer {
    /// Allocates exactly what `reservation` holds.
    ///
    /// # Errors
    /// The reservation is for another device, or the system refuses the mapping.
    pub fn allocate(device: &DeviceId, reservation: Reservation) -> Result<Self, DeviceError> {
        if reservation.device() != device {
            return Err(DeviceError::WrongDevice {
                device: device.clone(),
                reserved_on: reservation.device().clone(),
            });
        }
        let bytes = reservation.bytes();
        let failed = |reason: String| DeviceError::Allocation {
            device: device.clone(),
            bytes,
            reason,
        };
        let length = usize::try_from(bytes.get()).map_err(|error| failed(error.to_string()))?;
        let memory = if length == 0 {
            None
        } else {
            let mapping = MmapMut::map_anon(length).map_err(|error| failed(error.to_string()))?;
            // Weights are streamed front to back: large pages save a page walk every 4 KiB.
            // Advice may be refused on kernels without them, which costs speed only.
            #[cfg(target_os = "linux")]
            let _ = mapping.advise(memmap2::Advice::HugePage);
            Some(mapping)
        };
        Ok(Self {
            memory,
            reservation,
        })
    }

    /// Bytes of the buffer.
    pub fn size(&self) -> Bytes {
        self.reservation.bytes()
    }

    /// The whole buffer as elements of `T` (a trailing partial element is left out).
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        let bytes: &[u8] = self.memory.as_deref().unwrap_or(&[]);
        let whole = bytes.len() / size_of::<T>() * size_of::<T>();
        // Mappings start at page boundaries, so the cast cannot fail on alignment.
        bytemuck::cast_slice(&bytes[..whole])
    }

    /// As [`Self::as_slice`], to write.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        let bytes: &mut [u8] = self.memory.as_deref_mut().unwrap_or(&mut []);
        let whole = bytes.len() / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice_mut(&mut bytes[..whole])
    }
}
