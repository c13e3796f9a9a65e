//! Turning a GGUF file into a Hugging Face directory.

use std::path::Path;

use crate::gguf::GgufModel;
use crate::{FormatError, ModelSource, WrittenModel, write_model};

/// Writes the model in `gguf_path` as a Hugging Face directory `out_dir` with fp16 weights: see
/// [`write_model`].
///
/// # Errors
/// The model cannot be read (see [`GgufModel::open`]), a weight is beyond fp16, or as
/// [`write_model`].
pub fn import_gguf(
    gguf_path: &Path,
    out_dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<WrittenModel, FormatError> {
    let model = ModelSource::of_gguf(gguf_path, GgufModel::open(gguf_path)?);
    write_model(&model, out_dir, progress)
}
