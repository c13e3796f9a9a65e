//! A model as one thing: its tensors and the documents beside them.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::config_json::{ConfigView, MAX_CONFIG_BYTES, read_json_object, read_optional_file};
use crate::gguf::GgufModel;
use crate::synthetic::SyntheticTensors;
use crate::{FormatError, GptqConfig, SafetensorsDir, SyntheticShape, TensorSource};

/// Largest tokenizer.json that is read; the largest known one has 33 MB.
const MAX_TOKENIZER_BYTES: u64 = 512 << 20;

/// A model opened for planning and loading: headers and small documents are in memory, tensor
/// data is not.
pub struct ModelSource {
    path: PathBuf,
    config_path: PathBuf,
    config: Value,
    generation_config: Option<Value>,
    tokenizer_config: Option<Value>,
    contents: Contents,
}

/// Where tensors and tokenizer come from.
enum Contents {
    Directory(SafetensorsDir),
    Gguf(Box<GgufModel>),
    Synthetic(SyntheticTensors),
}

impl ModelSource {
    /// Opens a directory in Hugging Face's layout, or a GGUF file, which is presented as one.
    ///
    /// # Errors
    /// The path does not exist or is neither; config.json or every safetensors file is missing;
    /// a document or header does not hold together.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let metadata = match fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(FormatError::MissingFile {
                    path: path.to_path_buf(),
                    expected: "a model directory or a .gguf file",
                });
            }
            result => result.map_err(|source| FormatError::io(path, "open", source))?,
        };
        if metadata.is_dir() {
            return Self::open_directory(path);
        }
        if !metadata.is_file() || !is_gguf(path)? {
            return Err(FormatError::malformed(
                path,
                "model",
                "a file of another kind",
                "a directory with config.json and safetensors files, or a .gguf file",
            ));
        }
        Ok(Self::of_gguf(path, GgufModel::open(path)?))
    }

    /// A model of a known shape with random weights, which are made whenever they are read.
    ///
    /// # Errors
    /// There can be no model of this shape: a width that EXL2 cannot store, bits per weight
    /// outside 2 to 8.
    pub fn synthetic(shape: &SyntheticShape) -> Result<Self, FormatError> {
        let path = PathBuf::from(shape.to_string());
        Ok(ModelSource {
            config_path: path.clone(),
            path,
            config: shape.config(),
            generation_config: None,
            tokenizer_config: Some(SyntheticShape::tokenizer_config()),
            contents: Contents::Synthetic(SyntheticTensors::new(shape)?),
        })
    }

    /// An opened GGUF file, presented as a directory.
    pub(crate) fn of_gguf(path: &Path, model: GgufModel) -> Self {
        ModelSource {
            path: path.to_path_buf(),
            config_path: path.to_path_buf(),
            config: model.config().clone(),
            generation_config: model.generation_config().cloned(),
            tokenizer_config: Some(model.tokenizer_config().clone()),
            contents: Contents::Gguf(Box::new(model)),
        }
    }

    /// Opens a directory with config.json and safetensors files.
    fn open_directory(path: &Path) -> Result<Self, FormatError> {
        let config_path = path.join("config.json");
        let Some(config) = read_json_object(&config_path)? else {
            return Err(FormatError::MissingFile {
                path: config_path,
                expected: "the model's config.json beside its safetensors files",
            });
        };
        let tensors = SafetensorsDir::open(path)?;
        Ok(ModelSource {
            path: path.to_path_buf(),
            config_path,
            config,
            generation_config: read_json_object(&path.join("generation_config.json"))?,
            tokenizer_config: read_tokenizer_config(path)?,
            contents: Contents::Directory(tensors),
        })
    }

    /// The directory or file; of a synthetic model, what it is called.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's tensors.
    pub fn tensors(&self) -> &dyn TensorSource {
        match &self.contents {
            Contents::Directory(tensors) => tensors,
            Contents::Gguf(model) => model.as_ref(),
            Contents::Synthetic(tensors) => tensors,
        }
    }

    /// config.json.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// config.json with typed getters, whose errors name the file.
    pub fn config_view(&self) -> ConfigView<'_> {
        ConfigView::new(&self.config, &self.config_path)
    }

    /// How the model's GPTQ tensors, if it has any, are to be read.
    ///
    /// # Errors
    /// config.json names a quantisation method that is not supported.
    pub fn gptq_config(&self) -> Result<GptqConfig, FormatError> {
        GptqConfig::from_config(&self.config, &self.config_path)
    }

    /// generation_config.json, if there is one.
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// The bytes of tokenizer.json, or of one made from a GGUF file's vocabulary or for a
    /// synthetic model.
    ///
    /// # Errors
    /// The file is missing or cannot be read, or the vocabulary is of an unknown kind.
    pub fn tokenizer_json(&self) -> Result<Cow<'_, [u8]>, FormatError> {
        match &self.contents {
            Contents::Gguf(model) => model.tokenizer_json().map(Cow::Owned),
            Contents::Synthetic(tensors) => Ok(Cow::Owned(tensors.tokenizer_json().into_bytes())),
            Contents::Directory(_) => {
                let path = self.path.join("tokenizer.json");
                read_optional_file(&path, MAX_TOKENIZER_BYTES)?
                    .map(Cow::Owned)
                    .ok_or(FormatError::MissingFile {
                        path,
                        expected: "the model's tokenizer.json (tokenizer.model is not read)",
                    })
            }
        }
    }

    /// tokenizer_config.json, with the model's chat template under `chat_template` wherever it
    /// is stored; `None` if there is neither.
    pub fn tokenizer_config(&self) -> Option<&Value> {
        self.tokenizer_config.as_ref()
    }

    /// Bytes of the files that hold the tensors; of a synthetic model, those of its tensors.
    pub fn stored_bytes(&self) -> u64 {
        match &self.contents {
            Contents::Directory(tensors) => tensors.stored_bytes(),
            Contents::Gguf(model) => model.stored_bytes(),
            Contents::Synthetic(tensors) => tensors.stored_bytes(),
        }
    }
}

/// Whether a file starts as GGUF files do, or at least is named like one.
fn is_gguf(path: &Path) -> Result<bool, FormatError> {
    if path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    {
        return Ok(true);
    }
    let mut magic = [0u8; 4];
    let file = File::open(path).map_err(|source| FormatError::io(path, "open", source))?;
    match (&file).read_exact(&mut magic) {
        Ok(()) => Ok(&magic == b"GGUF"),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(FormatError::io(path, "read", error)),
    }
}

/// tokenizer_config.json with the chat template merged in.
///
/// As in transformers, a chat_template.jinja comes before the template in
/// tokenizer_config.json; the older chat_template.json is used where there is no other.
fn read_tokenizer_config(directory: &Path) -> Result<Option<Value>, FormatError> {
    const KEY: &str = "chat_template";
    let document = read_json_object(&directory.join("tokenizer_config.json"))?;
    let jinja = read_text(&directory.join("chat_template.jinja"))?;
    let template = match jinja {
        Some(text) => Some(Value::String(text)),
        None if document
            .as_ref()
            .is_some_and(|document| !document[KEY].is_null()) =>
        {
            None
        }
        None => read_json_object(&directory.join("chat_template.json"))?
            .and_then(|mut document| document.get_mut(KEY).map(Value::take)),
    };
    let Some(template) = template else {
        return Ok(document);
    };
    let mut document = document.unwrap_or_else(|| Value::Object(Map::new()));
    document[KEY] = template;
    Ok(Some(document))
}

/// A UTF-8 text file; `None` if it does not exist.
fn read_text(path: &Path) -> Result<Option<String>, FormatError> {
    let Some(bytes) = read_optional_file(path, MAX_CONFIG_BYTES)? else {
        return Ok(None);
    };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|error| FormatError::InvalidUtf8 {
            path: path.to_path_buf(),
            offset: error.utf8_error().valid_up_to(),
        })
}
