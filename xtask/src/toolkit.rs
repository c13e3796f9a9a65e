//! The CUDA compilers on a machine that has none: NVIDIA's Python packages, in the user's cache.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use oxllama_nvcc::Nvcc;

use crate::{report, run};

/// The release that kernels are checked and shipped with.
const RELEASE: &str = "13.0";

/// nvcc and what it needs (its front end's headers, its optimiser, the runtime's headers and the
/// C++ library that those include), and NVRTC.
const PACKAGES: [&str; 6] = [
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
    "nvidia-cuda-nvrtc",
];

/// Files without which an installation is not whole.
const NEEDED_FILES: [&str; 5] = [
    "bin/nvcc",
    "bin/ptxas",
    "nvvm/bin/cicc",
    "include/cuda_fp16.h",
    "lib/libnvrtc.so.13",
];

/// The compilers.
pub(crate) struct Toolkit {
    pub(crate) nvcc: Nvcc,
    /// Folders with NVRTC, for `OXLLAMA_CUDA_LIBRARIES`.
    pub(crate) libraries: Option<PathBuf>,
}

impl Toolkit {
    /// The nvcc that is installed, or else the one of NVIDIA's Python packages.
    pub(crate) fn find_or_install() -> Result<Self> {
        if let Some(nvcc) = Nvcc::find()? {
            return Ok(Self {
                nvcc,
                libraries: None,
            });
        }
        let home = install()?;
        Ok(Self {
            nvcc: Nvcc::open(home.join("bin/nvcc"))?,
            libraries: Some(home.join("lib")),
        })
    }
}

/// The packages' common folder in the cache, filled if it is not yet.
fn install() -> Result<PathBuf> {
    let cache = cache_folder()?;
    let folder = cache.join(format!("cuda-{RELEASE}"));
    // All packages unpack into one folder named after the major version.
    let major = RELEASE.split('.').next().unwrap_or(RELEASE);
    let home = |folder: &Path| folder.join(format!("nvidia/cu{major}"));
    if missing_file(&home(&folder)).is_none() {
        return Ok(home(&folder));
    }
    report(&format!(
        "xtask: installing nvcc {RELEASE} from NVIDIA's Python packages into {}",
        folder.display()
    ));
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let temporary = cache.join(format!("cuda-{RELEASE}.{}.tmp", std::process::id()));
    let packages = PACKAGES.map(|package| format!("{package}=={RELEASE}.*"));
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps"])
        .args(["--disable-pip-version-check", "--root-user-action=ignore"])
        .args(["--only-binary", ":all:"])
        .arg("--target")
        .arg(&temporary)
        .args(packages);
    run(&mut pip).context("nvcc is not installed, and Python's pip could not fetch it")?;
    if let Some(file) = missing_file(&home(&temporary)) {
        bail!("the packages {PACKAGES:?} do not have {file}");
    }
    // A folder that is not whole may be in the way; one that another process has just finished
    // is as good as this one.
    if missing_file(&home(&folder)).is_some() && folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    if fs::rename(&temporary, &folder).is_err() {
        fs::remove_dir_all(&temporary)?;
    }
    let missing = missing_file(&home(&folder));
    ensure!(missing.is_none(), "{} has no {missing:?}", folder.display());
    Ok(home(&folder))
}

fn missing_file(home: &Path) -> Option<&'static str> {
    NEEDED_FILES
        .into_iter()
        .find(|file| !home.join(file).is_file())
}

/// `oxllama` in the user's folder of caches.
fn cache_folder() -> Result<PathBuf> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty());
    let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let caches = caches.filter(|folder| folder.is_absolute());
    let caches = caches.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let caches = caches.context("neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(caches.join("oxllama"))
}
