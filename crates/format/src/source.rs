//! A set of named tensors, wherever they are stored.

use std::borrow::Cow;
use std::path::Path;

use crate::{DType, FormatError};

/// Name, element type and shape of a tensor: what a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Full tensor name, e.g. `model.layers.0.self_attn.q_proj.q_weight`.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first; row-major.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Bytes of the whole tensor as stored in this dtype.
    pub fn size_bytes(&self) -> u64 {
        self.shape
            .iter()
            .map(|&extent| extent as u64)
            .product::<u64>()
            * self.dtype.size_bytes() as u64
    }
}

/// A tensor with its bytes: little-endian, row-major, exactly `info.size_bytes()` long.
#[derive(Debug, Clone)]
pub struct TensorData<'a> {
    /// What the header says.
    pub info: TensorInfo,
    /// The elements: borrowed from a mapped file, or owned where they had to be decoded.
    pub bytes: Cow<'a, [u8]>,
}

/// Named tensors of one model: a directory of safetensors files, or a GGUF file.
///
/// Names follow Hugging Face's layout for every implementation.
pub trait TensorSource: Send + Sync {
    /// What the header says of `name`; `None` if the model has no such tensor.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// Every tensor's header, sorted by name.
    fn infos(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_>;

    /// The tensor's elements. Reads (or maps) only this tensor.
    ///
    /// # Errors
    /// The tensor is missing, or its file can no longer be read.
    fn read(&self, name: &str) -> Result<TensorData<'_>, FormatError>;

    /// The tensor's bytes as its file has them, in whatever encoding: enough to tell whether two
    /// tensors are the same. The default is right where [`Self::read`] decodes nothing.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn read_stored(&self, name: &str) -> Result<Cow<'_, [u8]>, FormatError> {
        Ok(self.read(name)?.bytes)
    }

    /// The file that holds `name`, or the place where it would be looked for; used in errors.
    /// The default, an empty path, means "in memory".
    fn file_of(&self, name: &str) -> &Path {
        let _ = name;
        Path::new("")
    }
}
