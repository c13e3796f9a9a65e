//! LoRA adapters as PEFT saves them: a directory with adapter_config.json and
//! adapter_model.safetensors.
//!
//! An adapter adds `scale · B · A · x` to the results of some of a model's linears. The names
//! of its tensors tell which: `base_model.model.` and the linear's own name come before
//! `.lora_A.weight`, `[rank, in_features]`, and `.lora_B.weight`, `[out_features, rank]`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config_json::{ConfigView, read_json_object};
use crate::{FloatLinear, FormatError, GptqConfig, LinearHeader, LinearSource, SafetensorsDir};
use crate::{TensorInfo, TensorSource};

/// What every tensor's name begins with.
const PREFIX: &str = "base_model.model.";

/// Keys whose values, unless they are off, make an adapter compute something else.
const MUST_BE_OFF: [&str; 12] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
];

/// An adapter opened for loading: header and configuration are read and checked, tensor data
/// is not read.
#[derive(Debug)]
pub struct AdapterSource {
    path: PathBuf,
    tensors: SafetensorsDir,
    modules: Vec<AdapterModule>,
}

/// What an adapter adds to one linear.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterModule {
    /// The linear's name in the model, e.g. `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// A, `[rank, in_features]`: a float linear from the linear's inputs.
    pub a: LinearHeader,
    /// B, `[out_features, rank]`: a float linear to the linear's outputs; may have a bias.
    pub b: LinearHeader,
    /// `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` for a rank-stabilised adapter.
    pub scale: f64,
}

impl AdapterModule {
    /// Columns between A and B.
    pub fn rank(&self) -> usize {
        self.a.out_features
    }
}

impl AdapterSource {
    /// Opens a directory that PEFT's `save_pretrained` wrote.
    ///
    /// # Errors
    /// A file is missing or does not hold together; the adapter is of another kind than LoRA
    /// on linears, or uses a variant that computes something else; tensors contradict the
    /// configuration or each other.
    pub fn open(directory: &Path) -> Result<Self, FormatError> {
        let config_path = directory.join("adapter_config.json");
        let Some(config) = read_json_object(&config_path)? else {
            return Err(FormatError::MissingFile {
                path: config_path,
                expected: "the adapter's configuration: a LoRA directory as PEFT saves it holds \
                           adapter_config.json and adapter_model.safetensors",
            });
        };
        let config = AdapterConfig::read(ConfigView::new(&config, &config_path))?;
        let tensors_path = directory.join("adapter_model.safetensors");
        if !tensors_path.exists() {
            return Err(FormatError::MissingFile {
                path: tensors_path,
                expected: "the adapter's tensors (adapter_model.bin is not read: save the \
                           adapter again with safe_serialization=True)",
            });
        }
        let tensors = SafetensorsDir::open_files(directory, &[tensors_path])?;
        tensors.check_readable()?;
        let modules = find_modules(&tensors, &config)?;
        Ok(AdapterSource {
            path: directory.to_path_buf(),
            tensors,
            modules,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The linears that the adapter changes, sorted by name; at least one.
    pub fn modules(&self) -> &[AdapterModule] {
        &self.modules
    }

    /// The data of [`AdapterModule::a`].
    ///
    /// # Errors
    /// The file can no longer be read.
    pub fn read_a(&self, module: &AdapterModule) -> Result<LinearSource<'_>, FormatError> {
        self.read(format!("{PREFIX}{}.lora_A", module.name))
    }

    /// The data of [`AdapterModule::b`].
    ///
    /// # Errors
    /// The file can no longer be read, or the bias is not finite.
    pub fn read_b(&self, module: &AdapterModule) -> Result<LinearSource<'_>, FormatError> {
        self.read(format!("{PREFIX}{}.lora_B", module.name))
    }

    fn read(&self, key: String) -> Result<LinearSource<'_>, FormatError> {
        FloatLinear::load(&self.tensors, &key, 1.0).map(LinearSource::Float)
    }
}

/// What adapter_config.json says of ranks and scales.
struct AdapterConfig<'a> {
    view: ConfigView<'a>,
    rank: usize,
    alpha: f64,
    rank_stabilised: bool,
}

impl<'a> AdapterConfig<'a> {
    fn read(view: ConfigView<'a>) -> Result<Self, FormatError> {
        let unsupported = |what: &str, supported: &str| FormatError::Unsupported {
            path: view.path().to_path_buf(),
            what: format!("`{what}`"),
            found: view.get(what).map_or_else(String::new, Value::to_string),
            supported: supported.to_owned(),
        };
        if view.str("peft_type")? != "LORA" {
            return Err(unsupported("peft_type", "LORA"));
        }
        for key in MUST_BE_OFF {
            if view.get(key).is_some_and(|value| !is_off(value)) {
                return Err(unsupported(key, "none; merge the adapter into its model"));
            }
        }
        if view
            .optional_str("bias")?
            .is_some_and(|bias| bias != "none")
        {
            return Err(unsupported("bias", "none"));
        }
        // Other initialisations change the model's own weights before training, so that the
        // adapter belongs to a model that is not in the files.
        let initialisation = view.get("init_lora_weights");
        let keeps_model = initialisation.is_none_or(|value| match value {
            Value::Bool(_) => true,
            Value::String(name) => ["gaussian", "eva", "orthogonal"].contains(&name.as_str()),
            _ => false,
        });
        if !keeps_model {
            let supported = "true, false, gaussian, eva, orthogonal; save the adapter converted \
                             to plain LoRA (path_initial_model_for_weight_conversion)";
            return Err(unsupported("init_lora_weights", supported));
        }
        let rank = view.usize("r")?;
        if rank == 0 {
            return Err(view.invalid("r", "at least 1"));
        }
        for pattern in ["rank_pattern", "alpha_pattern"] {
            check_pattern(view, pattern)?;
        }
        Ok(AdapterConfig {
            view,
            rank,
            alpha: view.f64("lora_alpha")?,
            rank_stabilised: view.bool_or("use_rslora", false)?,
        })
    }

    /// The entry of a pattern for a module, the first that matches as in PEFT.
    fn of_module(&self, pattern: &str, module: &str) -> Option<&'a Value> {
        let entries = self.view.get(pattern)?.as_object()?;
        let matches = |key: &str| match key.strip_prefix('^') {
            Some(whole) => whole == module,
            None => module
                .strip_suffix(key)
                .is_some_and(|before| before.is_empty() || before.ends_with('.')),
        };
        let (_, value) = entries.iter().find(|(key, _)| matches(key))?;
        Some(value)
    }

    /// Rank and scale of a module.
    fn rank_and_scale(&self, module: &str) -> (usize, f64) {
        // `check_pattern` has seen to the types.
        let rank = self.of_module("rank_pattern", module);
        let rank = rank.and_then(Value::as_u64);
        let rank = rank.map_or(self.rank, |rank| rank as usize);
        let alpha = self.of_module("alpha_pattern", module);
        let alpha = alpha.and_then(Value::as_f64).unwrap_or(self.alpha);
        let divisor = if self.rank_stabilised {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        (rank, alpha / divisor)
    }
}

/// Whether a value says that a feature is not used.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Checks `rank_pattern` or `alpha_pattern`: names of modules, or their ends, with numbers.
///
/// PEFT takes the keys as regular expressions that match a name from a dot on; keys that use
/// more of these than a leading `^` are refused.
fn check_pattern(view: ConfigView<'_>, key: &str) -> Result<(), FormatError> {
    let Some(value) = view.get(key) else {
        return Ok(());
    };
    let Some(entries) = value.as_object() else {
        return Err(view.invalid(key, "an object from module names to numbers"));
    };
    for (module, value) in entries {
        let plain = module.strip_prefix('^').unwrap_or(module);
        let is_name = |symbol: char| symbol.is_alphanumeric() || "_-.".contains(symbol);
        if plain.is_empty() || !plain.chars().all(is_name) {
            return Err(FormatError::Unsupported {
                path: view.path().to_path_buf(),
                what: format!("`{key}`"),
                found: format!("the regular expression {module:?}"),
                supported: "module names and their last parts".to_owned(),
            });
        }
        let fits = match key {
            "rank_pattern" => value
                .as_u64()
                .is_some_and(|rank| (1..=crate::MAX_CONFIG_COUNT).contains(&rank)),
            _ => value.as_f64().is_some_and(f64::is_finite),
        };
        if !fits {
            return Err(FormatError::InvalidConfig {
                path: view.path().to_path_buf(),
                key: format!("{key}[{module:?}]"),
                found: value.to_string(),
                expected: "a rank from 1, or a finite alpha".to_owned(),
            });
        }
    }
    Ok(())
}

/// Groups the file's tensors by module and checks their headers.
fn find_modules(
    tensors: &SafetensorsDir,
    config: &AdapterConfig<'_>,
) -> Result<Vec<AdapterModule>, FormatError> {
    let mut modules: Vec<AdapterModule> = Vec::new();
    // Sorted by name, so that a module's tensors follow one another.
    for info in tensors.infos() {
        let name = module_of(tensors, info)?;
        if modules.last().is_none_or(|module| module.name != name) {
            modules.push(read_module(tensors, config, name)?);
        }
    }
    if modules.is_empty() {
        return Err(FormatError::malformed(
            tensors.file_of(""),
            "the adapter",
            "no tensors",
            format!("tensors named {PREFIX}….lora_A.weight and {PREFIX}….lora_B.weight"),
        ));
    }
    Ok(modules)
}

/// The module that a tensor belongs to.
fn module_of<'t>(tensors: &SafetensorsDir, info: &'t TensorInfo) -> Result<&'t str, FormatError> {
    const ENDS: [&str; 3] = [".lora_A.weight", ".lora_B.weight", ".lora_B.bias"];
    let of_model = info.name.strip_prefix(PREFIX);
    let module = of_model.and_then(|name| ENDS.iter().find_map(|end| name.strip_suffix(end)));
    module.ok_or_else(|| FormatError::Unsupported {
        path: tensors.file_of(&info.name).to_path_buf(),
        what: "a tensor".to_owned(),
        found: format!("`{}`", info.name),
        supported: format!(
            "{PREFIX}…{}; adapters of embeddings, DoRA and trained copies of modules are to be \
             merged into their model",
            ENDS.join(", …")
        ),
    })
}

fn read_module(
    tensors: &SafetensorsDir,
    config: &AdapterConfig<'_>,
    name: &str,
) -> Result<AdapterModule, FormatError> {
    let header = |part: &str| {
        let key = format!("{PREFIX}{name}.{part}");
        let tensor = format!("{key}.weight");
        let header = LinearHeader::find(tensors, &key, &GptqConfig::default())?;
        let header = header.ok_or_else(|| FormatError::MissingTensor {
            path: tensors.file_of(&tensor).to_path_buf(),
            tensor: tensor.clone(),
            expected: "expected both lora_A and lora_B of a module".to_owned(),
        })?;
        Ok::<_, FormatError>((header, tensor))
    };
    let ((a, a_name), (b, b_name)) = (header("lora_A")?, header("lora_B")?);
    let (rank, scale) = config.rank_and_scale(name);
    for (tensor, found, header, expected) in [
        (
            a_name,
            a.out_features,
            a,
            format!("[{rank}, {}]", a.in_features),
        ),
        (
            b_name,
            b.in_features,
            b,
            format!("[{}, {rank}]", b.out_features),
        ),
    ] {
        if found != rank {
            return Err(FormatError::wrong_shape(
                tensors.file_of(&tensor),
                &tensor,
                &[header.out_features, header.in_features],
                format!("{expected}, of the rank that adapter_config.json gives the module"),
            ));
        }
    }
    Ok(AdapterModule {
        name: name.to_owned(),
        a,
        b,
        scale,
    })
}
