//! Model families: which tensors a family has, under which names, and its `config.json`.
//!
//! llama.cpp's names and conventions on the one side, Hugging Face's on the other. Where they
//! differ in substance:
//! - `llama` files store the rows of q and k with the two halves of each rotary pair side by
//!   side; Hugging Face keeps the halves of the head apart ([`Transform::SplitRotaryPairs`]);
//! - `gemma` files store norm weights with the 1 already added ([`Transform::SubtractOne`]);
//! - llama3 rope scaling is stored as its result, one divisor for each frequency
//!   (`rope_freqs.weight`), and longrope as two tensors of such divisors.

use super::GgufError;

/// What has to be done to a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transform {
    /// Nothing.
    Keep,
    /// Row `2 i + j` of each of `heads` heads becomes row `j half + i`.
    SplitRotaryPairs {
        /// Heads that the rows divide into.
        heads: usize,
    },
    /// The stored weight is the norm's factor; Hugging Face adds the 1 when it runs.
    SubtractOne,
}

/// Which heads a projection's rows belong to, as far as reordering them is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Query,
    Key,
    Norm,
    Other,
}

/// A tensor of each layer: its stem in the file, its stem in Hugging Face's layout, its role.
type LayerTensor = (&'static str, &'static str, Role);

const ATTENTION: &[LayerTensor] = &[
    ("attn_norm", "input_layernorm", Role::Norm),
    ("attn_q", "self_attn.q_proj", Role::Query),
    ("attn_k", "self_attn.k_proj", Role::Key),
    ("attn_v", "self_attn.v_proj", Role::Other),
    ("attn_output", "self_attn.o_proj", Role::Other),
];
const QK_NORMS: &[LayerTensor] = &[
    ("attn_q_norm", "self_attn.q_norm", Role::Norm),
    ("attn_k_norm", "self_attn.k_norm", Role::Norm),
];
const MLP: &[LayerTensor] = &[
    ("ffn_gate", "mlp.gate_proj", Role::Other),
    ("ffn_up", "mlp.up_proj", Role::Other),
    ("ffn_down", "mlp.down_proj", Role::Other),
];
const FFN_NORM: &[LayerTensor] = &[("ffn_norm", "post_attention_layernorm", Role::Norm)];
const FOUR_NORMS: &[LayerTensor] = &[
    (
        "post_attention_norm",
        "post_attention_layernorm",
        Role::Norm,
    ),
    ("ffn_norm", "pre_feedforward_layernorm", Role::Norm),
    ("post_ffw_norm", "post_feedforward_layernorm", Role::Norm),
];
const PHI3: &[LayerTensor] = &[
    ("attn_norm", "input_layernorm", Role::Norm),
    ("attn_qkv", "self_attn.qkv_proj", Role::Other),
    ("attn_output", "self_attn.o_proj", Role::Other),
    ("ffn_norm", "post_attention_layernorm", Role::Norm),
    ("ffn_up", "mlp.gate_up_proj", Role::Other),
    ("ffn_down", "mlp.down_proj", Role::Other),
];

/// A model family as data.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// `general.architecture`, which is also the prefix of the family's metadata keys.
    pub(crate) name: &'static str,
    /// Hugging Face's `model_type`.
    pub(crate) model_type: &'static str,
    /// Hugging Face's class.
    pub(crate) class: &'static str,
    /// Tensors of each layer; every weight is required, every bias optional.
    layer_tensors: &'static [&'static [LayerTensor]],
    /// Whether q and k rows are stored in rotary pairs.
    rotary_pairs: bool,
    /// Whether norm weights are stored with 1 added.
    norms_plus_one: bool,
    /// Whether Hugging Face's class assumes a padding token where `config.json` is silent.
    pub(crate) assumes_padding: bool,
}

/// Every family that can be converted.
const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        model_type: "llama",
        class: "LlamaForCausalLM",
        layer_tensors: &[ATTENTION, FFN_NORM, MLP],
        rotary_pairs: true,
        norms_plus_one: false,
        assumes_padding: false,
    },
    Architecture {
        name: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        layer_tensors: &[ATTENTION, FFN_NORM, MLP],
        rotary_pairs: false,
        norms_plus_one: false,
        assumes_padding: false,
    },
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        layer_tensors: &[ATTENTION, QK_NORMS, FFN_NORM, MLP],
        rotary_pairs: false,
        norms_plus_one: false,
        assumes_padding: false,
    },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        class: "Gemma2ForCausalLM",
        layer_tensors: &[ATTENTION, FOUR_NORMS, MLP],
        rotary_pairs: false,
        norms_plus_one: true,
        assumes_padding: true,
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        layer_tensors: &[ATTENTION, QK_NORMS, FOUR_NORMS, MLP],
        rotary_pairs: false,
        norms_plus_one: true,
        assumes_padding: true,
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        layer_tensors: &[PHI3],
        rotary_pairs: false,
        norms_plus_one: false,
        assumes_padding: true,
    },
];

/// Heads and layers, for naming and reordering.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dimensions {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
}

impl Architecture {
    /// The family with this name in the file.
    pub(crate) fn find(name: &str) -> Result<&'static Self, GgufError> {
        ARCHITECTURES
            .iter()
            .find(|architecture| architecture.name == name)
            .ok_or_else(|| GgufError::UnknownArchitecture {
                found: name.to_owned(),
                supported: ARCHITECTURES
                    .iter()
                    .map(|architecture| architecture.name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    fn layer_tensor(&self, stem: &str) -> Option<LayerTensor> {
        self.layer_tensors
            .iter()
            .flat_map(|tensors| tensors.iter())
            .find(|(gguf, _, _)| *gguf == stem)
            .copied()
    }

    fn transform(&self, role: Role, dimensions: Dimensions) -> Transform {
        match role {
            Role::Query if self.rotary_pairs => Transform::SplitRotaryPairs {
                heads: dimensions.heads,
            },
            Role::Key if self.rotary_pairs => Transform::SplitRotaryPairs {
                heads: dimensions.kv_heads,
            },
            Role::Norm if self.norms_plus_one => Transform::SubtractOne,
            _ => Transform::Keep,
        }
    }

    /// Hugging Face's name of the file's tensor `name`, and what to do to its elements.
    ///
    /// `Ok(None)` for tensors that only feed the configuration.
    pub(crate) fn map_tensor(
        &self,
        name: &str,
        dimensions: Dimensions,
    ) -> Result<Option<(String, Transform)>, GgufError> {
        let unexpected = || GgufError::UnexpectedTensor {
            tensor: name.to_owned(),
            architecture: self.name.to_owned(),
        };
        let mapped = match name {
            "token_embd.weight" => ("model.embed_tokens.weight".to_owned(), Transform::Keep),
            "output.weight" => ("lm_head.weight".to_owned(), Transform::Keep),
            "output_norm.weight" => (
                "model.norm.weight".to_owned(),
                self.transform(Role::Norm, dimensions),
            ),
            "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight" => {
                return Ok(None);
            }
            _ => {
                let (layer, rest) = name
                    .strip_prefix("blk.")
                    .and_then(|rest| rest.split_once('.'))
                    .ok_or_else(unexpected)?;
                let (stem, kind) = rest.split_once('.').ok_or_else(unexpected)?;
                let index: usize = layer.parse().map_err(|_| unexpected())?;
                // `to_string` refuses other spellings of a number, such as `+1` and `01`.
                if index >= dimensions.layers
                    || index.to_string() != layer
                    || !matches!(kind, "weight" | "bias")
                {
                    return Err(unexpected());
                }
                if stem == "attn_rot_embd" || stem == "rope_freqs" {
                    return Ok(None);
                }
                let (_, hf, role) = self.layer_tensor(stem).ok_or_else(unexpected)?;
                (
                    format!("model.layers.{layer}.{hf}.{kind}"),
                    self.transform(role, dimensions),
                )
            }
        };
        Ok(Some(mapped))
    }

    /// Names in the file of every tensor that the family cannot do without.
    pub(crate) fn required_tensors(&self, layers: usize) -> impl Iterator<Item = String> + '_ {
        let top = ["token_embd.weight", "output_norm.weight"].map(str::to_owned);
        let per_layer = (0..layers).flat_map(move |layer| {
            self.layer_tensors
                .iter()
                .flat_map(|tensors| tensors.iter())
                .map(move |(stem, _, _)| format!("blk.{layer}.{stem}.weight"))
        });
        top.into_iter().chain(per_layer)
    }
}
