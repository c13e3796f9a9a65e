//! What is wrong with a GGUF file, as seen from its bytes alone.

use std::path::Path;

use crate::FormatError;

/// What is wrong with a GGUF file's bytes, or why its content cannot be expressed as a Hugging
/// Face model.
///
/// Carries no path: the parser works on bytes. [`GgufError::at`] adds the file.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GgufError {
    /// The file does not start with `GGUF`.
    #[error("not a GGUF file: starts with bytes {found:02x?}, expected \"GGUF\"")]
    NotGguf {
        /// The first bytes, at most four.
        found: Vec<u8>,
    },

    /// A format version that this reader does not know.
    #[error(
        "GGUF version {found} is not supported; expected 2 or 3, little-endian: \
         convert the file again with a current llama.cpp"
    )]
    UnsupportedVersion {
        /// The version field, read as little-endian.
        found: u32,
    },

    /// The file ends inside its header.
    #[error(
        "truncated: {what} needs {needed_bytes} bytes at offset {offset}, \
         {available_bytes} are left; fetch the file again"
    )]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Position in the file, in bytes.
        offset: u64,
        /// Bytes that it needs.
        needed_bytes: u64,
        /// Bytes that the file still has there.
        available_bytes: u64,
    },

    /// A count that the rest of the file cannot hold.
    #[error("{what}: the header counts {count}, but the file has room for {limit} at most")]
    CountTooLarge {
        /// What is counted.
        what: &'static str,
        /// The count in the file.
        count: u64,
        /// The most that the remaining bytes could hold.
        limit: u64,
    },

    /// Text that is not UTF-8.
    #[error("{what} at offset {offset}: invalid UTF-8")]
    InvalidUtf8 {
        /// What the text is.
        what: &'static str,
        /// Position of the text in the file, in bytes.
        offset: u64,
    },

    /// A field with a value outside of what the format allows.
    #[error("{what}: found {found}, expected {expected}")]
    Malformed {
        /// Which field.
        what: String,
        /// Its value.
        found: String,
        /// The values that would do.
        expected: String,
    },

    /// Two metadata entries of the same key.
    #[error("metadata key `{key}` appears twice, expected once")]
    DuplicateKey {
        /// The key.
        key: String,
    },

    /// Two tensors of the same name.
    #[error("tensor `{tensor}` appears twice, expected once")]
    DuplicateTensor {
        /// The name in the file.
        tensor: String,
    },

    /// A tensor type that this reader cannot decode.
    #[error("tensor `{tensor}`: type {found} is not supported; supported: {supported}")]
    UnsupportedTensorType {
        /// The name in the file.
        tensor: String,
        /// The type's name, or its number where it has none here.
        found: String,
        /// Names of the types that can be decoded.
        supported: String,
    },

    /// A tensor whose data lie outside of the file.
    #[error(
        "tensor `{tensor}`: data at bytes {start}..{end} of the data section, \
         which has {data_bytes} bytes; fetch the file again"
    )]
    TensorOutOfFile {
        /// The name in the file.
        tensor: String,
        /// First byte, relative to the data section.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// Size of the data section.
        data_bytes: u64,
    },

    /// Two tensors share bytes.
    #[error("tensors `{first}` and `{second}` overlap in the file")]
    OverlappingTensors {
        /// The one that starts first.
        first: String,
        /// The one that starts inside of it.
        second: String,
    },

    /// A metadata key that the conversion needs.
    #[error("metadata key `{key}` is missing: expected {expected}")]
    MissingKey {
        /// The key.
        key: String,
        /// What it would hold.
        expected: &'static str,
    },

    /// A metadata value of another type than its key's.
    #[error("metadata key `{key}`: found {found}, expected {expected}")]
    WrongValueType {
        /// The key.
        key: String,
        /// The value's type in the file.
        found: String,
        /// The type that would do.
        expected: &'static str,
    },

    /// A model family that is not known here.
    #[error("architecture `{found}` is not supported; supported: {supported}")]
    UnknownArchitecture {
        /// `general.architecture`.
        found: String,
        /// The families that are.
        supported: String,
    },

    /// A tokenizer that cannot be expressed as a `tokenizer.json` here.
    #[error("tokenizer: {what} `{found}` is not supported; supported: {supported}")]
    UnknownTokenizer {
        /// `tokenizer.ggml.model` or `tokenizer.ggml.pre`.
        what: &'static str,
        /// Its value.
        found: String,
        /// The values that are.
        supported: String,
    },

    /// A feature that the file uses and this conversion lacks.
    #[error("{what}: {found} is not supported; supported: {supported}")]
    Unsupported {
        /// Which feature.
        what: String,
        /// What the file asks for.
        found: String,
        /// What would do.
        supported: String,
    },

    /// A tensor that the architecture needs.
    #[error("tensor `{tensor}` is missing: expected it for architecture `{architecture}`")]
    MissingTensor {
        /// The name that the file should have.
        tensor: String,
        /// The file's architecture.
        architecture: String,
    },

    /// A tensor that the architecture has no place for; leaving it out would change the model.
    #[error("tensor `{tensor}` has no place in architecture `{architecture}`")]
    UnexpectedTensor {
        /// The name in the file.
        tensor: String,
        /// The file's architecture.
        architecture: String,
    },

    /// A weight that is not a finite fp16 number.
    #[error(
        "tensor `{tensor}`: element {index} is {value}, expected a finite number of at most \
         65504 in magnitude"
    )]
    NotRepresentable {
        /// The Hugging Face name.
        tensor: String,
        /// Position of the element in the file's order.
        index: u64,
        /// Its value.
        value: f32,
    },
}

impl GgufError {
    /// Adds the file that the error is about.
    pub fn at(self, path: &Path) -> FormatError {
        FormatError::Gguf {
            path: path.to_path_buf(),
            source: self,
        }
    }

    /// A field with a value outside of what the format allows.
    pub(crate) fn malformed(
        what: impl Into<String>,
        found: impl ToString,
        expected: impl ToString,
    ) -> Self {
        GgufError::Malformed {
            what: what.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}
