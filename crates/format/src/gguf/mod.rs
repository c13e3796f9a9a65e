//! GGUF: llama.cpp's model files.
//!
//! [`GgufHeader::parse`] reads the format and nothing else; [`GgufFile`] maps a file;
//! [`dequantize`] decodes its tensor types exactly; [`GgufModel`] presents a language model as a
//! Hugging Face directory would.

mod architecture;
mod config;
mod dequant;
mod error;
mod file;
mod header;
mod model;
mod pretokenizer;
mod tokenizer;
mod value;

pub use dequant::{GgmlType, dequantize};
pub use error::GgufError;
pub use file::GgufFile;
pub use header::{GgufHeader, GgufTensor};
pub use model::GgufModel;
pub use value::{ArrayRef, Value, ValueType};
