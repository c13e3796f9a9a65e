//! A model family as a value: everything the one decoder needs to know.

use oxllama_backend::{Activation, NormKind, Rope};
use serde_json::Value;

use crate::config::{Config, MAX_POSITIONS};
use crate::{ModelError, RopeOverrides, RopeScaling, RopeSpec, families, rope};

/// What a model is: extents, formulas and tensor names, read from `config.json`.
///
/// A value of this type is consistent: extents are within bounds, `heads` is a multiple of
/// `kv_heads`, every rope's rotated part fits a head, every layer's rope exists.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `architectures[0]`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple of it, neighbouring query heads share one.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Tokens. The head's stored outputs may be more (padding), its embeddings' rows too.
    pub vocab_size: usize,
    /// Tokens of the longest context that the model was made for.
    pub max_position_embeddings: usize,
    /// Normalisations over a row.
    pub norm: NormSpec,
    /// Normalisation of query and key heads before the rotation.
    pub head_norm: Option<NormSpec>,
    /// Function of the MLP's gate.
    pub activation: Activation,
    /// Which norms and branches a layer has.
    pub block: BlockShape,
    /// Which linears have a bias.
    pub biases: Biases,
    /// Multiplies attention scores.
    pub attention_scale: f32,
    /// `Some(c)`: scores become `c · tanh(score / c)`.
    pub attention_softcap: Option<f32>,
    /// Multiplies embeddings.
    pub embedding_scale: f32,
    /// Multiplies each branch before it is added to the residual stream.
    pub residual_scale: f32,
    /// Multiplies logits.
    pub logit_scale: f32,
    /// `Some(c)`: logits become `c · tanh(logit / c)`.
    pub logit_softcap: Option<f32>,
    /// Whether the head is the embedding matrix. A head of its own in the files (EXL2 always
    /// has one) is used all the same.
    pub tied_head: bool,
    /// What differs from layer to layer.
    pub layers: Vec<LayerSpec>,
    /// The model's rotary embeddings; index 0 is the one that overrides apply to.
    pub ropes: Vec<RopeSpec>,
    /// What a user changed about `ropes[0]`.
    pub rope_overrides: RopeOverrides,
}

/// A normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// Formula.
    pub kind: NormKind,
    /// Added to the mean square or variance.
    pub epsilon: f32,
    /// Added to the stored weights (Gemma: 1).
    pub weight_offset: f32,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpec {
    /// `Some(w)`: a position sees itself and the `w − 1` before it.
    pub window: Option<usize>,
    /// Index into [`ModelSpec::ropes`]; `None`: not rotated.
    pub rope: Option<usize>,
}

/// Which norms and branches a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockShape {
    /// `x += attention(norm₁ x); x += mlp(norm₂ x)`
    Sequential,
    /// `x += norm₂ attention(norm₁ x); x += norm₄ mlp(norm₃ x)` (Gemma 2 and 3)
    SandwichNorms,
    /// `n = norm x; x += attention(n) + mlp(n)` (Cohere)
    Parallel,
}

/// Which linears have a bias. (The head never has.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// Query, key and value projections.
    pub qkv: bool,
    /// The attention's output projection.
    pub output: bool,
    /// Gate, up and down projections.
    pub mlp: bool,
}

impl ModelSpec {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`ModelError::UnknownArchitecture`], or [`ModelError::Config`] naming the key.
    pub fn from_config(config: &Value) -> Result<Self, ModelError> {
        families::read(&Config::new(config)?)
    }

    /// The same model with `overrides` of its main rope.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a factor that is not a positive finite number.
    pub fn with_rope_overrides(mut self, overrides: RopeOverrides) -> Result<Self, ModelError> {
        let RopeOverrides { scale, alpha, yarn } = overrides;
        for (key, factor) in [
            ("rope_scale", scale),
            ("rope_alpha", alpha),
            ("rope_yarn", yarn),
        ] {
            let range = 1.0e-3..=1.0e6;
            if let Some(factor) = factor.filter(|factor| !range.contains(factor)) {
                return Err(ModelError::Config {
                    key: key.to_owned(),
                    found: factor.to_string(),
                    expected: "a factor of 0.001 to 1000000".to_owned(),
                });
            }
        }
        self.rope_overrides = overrides;
        Ok(self)
    }

    /// The ropes of a model loaded for sequences of up to `planned_context` tokens, in the
    /// order of [`ModelSpec::ropes`].
    pub fn ropes_for(&self, planned_context: usize) -> Vec<Rope> {
        let of_index = |(index, spec): (usize, &RopeSpec)| {
            let overrides = match index {
                0 => self.rope_overrides,
                _ => RopeOverrides::default(),
            };
            rope(
                spec,
                &overrides,
                planned_context,
                self.max_position_embeddings,
            )
        };
        self.ropes.iter().enumerate().map(of_index).collect()
    }

    /// Width of the queries: `heads · head_dim`.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys and of the values: `kv_heads · head_dim`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Tokens of the longest context that can be planned: the model's own, stretched by what
    /// a user's overrides or dynamic scaling add.
    pub fn max_context_tokens(&self) -> usize {
        let RopeOverrides { scale, alpha, yarn } = self.rope_overrides;
        let dynamic = self.ropes.first().and_then(|rope| match rope.scaling {
            RopeScaling::Dynamic { factor, .. } => Some(factor),
            _ => None,
        });
        let stretch = [scale, alpha, yarn, dynamic]
            .into_iter()
            .flatten()
            .fold(1.0, f64::max);
        let stretched = self.max_position_embeddings as f64 * stretch;
        (stretched as usize).min(MAX_POSITIONS)
    }
}
