//! One GPU as a device, and its memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;
use oxllama_backend::{DeviceError, DeviceMemory};
use oxllama_memory::{Bytes, DeviceId, Reservation};

use crate::attention::AttentionKernels;
use crate::buffer::CudaBuffer;
use crate::context::{Context, GpuInfo};
use crate::draw::DrawKernels;
use crate::elementwise::ElementwiseKernels;
use crate::error::{CudaUnavailable, is_sticky};
use crate::graph::{self, RecordedSteps};
use crate::linear::{BlasLt, LinearKernels, LoaderPool};
use crate::module::{Kernel, Modules};
use crate::prepare::PrepareKernels;
use crate::step::StepResults;
use crate::stream::{Event, Stream};

/// Entries of the kernels, looked up once.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) begin_step: Kernel,
    pub(crate) attention: AttentionKernels,
    pub(crate) read_all: Kernel,
    pub(crate) fill_random: Kernel,
    pub(crate) prepare: PrepareKernels,
    pub(crate) elementwise: ElementwiseKernels,
    pub(crate) linear: LinearKernels,
    pub(crate) draws: DrawKernels,
}

impl Kernels {
    fn find(modules: &Modules, gpu: &GpuInfo) -> Result<Self, CudaUnavailable> {
        Ok(Self {
            begin_step: modules.kernel("step", "oxl_begin_step", 0)?,
            attention: AttentionKernels::find(modules, gpu)?,
            read_all: modules.kernel("ceilings", "oxl_read_all", 0)?,
            fill_random: modules.kernel("ceilings", "oxl_fill_random", 0)?,
            prepare: PrepareKernels::find(modules, gpu)?,
            elementwise: ElementwiseKernels::find(modules)?,
            linear: LinearKernels::find(modules, gpu)?,
            draws: DrawKernels::find(modules)?,
        })
    }
}

/// What all handles of one device share.
#[derive(Debug)]
struct Shared {
    // Dropped first: what uses the modules and the context goes before them.
    stream: Stream,
    /// Brings a step's results to the host while the stream is busy with steps after it.
    results: Stream,
    /// Everything before a copy to another device has run; what a copy from another device
    /// brings is there.
    left: Event,
    arrived: Event,
    /// Devices whose memory this one has been let read.
    reached: Mutex<Vec<DeviceId>>,
    loaders: LoaderPool,
    blaslt: Option<BlasLt>,
    records_steps: AtomicBool,
    kernels: Kernels,
    _modules: Modules,
    context: Arc<Context>,
}

/// One GPU and one queue of work on it. Clones are handles of the same device.
#[derive(Debug, Clone)]
pub struct CudaDevice {
    shared: Arc<Shared>,
}

impl CudaDevice {
    /// Holds a reservation to exactly what was said to be needed for `what`.
    pub(crate) fn check_reservation(
        &self,
        what: impl FnOnce() -> String,
        needed: Bytes,
        reservation: &Reservation,
    ) -> Result<(), DeviceError> {
        if reservation.bytes() == needed {
            return Ok(());
        }
        Err(DeviceError::ReservationSize {
            device: self.context().id().clone(),
            what: what(),
            needed,
            reserved: reservation.bytes(),
        })
    }

    /// Creates a context on `gpu` and loads the kernels.
    ///
    /// # Errors
    /// The GPU is too old, the driver refuses, or there is no device code for it.
    pub fn open(gpu: &GpuInfo) -> Result<Self, CudaUnavailable> {
        let context = Arc::new(Context::retain(gpu.clone())?);
        let failed = |operation| {
            move |error: DeviceError| CudaUnavailable::Open {
                name: gpu.name.clone(),
                operation,
                reason: error.to_string(),
            }
        };
        let stream = || Stream::new(&context).map_err(failed("creating a stream"));
        let event = || Event::new(&context).map_err(failed("creating an event"));
        let modules = Modules::load(&context)?;
        Ok(Self {
            shared: Arc::new(Shared {
                stream: stream()?,
                results: stream()?,
                left: event()?,
                arrived: event()?,
                reached: Mutex::default(),
                loaders: LoaderPool::default(),
                blaslt: BlasLt::open(),
                records_steps: AtomicBool::new(true),
                kernels: Kernels::find(&modules, gpu)?,
                _modules: modules,
                context,
            }),
        })
    }

    /// What the driver says of the GPU.
    pub fn info(&self) -> &GpuInfo {
        &self.shared.context.info
    }

    /// Whether the driver accepts nothing more from this process: every operation fails then.
    pub fn is_lost(&self) -> bool {
        self.context().is_lost()
    }

    /// Memory that nobody on the machine has at this moment.
    ///
    /// # Errors
    /// The device failed.
    pub fn free_memory(&self) -> Result<Bytes, DeviceError> {
        self.shared.context.free_memory()
    }

    /// Waits until everything enqueued so far has run.
    ///
    /// # Errors
    /// The device failed, now or in what was enqueued.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.stream().synchronize()
    }

    /// Whether decode steps are recorded and replayed from here on, as they are at first. Without,
    /// every kernel of a step is launched by itself, which gives the same bits more slowly: for
    /// tools that look at kernels one by one. Returns whether they were before.
    pub fn record_steps(&self, is_on: bool) -> bool {
        self.shared.records_steps.swap(is_on, Ordering::Relaxed)
    }

    /// What of all models' steps is recorded at the moment.
    pub fn recorded_steps(&self) -> RecordedSteps {
        self.context().recorded.read()
    }

    /// Bytes of the device's memory that a recorded launch is taken to need.
    pub fn node_bytes(&self) -> usize {
        graph::node_bytes(self.context().driver_version)
    }

    pub(crate) fn records_steps(&self) -> bool {
        self.shared.records_steps.load(Ordering::Relaxed)
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.shared.context
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.shared.stream
    }

    /// A stream that has passed the last step with logit rows: another one than the steps', where
    /// steps after it are under way.
    pub(crate) fn results_stream(&self, results: &StepResults) -> Result<&Stream, DeviceError> {
        if !results.are_behind {
            return Ok(self.stream());
        }
        let stream = &self.shared.results;
        stream.wait(&results.finished)?;
        Ok(stream)
    }

    /// What threads that load weights use, one each.
    pub(crate) fn loaders(&self) -> &LoaderPool {
        &self.shared.loaders
    }

    /// The library for products of many rows, where it is installed.
    pub(crate) fn blaslt(&self) -> Option<&BlasLt> {
        self.shared.blaslt.as_ref()
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.shared.kernels
    }

    /// Enqueues a copy of `bytes` bytes between two places of the device's memory, or of
    /// devices that reach each other.
    ///
    /// # Safety
    /// Both places are allocated, as long as said, until the stream has passed the copy.
    pub(crate) unsafe fn copy(
        &self,
        from: sys::CUdeviceptr,
        to: sys::CUdeviceptr,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.context().bind()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream().handle()) };
        self.context()
            .check(code, || format!("copying {bytes} bytes on the device"))
    }

    /// Copies the start of `source` to host bytes, after everything enqueued on `stream`, and waits.
    pub(crate) fn download_on(
        &self,
        stream: &Stream,
        source: &CudaBuffer,
        destination: &mut [u8],
    ) -> Result<(), DeviceError> {
        assert!(
            destination.len() <= source.length(),
            "{} bytes from a buffer of {}",
            destination.len(),
            source.length()
        );
        if destination.is_empty() {
            return Ok(());
        }
        self.context().bind()?;
        // SAFETY: both ends are as long as the destination; the wait below keeps them that long.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                destination.as_mut_ptr().cast(),
                source.address(),
                destination.len(),
                stream.handle(),
            )
        };
        let bytes = destination.len();
        self.context()
            .check(code, || format!("copying {bytes} bytes from the device"))?;
        stream.synchronize()
    }

    /// Whether the rows of a step that were copied from here have been computed, or still may be.
    pub(crate) fn check_rows_that_left(&self) -> Result<(), DeviceError> {
        self.shared.left.check()
    }

    /// Lets this device read `peer`'s memory by itself, the first time that it copies from there.
    fn reach(&self, peer: &Self) -> Result<(), DeviceError> {
        let reached = self.shared.reached.lock();
        let mut reached = reached.unwrap_or_else(PoisonError::into_inner);
        if !reached.contains(peer.id()) {
            let answer = self.context().reach(peer.context())?;
            peer.shared.left.own_failure(answer)?;
            // Where the two cannot reach each other, the driver copies through the host's memory.
            if is_sticky(answer) {
                let operation = || format!("reaching the memory of {}", peer.id());
                self.context().check(answer, operation)?;
            }
            reached.push(peer.id().clone());
        }
        Ok(())
    }
}

impl DeviceMemory for CudaDevice {
    type Buffer = CudaBuffer;

    fn id(&self) -> &DeviceId {
        self.context().id()
    }

    fn allocate(&self, reservation: Reservation) -> Result<CudaBuffer, DeviceError> {
        let mut buffer = CudaBuffer::allocate(self.context(), reservation)?;
        buffer.clear(self.stream())?;
        Ok(buffer)
    }

    fn release(&self, buffer: CudaBuffer) -> Reservation {
        buffer.into_reservation()
    }

    fn upload(&self, source: &[u8], destination: &mut CudaBuffer) -> Result<(), DeviceError> {
        assert!(
            source.len() <= destination.length(),
            "{} bytes into a buffer of {}",
            source.len(),
            destination.length()
        );
        if source.is_empty() {
            return Ok(());
        }
        self.context().bind()?;
        // SAFETY: both ends are as long as the source; the wait below keeps them that long.
        let code = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                destination.address(),
                source.as_ptr().cast(),
                source.len(),
                self.stream().handle(),
            )
        };
        self.context().check(code, || {
            format!("copying {} bytes to the device", source.len())
        })?;
        self.stream().synchronize()
    }

    fn download(&self, source: &CudaBuffer, destination: &mut [u8]) -> Result<(), DeviceError> {
        self.download_on(self.stream(), source, destination)
    }

    fn copy_from_peer(
        &self,
        peer: &Self,
        source: &CudaBuffer,
        destination: &mut CudaBuffer,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        assert!(
            bytes <= source.length() && bytes <= destination.length(),
            "{bytes} bytes from a buffer of {} to one of {}",
            source.length(),
            destination.length()
        );
        if Arc::ptr_eq(&self.shared, &peer.shared) {
            // SAFETY: both buffers are as long as said, and the models that own them outlive
            // their steps.
            return unsafe { self.copy(source.address(), destination.address(), bytes) };
        }
        self.reach(peer)?;
        let left = &peer.shared.left;
        left.record(peer.stream())?;
        self.stream().wait(left)?;
        // SAFETY: as above; both contexts are alive.
        let code = unsafe {
            sys::cuMemcpyPeerAsync(
                destination.address(),
                self.context().handle(),
                source.address(),
                peer.context().handle(),
                bytes,
                self.stream().handle(),
            )
        };
        left.own_failure(code)?;
        self.context().check(code, || {
            format!("copying {bytes} bytes from {}", peer.context().id())
        })?;
        self.shared.arrived.record(self.stream())?;
        peer.stream().wait(&self.shared.arrived)
    }

    fn copy_within(
        &self,
        buffer: &mut CudaBuffer,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let length = buffer.length();
        assert!(
            from + bytes <= length && to + bytes <= length,
            "{bytes} bytes from {from} to {to} of a buffer of {length}"
        );
        // SAFETY: both ranges lie in the buffer.
        unsafe { self.copy(buffer.at(from), buffer.at(to), bytes) }
    }
}
