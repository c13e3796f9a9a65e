//! Starting kernels.

use std::ffi::c_void;

use cudarc::driver::sys::{self, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchConfig};
use oxllama_backend::DeviceError;

use crate::device::CudaDevice;
use crate::module::Kernel;
use crate::stream::Stream;

/// Extents of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// Blocks.
    pub(crate) grid: [usize; 3],
    /// Threads of a block.
    pub(crate) block: [usize; 3],
    /// Dynamic shared memory of a block.
    pub(crate) shared_bytes: usize,
}

impl Launch {
    /// `blocks` blocks of `threads` threads.
    pub(crate) fn linear(blocks: usize, threads: usize) -> Self {
        Self {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
        }
    }

    /// As the driver takes it: on the default stream, without attributes.
    pub(crate) fn config(&self) -> CUlaunchConfig {
        CUlaunchConfig {
            gridDimX: self.grid[0] as u32,
            gridDimY: self.grid[1] as u32,
            gridDimZ: self.grid[2] as u32,
            blockDimX: self.block[0] as u32,
            blockDimY: self.block[1] as u32,
            blockDimZ: self.block[2] as u32,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: std::ptr::null_mut(),
            attrs: std::ptr::null_mut(),
            numAttrs: 0,
        }
    }
}

impl CudaDevice {
    /// Enqueues a kernel. It may start before the one enqueued last has ended, and waits for it
    /// itself (`dependency_wait` in the kernels' `common.cuh`).
    ///
    /// # Safety
    /// `A` is the structure that the kernel takes, and what its addresses point to is as large
    /// as the kernel expects and stays allocated until the stream has passed the launch.
    pub(crate) unsafe fn launch<A: Copy>(
        &self,
        kernel: Kernel,
        launch: Launch,
        args: &A,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_on(self.stream(), kernel, launch, args) }
    }

    /// [`Self::launch`] on another stream of the device.
    ///
    /// # Safety
    /// As [`Self::launch`].
    pub(crate) unsafe fn launch_on<A: Copy>(
        &self,
        stream: &Stream,
        kernel: Kernel,
        launch: Launch,
        args: &A,
    ) -> Result<(), DeviceError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let context = self.context();
        context.bind()?;
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            // SAFETY: plain integers, for which zeros are valid.
            ..unsafe { std::mem::zeroed() }
        };
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let has_dependent_launch = context.info.capability >= (9, 0);
        let config = CUlaunchConfig {
            hStream: stream.handle(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(has_dependent_launch),
            ..launch.config()
        };
        let mut parameters = [std::ptr::from_ref(args).cast::<c_void>().cast_mut()];
        // SAFETY: the kernel takes one parameter, which the driver copies before it returns; the
        // rest is the caller's promise.
        let code = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        context.check(code, || format!("starting {} as {launch:?}", kernel.name))
    }
}
