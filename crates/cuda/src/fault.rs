//! A kernel that fails, on demand.

use oxllama_backend::DeviceError;

use crate::ceilings::ReadAllArgs;
use crate::device::CudaDevice;
use crate::launch::Launch;

impl CudaDevice {
    /// Makes a kernel read where there is no memory, as a defective one might. The driver accepts
    /// nothing more from this process on this device afterwards: for tests of what is said and
    /// given back then.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], which is what it is for; an `Ok` means that the driver let the kernel
    /// pass.
    pub fn inject_fault(&self) -> Result<(), DeviceError> {
        let args = ReadAllArgs {
            memory: 0,
            result: 0,
            pieces: 1,
        };
        // SAFETY: the structure is the kernel's. It reads from address zero, where nothing is
        // mapped, so it harms no memory; the driver ends it and every later call.
        unsafe { self.launch(self.kernels().read_all, Launch::linear(1, 512), &args) }?;
        self.synchronize()
    }
}
