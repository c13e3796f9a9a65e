//! The fast CPU backend.
//!
//! [`CpuDevice`] implements the operations of [`oxllama_backend`] with SIMD kernels that are
//! compiled for several instruction sets and chosen at run time ([`Isa`]), on a pool of threads
//! that spin briefly between regions ([`SpinPool`]). Quantised weights are repacked at load and
//! multiplied with 16-bit activations in exact integer arithmetic within each group; the order
//! of every sum depends on the matrix and on the row's own position alone.
//!
//! `unsafe` is confined to the kernels and to handing threads disjoint parts of buffers.
#![allow(
    clippy::needless_range_loop,
    reason = "kernels index several register arrays with constants; iterators hide the shapes"
)]

mod attention;
mod bandwidth;
mod device;
mod device_attention;
mod float;
mod integer;
mod isa;
mod linear;
mod pack;
mod pool;
mod products;
mod quantise;
mod rowwise;
mod simd;
mod step;

pub use bandwidth::measure_read_bandwidth;
pub use device::{CpuDevice, CpuOptions};
pub use isa::{ISA_VARIABLE, Isa};
pub use linear::CpuLinear;
pub use pool::{SpinPool, Team};
pub use step::CpuWorkspace;

/// Something with raw pointers that the threads of a region share.
///
/// Whoever dereferences them answers for threads touching disjoint parts.
#[derive(Clone, Copy)]
struct SharedPointer<T>(T);

// SAFETY: only hands out copies; see the type's documentation.
unsafe impl<T> Sync for SharedPointer<T> {}
// SAFETY: as above.
unsafe impl<T> Send for SharedPointer<T> {}

impl<T: Copy> SharedPointer<T> {
    /// A method, so that closures capture the wrapper and not the pointer in it.
    fn get(&self) -> T {
        self.0
    }
}
