//! Queues of work on a GPU, and memory of the host that it can reach by itself.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};
use oxllama_backend::DeviceError;

use crate::context::Context;
use crate::error::{is_sticky, words};

/// A stream: what is enqueued runs in order.
#[derive(Debug)]
pub(crate) struct Stream {
    context: Arc<Context>,
    handle: CUstream,
}

// SAFETY: the driver's functions on streams may be called from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut handle = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the function only writes the handle.
        let code = unsafe { sys::cuStreamCreate(&raw mut handle, flags) };
        context.check(code, || "creating a stream".to_owned())?;
        Ok(Self {
            context: Arc::clone(context),
            handle,
        })
    }

    pub(crate) fn handle(&self) -> CUstream {
        self.handle
    }

    /// Waits until everything enqueued so far has run.
    pub(crate) fn synchronize(&self) -> Result<(), DeviceError> {
        self.context.bind()?;
        // SAFETY: the stream is alive.
        let code = unsafe { sys::cuStreamSynchronize(self.handle) };
        self.context
            .check(code, || "a step's kernels or copies".to_owned())
    }

    /// What is enqueued from here on waits for the place that `event` marked last.
    pub(crate) fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        self.context.bind()?;
        // SAFETY: both handles are alive.
        let code = unsafe { sys::cuStreamWaitEvent(self.handle, event.handle, 0) };
        event.own_failure(code)?;
        self.context
            .check(code, || "waiting for another stream".to_owned())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.context.give_back(|| {
            // SAFETY: made in `new`; destroyed once. Work that is still enqueued runs to its end.
            unsafe { sys::cuStreamDestroy_v2(self.handle) }
        });
    }
}

/// A place in a stream that others can wait for.
#[derive(Debug)]
pub(crate) struct Event {
    context: Arc<Context>,
    handle: CUevent,
}

// SAFETY: as for streams.
unsafe impl Send for Event {}
// SAFETY: as for streams.
unsafe impl Sync for Event {}

impl Event {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut handle = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current; the function only writes the handle.
        let code = unsafe { sys::cuEventCreate(&raw mut handle, flags) };
        context.check(code, || "creating an event".to_owned())?;
        Ok(Self {
            context: Arc::clone(context),
            handle,
        })
    }

    /// Marks the place after everything enqueued on `stream` so far.
    pub(crate) fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        self.context.bind()?;
        // SAFETY: both handles are alive and of one context.
        let code = unsafe { sys::cuEventRecord(self.handle, stream.handle) };
        self.context.check(code, || "marking a stream".to_owned())
    }

    /// Where the answer to a call that had to do with two devices says that one of them is lost,
    /// whether it is this event's; the other one must not be taken for lost then.
    pub(crate) fn own_failure(&self, answer: CUresult) -> Result<(), DeviceError> {
        if !is_sticky(answer) {
            return Ok(());
        }
        self.check()
    }

    /// Whether what was enqueued before the place that was marked last has failed, as far as is
    /// known: waits for nothing.
    pub(crate) fn check(&self) -> Result<(), DeviceError> {
        self.context.bind()?;
        // SAFETY: the handle is alive.
        let code = unsafe { sys::cuEventQuery(self.handle) };
        match code {
            CUresult::CUDA_ERROR_NOT_READY => Ok(()),
            code => self
                .context
                .check(code, || "a step's kernels or copies".to_owned()),
        }
    }

    /// Waits for the place that was marked last; returns at once if none was.
    pub(crate) fn synchronize(&self) -> Result<(), DeviceError> {
        self.context.bind()?;
        // SAFETY: the handle is alive.
        let code = unsafe { sys::cuEventSynchronize(self.handle) };
        self.context
            .check(code, || "a step's kernels or copies".to_owned())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.context.give_back(|| {
            // SAFETY: made in `new`; destroyed once.
            unsafe { sys::cuEventDestroy_v2(self.handle) }
        });
    }
}

/// Page-locked memory of the host, which copies to and from the GPU run beside other work.
#[derive(Debug)]
pub(crate) struct PinnedBuffer {
    context: Arc<Context>,
    memory: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: plain memory, owned by `self`.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared references only read.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// Zeroed memory of `bytes` bytes, at least one.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut memory = std::ptr::null_mut();
        let failed = || format!("locking {bytes} bytes of the host's memory");
        // SAFETY: the context is current; the function only writes the pointer.
        let code = unsafe { sys::cuMemHostAlloc(&raw mut memory, bytes.max(1), 0) };
        let refused = |reason: String| DeviceError::Operation {
            device: context.id().clone(),
            operation: failed(),
            reason,
        };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            // The host's, not the device's.
            return Err(refused(words(code)));
        }
        context.check(code, failed)?;
        let memory =
            NonNull::new(memory).ok_or_else(|| refused("the driver gave no address".to_owned()))?;
        // SAFETY: the driver gave as many bytes.
        unsafe { memory.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self {
            context: Arc::clone(context),
            memory,
            bytes,
        })
    }

    pub(crate) fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: initialised in `new`, aligned to a page, and `Pod` takes every bit pattern.
        unsafe {
            std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.bytes / size_of::<T>())
        }
    }

    /// To write. The caller has made sure that no copy of this memory is under way.
    pub(crate) fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.as_ptr().cast(), self.bytes / size_of::<T>())
        }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        self.context.give_back(|| {
            // SAFETY: made in `new`, freed once; the driver waits for copies under way.
            unsafe { sys::cuMemFreeHost(self.memory.as_ptr()) }
        });
    }
}
