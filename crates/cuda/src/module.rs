//! Device code on a GPU, and its entries by name.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult};
use oxllama_kernels::UNITS;

use crate::context::Context;
use crate::error::CudaUnavailable;
use crate::launch::Launch;
use crate::origin::{Origin, no_code};

/// Every unit, loaded on one GPU.
#[derive(Debug)]
pub(crate) struct Modules {
    context: Arc<Context>,
    by_unit: HashMap<&'static str, CUmodule>,
}

// SAFETY: modules are only read after they have been loaded.
unsafe impl Send for Modules {}
// SAFETY: as above.
unsafe impl Sync for Modules {}

impl Modules {
    pub(crate) fn load(context: &Arc<Context>) -> Result<Self, CudaUnavailable> {
        let mut modules = Self {
            context: Arc::clone(context),
            by_unit: HashMap::with_capacity(UNITS.len()),
        };
        let origin = Origin::from_environment().map_err(|reason| modules.failed(reason))?;
        context
            .bind()
            .map_err(|error| modules.failed(error.to_string()))?;
        let mut missing = Vec::new();
        for unit in UNITS {
            let image = unit.image.filter(|_| origin == Origin::Images);
            let loaded = image.map(|image| modules.load_code(unit.name, image));
            match loaded {
                Some(Err(code)) if !does_not_fit(code) => {
                    return Err(modules.refused(code, unit.name));
                }
                Some(Err(_)) | None => missing.push(unit),
                Some(Ok(())) => {}
            }
        }
        if missing.is_empty() {
            return Ok(modules);
        }
        let codes = origin
            .compile(
                &missing,
                context.info.capability,
                context.driver_version / 1000,
            )
            .map_err(|error| {
                modules.failed(match origin {
                    Origin::Images => no_code(&error),
                    Origin::Sources(_) => error.to_string(),
                })
            })?;
        for (unit, code) in missing.iter().zip(&codes) {
            modules
                .load_code(unit.name, code)
                .map_err(|code| modules.refused(code, unit.name))?;
        }
        Ok(modules)
    }

    /// Loads what nvcc or NVRTC made into the current context.
    fn load_code(&mut self, unit: &'static str, code: &[u8]) -> Result<(), CUresult> {
        let mut module = std::ptr::null_mut();
        // SAFETY: a whole fat binary or cubin, whose own header says how long it is.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, code.as_ptr().cast()) };
        if result != CUresult::CUDA_SUCCESS {
            return Err(result);
        }
        self.by_unit.insert(unit, module);
        Ok(())
    }

    /// The entry `name` of `unit`, which may then use up to `shared_bytes` of dynamic shared
    /// memory.
    pub(crate) fn kernel(
        &self,
        unit: &'static str,
        name: &'static str,
        shared_bytes: usize,
    ) -> Result<Kernel, CudaUnavailable> {
        let found = self.kernel_if_any(unit, name, shared_bytes)?;
        found.ok_or_else(|| self.refused(CUresult::CUDA_ERROR_NOT_FOUND, name))
    }

    /// Entries with the shared memory of each, as [`Self::kernel`] gives them, or `None` where the unit lacks one for this GPU.
    pub(crate) fn kernels_if_any<const N: usize>(
        &self,
        unit: &'static str,
        entries: [(&'static str, usize); N],
    ) -> Result<Option<[Kernel; N]>, CudaUnavailable> {
        let mut kernels = Vec::with_capacity(N);
        for (name, shared_bytes) in entries {
            kernels.extend(self.kernel_if_any(unit, name, shared_bytes)?);
        }
        Ok(kernels.try_into().ok())
    }

    /// [`Self::kernel`], or `None` where the unit has no such entry for this GPU.
    fn kernel_if_any(
        &self,
        unit: &'static str,
        name: &'static str,
        shared_bytes: usize,
    ) -> Result<Option<Kernel>, CudaUnavailable> {
        let missing = |reason: String| self.failed(format!("{name} of unit {unit}: {reason}"));
        let Some(&module) = self.by_unit.get(unit) else {
            return Err(missing("there is no such unit".to_owned()));
        };
        let symbol = CString::new(name).map_err(|error| missing(error.to_string()))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded; the name ends with a zero.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut function, module, symbol.as_ptr()) };
        if code == CUresult::CUDA_ERROR_NOT_FOUND {
            return Ok(None);
        }
        if code != CUresult::CUDA_SUCCESS {
            return Err(self.refused(code, name));
        }
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is the module's.
        let code = unsafe { sys::cuFuncSetAttribute(function, attribute, shared_bytes as i32) };
        if code != CUresult::CUDA_SUCCESS {
            let what = format!("giving {name} {shared_bytes} bytes of shared memory");
            return Err(self.refused(code, &what));
        }
        Ok(Some(Kernel { function, name }))
    }

    /// How many of a kernel's clusters of `ctas` blocks run at once, where each block takes a multiprocessor's `shared_bytes`:
    /// a cluster lies within one of the GPU's groups of multiprocessors, which are not of equal size.
    pub(crate) fn most_clusters(
        &self,
        kernel: Kernel,
        ctas: usize,
        threads: usize,
        shared_bytes: usize,
    ) -> Result<usize, CudaUnavailable> {
        let grid = self.context.info.multiprocessors / ctas * ctas;
        let launch = Launch {
            shared_bytes,
            ..Launch::linear(grid.max(ctas), threads)
        };
        let config = launch.config();
        let mut clusters = 0;
        // SAFETY: the function is a module's; the driver reads the structure and writes one number.
        let code = unsafe {
            sys::cuOccupancyMaxActiveClusters(&raw mut clusters, kernel.function, &raw const config)
        };
        match code {
            CUresult::CUDA_SUCCESS => Ok(clusters.unsigned_abs() as usize),
            code => Err(self.refused(code, &format!("asking for clusters of {}", kernel.name))),
        }
    }

    /// The driver's answer to loading `what`.
    fn refused(&self, code: CUresult, what: &str) -> CudaUnavailable {
        match self.context.check(code, || format!("loading {what}")) {
            Ok(()) => self.failed(format!("{what} was refused without a reason")),
            Err(error) => self.failed(error.to_string()),
        }
    }

    fn failed(&self, reason: String) -> CudaUnavailable {
        CudaUnavailable::Kernels {
            name: self.context.info.name.clone(),
            reason,
        }
    }
}

/// Whether the driver's answer means that an image has nothing for this GPU and driver, so that
/// code made for them may do.
fn does_not_fit(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_INVALID_PTX
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED
    )
}

impl Drop for Modules {
    fn drop(&mut self) {
        for &module in self.by_unit.values() {
            self.context.give_back(|| {
                // SAFETY: loaded once; kernels are used only by devices, which hold these
                // modules.
                unsafe { sys::cuModuleUnload(module) }
            });
        }
    }
}

/// An entry of a loaded module; valid as long as its [`Modules`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) function: CUfunction,
    pub(crate) name: &'static str,
}

// SAFETY: a handle that is only read.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}
