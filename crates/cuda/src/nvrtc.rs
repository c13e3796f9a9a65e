//! Compiling kernels when the program runs, with NVIDIA's runtime compiler.
//!
//! Used where no image that was made at build time fits the GPU, and to try a changed kernel
//! without building the program again. Compiled code is kept on disk ([`KernelCache`]).

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::library::{self, LibraryNotFound};

/// A handle of a program that is being compiled.
type Program = *mut c_void;

/// `NVRTC_SUCCESS`. The codes stay integers: a newer library may answer with one that no list of
/// ours has.
const SUCCESS: c_int = 0;

/// The functions of the library that are used, as `nvrtc.h` declares them.
#[derive(Debug)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    architecture_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

impl Functions {
    fn find(library: &'static Library) -> Result<Self, libloading::Error> {
        // SAFETY: each name is declared with the type of its field in every `nvrtc.h` from
        // CUDA 11.1 on, and the library is never unloaded.
        unsafe {
            Ok(Self {
                version: *library.get(b"nvrtcVersion\0")?,
                error_string: *library.get(b"nvrtcGetErrorString\0")?,
                architecture_count: *library.get(b"nvrtcGetNumSupportedArchs\0")?,
                architectures: *library.get(b"nvrtcGetSupportedArchs\0")?,
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                log: *library.get(b"nvrtcGetProgramLog\0")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                cubin: *library.get(b"nvrtcGetCUBIN\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
            })
        }
    }

    fn words(&self, code: c_int) -> String {
        // SAFETY: gives a static string for every number.
        let text = unsafe { (self.error_string)(code) };
        if text.is_null() {
            return format!("code {code}");
        }
        // SAFETY: the library's own string, which ends with a zero.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_string_lossy().into_owned()
    }
}

/// What the runtime compiler could not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// There is no runtime compiler.
    #[error(transparent)]
    Library(#[from] LibraryNotFound),
    /// What was found under the library's name is not the library.
    #[error("{} is no NVRTC: {reason}", path.display())]
    NotNvrtc {
        /// The file.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// CUDA's own headers are not there.
    #[error(
        "NVRTC is there ({}), but cuda_fp16.h is not, neither in {}: install the CUDA runtime's headers \
         (nvidia-cuda-runtime among NVIDIA's Python packages)",
        library.display(),
        searched.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(" nor in ")
    )]
    Headers {
        /// The compiler.
        library: PathBuf,
        /// Folders that do not have it.
        searched: Vec<PathBuf>,
    },
    /// The GPU is newer than the compiler.
    #[error(
        "{} is of CUDA {}.{} and cannot compile for compute capability {major}.{minor}: install a newer \
         one, or a release of this program with kernels for that GPU",
        library.display(), version.0, version.1
    )]
    Architecture {
        /// The compiler.
        library: PathBuf,
        /// The compiler's release.
        version: (i32, i32),
        /// Of the GPU.
        major: i32,
        /// Of the GPU.
        minor: i32,
    },
    /// The source is wrong, or the compiler failed.
    #[error("unit {unit} does not compile ({reason}):\n{log}")]
    Source {
        /// The unit.
        unit: String,
        /// The compiler's word for it.
        reason: String,
        /// The compiler's messages.
        log: String,
    },
    /// A source could not be read from the folder that the user named.
    #[error("cannot read {}: {reason}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// One unit to compile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSource {
    /// The unit's name.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Names and texts of the headers that it may include.
    pub headers: Vec<(String, String)>,
}

/// NVRTC, loaded, and the headers that kernels need.
#[derive(Debug)]
pub struct RuntimeCompiler {
    functions: Functions,
    path: PathBuf,
    version: (i32, i32),
    include_folders: Vec<PathBuf>,
}

impl RuntimeCompiler {
    /// Looks for the newest library that makes code for a driver of CUDA `newest_major`.
    ///
    /// # Errors
    /// There is none, or it has no headers.
    pub fn find(newest_major: i32) -> Result<Self, CompileError> {
        let library = library::open(&library::file_names("nvrtc", newest_major))?;
        let not_nvrtc = |reason: String| CompileError::NotNvrtc {
            path: format!("{library:?}").into(),
            reason,
        };
        let functions = Functions::find(library).map_err(|error| not_nvrtc(error.to_string()))?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: only writes the two numbers.
        let code = unsafe { (functions.version)(&raw mut major, &raw mut minor) };
        if code != SUCCESS {
            return Err(not_nvrtc(functions.words(code)));
        }
        let path = library::file_of(functions.version as *const c_void)
            .ok_or_else(|| not_nvrtc("the loader does not know its file".to_owned()))?;
        open_builtins(&path, (major, minor));
        let candidates = header_folders(&path);
        let Some(include) = candidates
            .iter()
            .find(|folder| folder.join("cuda_fp16.h").is_file())
        else {
            return Err(CompileError::Headers {
                library: path,
                searched: candidates,
            });
        };
        // Toolkits from 13 on keep <nv/target>, which cuda_fp16.h includes, apart.
        let include_folders = [include.clone(), include.join("cccl")];
        Ok(Self {
            functions,
            path,
            version: (major, minor),
            include_folders: include_folders.into_iter().filter(|f| f.is_dir()).collect(),
        })
    }

    /// The library's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The release of CUDA that the library is of, as (13, 0).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// What to compile for on a GPU of this compute capability, as `sm_90a`.
    ///
    /// # Errors
    /// The compiler is older than the GPU.
    pub fn architecture(&self, (major, minor): (i32, i32)) -> Result<String, CompileError> {
        let unknown = || CompileError::Architecture {
            library: self.path.clone(),
            version: self.version,
            major,
            minor,
        };
        let mut count = 0;
        // SAFETY: only writes the number.
        let code = unsafe { (self.functions.architecture_count)(&raw mut count) };
        let length = usize::try_from(count).ok().filter(|_| code == SUCCESS);
        let mut known: Vec<c_int> = vec![0; length.ok_or_else(unknown)?];
        // SAFETY: writes as many numbers as it has just said.
        let code = unsafe { (self.functions.architectures)(known.as_mut_ptr()) };
        if code != SUCCESS || !known.contains(&(10 * major + minor)) {
            return Err(unknown());
        }
        // Instructions that only one architecture has exist from 9.0 on, behind an `a`.
        let specific = if major >= 9 { "a" } else { "" };
        Ok(format!("sm_{major}{minor}{specific}"))
    }

    /// Options of every compilation.
    fn options(&self, architecture: &str) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={architecture}"),
            "-std=c++17".to_owned(),
            // There is device code only; of a generic lambda it would not be seen.
            "--device-as-default-execution-space".to_owned(),
        ];
        let folders = self.include_folders.iter();
        options.extend(folders.map(|folder| format!("--include-path={}", folder.display())));
        options
    }

    /// Everything that compiled code depends on: the sources, and the compiler with its options.
    pub(crate) fn key(&self, source: &KernelSource, architecture: &str) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        add(&format!("{:?}", self.version));
        // The version leaves out the build, which the file's size tells with some luck.
        let size = std::fs::metadata(&self.path).map_or(0, |file| file.len());
        add(&size.to_string());
        self.options(architecture)
            .iter()
            .for_each(|option| add(option));
        add(&source.name);
        add(&source.text);
        for (name, text) in &source.headers {
            add(name);
            add(text);
        }
        hasher.finalize()
    }

    /// Compiles one unit to machine code for `architecture` (of [`Self::architecture`]), as the
    /// driver loads it.
    ///
    /// # Errors
    /// The source is wrong; the error has the compiler's messages.
    pub fn compile(
        &self,
        source: &KernelSource,
        architecture: &str,
    ) -> Result<Vec<u8>, CompileError> {
        let failed = |reason: String, log: String| CompileError::Source {
            unit: source.name.clone(),
            reason,
            log,
        };
        let string = |text: &str| {
            CString::new(text).map_err(|error| failed(error.to_string(), String::new()))
        };
        let text = string(&source.text)?;
        let name = string(&format!("{}.cu", source.name))?;
        let headers = &source.headers;
        let names = headers.iter().map(|(name, _)| string(name));
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let texts = headers.iter().map(|(_, text)| string(text));
        let texts = texts.collect::<Result<Vec<_>, _>>()?;
        let options = self.options(architecture);
        let options = options.iter().map(|option| string(option));
        let options = options.collect::<Result<Vec<_>, _>>()?;
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            strings.iter().map(|string| string.as_ptr()).collect()
        };
        let (name_pointers, text_pointers) = (pointers(&names), pointers(&texts));
        let option_pointers = pointers(&options);
        let functions = &self.functions;

        let mut handle = std::ptr::null_mut();
        // SAFETY: every string ends with a zero and outlives the call, which copies them; both
        // lists of headers are as long as is said.
        let code = unsafe {
            (functions.create)(
                &raw mut handle,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                text_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        };
        if code != SUCCESS {
            return Err(failed(functions.words(code), String::new()));
        }
        let compilation = Compilation { functions, handle };
        // SAFETY: the program was created; the options are as many as is said.
        let code = unsafe {
            (functions.compile)(handle, options.len() as c_int, option_pointers.as_ptr())
        };
        if code != SUCCESS {
            return Err(failed(functions.words(code), compilation.log()));
        }
        compilation
            .cubin()
            .map_err(|code| failed(functions.words(code), compilation.log()))
    }
}

/// A program that was created, and is destroyed in any case.
struct Compilation<'a> {
    functions: &'a Functions,
    handle: Program,
}

impl Compilation<'_> {
    /// The compiler's messages.
    fn log(&self) -> String {
        let read = self.read(self.functions.log_size, self.functions.log);
        let text = read.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.trim_end_matches(['\0', '\n']).to_owned()
    }

    fn cubin(&self) -> Result<Vec<u8>, c_int> {
        self.read(self.functions.cubin_size, self.functions.cubin)
    }

    fn read(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        read: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, c_int> {
        let mut bytes = 0;
        // SAFETY: the program is alive; the function only writes the size.
        let code = unsafe { size(self.handle, &raw mut bytes) };
        if code != SUCCESS {
            return Err(code);
        }
        let mut text = vec![0_u8; bytes];
        // SAFETY: the function writes as many bytes as the other has just said.
        let code = unsafe { read(self.handle, text.as_mut_ptr().cast()) };
        if code != SUCCESS {
            return Err(code);
        }
        Ok(text)
    }
}

impl Drop for Compilation<'_> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { (self.functions.destroy)(&raw mut self.handle) };
    }
}

/// Loads the library of built-in headers that lies beside NVRTC: it asks the loader for that one
/// by its bare name, which is found outside of the loader's folders only if it is loaded already.
fn open_builtins(nvrtc: &Path, (major, minor): (i32, i32)) {
    let path = nvrtc.with_file_name(format!("libnvrtc-builtins.so.{major}.{minor}"));
    if path.is_file() {
        // SAFETY: NVIDIA's, whose initialisation touches nothing of ours. That it does not load
        // is told by the first compilation.
        if let Ok(library) = unsafe { Library::new(path) } {
            std::mem::forget(library);
        }
    }
}

/// Folders that may have CUDA's headers for the library at `nvrtc`: those of its own toolkit or
/// Python package, those of other packages, those of toolkits.
fn header_folders(nvrtc: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let files = [Some(nvrtc.to_owned()), nvrtc.canonicalize().ok()];
    for file in files.into_iter().flatten() {
        let Some(package) = file.parent().and_then(Path::parent) else {
            continue;
        };
        folders.push(package.join("include"));
        if let Some(packages) = package.parent() {
            folders.push(packages.join("cuda_runtime/include"));
        }
    }
    let variable = |name: &str| std::env::var_os(name);
    let toolkits = library::toolkits(&variable, Path::new("/"));
    folders.extend(toolkits.into_iter().map(|toolkit| toolkit.join("include")));
    folders.push(PathBuf::from("/usr/include"));
    folders.dedup();
    folders
}
