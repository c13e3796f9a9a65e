//! Turning a GGUF file into a Hugging Face directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::gguf::GgufModel;
use crate::{FormatError, SafetensorsWriter, TensorInfo, TensorSource};

/// Most tensor bytes of one safetensors file; a larger model is cut into several.
const MAX_SHARD_BYTES: u64 = 4 << 30;

/// What an import wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportSummary {
    /// Hugging Face's `model_type`, e.g. `llama`.
    pub model_type: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all tensors as fp16.
    pub tensor_bytes: u64,
    /// Number of safetensors files.
    pub shards: usize,
    /// Where the directory is.
    pub directory: PathBuf,
}

/// Writes the model in `gguf_path` as a Hugging Face directory `out_dir`: fp16 safetensors (with
/// an index where there are several), `config.json`, `generation_config.json`, `tokenizer.json`
/// and `tokenizer_config.json`.
///
/// Everything is written into `OUT_DIR.partial`, which takes its final name only when complete.
/// One left by an interrupted import is replaced. `progress` is told the bytes of tensors written
/// so far and in all, before the first tensor and after each.
///
/// # Errors
/// The model cannot be read (see [`GgufModel::open`]), a weight is beyond fp16, `out_dir` exists
/// and is not an empty directory, or writing fails.
pub fn import_gguf(
    gguf_path: &Path,
    out_dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportSummary, FormatError> {
    import_with_shards(gguf_path, out_dir, MAX_SHARD_BYTES, progress)
}

/// As [`import_gguf`], with a new file wherever one would pass `max_shard_bytes`.
fn import_with_shards(
    gguf_path: &Path,
    out_dir: &Path,
    max_shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportSummary, FormatError> {
    let model = GgufModel::open(gguf_path)?;
    refuse_occupied(out_dir)?;
    let partial = partial_path(out_dir)?;
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .map_err(|source| FormatError::io(&partial, "remove the interrupted", source))?;
    }
    fs::create_dir_all(&partial).map_err(|source| FormatError::io(&partial, "create", source))?;
    let written = write_directory(&model, &partial, max_shard_bytes, progress).and_then(|shards| {
        // An empty directory gives way; one that was filled meanwhile does not.
        fs::rename(&partial, out_dir)
            .map_err(|source| FormatError::io(out_dir, "put the finished model at", source))?;
        Ok(shards)
    });
    let shards = match written {
        Ok(shards) => shards,
        Err(error) => {
            // The first error is the one to report; a leftover is replaced by the next import.
            let _ = fs::remove_dir_all(&partial);
            return Err(error);
        }
    };
    Ok(ImportSummary {
        model_type: model.config()["model_type"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        tensors: model.infos().count(),
        tensor_bytes: model.infos().map(TensorInfo::size_bytes).sum(),
        shards,
        directory: out_dir.to_path_buf(),
    })
}

/// `OUT_DIR.partial`, beside the directory.
fn partial_path(out_dir: &Path) -> Result<PathBuf, FormatError> {
    let name = out_dir.file_name().ok_or_else(|| {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "expected a path with a name");
        FormatError::io(out_dir, "create", source)
    })?;
    let mut partial = name.to_os_string();
    partial.push(".partial");
    Ok(out_dir.with_file_name(partial))
}

/// Refuses a target that would be overwritten.
fn refuse_occupied(out_dir: &Path) -> Result<(), FormatError> {
    let occupied = match fs::read_dir(out_dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(source) => return Err(FormatError::io(out_dir, "look into", source)),
    };
    if occupied {
        let source = io::Error::new(
            io::ErrorKind::AlreadyExists,
            "the directory is not empty; expected a new or an empty one",
        );
        return Err(FormatError::io(out_dir, "write into", source));
    }
    Ok(())
}

/// Writes all files of the model; returns the number of safetensors files.
fn write_directory(
    model: &GgufModel,
    directory: &Path,
    max_shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<usize, FormatError> {
    // Before the weights: the tokenizer is what an unusual file is most likely to fail on.
    write_file(&directory.join("tokenizer.json"), &model.tokenizer_json()?)?;
    write_json(&directory.join("config.json"), model.config())?;
    write_json(
        &directory.join("tokenizer_config.json"),
        model.tokenizer_config(),
    )?;
    if let Some(generation) = model.generation_config() {
        write_json(&directory.join("generation_config.json"), generation)?;
    }
    let shards = cut_into_shards(model, max_shard_bytes);
    let total_bytes: u64 = model.infos().map(TensorInfo::size_bytes).sum();
    let mut done_bytes = 0;
    progress(done_bytes, total_bytes);
    let mut weight_map = serde_json::Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = shard_name(index, shards.len());
        let mut writer = SafetensorsWriter::create(&directory.join(&name), shard)?;
        for info in shard {
            writer.write(&info.name, &model.read(&info.name)?.bytes)?;
            weight_map.insert(info.name.clone(), json!(name));
            done_bytes += info.size_bytes();
            progress(done_bytes, total_bytes);
        }
        writer.finish()?;
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total_bytes}, "weight_map": weight_map});
        write_json(&directory.join("model.safetensors.index.json"), &index)?;
    }
    Ok(shards.len())
}

/// Tensors by file, in the order of their names; a tensor larger than a file has one for itself.
fn cut_into_shards(model: &GgufModel, max_shard_bytes: u64) -> Vec<Vec<TensorInfo>> {
    let mut shards: Vec<Vec<TensorInfo>> = vec![Vec::new()];
    let mut shard_bytes = 0;
    for info in model.infos() {
        let size_bytes = info.size_bytes();
        if shard_bytes > 0 && shard_bytes + size_bytes > max_shard_bytes {
            shards.push(Vec::new());
            shard_bytes = 0;
        }
        shard_bytes += size_bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(info.clone());
        }
    }
    shards
}

/// The name that Hugging Face's loaders expect.
fn shard_name(index: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".to_owned()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", index + 1)
    }
}

fn write_json(path: &Path, document: &Value) -> Result<(), FormatError> {
    write_file(path, format!("{document:#}\n").as_bytes())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    fs::write(path, bytes).map_err(|source| FormatError::io(path, "write", source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SafetensorsDir;

    #[test]
    fn a_large_model_is_cut_into_files_with_an_index() {
        let source =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf/gemma3.gguf");
        let work = tempfile::tempdir().unwrap();
        let target = work.path().join("model");
        let max_shard_bytes = 100_000;
        let summary =
            import_with_shards(&source, &target, max_shard_bytes, &mut |_, _| {}).unwrap();
        assert!(summary.shards > 3);

        let model = GgufModel::open(&source).unwrap();
        let imported = SafetensorsDir::open(&target).unwrap();
        assert!(imported.infos().eq(model.infos()));
        for info in model.infos() {
            let (found, expected) = (imported.read(&info.name), model.read(&info.name));
            assert_eq!(
                found.unwrap().bytes,
                expected.unwrap().bytes,
                "{}",
                info.name
            );
        }

        let index = fs::read(target.join("model.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], summary.tensor_bytes);
        let map = index["weight_map"].as_object().unwrap();
        assert_eq!(map.len(), summary.tensors);
        for (name, file) in map {
            let file = target.join(file.as_str().unwrap());
            assert_eq!(imported.file_of(name), file, "{name}");
            let held: u64 = map
                .iter()
                .filter(|(_, other)| target.join(other.as_str().unwrap()) == file)
                .filter_map(|(name, _)| model.info(name))
                .map(TensorInfo::size_bytes)
                .sum();
            assert!(held <= max_shard_bytes, "{}: {held} bytes", file.display());
        }
    }
}
