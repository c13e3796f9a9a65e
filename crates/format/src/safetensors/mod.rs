//! Safetensors: reading ([`SafetensorsDir`]) and streaming writing ([`SafetensorsWriter`]).
//!
//! The format: 8 bytes with the header's length (little-endian), a JSON header that maps each
//! tensor name to `{"dtype", "shape", "data_offsets": [begin, end]}` (offsets count from the
//! header's end), then the tensors without gaps.

mod header;
mod reader;
mod writer;

pub use header::{HeaderEntry, SafetensorsHeader, StoredDType};
pub use reader::SafetensorsDir;
pub use writer::SafetensorsWriter;
