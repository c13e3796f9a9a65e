//! Why CUDA, or one GPU, cannot be used; and how the driver's codes become errors.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

/// Why there is no CUDA device to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaUnavailable {
    /// The driver's library is not on this machine.
    #[error(
        "no NVIDIA driver was found (libcuda.so.1): to use a GPU, install the driver, or start \
         the container with GPUs (for example --gpus all)"
    )]
    NoDriver,
    /// The driver is older than what the kernels are built for.
    #[error(
        "the NVIDIA driver supports CUDA {found_major}.{found_minor}, but {needed_major}.\
         {needed_minor} is needed: update the driver"
    )]
    OldDriver {
        /// Of the driver.
        found_major: i32,
        /// Of the driver.
        found_minor: i32,
        /// At least.
        needed_major: i32,
        /// At least.
        needed_minor: i32,
    },
    /// The driver is there but shows no GPU.
    #[error(
        "the NVIDIA driver gives no device ({reason}): check `nvidia-smi` and \
         CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// The driver's words.
        reason: String,
    },
    /// The driver's library is there, but it does not start.
    #[error("the NVIDIA driver does not start ({reason}): {hint}")]
    DriverFailed {
        /// The driver's words.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// A GPU that kernels are not written for.
    #[error("{name} has compute capability {major}.{minor}; 8.0 (Ampere, 2020) or newer is needed")]
    Unsupported {
        /// What the GPU calls itself.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
    },
    /// No device code fits the GPU.
    #[error("the kernels cannot be loaded on {name}: {reason}")]
    Kernels {
        /// What the GPU calls itself.
        name: String,
        /// What is missing, and what to do.
        reason: String,
    },
    /// The driver refused something while the GPU was opened.
    #[error("{name}: {operation} failed: {reason}")]
    Open {
        /// What the GPU calls itself.
        name: String,
        /// What was attempted.
        operation: &'static str,
        /// The driver's words.
        reason: String,
    },
}

/// The driver's words for one of its codes.
pub(crate) fn words(code: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: a code means that the driver's library is loaded; `text` receives a pointer to a
    // static string.
    let found = unsafe { sys::cuGetErrorString(code, &raw mut text) };
    if found != CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("driver error {}", code as u32);
    }
    // SAFETY: the driver gave a string of its own that ends with a zero.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{} (driver error {})", text.to_string_lossy(), code as u32)
}

/// Why the driver did not start, or shows no GPU.
pub(crate) fn not_started(code: CUresult) -> CudaUnavailable {
    let hint = match code {
        CUresult::CUDA_ERROR_NO_DEVICE => {
            return CudaUnavailable::NoDevice {
                reason: words(code),
            };
        }
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "a toolkit's stub was found in place of the driver's library: take its folder out of \
             LD_LIBRARY_PATH"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "its library and its kernel module are of different versions: restart the machine \
             after an update, or start the container anew"
        }
        CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "a compatibility package is in its place that this GPU does not support: remove it, \
             or update the driver itself"
        }
        CUresult::CUDA_ERROR_SYSTEM_NOT_READY => {
            "the system's services for GPUs do not run (for example nvidia-fabricmanager)"
        }
        _ => "see whether `nvidia-smi` works",
    };
    CudaUnavailable::DriverFailed {
        reason: words(code),
        hint,
    }
}

/// Whether after this code the context accepts nothing more: what a kernel did wrong, or the
/// hardware.
pub(crate) fn is_sticky(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_EXTERNAL_DEVICE
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}
