//! Device code on a GPU, and its entries by name.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult};
use oxllama_kernels::{UNITS, Unit};

use crate::context::Context;
use crate::error::{CudaUnavailable, words};

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
        for unit in UNITS {
            let module = modules.load_unit(unit)?;
            modules.by_unit.insert(unit.name, module);
        }
        Ok(modules)
    }

    fn load_unit(&self, unit: &Unit) -> Result<CUmodule, CudaUnavailable> {
        let Some(image) = unit.image else {
            return Err(self.failed("this program was built without CUDA kernels".to_owned()));
        };
        self.context
            .bind()
            .map_err(|error| self.failed(error.to_string()))?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole fat binary, whose own header says how long it is.
        let code = unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) };
        if code != CUresult::CUDA_SUCCESS {
            return Err(self.failed(format!("unit {}: {}", unit.name, words(code))));
        }
        Ok(module)
    }

    /// The entry `name` of `unit`, which may then use up to `shared_bytes` of dynamic shared
    /// memory.
    pub(crate) fn kernel(
        &self,
        unit: &'static str,
        name: &'static str,
        shared_bytes: usize,
    ) -> Result<Kernel, CudaUnavailable> {
        let missing = |reason: String| self.failed(format!("{name} of unit {unit}: {reason}"));
        let Some(&module) = self.by_unit.get(unit) else {
            return Err(missing("there is no such unit".to_owned()));
        };
        let symbol = CString::new(name).map_err(|error| missing(error.to_string()))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded; the name ends with a zero.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut function, module, symbol.as_ptr()) };
        if code != CUresult::CUDA_SUCCESS {
            return Err(missing(words(code)));
        }
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is the module's.
        let code = unsafe { sys::cuFuncSetAttribute(function, attribute, shared_bytes as i32) };
        if code != CUresult::CUDA_SUCCESS {
            let reason = words(code);
            return Err(missing(format!(
                "{shared_bytes} bytes of shared memory: {reason}"
            )));
        }
        Ok(Kernel { function, name })
    }

    fn failed(&self, reason: String) -> CudaUnavailable {
        CudaUnavailable::Kernels {
            name: self.context.info.name.clone(),
            reason,
        }
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        for &module in self.by_unit.values() {
            // SAFETY: loaded once; kernels are used only by devices, which hold these modules.
            let _ = unsafe { sys::cuModuleUnload(module) };
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
