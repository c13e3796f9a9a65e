//! Writing model directories for tests.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use oxllama_format::{SafetensorsDir, TensorSource};
use serde_json::{Map, Value, json};

/// A tensor to be written: its header entry, and its bytes unless the file is to be sparse.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Option<Vec<u8>>,
}

impl Tensor {
    /// A tensor of a sparse file: zeros that take no room.
    pub(crate) fn sparse(name: String, dtype: &'static str, shape: &[usize]) -> Self {
        Self {
            name,
            dtype,
            shape: shape.to_vec(),
            bytes: None,
        }
    }

    fn size(&self) -> u64 {
        let element = match self.dtype {
            "F32" | "I32" => 4,
            "F16" | "BF16" | "I16" => 2,
            other => panic!("unexpected dtype {other}"),
        };
        element
            * self
                .shape
                .iter()
                .map(|&extent| extent as u64)
                .product::<u64>()
    }
}

/// Writes `tensors` as one safetensors file.
pub(crate) fn write_safetensors(path: &Path, tensors: &[Tensor]) {
    let mut header = Map::new();
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.size();
        let entry = json!({
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end],
        });
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(path).expect("a file");
    file.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| file.write_all(&header))
        .expect("the header");
    for bytes in tensors.iter().filter_map(|tensor| tensor.bytes.as_ref()) {
        file.write_all(bytes).expect("the data");
    }
    file.set_len(8 + header.len() as u64 + end)
        .expect("the length");
}

/// Every tensor of a directory with its bytes.
pub(crate) fn read_tensors(path: &Path) -> Vec<Tensor> {
    let source = SafetensorsDir::open(path).expect("tensors");
    let of_info = |info: &oxllama_format::TensorInfo| Tensor {
        name: info.name.clone(),
        dtype: info.dtype.name(),
        shape: info.shape.clone(),
        bytes: Some(
            source
                .read(&info.name)
                .expect("a tensor")
                .bytes
                .into_owned(),
        ),
    };
    source.infos().map(of_info).collect()
}

/// A copy of the model at `from`, with its configuration and weights changed.
pub(crate) fn altered_copy(
    from: &Path,
    change_config: impl FnOnce(&mut Map<String, Value>),
    change_tensors: impl FnOnce(&mut Vec<Tensor>),
) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let config = std::fs::read_to_string(from.join("config.json")).expect("config.json");
    let mut config: Map<String, Value> = serde_json::from_str(&config).expect("JSON");
    change_config(&mut config);
    let text = Value::Object(config).to_string();
    std::fs::write(directory.path().join("config.json"), text).expect("config.json");
    let mut tensors = read_tensors(from);
    // The fixtures keep their expected logits in a file beside the model's.
    tensors.retain(|tensor| tensor.name.ends_with(".weight") || tensor.name.ends_with(".bias"));
    change_tensors(&mut tensors);
    write_safetensors(&directory.path().join("model.safetensors"), &tensors);
    directory
}

/// The five tensors of an EXL2 linear of zeros, all groups of `group_rows` rows at `bits`.
pub(crate) fn sparse_exl2(
    key: &str,
    in_features: usize,
    out_features: usize,
    bits: usize,
    group_rows: usize,
) -> [Tensor; 5] {
    let groups = in_features.div_ceil(group_rows);
    let tensor =
        |part: &str, dtype, shape: &[usize]| Tensor::sparse(format!("{key}.{part}"), dtype, shape);
    [
        tensor("q_weight", "I32", &[in_features * bits / 32, out_features]),
        tensor("q_scale", "I32", &[groups, out_features / 8]),
        tensor("q_scale_max", "F16", &[groups]),
        tensor("q_groups", "I16", &[2 * groups]),
        tensor("q_invperm", "I32", &[in_features]),
    ]
}
