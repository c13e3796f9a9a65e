//! What the machine allows at most, measured.

use anyhow::Result;
use oxllama_cpu::{SpinPool, measure_read_bandwidth};
use oxllama_cuda::CudaDevice;
use oxllama_memory::{Bytes, Purpose};

use crate::args::PlacementArgs;
use crate::session::{self, Devices, Host};

/// What the bandwidth is measured over: far more than any cache.
const BANDWIDTH_BYTES: usize = 1 << 30;
const GPU_BANDWIDTH_BYTES: Bytes = Bytes::from_gib(1);

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
    /// Measures the (first) device of `host`, once.
    pub(super) fn measure(host: &Host, placement: &PlacementArgs) -> Result<Self> {
        let threads = match &host.devices {
            Devices::Cpu(_) => placement.threads.unwrap_or_else(SpinPool::default_threads),
            Devices::Reference(_) => 1,
            Devices::Cuda(devices) => return Self::measure_gpu(host, &devices[0]),
        };
        Ok(Self {
            device: session::cpu_name(),
            threads: Some(threads),
            read_bytes_per_s: measure_read_bandwidth(threads, BANDWIDTH_BYTES)?,
            flops_per_s: None,
        })
    }

    fn measure_gpu(host: &Host, device: &CudaDevice) -> Result<Self> {
        let reserve = || {
            let (id, bytes) = (&device.info().id, GPU_BANDWIDTH_BYTES);
            host.ledger.reserve(id, "bench", Purpose::Workspace, bytes)
        };
        Ok(Self {
            device: device.info().name.clone(),
            threads: None,
            read_bytes_per_s: device.measure_read_bandwidth(reserve()?)?,
            flops_per_s: device.measure_matrix_rate(reserve()?)?,
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
