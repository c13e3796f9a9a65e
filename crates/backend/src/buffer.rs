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

    /// Frees the memory and returns the room that it had.
    pub fn into_reservation(self) -> Reservation {
        self.reservation
    }

    /// The whole buffer as elements of `T` (a trailing partial element is left out).
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        let Some(bytes) = self.memory.as_deref() else {
            return &[];
        };
        let whole = bytes.len() / size_of::<T>() * size_of::<T>();
        // Mappings start at page boundaries, so the cast cannot fail on alignment.
        bytemuck::cast_slice(&bytes[..whole])
    }

    /// As [`Self::as_slice`], to write.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        let Some(bytes) = self.memory.as_deref_mut() else {
            return &mut [];
        };
        let whole = bytes.len() / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice_mut(&mut bytes[..whole])
    }

    /// `out[i, :] = self[rows[i], :]`, f32 `[_, width]`.
    ///
    /// # Panics
    /// If a row or the output lies outside its buffer: a caller's mistake.
    pub fn gather_rows(&self, rows: &[u32], width: usize, out: &mut HostBuffer) {
        let x = self.as_slice::<f32>();
        let out = &mut out.as_mut_slice::<f32>()[..rows.len() * width];
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&x[row as usize * width..][..width]);
        }
    }

    /// `out[rows[i], :] += scale · self[i, :]`, f32 `[_, width]`.
    ///
    /// # Panics
    /// As [`Self::gather_rows`].
    pub fn scatter_add_rows(&self, rows: &[u32], scale: f32, width: usize, out: &mut HostBuffer) {
        let x = &self.as_slice::<f32>()[..rows.len() * width];
        let out = out.as_mut_slice::<f32>();
        for (&row, x) in rows.iter().zip(x.chunks_exact(width)) {
            let out = &mut out[row as usize * width..][..width];
            for (out, x) in out.iter_mut().zip(x) {
                *out += scale * x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use oxllama_memory::{Ledger, Purpose};

    use super::*;

    fn reserve(ledger: &Ledger, device: &DeviceId, bytes: u64) -> Reservation {
        ledger
            .reserve(device, "test", Purpose::Workspace, Bytes(bytes))
            .expect("the ledger has room")
    }

    #[test]
    fn a_buffer_is_zeroed_and_holds_its_reservation_until_dropped() {
        let device = DeviceId::cpu(0);
        let ledger = Ledger::for_device(device.clone(), Bytes(10_000));
        let used = || ledger.usage(&device).expect("the device is known").used;

        let reservation = reserve(&ledger, &device, 4099);
        let mut buffer = HostBuffer::allocate(&device, reservation).expect("a small mapping");
        assert_eq!(buffer.size(), Bytes(4099));
        assert_eq!(used(), Bytes(4099));
        assert_eq!(buffer.as_slice::<u8>(), vec![0; 4099]);
        // The three bytes past the last whole element belong to no element.
        assert_eq!(buffer.as_slice::<f32>(), vec![0.0; 1024]);

        buffer.as_mut_slice::<f32>()[1023] = 1.0;
        assert_eq!(buffer.as_slice::<u32>()[1023], 0x3F80_0000);
        drop(buffer);
        assert_eq!(used(), Bytes::ZERO);
    }

    #[test]
    fn an_empty_buffer_has_no_elements_of_any_type() {
        let device = DeviceId::cpu(0);
        let ledger = Ledger::for_device(device.clone(), Bytes::ZERO);
        let reservation = reserve(&ledger, &device, 0);
        let mut buffer = HostBuffer::allocate(&device, reservation).expect("nothing to map");
        assert!(buffer.as_slice::<u64>().is_empty());
        assert!(buffer.as_mut_slice::<u64>().is_empty());
    }

    #[test]
    fn a_reservation_of_another_device_is_refused_and_given_back() {
        let (here, there) = (DeviceId::cpu(0), DeviceId::cpu(1));
        let ledger = Ledger::for_device(there.clone(), Bytes(100));
        let reservation = reserve(&ledger, &there, 100);
        let error = HostBuffer::allocate(&here, reservation).expect_err("another device");
        assert!(
            matches!(
                &error,
                DeviceError::WrongDevice { device, reserved_on }
                    if *device == here && *reserved_on == there
            ),
            "{error}"
        );
        let usage = ledger.usage(&there).expect("the device is known");
        assert_eq!(usage.used, Bytes::ZERO);
    }
}
