//! Where device code comes from: images of the build, or sources that are compiled now.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use oxllama_kernels::{HEADERS, TARGETS, Unit};

use crate::nvrtc::{CompileError, KernelSource, RuntimeCompiler};
use crate::{KernelCache, LIBRARIES_VARIABLE};

/// The environment variable that chooses: `auto` (images, and the compiler where none fits) or
/// `nvrtc` (the compiler).
pub const KERNELS_VARIABLE: &str = "OXLLAMA_CUDA_KERNELS";

/// The environment variable with a folder whose `.cu` and `.cuh` files are compiled in place of
/// those that the program holds.
pub const KERNEL_FOLDER_VARIABLE: &str = "OXLLAMA_KERNEL_DIR";

/// What the environment asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Images of the build, and the compiler where none fits.
    Images,
    /// The compiler, on the sources that the program holds, or on those of a folder.
    Sources(Option<PathBuf>),
}

impl Origin {
    /// # Errors
    /// [`KERNELS_VARIABLE`] has another value; the error says which it may have.
    pub(crate) fn from_environment() -> Result<Self, String> {
        let variable = |name| env::var_os(name).filter(|value| !value.is_empty());
        if let Some(folder) = variable(KERNEL_FOLDER_VARIABLE) {
            return Ok(Self::Sources(Some(folder.into())));
        }
        match variable(KERNELS_VARIABLE) {
            None => Ok(Self::Images),
            Some(value) if value == "auto" => Ok(Self::Images),
            Some(value) if value == "nvrtc" => Ok(Self::Sources(None)),
            Some(value) => Err(format!(
                "{KERNELS_VARIABLE} is {value:?}, but may be `auto` or `nvrtc`"
            )),
        }
    }

    /// Machine code of each of `units` for a GPU of `capability`, where the driver is of CUDA
    /// `driver_major`. Several are compiled at a time.
    pub(crate) fn compile(
        &self,
        units: &[&'static Unit],
        capability: (i32, i32),
        driver_major: i32,
    ) -> Result<Vec<Vec<u8>>, CompileError> {
        let compiler = RuntimeCompiler::find(driver_major)?;
        let architecture = compiler.architecture(capability)?;
        let cache = KernelCache::of_user();
        let compile = |unit: &Unit| {
            let source = match self {
                Self::Images | Self::Sources(None) => KernelSource::embedded(unit),
                Self::Sources(Some(folder)) => KernelSource::read(folder, unit.name)?,
            };
            cache.compile(&compiler, &source, &architecture)
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = units.len().div_ceil(threads).max(1);
        let shares: Vec<Result<Vec<_>, _>> = std::thread::scope(|scope| {
            let workers: Vec<_> = units
                .chunks(share)
                .map(|units| scope.spawn(|| units.iter().map(|unit| compile(unit)).collect()))
                .collect();
            let join = |worker: std::thread::ScopedJoinHandle<'_, _>| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            workers.into_iter().map(join).collect()
        });
        let codes: Result<Vec<Vec<_>>, _> = shares.into_iter().collect();
        Ok(codes?.into_iter().flatten().collect())
    }
}

/// Why a GPU cannot have its kernels when no image fits and `error` keeps them from being
/// compiled.
pub(crate) fn no_code(error: &CompileError) -> String {
    let images = if TARGETS.is_empty() {
        "this program was built without device code".to_owned()
    } else {
        format!("this program's device code is for {}", TARGETS.join(", "))
    };
    let cure = match error {
        CompileError::Library(_) => format!(
            " (with NVRTC, it compiles its kernels when it first runs; {LIBRARIES_VARIABLE} names \
             the library's folder)"
        ),
        _ => String::new(),
    };
    format!("{images}, and it cannot be compiled now: {error}{cure}")
}

impl KernelSource {
    /// A unit as the program holds it.
    pub fn embedded(unit: &Unit) -> Self {
        let headers = HEADERS.iter();
        let headers = headers.map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        Self::new(unit.name, unit.source.to_owned(), headers.collect())
    }

    /// The unit `name` of a folder of sources.
    ///
    /// # Errors
    /// The folder does not have it, or a file cannot be read.
    pub fn read(folder: &Path, name: &str) -> Result<Self, CompileError> {
        let failed = |path: &Path, error: std::io::Error| CompileError::Read {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let text = |path: &Path| fs::read_to_string(path).map_err(|error| failed(path, error));
        let mut headers = Vec::new();
        for entry in fs::read_dir(folder).map_err(|error| failed(folder, error))? {
            let path = entry.map_err(|error| failed(folder, error))?.path();
            if path.extension().is_some_and(|extension| extension == "cuh") {
                let name = path.file_name().unwrap_or_default();
                headers.push((name.to_string_lossy().into_owned(), text(&path)?));
            }
        }
        headers.sort();
        let unit = text(&folder.join(format!("{name}.cu")))?;
        Ok(Self::new(name, unit, headers))
    }

    /// Keeps those of `headers` that the unit includes, itself or through others, so that it is
    /// not compiled again when another one changes.
    fn new(name: &str, text: String, mut headers: Vec<(String, String)>) -> Self {
        let mut included = vec![false; headers.len()];
        let mut unread = vec![&text];
        while let Some(text) = unread.pop() {
            for (index, (name, header)) in headers.iter().enumerate() {
                if !included[index] && text.contains(&format!("\"{name}\"")) {
                    included[index] = true;
                    unread.push(header);
                }
            }
        }
        let mut included = included.into_iter();
        headers.retain(|_| included.next().unwrap_or(false));
        Self {
            name: name.to_owned(),
            text,
            headers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_a_unit_and_what_it_includes() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            fs::write(folder.path().join(name), text).expect("an own folder");
        };
        write("one.cu", "#include \"b.cuh\"\n");
        write("a.cuh", "leaf");
        write("b.cuh", "#include \"a.cuh\"\n#include \"b.cuh\"\n");
        write("c.cuh", "other");
        let source = KernelSource::read(folder.path(), "one").expect("readable");
        let names: Vec<_> = source.headers.iter().map(|(name, _)| &**name).collect();
        assert_eq!((&*source.name, names), ("one", vec!["a.cuh", "b.cuh"]));
        let error = KernelSource::read(folder.path(), "two").expect_err("not there");
        assert!(error.to_string().contains("two.cu"), "{error}");
    }
}
