//! The CUDA backend.
//!
//! Everything is found at run time: the driver, and the libraries that are used where they
//! are there. [`gpus`] lists what can be used and says why not where nothing can;
//! [`CudaDevice::open`] makes a [`oxllama_backend::Device`] of one GPU.
//!
//! A device has one stream on which every operation is enqueued in order; only downloads wait
//! for it. Kernels are launched so that the next may start while the last one ends
//! (programmatic dependent launch, on architectures from 9.0 on).

mod attention;
mod buffer;
mod ceilings;
mod context;
mod device;
mod draw;
mod elementwise;
mod error;
mod fault;
mod graph;
mod kernel_cache;
mod launch;
mod library;
mod linear;
mod module;
mod monitor;
mod norm;
mod nvrtc;
mod origin;
mod prepare;
mod step;
mod stream;
mod tolerances;

pub use buffer::CudaBuffer;
pub use context::{GpuInfo, gpus};
pub use device::CudaDevice;
pub use error::CudaUnavailable;
pub use graph::RecordedSteps;
pub use kernel_cache::KernelCache;
pub use library::{LIBRARIES_VARIABLE, LibraryNotFound};
pub use linear::CudaLinear;
pub use monitor::{GpuState, Monitor};
pub use nvrtc::{CompileError, KernelSource, RuntimeCompiler};
pub use origin::{KERNEL_FOLDER_VARIABLE, KERNELS_VARIABLE};
pub use step::CudaWorkspace;
pub use tolerances::TOLERANCES;
