//! The scalar reference backend: every operation as its formula reads, in `f32`, in one
//! thread and in one fixed order of summation.
//!
//! It is what other backends are compared with, so it prefers being obviously right to
//! being fast. Two choices only are made for speed, neither of which changes a sum: weights
//! are decoded once at load, and stored such that the loop over outputs is the inner one.

mod attention;
mod draw;
mod elementwise;
mod linear;
mod memory;
mod norm;

use oxllama_memory::DeviceId;

pub use draw::draw;
pub use linear::ReferenceLinear;
pub use memory::ReferenceWorkspace;

/// A device of host memory whose operations are scalar `f32` arithmetic.
#[derive(Debug, Clone)]
pub struct ReferenceDevice {
    id: DeviceId,
}

impl ReferenceDevice {
    /// A device that takes reservations made on `id`.
    pub fn new(id: DeviceId) -> Self {
        Self { id }
    }
}
