//! A GGUF file, mapped.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::value::ArrayRef;
use super::{GgufError, GgufHeader, GgufTensor, Value};
use crate::FormatError;
use crate::mmap::map_file;

/// A GGUF file mapped into memory, its header parsed and checked.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    header: GgufHeader,
}

impl GgufFile {
    /// Maps `path` and parses its header; reads no tensor's data.
    ///
    /// # Errors
    /// The file cannot be read, or its header is wrong: see [`GgufHeader::parse`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(|error| FormatError::io(path, "open", error))?;
        let map = map_file(path, &file)?;
        let header = GgufHeader::parse(&map).map_err(|error| error.at(path))?;
        Ok(GgufFile {
            path: path.to_path_buf(),
            map,
            header,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The parsed header.
    pub fn header(&self) -> &GgufHeader {
        &self.header
    }

    /// A tensor's data as stored: `tensor.size_bytes` bytes. `tensor` is one of this file's.
    pub fn data(&self, tensor: &GgufTensor) -> &[u8] {
        &self.map[tensor.start..tensor.start + tensor.size_bytes]
    }

    /// Metadata with typed access.
    pub(crate) fn metadata(&self) -> Metadata<'_> {
        Metadata {
            header: &self.header,
            file: &self.map,
        }
    }
}

/// Typed access to a file's metadata; every method names the key in its errors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Metadata<'a> {
    pub(crate) header: &'a GgufHeader,
    pub(crate) file: &'a [u8],
}

impl<'a> Metadata<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.header.metadata.get(key)
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        convert(value)
            .map(Some)
            .ok_or_else(|| GgufError::WrongValueType {
                key: key.to_owned(),
                found: value.type_name(),
                expected,
            })
    }

    /// A non-negative integer below 2^31, the range of every count and id that is read here.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<u64>, GgufError> {
        let Some(value) = self.typed(key, "a non-negative integer", Value::as_u64)? else {
            return Ok(None);
        };
        if value > i32::MAX as u64 {
            return Err(GgufError::malformed(
                format!("metadata key `{key}`"),
                value,
                "at most 2147483647",
            ));
        }
        Ok(Some(value))
    }

    /// A finite float; a binary32 becomes the shortest decimal that rounds to it, as the writer
    /// had it (`1e-5`, not `9.999999747378752e-6`).
    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        let value = self.typed(key, "a float", |value| match *value {
            Value::F32(value) => Some(shortest_decimal(value)),
            ref value => value.as_f64(),
        })?;
        match value {
            Some(value) if !value.is_finite() => Err(GgufError::malformed(
                format!("metadata key `{key}`"),
                value,
                "a finite number",
            )),
            value => Ok(value),
        }
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        self.typed(key, "a string", Value::as_str)
    }

    fn array(&self, key: &str) -> Result<Option<ArrayRef>, GgufError> {
        self.typed(key, "an array", |value| match value {
            Value::Array(array) => Some(*array),
            _ => None,
        })
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, GgufError> {
        self.array(key)?
            .map(|array| array.strings(key, self.file))
            .transpose()
    }

    pub(crate) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, GgufError> {
        self.array(key)?
            .map(|array| array.numbers(key, self.file))
            .transpose()
    }
}

/// The number whose decimal text is the shortest that rounds to `value`.
pub(crate) fn shortest_decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
