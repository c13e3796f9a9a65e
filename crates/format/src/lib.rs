//! Model files: safetensors, EXL2, GPTQ, GGUF and the JSON files beside them.
//!
//! This crate reads, checks and writes bytes. It does no arithmetic on tensors beyond
//! decoding what a format stores. Everything that can be known from headers alone
//! ([`TensorInfo`], [`LinearHeader`]) is available without touching tensor data, so that a
//! plan can be made for a model far larger than the machine.

mod config_json;
mod dtype;
mod error;
pub mod gguf;
mod host_memory;
pub mod import;
mod linear;
mod lora;
mod memory_source;
mod mmap;
mod model_source;
mod model_writer;
mod safetensors;
mod source;
mod synthetic;
mod tensors;

pub use config_json::{
    ConfigView, MAX_CONFIG_BYTES, MAX_CONFIG_COUNT, parse_json_object, read_json_object,
    read_optional_file,
};
pub use dtype::DType;
pub use error::FormatError;
pub use host_memory::HostMemory;
pub use linear::{
    EXL2_BITS, Encoding, Exl2Group, Exl2Layout, Exl2Linear, Exl2Tensors, FloatLinear, GptqConfig,
    GptqLinear, LinearHeader, LinearSource, ScaledF16,
};
pub use lora::{AdapterModule, AdapterSource};
pub use memory_source::MemoryTensors;
pub use model_source::ModelSource;
pub use model_writer::{WrittenModel, write_model};
pub use safetensors::{
    HeaderEntry, SafetensorsDir, SafetensorsHeader, SafetensorsWriter, StoredDType,
};
pub use source::{TensorData, TensorInfo, TensorSource};
pub use synthetic::{SyntheticShape, SyntheticShapeError};
pub use tensors::{read_head_norm_f32, read_vector_f32};
