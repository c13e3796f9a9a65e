//! How CUDA sources become images ahead of time: the units of a folder, the targets to compile
//! them for, finding nvcc and running it, and what ptxas reports of registers and spills.
//!
//! Shared by the build scripts of `oxllama-kernels` and `oxllama-emulator` and by `cargo xtask
//! kernels`; no part of the program.

mod compiler;
mod error;
mod parallel;
mod ptxas;
mod target;
mod unit;

pub use compiler::{Checks, NVCC_VARIABLE, Nvcc, OLDEST_RELEASE};
pub use error::NvccError;
pub use parallel::for_each_in_parallel;
pub use ptxas::{FunctionReport, parse_report};
pub use target::{ARCHITECTURES_VARIABLE, DEFAULT_TARGETS, Target};
pub use unit::{UnitEntry, UnitSource, headers, units, write_if_changed};
