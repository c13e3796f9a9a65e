//! What the machine allows at most, measured.

use anyhow::Result;
use oxllama_cpu::{SpinPool, measure_read_bandwidth};

use crate::args::{DeviceKind, PlacementArgs};
use crate::session;

/// What the bandwidth is measured over: far more than any cache.
const BANDWIDTH_BYTES: usize = 1 << 30;

/// The rates that no step can pass on the device that runs it.
pub(super) struct Ceilings {
    /// What the device calls itself.
    pub(super) device: String,
    /// Threads that compute, where that is the user's to choose.
    pub(super) threads: Option<usize>,
    /// Bytes a second that it reads from its memory.
    pub(super) read_bytes_per_s: f64,
    /// Multiplications and additions a second in matrix products; `None` where nothing measures
    /// them.
    pub(super) flops_per_s: Option<f64>,
}

impl Ceilings {
    /// Measures the device that `placement` asks for, once.
    pub(super) fn measure(placement: &PlacementArgs) -> Result<Self> {
        let threads = match placement.device {
            DeviceKind::Cpu => placement.threads.unwrap_or_else(SpinPool::default_threads),
            DeviceKind::Reference => 1,
        };
        Ok(Self {
            device: session::cpu_name(),
            threads: Some(threads),
            read_bytes_per_s: measure_read_bandwidth(threads, BANDWIDTH_BYTES)?,
            flops_per_s: None,
        })
    }

    /// The higher of two measurements of the same device.
    pub(super) fn best(self, other: Self) -> Self {
        Self {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            flops_per_s: match (self.flops_per_s, other.flops_per_s) {
                (Some(ours), Some(theirs)) => Some(ours.max(theirs)),
                (ours, theirs) => ours.or(theirs),
            },
            ..self
        }
    }
}
