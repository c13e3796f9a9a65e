//! What can go wrong between a source and its image.

use std::io;
use std::path::PathBuf;

/// A failure to find, run or understand the compiler.
#[derive(Debug, thiserror::Error)]
pub enum NvccError {
    /// A file or folder could not be read, written or started.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A name in a list of targets means nothing.
    #[error(
        "unknown architecture `{found}`: expected machine code as `80` or `90a`, or PTX as `compute_80`, \
         separated by commas; 80 is the oldest"
    )]
    Target {
        /// The name.
        found: String,
    },
    /// What was named as the compiler does not answer like one.
    #[error("{} does not print a release of nvcc: {printed}", path.display())]
    NotNvcc {
        /// The program.
        path: PathBuf,
        /// What it printed.
        printed: String,
    },
    /// The compiler is too old for the options and architectures in use.
    #[error("{} is of CUDA {found}, and {} or later is needed", path.display(), crate::OLDEST_RELEASE)]
    TooOld {
        /// The program.
        path: PathBuf,
        /// Its release, as `12.1`.
        found: String,
    },
    /// The compiler refused a source.
    #[error("{command}\nended with {status}:\n{output}")]
    Compilation {
        /// The command line.
        command: String,
        /// How the compiler ended.
        status: String,
        /// What it printed.
        output: String,
    },
}

impl NvccError {
    /// For `map_err` on what was tried with `path`.
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}
