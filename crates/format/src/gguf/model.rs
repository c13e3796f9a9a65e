//! A GGUF file as a Hugging Face model.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::architecture::{Architecture, Dimensions, Transform};
use super::config::{ConfigBuilder, TensorFacts};
use super::dequant::dequantize_to_f16;
use super::tokenizer::Tokenizer;
use super::{GgmlType, GgufError, GgufFile, GgufTensor};
use crate::{DType, FormatError, TensorData, TensorInfo, TensorSource};

/// A language model in a GGUF file, seen as Hugging Face would have it: its names, its order of
/// rows, fp16, and its JSON documents.
///
/// Tensors are decoded when they are read. Their headers are known without touching data.
#[derive(Debug)]
pub struct GgufModel {
    file: GgufFile,
    tensors: BTreeMap<String, Entry>,
    architecture: &'static Architecture,
    config: Value,
    generation_config: Option<Value>,
    tokenizer_config: Value,
}

/// One tensor: what it is here, and how it comes out of the file.
#[derive(Debug)]
struct Entry {
    info: TensorInfo,
    /// Position in the file's list of tensors.
    index: usize,
    transform: Transform,
}

impl GgufModel {
    /// Opens a GGUF file of a known family; reads no tensor's data but a few rope divisors.
    ///
    /// # Errors
    /// The file cannot be read; its header is wrong; its family, tokenizer or a feature of
    /// either is unknown; tensors are missing or have no place.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = GgufFile::open(path)?;
        Self::from_file(file).map_err(|error| error.at(path))
    }

    fn from_file(file: GgufFile) -> Result<Self, GgufError> {
        let metadata = file.metadata();
        let parts = metadata.integer("split.count")?.unwrap_or(1);
        if parts > 1 {
            return Err(GgufError::Unsupported {
                what: "split.count".to_owned(),
                found: parts.to_string(),
                supported: "one file; join the parts with llama.cpp's gguf-split".to_owned(),
            });
        }
        let key = "general.architecture";
        let name = metadata.text(key)?.ok_or_else(|| GgufError::MissingKey {
            key: key.to_owned(),
            expected: "the model family",
        })?;
        let architecture = Architecture::find(name)?;
        let builder = ConfigBuilder {
            file: &file,
            architecture,
        };
        let dimensions = builder.dimensions()?;
        let tensors = map_tensors(&file, architecture, dimensions)?;
        let embedding = &tensors["model.embed_tokens.weight"].info.shape;
        if embedding.len() != 2 {
            return Err(GgufError::malformed(
                "tensor `token_embd.weight`: shape",
                format!("{embedding:?}"),
                "two dimensions",
            ));
        }
        let facts = TensorFacts {
            vocabulary_rows: embedding[0],
            tied: !tensors.contains_key("lm_head.weight"),
            attention_bias: tensors.contains_key("model.layers.0.self_attn.q_proj.bias"),
            mlp_bias: tensors.contains_key("model.layers.0.mlp.up_proj.bias"),
        };
        let mut config = builder.build(facts)?;
        let tokenizer = Tokenizer::new(metadata, architecture.name, embedding[0])?;
        tokenizer.add_ids(&mut config, architecture.assumes_padding);
        let tokenizer_config = tokenizer.config(config.get("max_position_embeddings"))?;
        let generation_config = tokenizer.generation_config()?;
        Ok(GgufModel {
            tensors,
            architecture,
            config: Value::Object(config),
            generation_config,
            tokenizer_config,
            file,
        })
    }

    /// The file behind the model.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// `config.json`: everything that `transformers` needs to build the model.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// `generation_config.json`: BOS, padding and end tokens; `None` if the file names no EOS.
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// `tokenizer_config.json`: special tokens, whether BOS is added, the chat template.
    pub fn tokenizer_config(&self) -> &Value {
        &self.tokenizer_config
    }

    /// `tokenizer.json`, built anew on every call.
    ///
    /// # Errors
    /// The vocabulary lacks its merges or scores, or they contradict it.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>, FormatError> {
        let rows = self.tensors["model.embed_tokens.weight"].info.shape[0];
        Tokenizer::new(self.file.metadata(), self.architecture.name, rows)
            .and_then(|tokenizer| tokenizer.document())
            .map_err(|error| error.at(self.file.path()))
            .map(|document| document.to_string().into_bytes())
    }

    /// Bytes of the file that hold tensors.
    pub fn stored_bytes(&self) -> u64 {
        let tensors = &self.file.header().tensors;
        tensors.iter().map(|tensor| tensor.size_bytes as u64).sum()
    }

    fn entry(&self, name: &str) -> Result<&Entry, FormatError> {
        self.tensors
            .get(name)
            .ok_or_else(|| FormatError::MissingTensor {
                path: self.file.path().to_path_buf(),
                tensor: name.to_owned(),
                expected: format!("a tensor of architecture `{}`", self.architecture.name),
            })
    }

    /// How the file stores the tensor with this Hugging Face name.
    pub fn stored(&self, name: &str) -> Option<&GgufTensor> {
        let entry = self.tensors.get(name)?;
        self.file.header().tensors.get(entry.index)
    }
}

/// Names every tensor of the file, and checks that none is missing.
fn map_tensors(
    file: &GgufFile,
    architecture: &'static Architecture,
    dimensions: Dimensions,
) -> Result<BTreeMap<String, Entry>, GgufError> {
    let stored = &file.header().tensors;
    let mut present = std::collections::HashSet::with_capacity(stored.len());
    let mut tensors = BTreeMap::new();
    for (index, tensor) in stored.iter().enumerate() {
        present.insert(tensor.name.as_str());
        let Some((name, transform)) = architecture.map_tensor(&tensor.name, dimensions)? else {
            continue;
        };
        if let Transform::SplitRotaryPairs { heads } = transform
            && !tensor.shape[0].is_multiple_of(2 * heads)
        {
            return Err(GgufError::malformed(
                format!("tensor `{}`: rows", tensor.name),
                tensor.shape[0],
                format!("a multiple of twice the {heads} heads"),
            ));
        }
        let info = TensorInfo {
            name: name.clone(),
            dtype: DType::F16,
            shape: tensor.shape.clone(),
        };
        let entry = Entry {
            info,
            index,
            transform,
        };
        tensors.insert(name, entry);
    }
    // Stops at the first gap, so that an absurd number of layers costs nothing.
    for name in architecture.required_tensors(dimensions.layers) {
        if !present.contains(name.as_str()) {
            return Err(GgufError::MissingTensor {
                tensor: name,
                architecture: architecture.name.to_owned(),
            });
        }
    }
    Ok(tensors)
}

impl TensorSource for GgufModel {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|entry| &entry.info)
    }

    fn infos(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        Box::new(self.tensors.values().map(|entry| &entry.info))
    }

    fn read(&self, name: &str) -> Result<TensorData<'_>, FormatError> {
        let entry = self.entry(name)?;
        let stored = &self.file.header().tensors[entry.index];
        let bytes =
            decode(stored, self.file.data(stored), entry.transform).map_err(|(index, value)| {
                let error = GgufError::NotRepresentable {
                    tensor: name.to_owned(),
                    index,
                    value,
                };
                error.at(self.file.path())
            })?;
        Ok(TensorData {
            info: entry.info.clone(),
            bytes,
        })
    }

    fn read_stored(&self, name: &str) -> Result<Cow<'_, [u8]>, FormatError> {
        let index = self.entry(name)?.index;
        let stored = &self.file.header().tensors[index];
        Ok(Cow::Borrowed(self.file.data(stored)))
    }

    fn file_of(&self, _name: &str) -> &Path {
        self.file.path()
    }
}

/// A tensor's elements as little-endian fp16, in Hugging Face's order.
fn decode<'a>(
    tensor: &GgufTensor,
    stored: &'a [u8],
    transform: Transform,
) -> Result<Cow<'a, [u8]>, (u64, f32)> {
    let bias = (transform == Transform::SubtractOne).then_some(-1.0);
    let halves = if tensor.ggml_type == GgmlType::F16 && bias.is_none() {
        check_finite(stored)?;
        Cow::Borrowed(stored)
    } else {
        let mut halves = vec![0_u8; tensor.elements() * 2];
        dequantize_to_f16(tensor.ggml_type, stored, bias, &mut halves)?;
        Cow::Owned(halves)
    };
    Ok(match transform {
        Transform::SplitRotaryPairs { heads } => {
            Cow::Owned(split_rotary_pairs(&halves, tensor.shape[0], heads))
        }
        Transform::Keep | Transform::SubtractOne => halves,
    })
}

/// Refuses fp16 infinities and NaNs.
fn check_finite(halves: &[u8]) -> Result<(), (u64, f32)> {
    let halves = halves.as_chunks::<2>().0;
    let is_bad = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & 0x7c00 == 0x7c00;
    // Without a branch inside, so that it runs at the speed of memory; then the search.
    if halves.iter().fold(false, |bad, bytes| bad | is_bad(bytes)) {
        let index = halves.iter().position(is_bad).unwrap_or(0);
        return Err((
            index as u64,
            half::f16::from_le_bytes(halves[index]).to_f32(),
        ));
    }
    Ok(())
}

/// Reorders the `rows` rows of fp16 bytes: within each head, row `2 i + j` becomes row
/// `j half + i`, where `half` is half of the head's rows.
fn split_rotary_pairs(halves: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let row_bytes = halves.len() / rows;
    let half = rows / heads / 2;
    let mut reordered = Vec::with_capacity(halves.len());
    for head in halves.chunks_exact(2 * half * row_bytes) {
        for j in 0..2 {
            for i in 0..half {
                let start = (2 * i + j) * row_bytes;
                reordered.extend_from_slice(&head[start..start + row_bytes]);
            }
        }
    }
    reordered
}
