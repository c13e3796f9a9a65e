//! GPUs, and the driver's context of one of them.

use std::ffi::CStr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute, CUresult};
use oxllama_backend::{DeviceError, MemoryState};
use oxllama_memory::{Bytes, DeviceId};

use crate::error::{CudaUnavailable, is_sticky, not_started, words};
use crate::graph::RecordedCounts;
use crate::library;
use crate::monitor;

/// The oldest driver that loads the images (CUDA 12.0, driver 525).
const NEEDED_DRIVER: (i32, i32) = (12, 0);

/// The oldest compute capability that the kernels are written for.
const NEEDED_CAPABILITY: (i32, i32) = (8, 0);

/// One GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// `cuda:` and its place in the list of [`gpus`].
    pub id: DeviceId,
    /// The driver's number for it.
    pub(crate) ordinal: i32,
    /// What it calls itself.
    pub name: String,
    /// `domain:bus:device.function`, as `nvidia-smi` prints it.
    pub pci_bus: String,
    /// Compute capability, such as (9, 0).
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// All of its memory.
    pub memory: Bytes,
    /// Second-level cache.
    pub l2_cache: Bytes,
    /// Shared memory that one block may have.
    pub shared_per_block: Bytes,
}

impl GpuInfo {
    /// Whether kernels are written for it.
    ///
    /// # Errors
    /// It is too old; the error says what is needed.
    pub fn check(&self) -> Result<(), CudaUnavailable> {
        if self.capability >= NEEDED_CAPABILITY {
            return Ok(());
        }
        Err(CudaUnavailable::Unsupported {
            name: self.name.clone(),
            major: self.capability.0,
            minor: self.capability.1,
        })
    }
}

/// The GPUs that the driver shows, in the order of their PCI addresses (as `nvidia-smi` lists
/// them), or as `CUDA_VISIBLE_DEVICES` orders them where that is set.
///
/// # Errors
/// There is no driver, it is too old, does not start, or shows no device.
pub fn gpus() -> Result<Vec<GpuInfo>, CudaUnavailable> {
    if !library::has_driver() {
        return Err(CudaUnavailable::NoDriver);
    }
    let version = driver_version().map_err(not_started)?;
    let found = (version / 1000, version % 1000 / 10);
    if found < NEEDED_DRIVER {
        return Err(CudaUnavailable::OldDriver {
            found_major: found.0,
            found_minor: found.1,
            needed_major: NEEDED_DRIVER.0,
            needed_minor: NEEDED_DRIVER.1,
        });
    }
    // SAFETY: may be called any number of times.
    done(unsafe { sys::cuInit(0) }).map_err(not_started)?;
    let mut count = 0;
    // SAFETY: the driver is initialised; the function only writes the count.
    done(unsafe { sys::cuDeviceGetCount(&raw mut count) }).map_err(not_started)?;
    let mut gpus = (0..count)
        .map(describe)
        .collect::<Result<Vec<_>, _>>()
        .map_err(not_started)?;
    if gpus.is_empty() {
        return Err(CudaUnavailable::NoDevice {
            reason: "it lists none".to_owned(),
        });
    }
    if std::env::var_os("CUDA_VISIBLE_DEVICES").is_none() {
        gpus.sort_by(|a, b| a.pci_bus.cmp(&b.pci_bus));
    }
    for (index, gpu) in gpus.iter_mut().enumerate() {
        gpu.id = DeviceId::cuda(index as u32);
    }
    Ok(gpus)
}

/// The newest CUDA that the driver knows, as 12040 for 12.4. Its library is there.
fn driver_version() -> Result<i32, CUresult> {
    let mut version = 0;
    // SAFETY: the function only writes the version.
    done(unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    Ok(version)
}

/// What the driver says of its device `ordinal`, below the count that it gave.
fn describe(ordinal: i32) -> Result<GpuInfo, CUresult> {
    let device = device(ordinal)?;
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: `device` came from the driver; the function only writes the value.
        done(unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) })?;
        Ok::<_, CUresult>(value)
    };
    let mut name = [0; 256];
    // SAFETY: the buffer is as long as is said.
    done(unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 256, device) })?;
    let mut pci_bus = [0; 32];
    // SAFETY: as above.
    done(unsafe { sys::cuDeviceGetPCIBusId(pci_bus.as_mut_ptr(), 32, device) })?;
    let mut memory = 0;
    // SAFETY: the function only writes the size.
    done(unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) })?;
    let bytes = |count: i32| Bytes(u64::from(count.unsigned_abs()));
    Ok(GpuInfo {
        id: DeviceId::cuda(ordinal.unsigned_abs()),
        ordinal,
        name: text(&name),
        pci_bus: text(&pci_bus),
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
            .unsigned_abs() as usize,
        memory: Bytes::from_usize(memory),
        l2_cache: bytes(attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        shared_per_block: bytes(attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?),
    })
}

fn device(ordinal: i32) -> Result<CUdevice, CUresult> {
    let mut device = 0;
    // SAFETY: the driver is initialised; the function only writes the handle.
    done(unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
    Ok(device)
}

/// A string that the driver wrote into a buffer of ours.
fn text(buffer: &[std::ffi::c_char]) -> String {
    let bytes: &[u8] = bytemuck::cast_slice(buffer);
    let text = CStr::from_bytes_until_nul(bytes).unwrap_or_default();
    text.to_string_lossy().into_owned()
}

fn done(code: CUresult) -> Result<(), CUresult> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(code),
    }
}

/// What broke a context.
#[derive(Debug)]
struct Loss {
    operation: String,
    reason: String,
}

/// The primary context of one GPU, kept as long as anything of it is used.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) info: GpuInfo,
    /// The newest CUDA that the driver knows, as 12040 for 12.4.
    pub(crate) driver_version: i32,
    device: CUdevice,
    handle: CUcontext,
    /// The first error that the driver does not recover from. From then on the driver is not
    /// asked for anything any more.
    loss: OnceLock<Loss>,
    /// What is recorded in it.
    pub(crate) recorded: RecordedCounts,
}

// SAFETY: the driver's functions may be called from any thread; a context is made current in the
// thread that calls before each use.
unsafe impl Send for Context {}
// SAFETY: as above; the driver synchronises its own state.
unsafe impl Sync for Context {}

impl Context {
    /// Takes hold of the GPU's primary context.
    pub(crate) fn retain(info: GpuInfo) -> Result<Self, CudaUnavailable> {
        info.check()?;
        let failed = |operation| {
            let name = info.name.clone();
            move |code: CUresult| CudaUnavailable::Open {
                name,
                operation,
                reason: words(code),
            }
        };
        let device = device(info.ordinal).map_err(failed("finding the device"))?;
        let driver_version = driver_version().map_err(failed("asking for the driver's version"))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `device` came from the driver; the function only writes the handle.
        done(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut handle, device) })
            .map_err(failed("creating a context"))?;
        Ok(Self {
            info,
            driver_version,
            device,
            handle,
            loss: OnceLock::new(),
            recorded: RecordedCounts::default(),
        })
    }

    pub(crate) fn id(&self) -> &DeviceId {
        &self.info.id
    }

    pub(crate) fn handle(&self) -> CUcontext {
        self.handle
    }

    /// Whether the driver accepts nothing more.
    pub(crate) fn is_lost(&self) -> bool {
        self.loss.get().is_some()
    }

    fn lost(&self, loss: &Loss) -> DeviceError {
        DeviceError::Lost {
            device: self.id().clone(),
            operation: loss.operation.clone(),
            reason: loss.reason.clone(),
        }
    }

    /// Makes the context the calling thread's: before anything else is asked of the driver. Of a
    /// lost one nothing is asked.
    pub(crate) fn bind(&self) -> Result<(), DeviceError> {
        if let Some(loss) = self.loss.get() {
            return Err(self.lost(loss));
        }
        // SAFETY: the handle is valid as long as `self` lives.
        let code = unsafe { sys::cuCtxSetCurrent(self.handle) };
        self.check(code, || "selecting the device".to_owned())
    }

    /// Turns the driver's answer into a result. `operation` says what was attempted.
    pub(crate) fn check(
        &self,
        code: CUresult,
        operation: impl FnOnce() -> String,
    ) -> Result<(), DeviceError> {
        if code == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        if is_sticky(code) {
            let loss = self.loss.get_or_init(|| Loss {
                operation: operation(),
                reason: words(code),
            });
            return Err(self.lost(loss));
        }
        if let Some(loss) = self.loss.get() {
            return Err(self.lost(loss));
        }
        let (device, operation) = (self.id().clone(), operation());
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, answer) = query_free();
            let state = Box::new(MemoryState {
                free: (answer == CUresult::CUDA_SUCCESS).then_some(free),
                processes: monitor::processes(&self.info),
            });
            return Err(DeviceError::OutOfMemory {
                device,
                operation,
                state,
            });
        }
        Err(DeviceError::Operation {
            device,
            operation,
            reason: words(code),
        })
    }

    /// Lets `destroy` give something of this context back to the driver. What a lost one had, the
    /// driver takes back by itself when the context, or the process, ends.
    pub(crate) fn give_back(&self, destroy: impl FnOnce() -> CUresult) {
        // Even where it could not be selected: another thread may have selected it before.
        let _ = self.bind();
        if self.is_lost() {
            return;
        }
        // The answer may be that of a kernel before. What was refused for another reason cannot
        // be given back in another way.
        let code = destroy();
        if is_sticky(code) {
            let _ = self.check(code, || "a step's kernels or copies".to_owned());
        }
    }

    /// Asks the driver to let this GPU read and write the memory of `other`'s, and returns what it
    /// answered: that they cannot reach each other, for example, or that they do already.
    pub(crate) fn reach(&self, other: &Self) -> Result<CUresult, DeviceError> {
        self.bind()?;
        // SAFETY: this context is current, and the other one's handle is valid.
        Ok(unsafe { sys::cuCtxEnablePeerAccess(other.handle, 0) })
    }

    /// Memory of the GPU that nobody has at this moment.
    pub(crate) fn free_memory(&self) -> Result<Bytes, DeviceError> {
        self.bind()?;
        let (free, code) = query_free();
        self.check(code, || "asking for free memory".to_owned())?;
        Ok(free)
    }
}

/// Memory of the current context's GPU that nobody has at this moment, if the code says success.
fn query_free() -> (Bytes, CUresult) {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the function only writes two sizes; without a current context it refuses.
    let code = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
    (Bytes::from_usize(free), code)
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `retain`; everything made in it holds an `Arc` of `self`.
        // The result is of no use: nothing can be done about a context that cannot be released.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
