//! The crate's error type.

use std::io;
use std::path::{Path, PathBuf};

use crate::DType;

/// What is wrong with a model's files.
///
/// Every variant that speaks of a tensor carries the file it was found in (an unknown file is an
/// empty path, shown as `(in memory)`), the tensor's name, and both values: what the file says
/// and what it should say.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted, e.g. `open`, `read`, `map`, `create`.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },

    /// A file that the model needs does not exist.
    #[error("{}: not found: expected {expected}", path.display())]
    MissingFile {
        /// The file or directory that was looked for.
        path: PathBuf,
        /// What it would hold, and what to do.
        expected: &'static str,
    },

    /// A file ends before what its header declares.
    #[error(
        "{}: truncated: the file has {found_bytes} bytes, {what} needs {expected_bytes}; \
         fetch or write the file again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What does not fit, e.g. `the header`, ``tensor `a` ``.
        what: String,
        /// Bytes that the file has.
        found_bytes: u64,
        /// Bytes that it would need.
        expected_bytes: u64,
    },

    /// A file's header or structure contradicts its format.
    #[error("{}: {what}: found {found}, expected {expected}", display_path(path))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which part of the file.
        what: String,
        /// What it holds.
        found: String,
        /// What the format allows.
        expected: String,
    },

    /// One tensor's header entry or content contradicts its format.
    #[error(
        "{}: tensor `{tensor}`: {what}: found {found}, expected {expected}",
        display_path(path)
    )]
    InvalidTensor {
        /// The file.
        path: PathBuf,
        /// Full tensor name.
        tensor: String,
        /// Which property, e.g. `data_offsets`, `group 3's bits`.
        what: String,
        /// What the file holds.
        found: String,
        /// What the format allows.
        expected: String,
    },

    /// A tensor has the wrong element type.
    #[error(
        "{}: tensor `{tensor}`: dtype: found {found}, expected {expected}",
        display_path(path)
    )]
    WrongDType {
        /// The file.
        path: PathBuf,
        /// Full tensor name.
        tensor: String,
        /// The element type in the file, as the file spells it.
        found: String,
        /// The element types that would do.
        expected: String,
    },

    /// A tensor has the wrong shape.
    #[error(
        "{}: tensor `{tensor}`: shape: found {found:?}, expected {expected}",
        display_path(path)
    )]
    WrongShape {
        /// The file.
        path: PathBuf,
        /// Full tensor name.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that would do.
        expected: String,
    },

    /// A tensor that the model needs is in none of its files.
    #[error("tensor `{tensor}` is missing from {}: {expected}", display_path(path))]
    MissingTensor {
        /// Where it was looked for: a file or a directory.
        path: PathBuf,
        /// Full tensor name.
        tensor: String,
        /// Why it is needed.
        expected: String,
    },

    /// Two files of a directory, or one file twice, hold a tensor of the same name.
    #[error(
        "tensor `{tensor}` is in {} and again in {}: expected each name once; \
         remove the file that does not belong to the model",
        first.display(),
        second.display()
    )]
    DuplicateTensor {
        /// Full tensor name.
        tensor: String,
        /// The file that was read first.
        first: PathBuf,
        /// The other file, or the same one.
        second: PathBuf,
    },

    /// A text file is not UTF-8.
    #[error("{}: invalid UTF-8 at byte {offset}: expected a UTF-8 text file", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// Position of the first invalid byte.
        offset: usize,
    },

    /// A JSON document does not parse.
    #[error(
        "{}: invalid JSON at line {line} column {column}: {message}",
        display_path(path)
    )]
    InvalidJson {
        /// The file.
        path: PathBuf,
        /// Line, from 1; 0 where the parser cannot tell.
        line: usize,
        /// Column, from 1; 0 where the parser cannot tell.
        column: usize,
        /// The parser's message.
        message: String,
    },

    /// A configuration value is missing, of the wrong type or out of range.
    #[error("{}: `{key}`: found {found}, expected {expected}", display_path(path))]
    InvalidConfig {
        /// The file, e.g. `config.json`.
        path: PathBuf,
        /// The key, with dots for nesting.
        key: String,
        /// The value in the file, shortened; `nothing` where the key is absent.
        found: String,
        /// The values that would do.
        expected: String,
    },

    /// A valid file uses something that this program does not implement.
    #[error(
        "{}: {what}: {found} is not supported; supported: {supported}",
        display_path(path)
    )]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Which property, e.g. `quantization_config.bits`.
        what: String,
        /// Its value.
        found: String,
        /// The values that are supported.
        supported: String,
    },

    /// A GGUF file is wrong, or cannot be expressed as a Hugging Face model.
    #[error("{}: {source}", display_path(path))]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with its content.
        source: crate::gguf::GgufError,
    },
}

/// `(in memory)` for the empty path that stands for "no file".
fn display_path(path: &Path) -> std::borrow::Cow<'_, str> {
    if path.as_os_str().is_empty() {
        "(in memory)".into()
    } else {
        path.to_string_lossy()
    }
}

impl FormatError {
    /// Wraps an I/O error with its path and what was attempted.
    pub fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        FormatError::Io {
            path: path.to_path_buf(),
            action,
            source,
        }
    }

    /// A header or structure error of a whole file.
    pub fn malformed(
        path: &Path,
        what: impl Into<String>,
        found: impl ToString,
        expected: impl ToString,
    ) -> Self {
        FormatError::Malformed {
            path: path.to_path_buf(),
            what: what.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// An error in one tensor's header entry or content.
    pub fn invalid_tensor(
        path: &Path,
        tensor: &str,
        what: impl Into<String>,
        found: impl ToString,
        expected: impl ToString,
    ) -> Self {
        FormatError::InvalidTensor {
            path: path.to_path_buf(),
            tensor: tensor.to_owned(),
            what: what.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// A tensor of the wrong element type; `expected` lists those that would do.
    pub fn wrong_dtype(path: &Path, tensor: &str, found: DType, expected: &[DType]) -> Self {
        let names: Vec<&str> = expected.iter().map(|dtype| dtype.name()).collect();
        FormatError::WrongDType {
            path: path.to_path_buf(),
            tensor: tensor.to_owned(),
            found: found.name().to_owned(),
            expected: names.join(" or "),
        }
    }

    /// A tensor of the wrong shape.
    pub fn wrong_shape(
        path: &Path,
        tensor: &str,
        found: &[usize],
        expected: impl ToString,
    ) -> Self {
        FormatError::WrongShape {
            path: path.to_path_buf(),
            tensor: tensor.to_owned(),
            found: found.to_vec(),
            expected: expected.to_string(),
        }
    }
}
