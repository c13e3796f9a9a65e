//! Model files: safetensors, EXL2, GPTQ, GGUF and the JSON files beside them.
//!
//! This crate reads, checks and writes bytes. It does no arithmetic on tensors beyond
//! decoding what a format stores. Everything that can be known from headers alone
//! ([`TensorInfo`], [`LinearHeader`]) is available without touching tensor data, so that a
//! plan can be made for a model far larger than the machine.

mod dtype;
mod error;
mod mmap;
mod safetensors;
mod source;

pub use dtype::DType;
pub use error::FormatError;
pub use safetensors::{
    HeaderEntry, SafetensorsDir, SafetensorsHeader, SafetensorsWriter, StoredDType,
};
pub use source::{TensorData, TensorInfo, TensorSource};
