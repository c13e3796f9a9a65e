//! The CUDA kernels: their sources, and their images where a compiler was found at build time.
//!
//! One *unit* is one `.cu` file of the folder `cuda`, compiled by itself. A unit holds device
//! code only. Every entry is `extern "C" __global__ void oxl_<name>(const __grid_constant__
//! <Name>Args args)`: one structure by value, of which `oxllama-cuda` has the same in Rust.

/// One separately compiled source file.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// The file's text, for compilation at run time.
    pub source: &'static str,
    /// Device code for one or several architectures, as the driver loads it; `None` where no
    /// compiler was found at build time.
    pub image: Option<&'static [u8]>,
}

/// Every unit, by name.
pub const UNITS: &[Unit] = include!(concat!(env!("OUT_DIR"), "/units.rs"));

/// Name and text of every header that units include.
pub const HEADERS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/headers.rs"));

/// What images hold code for, as `sm_90a`, or `compute_80` for PTX that the driver compiles;
/// empty where no compiler was found at build time.
pub const TARGETS: &[&str] = include!(concat!(env!("OUT_DIR"), "/targets.rs"));
