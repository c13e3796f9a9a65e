//! Finding nvcc, and one run of it.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{NvccError, Target, UnitSource};

/// The environment variable that names the compiler; empty: there is none, whatever is installed.
pub const NVCC_VARIABLE: &str = "OXLLAMA_NVCC";

/// The oldest release that knows the options and architectures in use.
pub const OLDEST_RELEASE: Release = Release {
    major: 12,
    minor: 8,
};

/// A release of the CUDA toolkit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    major: u32,
    minor: u32,
}

impl Release {
    /// Reads `13.0` out of `…, release 13.0, V13.0.88`.
    fn parse(printed: &str) -> Option<Self> {
        let number = printed.split("release ").nth(1)?.split(',').next()?;
        let (major, minor) = number.split_once('.')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

impl fmt::Display for Release {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)
    }
}

/// What a compilation is held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checks {
    /// It compiles.
    Compiles,
    /// It compiles without a warning, a spill or local memory; ptxas reports every function.
    Strict,
}

/// A compiler that answers.
#[derive(Debug, Clone)]
pub struct Nvcc {
    path: PathBuf,
    version: String,
}

impl Nvcc {
    /// The first of: what [`NVCC_VARIABLE`] names, `$CUDA_HOME/bin`, `PATH`, `/usr/local/cuda`,
    /// the newest `/usr/local/cuda-*`. `None` where none of them has an nvcc.
    ///
    /// # Errors
    /// What was found does not answer like an nvcc, or is older than [`OLDEST_RELEASE`].
    pub fn find() -> Result<Option<Self>, NvccError> {
        find_path(&|variable| env::var_os(variable), Path::new("/usr/local"))
            .map(Self::open)
            .transpose()
    }

    /// The compiler at `path`.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn open(path: PathBuf) -> Result<Self, NvccError> {
        let output = Command::new(&path)
            .arg("--version")
            .output()
            .map_err(NvccError::file("start", &path))?;
        let printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let Some(release) = Release::parse(&printed) else {
            return Err(NvccError::NotNvcc { path, printed });
        };
        if release < OLDEST_RELEASE {
            let found = release.to_string();
            return Err(NvccError::TooOld { path, found });
        }
        Ok(Self {
            path,
            version: printed,
        })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it prints of its version, with the build.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Options of every compilation for `targets`.
    fn options(targets: &[Target], checks: Checks) -> Vec<String> {
        let fixed = [
            "-O3",
            "-std=c++17",
            "-Xfatbin",
            "-compress-all",
            "--compress-mode=size",
            "-fatbin",
        ];
        let mut options: Vec<String> = fixed.map(str::to_owned).into();
        for target in targets {
            options.extend(["-gencode".to_owned(), target.gencode()]);
        }
        if checks == Checks::Strict {
            options.extend(
                [
                    "-Xptxas",
                    "-v,-warn-spills,-warn-lmem-usage",
                    "-Werror",
                    "all-warnings",
                ]
                .map(str::to_owned),
            );
        }
        options
    }

    /// Compiles a unit to one compressed image for all targets and returns what the compiler
    /// printed. With several targets, two are compiled at a time.
    ///
    /// # Errors
    /// The compiler refuses the source, or cannot be started.
    pub fn compile(
        &self,
        unit: &UnitSource,
        targets: &[Target],
        checks: Checks,
        image: &Path,
    ) -> Result<String, NvccError> {
        let mut command = Command::new(&self.path);
        command.args(Self::options(targets, checks));
        if targets.len() > 1 {
            command.args(["--threads", "2"]);
        }
        command.arg("-o").arg(image).arg(&unit.path);
        let output = command
            .output()
            .map_err(NvccError::file("start", &self.path))?;
        let mut printed = String::from_utf8_lossy(&output.stdout).into_owned();
        printed.push_str(&String::from_utf8_lossy(&output.stderr));
        if output.status.success() {
            Ok(printed)
        } else {
            Err(NvccError::Compilation {
                command: format!("{command:?}"),
                status: output.status.to_string(),
                output: printed,
            })
        }
    }

    /// As [`Self::compile`] into `folder`, unless the image there was made of the same texts with
    /// the same options by the same compiler. Returns the image's path.
    ///
    /// # Errors
    /// As [`Self::compile`], or `folder` cannot be written.
    pub fn compile_if_stale(
        &self,
        unit: &UnitSource,
        targets: &[Target],
        folder: &Path,
    ) -> Result<PathBuf, NvccError> {
        let image = folder.join(format!("{}.fatbin", unit.name));
        let stamp = folder.join(format!("{}.inputs", unit.name));
        let inputs = self.inputs(unit, targets);
        let made_of = fs::read_to_string(&stamp).unwrap_or_default();
        if made_of == inputs && image.is_file() {
            return Ok(image);
        }
        // The stamp is written after the image, so that one that is cut short counts as stale.
        if stamp.exists() {
            fs::remove_file(&stamp).map_err(NvccError::file("remove", &stamp))?;
        }
        self.compile(unit, targets, Checks::Compiles, &image)?;
        fs::write(&stamp, inputs).map_err(NvccError::file("write", &stamp))?;
        Ok(image)
    }

    /// All that an image depends on, in full: no hash, so nothing can collide.
    fn inputs(&self, unit: &UnitSource, targets: &[Target]) -> String {
        let mut inputs = format!(
            "{}\n{:?}\n",
            self.version,
            Self::options(targets, Checks::Compiles)
        );
        for (name, text) in &unit.texts {
            inputs.push_str(&format!("{name} {}\n{text}", text.len()));
        }
        inputs
    }
}

/// Where nvcc lies, by `variable` (the environment) and the folder with system-wide toolkits.
fn find_path(variable: &dyn Fn(&str) -> Option<OsString>, system: &Path) -> Option<PathBuf> {
    if let Some(path) = variable(NVCC_VARIABLE) {
        return (!path.is_empty()).then(|| path.into());
    }
    let program = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let home = variable("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = variable("PATH").unwrap_or_default();
    let mut candidates: Vec<PathBuf> = home.into_iter().chain(env::split_paths(&path)).collect();
    candidates.push(system.join("cuda/bin"));
    candidates.extend(versioned_toolkits(system));
    let candidates = candidates.into_iter().map(|folder| folder.join(&program));
    candidates.into_iter().find(|path| path.is_file())
}

/// `cuda-13.0/bin` and the like in `system`, the newest first.
fn versioned_toolkits(system: &Path) -> Vec<PathBuf> {
    let mut toolkits: Vec<((u32, u32), PathBuf)> = fs::read_dir(system)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let (major, minor) = name.strip_prefix("cuda-")?.split_once('.')?;
            let version = (major.parse().ok()?, minor.parse().ok()?);
            Some((version, entry.path().join("bin")))
        })
        .collect();
    toolkits.sort();
    toolkits.into_iter().rev().map(|(_, path)| path).collect()
}

#[cfg(all(test, unix))]
mod tests;
