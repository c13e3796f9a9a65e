//! What most families share: a Llama-like configuration with family defaults.

use oxllama_backend::{Activation, NormKind, RopeStyle};

use super::rope::{RopeDefaults, read_rope};
use crate::config::{Config, MAX_EXTENT, MAX_LAYERS, MAX_POSITIONS};
use crate::{Biases, BlockShape, LayerSpec, ModelError, ModelSpec, NormSpec, RopeOverrides};

/// What a family's configuration class assumes where `config.json` says nothing.
pub(super) struct Defaults {
    /// `num_attention_heads`; `None`: the key must be there.
    pub heads: Option<usize>,
    /// `num_key_value_heads`; `None`: as many as query heads.
    pub kv_heads: Option<usize>,
    /// `head_dim`; `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// `vocab_size`; `None`: the key must be there.
    pub vocab_size: Option<usize>,
    /// `max_position_embeddings`; `None`: the key must be there.
    pub max_position_embeddings: Option<usize>,
    /// Formula of the norms.
    pub norm: NormKind,
    /// The key of the norm's epsilon.
    pub epsilon_key: &'static str,
    /// The norm's epsilon.
    pub epsilon: f64,
    /// Added to stored norm weights.
    pub norm_weight_offset: f32,
    /// Keys of the activation, the first present counts.
    pub activation_keys: &'static [&'static str],
    /// `hidden_act`
    pub activation: &'static str,
    /// `tie_word_embeddings`
    pub tied_head: bool,
    /// `rope_theta`
    pub theta: f64,
    /// Which dimensions form a rotary pair.
    pub rope_style: RopeStyle,
}

impl Defaults {
    /// Llama's.
    pub(super) const LLAMA: Self = Self {
        heads: None,
        kv_heads: None,
        head_dim: None,
        vocab_size: None,
        max_position_embeddings: None,
        norm: NormKind::Rms,
        epsilon_key: "rms_norm_eps",
        epsilon: 1e-6,
        norm_weight_offset: 0.0,
        activation_keys: &["hidden_act"],
        activation: "silu",
        tied_head: false,
        theta: 10_000.0,
        rope_style: RopeStyle::Halves,
    };

    /// What all Gemmas share.
    pub(super) const GEMMA: Self = Self {
        head_dim: Some(256),
        norm_weight_offset: 1.0,
        activation_keys: &["hidden_activation", "hidden_act"],
        activation: "gelu_pytorch_tanh",
        tied_head: true,
        ..Self::LLAMA
    };
}

/// A model of Llama's shape: sequential blocks, one rope, full attention in every layer,
/// no bias, every multiplier 1.
pub(super) fn read_base(config: &Config<'_>, defaults: &Defaults) -> Result<ModelSpec, ModelError> {
    let count = |key: &str, most: usize, default: Option<usize>| match default {
        Some(default) => config.count_or(key, most, default),
        None => config.count(key, most),
    };
    let hidden_size = config.count("hidden_size", MAX_EXTENT)?;
    let heads = count("num_attention_heads", MAX_EXTENT, defaults.heads)?;
    let kv_heads = config.count_or(
        "num_key_value_heads",
        MAX_EXTENT,
        defaults.kv_heads.unwrap_or(heads),
    )?;
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of the {heads} num_attention_heads");
        return Err(config.error("num_key_value_heads", expected));
    }
    let head_dim = read_head_dim(config, defaults, hidden_size, heads)?;
    let max_position_embeddings = count(
        "max_position_embeddings",
        MAX_POSITIONS,
        defaults.max_position_embeddings,
    )?;
    let layers = config.count("num_hidden_layers", MAX_LAYERS)?;
    let rope = read_rope(
        config,
        &RopeDefaults {
            theta: defaults.theta,
            style: defaults.rope_style,
            head_dim,
            max_position_embeddings,
        },
    )?;
    Ok(ModelSpec {
        architecture: String::new(),
        hidden_size,
        intermediate_size: config.count("intermediate_size", MAX_EXTENT)?,
        heads,
        kv_heads,
        head_dim,
        vocab_size: count("vocab_size", MAX_EXTENT, defaults.vocab_size)?,
        max_position_embeddings,
        norm: NormSpec {
            kind: defaults.norm,
            epsilon: config.positive_or(defaults.epsilon_key, defaults.epsilon)? as f32,
            weight_offset: defaults.norm_weight_offset,
        },
        head_norm: None,
        activation: read_activation(config, defaults)?,
        block: BlockShape::Sequential,
        biases: Biases::default(),
        attention_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        attention_softcap: None,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logit_scale: 1.0,
        logit_softcap: None,
        tied_head: config.flag_or("tie_word_embeddings", defaults.tied_head)?,
        layers: vec![
            LayerSpec {
                window: None,
                rope: Some(0),
            };
            layers
        ],
        ropes: vec![rope],
        rope_overrides: RopeOverrides::default(),
    })
}

fn read_head_dim(
    config: &Config<'_>,
    defaults: &Defaults,
    hidden_size: usize,
    heads: usize,
) -> Result<usize, ModelError> {
    let head_dim = match config
        .optional_count("head_dim", MAX_EXTENT)?
        .or(defaults.head_dim)
    {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a divisor of the {hidden_size} hidden_size, or a head_dim");
            return Err(config.error("num_attention_heads", expected));
        }
    };
    if head_dim.saturating_mul(heads) > MAX_EXTENT {
        let expected = format!("{heads} heads of it to be at most {MAX_EXTENT} wide");
        return Err(config.error("head_dim", expected));
    }
    Ok(head_dim)
}

fn read_activation(config: &Config<'_>, defaults: &Defaults) -> Result<Activation, ModelError> {
    let keys = defaults.activation_keys;
    let key = keys
        .iter()
        .find(|key| config.get(key).is_some())
        .unwrap_or(&keys[0]);
    match config.text(key)?.unwrap_or(defaults.activation) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::GeluErf),
        _ => Err(config.error(key, "silu, gelu or gelu_pytorch_tanh")),
    }
}

/// `attention_bias` as most families mean it: on query, key, value and output alike.
pub(super) fn read_attention_bias(
    config: &Config<'_>,
    spec: &mut ModelSpec,
) -> Result<(), ModelError> {
    let has_bias = config.flag_or("attention_bias", false)?;
    spec.biases.qkv = has_bias;
    spec.biases.output = has_bias;
    Ok(())
}

/// `sliding_window`, if it is set.
pub(super) fn read_window(config: &Config<'_>) -> Result<Option<usize>, ModelError> {
    config.optional_count("sliding_window", MAX_POSITIONS)
}

/// For each layer whether it slides: `layer_types` where that is given, else `rule`.
pub(super) fn read_sliding_layers(
    config: &Config<'_>,
    layers: usize,
    rule: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, ModelError> {
    let Some(types) = config.texts("layer_types", layers)? else {
        return Ok((0..layers).map(rule).collect());
    };
    let of_type = |text: &&str| match *text {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        _ => {
            let expected = "each one full_attention or sliding_attention";
            Err(config.error("layer_types", expected))
        }
    };
    types.iter().map(of_type).collect()
}

/// `1 / sqrt(query_pre_attn_scalar)`, as the later Gemmas scale attention.
pub(super) fn read_query_scale(config: &Config<'_>) -> Result<f32, ModelError> {
    let scalar = config.positive_or("query_pre_attn_scalar", 256.0)?;
    Ok((1.0 / scalar.sqrt()) as f32)
}
