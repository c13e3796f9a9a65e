//! Writing any model as a directory in Hugging Face's layout.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{FormatError, ModelSource, SafetensorsWriter, TensorInfo, TensorSource};

/// Most tensor bytes of one safetensors file; a larger model is cut into several.
const MAX_SHARD_BYTES: u64 = 4 << 30;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenModel {
    /// Hugging Face's `model_type`, e.g. `llama`.
    pub model_type: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Number of safetensors files.
    pub shards: usize,
    /// Where the directory is.
    pub directory: PathBuf,
}

/// Writes `model` as a Hugging Face directory `out_dir`: safetensors (with an index where there
/// are several), `config.json`, `generation_config.json`, `tokenizer.json` and
/// `tokenizer_config.json`.
///
/// Everything is written into `OUT_DIR.partial`, which takes its final name only when complete.
/// One left by an interrupted run is replaced. `progress` is told the bytes of tensors written so
/// far and in all, before the first tensor and after each.
///
/// # Errors
/// `out_dir` exists and is not an empty directory, a tensor or document cannot be read, or
/// writing fails.
pub fn write_model(
    model: &ModelSource,
    out_dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<WrittenModel, FormatError> {
    write_with_shards(model, out_dir, MAX_SHARD_BYTES, progress)
}

/// As [`write_model`], with a new file wherever one would pass `max_shard_bytes`.
fn write_with_shards(
    model: &ModelSource,
    out_dir: &Path,
    max_shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<WrittenModel, FormatError> {
    refuse_occupied(out_dir)?;
    let partial = partial_path(out_dir)?;
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .map_err(|source| FormatError::io(&partial, "remove the interrupted", source))?;
    }
    fs::create_dir_all(&partial).map_err(|source| FormatError::io(&partial, "create", source))?;
    let written = write_directory(model, &partial, max_shard_bytes, progress).and_then(|shards| {
        // An empty directory gives way; one that was filled meanwhile does not.
        fs::rename(&partial, out_dir)
            .map_err(|source| FormatError::io(out_dir, "put the finished model at", source))?;
        Ok(shards)
    });
    let shards = match written {
        Ok(shards) => shards,
        Err(error) => {
            // The first error is the one to report; a leftover is replaced by the next run.
            let _ = fs::remove_dir_all(&partial);
            return Err(error);
        }
    };
    let tensors = model.tensors();
    Ok(WrittenModel {
        model_type: model.config()["model_type"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        tensors: tensors.infos().count(),
        tensor_bytes: tensors.infos().map(TensorInfo::size_bytes).sum(),
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
    model: &ModelSource,
    directory: &Path,
    max_shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<usize, FormatError> {
    // Before the weights: the tokenizer is what an unusual file is most likely to fail on.
    write_file(&directory.join("tokenizer.json"), &model.tokenizer_json()?)?;
    write_json(&directory.join("config.json"), model.config())?;
    for (name, document) in [
        ("tokenizer_config.json", model.tokenizer_config()),
        ("generation_config.json", model.generation_config()),
    ] {
        if let Some(document) = document {
            write_json(&directory.join(name), document)?;
        }
    }
    let tensors = model.tensors();
    let shards = cut_into_shards(tensors, max_shard_bytes);
    let total_bytes: u64 = tensors.infos().map(TensorInfo::size_bytes).sum();
    let mut done_bytes = 0;
    progress(done_bytes, total_bytes);
    let mut weight_map = serde_json::Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = shard_name(index, shards.len());
        let mut writer = SafetensorsWriter::create(&directory.join(&name), shard)?;
        for info in shard {
            writer.write(&info.name, &tensors.read(&info.name)?.bytes)?;
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
fn cut_into_shards(tensors: &dyn TensorSource, max_shard_bytes: u64) -> Vec<Vec<TensorInfo>> {
    let mut shards: Vec<Vec<TensorInfo>> = vec![Vec::new()];
    let mut shard_bytes = 0;
    for info in tensors.infos() {
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
        let source = ModelSource::open(&source).unwrap();
        let summary = write_with_shards(&source, &target, max_shard_bytes, &mut |_, _| {}).unwrap();
        assert!(summary.shards > 3);

        let model = source.tensors();
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
