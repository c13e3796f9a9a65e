//! Writing a safetensors file in one pass, with no more in memory than the caller holds.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{FormatError, TensorInfo};

/// Writes one safetensors file: the header first, then each tensor in the declared order.
///
/// The bytes go to a hidden file beside the target, which takes its place only in
/// [`SafetensorsWriter::finish`]; a writer that is dropped before removes it.
#[derive(Debug)]
pub struct SafetensorsWriter {
    target: PathBuf,
    temporary: PathBuf,
    /// `None` once finished.
    output: Option<BufWriter<File>>,
    /// Name and size in bytes, in file order.
    tensors: Vec<(String, u64)>,
    /// The tensor being written and how many of its bytes are.
    current: usize,
    written_bytes: u64,
}

impl SafetensorsWriter {
    /// Starts a file with the given tensors; their data must follow in the same order.
    ///
    /// The header carries `{"format": "pt"}`, which other loaders ask for.
    ///
    /// # Errors
    /// A name twice, or the file cannot be created.
    pub fn create(path: &Path, tensors: &[TensorInfo]) -> Result<Self, FormatError> {
        let header = header_bytes(path, tensors)?;
        let temporary = temporary_path(path)?;
        let file = File::create(&temporary)
            .map_err(|source| FormatError::io(&temporary, "create", source))?;
        let mut writer = SafetensorsWriter {
            target: path.to_path_buf(),
            temporary,
            output: Some(BufWriter::with_capacity(1 << 20, file)),
            tensors: tensors
                .iter()
                .map(|info| (info.name.clone(), info.size_bytes()))
                .collect(),
            current: 0,
            written_bytes: 0,
        };
        writer.append(&header)?;
        Ok(writer)
    }

    /// Appends bytes of the tensor `name`: all of them, or a next part of them.
    ///
    /// # Errors
    /// `name` is not the tensor whose turn it is, more bytes than it has, or a failed write.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        self.skip_complete(Some(name));
        let Some((expected_name, size_bytes)) = self.tensors.get(self.current) else {
            return Err(self.out_of_order(name, "nothing: every declared tensor is written"));
        };
        if expected_name != name {
            let expected = format!(
                "`{expected_name}`, of which {} of {size_bytes} bytes are written",
                self.written_bytes
            );
            return Err(self.out_of_order(name, &expected));
        }
        let total = self.written_bytes + bytes.len() as u64;
        if total > *size_bytes {
            return Err(FormatError::invalid_tensor(
                &self.target,
                name,
                "bytes written",
                total,
                size_bytes,
            ));
        }
        self.append(bytes)?;
        self.written_bytes = total;
        Ok(())
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// A tensor is not written to its end, or the file cannot be flushed or renamed.
    pub fn finish(mut self) -> Result<(), FormatError> {
        self.skip_complete(None);
        if let Some((name, size_bytes)) = self.tensors.get(self.current) {
            return Err(FormatError::invalid_tensor(
                &self.target,
                name,
                "bytes written",
                self.written_bytes,
                size_bytes,
            ));
        }
        if let Some(output) = self.output.take() {
            let result = output
                .into_inner()
                .map_err(std::io::IntoInnerError::into_error)
                .and_then(|file| file.sync_all())
                .and_then(|()| fs::rename(&self.temporary, &self.target));
            if let Err(source) = result {
                // Best effort: the error that matters is the one returned.
                let _ = fs::remove_file(&self.temporary);
                return Err(FormatError::io(&self.target, "write", source));
            }
        }
        Ok(())
    }

    /// Moves past tensors that are complete, up to one named `wanted`.
    fn skip_complete(&mut self, wanted: Option<&str>) {
        while let Some((name, size_bytes)) = self.tensors.get(self.current) {
            if self.written_bytes < *size_bytes || wanted == Some(name.as_str()) {
                return;
            }
            self.current += 1;
            self.written_bytes = 0;
        }
    }

    /// Appends to the temporary file.
    fn append(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        match &mut self.output {
            Some(output) => output
                .write_all(bytes)
                .map_err(|source| FormatError::io(&self.temporary, "write", source)),
            None => Ok(()),
        }
    }

    /// A tensor written when it is not its turn.
    fn out_of_order(&self, name: &str, expected: &str) -> FormatError {
        FormatError::malformed(
            &self.target,
            "order of tensors",
            format!("`{name}`"),
            expected,
        )
    }
}

impl Drop for SafetensorsWriter {
    fn drop(&mut self) {
        if self.output.take().is_some() {
            // Nothing can be reported from here; a leftover hidden file is harmless.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// The length prefix and the header, padded so that the data starts at a multiple of 8.
fn header_bytes(path: &Path, tensors: &[TensorInfo]) -> Result<Vec<u8>, FormatError> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut position = 0u64;
    for info in tensors {
        let end = position + info.size_bytes();
        let entry = json!({
            "dtype": info.dtype.name(),
            "shape": info.shape,
            "data_offsets": [position, end],
        });
        if header.insert(info.name.clone(), entry).is_some() {
            return Err(FormatError::DuplicateTensor {
                tensor: info.name.clone(),
                first: path.to_path_buf(),
                second: path.to_path_buf(),
            });
        }
        position = end;
    }
    let mut json = Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&json);
    Ok(bytes)
}

/// A hidden name beside the target, so that the last rename stays within one file system.
fn temporary_path(path: &Path) -> Result<PathBuf, FormatError> {
    let Some(name) = path.file_name() else {
        return Err(FormatError::malformed(
            path,
            "path",
            "no file name",
            "a file to write",
        ));
    };
    let hidden = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
    Ok(path.with_file_name(hidden))
}
