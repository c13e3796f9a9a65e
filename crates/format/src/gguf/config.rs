//! `config.json` out of metadata.

use serde_json::{Map, Value, json};

use super::architecture::{Architecture, Dimensions};
use super::file::{Metadata, shortest_decimal};
use super::{GgufError, GgufFile};

/// What of the tensors the configuration depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorFacts {
    /// Rows of the embedding.
    pub(crate) vocabulary_rows: usize,
    /// Whether there is no head of its own.
    pub(crate) tied: bool,
    /// Whether the query projection has a bias.
    pub(crate) attention_bias: bool,
    /// Whether the MLP's up projection has a bias.
    pub(crate) mlp_bias: bool,
}

/// Builds `config.json` for one family.
pub(crate) struct ConfigBuilder<'a> {
    pub(crate) file: &'a GgufFile,
    pub(crate) architecture: &'static Architecture,
}

impl<'a> ConfigBuilder<'a> {
    fn metadata(&self) -> Metadata<'a> {
        self.file.metadata()
    }

    fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture.name)
    }

    fn integer(&self, suffix: &str) -> Result<Option<u64>, GgufError> {
        self.metadata().integer(&self.key(suffix))
    }

    fn float(&self, suffix: &str) -> Result<Option<f64>, GgufError> {
        self.metadata().float(&self.key(suffix))
    }

    fn required(&self, suffix: &str) -> Result<u64, GgufError> {
        let key = self.key(suffix);
        match self.metadata().integer(&key)? {
            Some(0) => Err(GgufError::malformed(
                format!("metadata key `{key}`"),
                0,
                "a positive number",
            )),
            Some(value) => Ok(value),
            None => Err(GgufError::MissingKey {
                key,
                expected: "a positive integer",
            }),
        }
    }

    /// Layers and heads, checked against each other.
    pub(crate) fn dimensions(&self) -> Result<Dimensions, GgufError> {
        let heads = self.required("attention.head_count")?;
        let kv_heads = match self.integer("attention.head_count_kv")? {
            Some(0) | None => heads,
            Some(kv_heads) => kv_heads,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(GgufError::malformed(
                format!("metadata key `{}`", self.key("attention.head_count_kv")),
                kv_heads,
                format!("a divisor of the {heads} heads"),
            ));
        }
        Ok(Dimensions {
            layers: self.required("block_count")? as usize,
            heads: heads as usize,
            kv_heads: kv_heads as usize,
        })
    }

    /// The whole of `config.json`, but for the token ids.
    pub(crate) fn build(&self, facts: TensorFacts) -> Result<Map<String, Value>, GgufError> {
        let dimensions = self.dimensions()?;
        let hidden = self.required("embedding_length")?;
        let head_dim = self.head_dim(hidden, dimensions)?;
        self.refuse_unsupported(head_dim)?;
        let mut config = Map::new();
        let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
        set("architectures", json!([self.architecture.class]));
        set("model_type", json!(self.architecture.model_type));
        set("hidden_size", json!(hidden));
        set(
            "intermediate_size",
            json!(self.required("feed_forward_length")?),
        );
        set("num_hidden_layers", json!(dimensions.layers));
        set("num_attention_heads", json!(dimensions.heads));
        set("num_key_value_heads", json!(dimensions.kv_heads));
        set("vocab_size", json!(facts.vocabulary_rows));
        let epsilon = self.float("attention.layer_norm_rms_epsilon")?;
        let epsilon = epsilon.ok_or_else(|| GgufError::MissingKey {
            key: self.key("attention.layer_norm_rms_epsilon"),
            expected: "a float",
        })?;
        set("rms_norm_eps", json!(epsilon));
        // The converter for Gemma 2 leaves its base out; it is everyone's old default.
        let default_base = if self.architecture.name == "gemma3" {
            1e6
        } else {
            1e4
        };
        set(
            "rope_theta",
            json!(self.float("rope.freq_base")?.unwrap_or(default_base)),
        );
        set(
            "max_position_embeddings",
            json!(self.required("context_length")?),
        );
        set("tie_word_embeddings", json!(facts.tied));
        set("torch_dtype", json!("float16"));
        self.add_family(&mut config, head_dim, dimensions, facts)?;
        if let Some(scaling) = self.rope_scaling(&mut config, head_dim)? {
            config.insert("rope_scaling".to_owned(), scaling);
        }
        Ok(config)
    }

    fn head_dim(&self, hidden: u64, dimensions: Dimensions) -> Result<u64, GgufError> {
        let heads = dimensions.heads as u64;
        if let Some(length) = self.integer("attention.key_length")? {
            let value_length = self.integer("attention.value_length")?.unwrap_or(length);
            if length == 0 || !length.is_multiple_of(2) || length != value_length {
                return Err(GgufError::malformed(
                    format!("metadata key `{}`", self.key("attention.key_length")),
                    length,
                    format!("an even number equal to the value length {value_length}"),
                ));
            }
            return Ok(length);
        }
        if !hidden.is_multiple_of(2 * heads) {
            return Err(GgufError::malformed(
                format!("metadata key `{}`", self.key("embedding_length")),
                hidden,
                format!("a multiple of twice the {heads} heads"),
            ));
        }
        Ok(hidden / heads)
    }

    fn refuse_unsupported(&self, head_dim: u64) -> Result<(), GgufError> {
        let experts = self.integer("expert_count")?.unwrap_or(0);
        if experts > 0 {
            return Err(GgufError::Unsupported {
                what: self.key("expert_count"),
                found: experts.to_string(),
                supported: "dense models".to_owned(),
            });
        }
        let rotary = self.integer("rope.dimension_count")?.unwrap_or(head_dim);
        if rotary != head_dim && self.architecture.name != "phi3" {
            return Err(GgufError::Unsupported {
                what: self.key("rope.dimension_count"),
                found: rotary.to_string(),
                supported: format!("the head's size {head_dim}"),
            });
        }
        Ok(())
    }

    /// What one family's configuration has and others' do not.
    fn add_family(
        &self,
        config: &mut Map<String, Value>,
        head_dim: u64,
        dimensions: Dimensions,
        facts: TensorFacts,
    ) -> Result<(), GgufError> {
        let sliding_window = self
            .integer("attention.sliding_window")?
            .filter(|&window| window > 0);
        let explicit_head_dim = self.integer("attention.key_length")?;
        let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
        match self.architecture.name {
            "llama" => {
                set("hidden_act", json!("silu"));
                if let Some(head_dim) = explicit_head_dim {
                    set("head_dim", json!(head_dim));
                }
                if let Some(window) = sliding_window {
                    // The file does not tell Mistral from Llama; only Mistral has a window.
                    set("architectures", json!(["MistralForCausalLM"]));
                    set("model_type", json!("mistral"));
                    set("sliding_window", json!(window));
                } else {
                    set("attention_bias", json!(facts.attention_bias));
                    if facts.mlp_bias {
                        set("mlp_bias", json!(true));
                    }
                }
            }
            "qwen2" => {
                set("hidden_act", json!("silu"));
                set("use_sliding_window", json!(false));
            }
            "qwen3" => {
                set("hidden_act", json!("silu"));
                set("head_dim", json!(head_dim));
                set("attention_bias", json!(facts.attention_bias));
                set("use_sliding_window", json!(false));
            }
            "phi3" => {
                set("hidden_act", json!("silu"));
                if let Some(window) = sliding_window {
                    set("sliding_window", json!(window));
                }
                let rotary = self.integer("rope.dimension_count")?.unwrap_or(head_dim);
                if rotary != head_dim {
                    let share = rotary as f64 / head_dim as f64;
                    set("partial_rotary_factor", json!(share));
                }
            }
            _ => self.add_gemma(config, head_dim, dimensions, sliding_window)?,
        }
        Ok(())
    }

    fn add_gemma(
        &self,
        config: &mut Map<String, Value>,
        head_dim: u64,
        dimensions: Dimensions,
        sliding_window: Option<u64>,
    ) -> Result<(), GgufError> {
        let hidden = self.required("embedding_length")?;
        let gemma3 = self.architecture.name == "gemma3";
        let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
        set("head_dim", json!(head_dim));
        set("hidden_activation", json!("gelu_pytorch_tanh"));
        set("attention_bias", json!(false));
        // The file does not hold the query's scale. The 27B models, told by their number of
        // layers, scale by the hidden size per head; all others by the head's size.
        let largest_layers = if gemma3 { 62 } else { 46 };
        let scalar = if dimensions.layers == largest_layers {
            hidden / dimensions.heads as u64
        } else {
            head_dim
        };
        set("query_pre_attn_scalar", json!(scalar));
        let caps = ["attn_logit_softcapping", "final_logit_softcapping"];
        for cap in caps {
            set(cap, json!(self.float(cap)?.filter(|&cap| cap > 0.0)));
        }
        let default_window = if gemma3 { 1_024 } else { 4_096 };
        set(
            "sliding_window",
            json!(sliding_window.unwrap_or(default_window)),
        );
        if gemma3 {
            let local = self.float("rope.freq_base_swa")?.unwrap_or(1e4);
            set("rope_local_base_freq", json!(local));
        }
        let period = self.window_period(if gemma3 { 6 } else { 2 })?;
        if gemma3 {
            set("sliding_window_pattern", json!(period));
        }
        let layer_types: Vec<&str> = (1..=dimensions.layers as u64)
            .map(|layer| {
                if layer.is_multiple_of(period) {
                    "full_attention"
                } else {
                    "sliding_attention"
                }
            })
            .collect();
        set("layer_types", json!(layer_types));
        Ok(())
    }

    /// Every how many layers one sees the whole context.
    fn window_period(&self, default: u64) -> Result<u64, GgufError> {
        let period = self.integer("attention.sliding_window_pattern")?;
        Ok(period.filter(|&period| period > 0).unwrap_or(default))
    }

    fn rope_scaling(
        &self,
        config: &mut Map<String, Value>,
        head_dim: u64,
    ) -> Result<Option<Value>, GgufError> {
        if let Some(divisors) = self.rope_divisors("rope_freqs.weight")? {
            let base = config["rope_theta"].as_f64().unwrap_or(1e4);
            return llama3_scaling(&divisors, base, head_dim, self.original_context()?);
        }
        let long = self.rope_divisors("rope_factors_long.weight")?;
        let short = self.rope_divisors("rope_factors_short.weight")?;
        if let (Some(long), Some(short)) = (long, short) {
            let original = self
                .original_context()?
                .ok_or_else(|| GgufError::MissingKey {
                    key: self.key("rope.scaling.original_context_length"),
                    expected: "the context length before longrope",
                })?;
            config.insert(
                "original_max_position_embeddings".to_owned(),
                json!(original),
            );
            let decimals = |divisors: Vec<f32>| {
                divisors
                    .into_iter()
                    .map(shortest_decimal)
                    .collect::<Vec<_>>()
            };
            return Ok(Some(json!({
                "type": "longrope",
                "rope_type": "longrope",
                "long_factor": decimals(long),
                "short_factor": decimals(short),
            })));
        }
        self.named_rope_scaling()
    }

    /// Scaling by `rope.scaling.type`, or by the key of old files.
    fn named_rope_scaling(&self) -> Result<Option<Value>, GgufError> {
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.float("rope.scale_linear")?,
        };
        let type_key = self.key("rope.scaling.type");
        let scaling_type = self.metadata().text(&type_key)?;
        let factor = match (scaling_type, factor) {
            (Some("none"), _) | (None, None) => return Ok(None),
            (_, Some(factor)) => factor,
            (Some(_), None) => {
                return Err(GgufError::MissingKey {
                    key: self.key("rope.scaling.factor"),
                    expected: "the factor that the scaling type needs",
                });
            }
        };
        match scaling_type {
            None | Some("linear") => Ok((factor != 1.0)
                .then(|| json!({"type": "linear", "rope_type": "linear", "factor": factor}))),
            Some("yarn") => {
                let mut scaling = json!({"type": "yarn", "rope_type": "yarn", "factor": factor});
                if let Some(original) = self.original_context()? {
                    scaling["original_max_position_embeddings"] = json!(original);
                }
                if let Some(attention) = self.float("rope.scaling.attn_factor")? {
                    scaling["attention_factor"] = json!(attention);
                }
                Ok(Some(scaling))
            }
            Some(other) => Err(GgufError::Unsupported {
                what: type_key,
                found: other.to_owned(),
                supported: "none, linear, yarn, and longrope with its tensors".to_owned(),
            }),
        }
    }

    fn original_context(&self) -> Result<Option<u64>, GgufError> {
        self.integer("rope.scaling.original_context_length")
    }

    /// The divisors of a rope tensor; `None` without it.
    fn rope_divisors(&self, name: &str) -> Result<Option<Vec<f32>>, GgufError> {
        let tensors = &self.file.header().tensors;
        let Some(tensor) = tensors.iter().find(|tensor| tensor.name == name) else {
            return Ok(None);
        };
        // A head has few frequencies; a larger tensor is not what its name says.
        if tensor.shape.len() != 1 || tensor.shape[0] > 4_096 {
            return Err(GgufError::malformed(
                format!("tensor `{name}`: shape"),
                format!("{:?}", tensor.shape),
                "one divisor for each of a head's frequencies",
            ));
        }
        let mut divisors = vec![0.0; tensor.elements()];
        super::dequantize(tensor.ggml_type, self.file.data(tensor), &mut divisors);
        if let Some(bad) = divisors.iter().find(|d| !(d.is_finite() && **d > 0.0)) {
            return Err(GgufError::malformed(
                format!("tensor `{name}`: divisor"),
                bad,
                "a positive number",
            ));
        }
        Ok(Some(divisors))
    }
}

/// The llama3 scaling whose result `divisors` are.
///
/// Only the ratio of the parameters shows in the result, and every published model has the low
/// factor 1, the high factor 4 and the original context 8192; so these are assumed and the
/// divisors compared with what follows from them: `wavelength = 2 pi base^(2 i / head_dim)`;
/// 1 where it is below `original / high`, `factor` above `original / low`, and between them the
/// inverse of the two inverses' mean weighted by
/// `(original / wavelength - low) / (high - low)`.
fn llama3_scaling(
    divisors: &[f32],
    base: f64,
    head_dim: u64,
    original: Option<u64>,
) -> Result<Option<Value>, GgufError> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let original = original.unwrap_or(8_192);
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    if divisors.iter().all(|&divisor| divisor == 1.0) {
        return Ok(None);
    }
    let expected = (0..head_dim / 2).map(|i| {
        let wavelength = std::f64::consts::TAU * base.powf(2.0 * i as f64 / head_dim as f64);
        let turns = original as f64 / wavelength;
        if turns > HIGH {
            1.0
        } else if turns < LOW {
            factor
        } else {
            let smooth = (turns - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    });
    let matches = divisors.len() as u64 == head_dim / 2
        && expected
            .zip(divisors)
            .all(|(expected, &found)| (expected - f64::from(found)).abs() <= 1e-3 * expected);
    if !matches {
        return Err(GgufError::Unsupported {
            what: "tensor `rope_freqs.weight`".to_owned(),
            found: format!("{} divisors of up to {factor}", divisors.len()),
            supported: format!(
                "the {} divisors of llama3 scaling with low factor 1, high factor 4 and \
                 original context {original}",
                head_dim / 2
            ),
        });
    }
    Ok(Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": original,
    })))
}
