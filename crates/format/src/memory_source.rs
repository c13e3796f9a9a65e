//! Tensors held in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::{FormatError, TensorData, TensorInfo, TensorSource};

/// A [`TensorSource`] over owned bytes: for tensors that a program makes rather than reads.
#[derive(Debug, Clone, Default)]
pub struct MemoryTensors {
    tensors: BTreeMap<String, (TensorInfo, Vec<u8>)>,
}

impl MemoryTensors {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor, or replaces the one of the same name.
    ///
    /// # Errors
    /// `bytes` (little-endian, row-major) is not as long as the header says.
    pub fn insert(&mut self, info: TensorInfo, bytes: Vec<u8>) -> Result<(), FormatError> {
        if info.size_bytes() != bytes.len() as u64 {
            return Err(FormatError::invalid_tensor(
                &PathBuf::new(),
                &info.name,
                "bytes",
                bytes.len(),
                format!(
                    "{} for shape {:?} of {}",
                    info.size_bytes(),
                    info.shape,
                    info.dtype
                ),
            ));
        }
        self.tensors.insert(info.name.clone(), (info, bytes));
        Ok(())
    }
}

impl TensorSource for MemoryTensors {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn infos(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        Box::new(self.tensors.values().map(|(info, _)| info))
    }

    fn read(&self, name: &str) -> Result<TensorData<'_>, FormatError> {
        let Some((info, bytes)) = self.tensors.get(name) else {
            return Err(FormatError::MissingTensor {
                path: PathBuf::new(),
                tensor: name.to_owned(),
                expected: "expected among the tensors in memory".to_owned(),
            });
        };
        Ok(TensorData {
            info: info.clone(),
            bytes: Cow::Borrowed(bytes),
        })
    }
}
