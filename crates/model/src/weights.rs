//! Which stored tensors are which weights of a model, checked against `config.json` from
//! headers alone.
//!
//! Names are those of Hugging Face; EXL2 files use the same with fused sources split.

use std::ops::Range;

use oxllama_format::{Encoding, FormatError, GptqConfig, LinearHeader, LinearSource, TensorSource};

use crate::{BlockShape, ModelError, ModelSpec};

/// The seven linears of a layer.
#[derive(Debug)]
pub(crate) struct LayerLinears<L> {
    /// `[heads · head_dim, hidden]`
    pub(crate) query: L,
    /// `[kv_heads · head_dim, hidden]`
    pub(crate) key: L,
    /// `[kv_heads · head_dim, hidden]`
    pub(crate) value: L,
    /// `[hidden, heads · head_dim]`
    pub(crate) output: L,
    /// `[intermediate, hidden]`
    pub(crate) gate: L,
    /// `[intermediate, hidden]`
    pub(crate) up: L,
    /// `[hidden, intermediate]`
    pub(crate) down: L,
}

impl<L> LayerLinears<L> {
    /// All of them, in the order in which they are loaded.
    pub(crate) fn as_array(&self) -> [&L; 7] {
        [
            &self.query,
            &self.key,
            &self.value,
            &self.output,
            &self.gate,
            &self.up,
            &self.down,
        ]
    }
}

/// The norms of a layer: `N` over the row's width, `H` by head.
#[derive(Debug)]
pub(crate) struct LayerNorms<N, H> {
    /// Before attention (and, in parallel blocks, before the MLP).
    pub(crate) attention: N,
    /// Of the attention's result (Gemma 2 and 3).
    pub(crate) post_attention: Option<N>,
    /// Before the MLP; none in parallel blocks.
    pub(crate) mlp: Option<N>,
    /// Of the MLP's result (Gemma 2 and 3).
    pub(crate) post_mlp: Option<N>,
    /// Of the query heads.
    pub(crate) query: Option<H>,
    /// Of the key heads.
    pub(crate) key: Option<H>,
}

impl<N, H> LayerNorms<N, H> {
    /// The norms over the row's width.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &N> {
        [
            Some(&self.attention),
            self.post_attention.as_ref(),
            self.mlp.as_ref(),
            self.post_mlp.as_ref(),
        ]
        .into_iter()
        .flatten()
    }

    /// The norms by head.
    pub(crate) fn heads(&self) -> impl Iterator<Item = &H> {
        self.query.iter().chain(&self.key)
    }

    /// The same norms, each made into another value.
    /// Both functions work on `context`, one after the other.
    pub(crate) fn try_map<C, N2, H2, E>(
        &self,
        context: &mut C,
        row: impl Fn(&N, &mut C) -> Result<N2, E>,
        head: impl Fn(&H, &mut C) -> Result<H2, E>,
    ) -> Result<LayerNorms<N2, H2>, E> {
        let mut optional_row = |norm: &Option<N>| {
            let norm = norm.as_ref();
            norm.map(|norm| row(norm, context)).transpose()
        };
        let post_attention = optional_row(&self.post_attention)?;
        let mlp = optional_row(&self.mlp)?;
        let post_mlp = optional_row(&self.post_mlp)?;
        let attention = row(&self.attention, context)?;
        let mut optional_head = |norm: &Option<H>| {
            let norm = norm.as_ref();
            norm.map(|norm| head(norm, context)).transpose()
        };
        Ok(LayerNorms {
            attention,
            post_attention,
            mlp,
            post_mlp,
            query: optional_head(&self.query)?,
            key: optional_head(&self.key)?,
        })
    }
}

/// Where a linear is stored.
#[derive(Debug, Clone)]
pub(crate) struct StoredLinear {
    /// Name without the suffix that tells the encoding.
    pub(crate) key: String,
    /// Outputs to take of a fused source; `None`: all.
    part: Option<Range<usize>>,
    /// Of the part that is taken.
    pub(crate) header: LinearHeader,
}

impl StoredLinear {
    /// Reads and checks the weights.
    pub(crate) fn read<'a>(
        &self,
        tensors: &'a dyn TensorSource,
        gptq: &GptqConfig,
    ) -> Result<LinearSource<'a>, FormatError> {
        let whole = LinearSource::load(tensors, &self.key, gptq, 1.0)?;
        match &self.part {
            Some(part) => whole.slice_outputs(part.clone()),
            None => Ok(whole),
        }
    }

    /// How a user tells it from its neighbours, e.g. `…qkv_proj[0..64]`.
    pub(crate) fn label(&self) -> String {
        match &self.part {
            Some(Range { start, end }) => format!("{}[{start}..{end}]", self.key),
            None => self.key.clone(),
        }
    }
}

/// Where a norm over the row's width, `[hidden]`, is stored.
#[derive(Debug, Clone)]
pub(crate) struct StoredNorm {
    /// Full tensor name.
    pub(crate) name: String,
}

/// Where the norm of the query or key heads is stored.
#[derive(Debug, Clone)]
pub(crate) struct StoredHeadNorm {
    /// Full tensor name.
    pub(crate) name: String,
    /// How many heads it is for.
    pub(crate) heads: usize,
}

/// One layer of the files.
pub(crate) struct StoredLayer {
    pub(crate) linears: LayerLinears<StoredLinear>,
    pub(crate) norms: LayerNorms<StoredNorm, StoredHeadNorm>,
}

/// Every weight of a model, found in its files.
pub(crate) struct StoredWeights {
    /// Float, `[vocabulary or more, hidden]`.
    pub(crate) embedding: StoredLinear,
    pub(crate) layers: Vec<StoredLayer>,
    pub(crate) final_norm: StoredNorm,
    /// `None`: the embedding is the head.
    pub(crate) head: Option<StoredLinear>,
}

impl StoredWeights {
    /// Finds and checks every weight that `spec` asks for.
    ///
    /// # Errors
    /// A weight is missing, contradicts the configuration, or its header is malformed.
    pub(crate) fn find(
        tensors: &dyn TensorSource,
        gptq: &GptqConfig,
        spec: &ModelSpec,
    ) -> Result<Self, ModelError> {
        let finder = Finder {
            tensors,
            gptq,
            spec,
        };
        let (prefix, head_key) = finder.prefix()?;
        let layers = (0..spec.layers.len())
            .map(|index| finder.layer(&format!("{prefix}layers.{index}.")))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            embedding: finder.embedding(&format!("{prefix}embed_tokens"))?,
            layers,
            final_norm: finder.norm(format!("{prefix}norm.weight"))?,
            head: finder.head(head_key)?,
        })
    }

    /// The linear that makes logits.
    pub(crate) fn head_linear(&self) -> &StoredLinear {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// What a linear must look like.
struct Expected<'e> {
    what: &'e str,
    in_features: usize,
    out_features: usize,
    /// The keys that the extents come from.
    reason: &'e str,
    bias: bool,
    bias_key: &'static str,
}

struct Finder<'a> {
    tensors: &'a dyn TensorSource,
    gptq: &'a GptqConfig,
    spec: &'a ModelSpec,
}

impl Finder<'_> {
    /// The prefix of the text model's names and the key of its head: the first candidate
    /// with embeddings.
    fn prefix(&self) -> Result<(&'static str, &'static str), ModelError> {
        let candidates = [
            ("model.", "lm_head"),
            ("language_model.model.", "language_model.lm_head"),
            ("model.language_model.", "lm_head"),
        ];
        for (prefix, head) in candidates {
            let key = format!("{prefix}embed_tokens");
            if LinearHeader::find(self.tensors, &key, self.gptq)?.is_some() {
                return Ok((prefix, head));
            }
        }
        Err(ModelError::MissingWeight {
            tensor: "model.embed_tokens.weight".to_owned(),
            expected: "the embedding matrix, under this name or language_model.model.*".to_owned(),
        })
    }

    fn layer(&self, prefix: &str) -> Result<StoredLayer, ModelError> {
        Ok(StoredLayer {
            linears: self.layer_linears(prefix)?,
            norms: self.layer_norms(prefix)?,
        })
    }

    fn layer_linears(&self, prefix: &str) -> Result<LayerLinears<StoredLinear>, ModelError> {
        let spec = self.spec;
        let (hidden, intermediate) = (spec.hidden_size, spec.intermediate_size);
        let (query_width, kv_width) = (spec.query_width(), spec.kv_width());
        let attention = |what, in_features, out_features, bias| Expected {
            what,
            in_features,
            out_features,
            reason: "hidden_size, num_attention_heads, num_key_value_heads and head_dim",
            bias,
            bias_key: "attention_bias",
        };
        let mlp = |what, in_features, out_features| Expected {
            what,
            in_features,
            out_features,
            reason: "hidden_size and intermediate_size",
            bias: spec.biases.mlp,
            bias_key: "mlp_bias",
        };
        let of_qkv = |name: &str, what, start: usize, width: usize| {
            let fused = Fused {
                key: format!("{prefix}self_attn.qkv_proj"),
                out_features: query_width + 2 * kv_width,
                start,
            };
            let expected = attention(what, hidden, width, spec.biases.qkv);
            self.part(format!("{prefix}self_attn.{name}"), fused, &expected)
        };
        let of_gate_up = |name: &str, what, start: usize| {
            let fused = Fused {
                key: format!("{prefix}mlp.gate_up_proj"),
                out_features: 2 * intermediate,
                start,
            };
            let expected = mlp(what, hidden, intermediate);
            self.part(format!("{prefix}mlp.{name}"), fused, &expected)
        };
        Ok(LayerLinears {
            query: of_qkv("q_proj", "the query projection", 0, query_width)?,
            key: of_qkv("k_proj", "the key projection", query_width, kv_width)?,
            value: of_qkv(
                "v_proj",
                "the value projection",
                query_width + kv_width,
                kv_width,
            )?,
            output: self.linear(
                format!("{prefix}self_attn.o_proj"),
                &attention(
                    "the attention's output projection",
                    query_width,
                    hidden,
                    spec.biases.output,
                ),
            )?,
            gate: of_gate_up("gate_proj", "the MLP's gate projection", 0)?,
            up: of_gate_up("up_proj", "the MLP's up projection", intermediate)?,
            down: self.linear(
                format!("{prefix}mlp.down_proj"),
                &mlp("the MLP's down projection", intermediate, hidden),
            )?,
        })
    }

    fn layer_norms(
        &self,
        prefix: &str,
    ) -> Result<LayerNorms<StoredNorm, StoredHeadNorm>, ModelError> {
        let norm = |name: &str| self.norm(format!("{prefix}{name}.weight"));
        let (post_attention, mlp, post_mlp) = match self.spec.block {
            BlockShape::Sequential => (None, Some(norm("post_attention_layernorm")?), None),
            BlockShape::SandwichNorms => (
                Some(norm("post_attention_layernorm")?),
                Some(norm("pre_feedforward_layernorm")?),
                Some(norm("post_feedforward_layernorm")?),
            ),
            BlockShape::Parallel => (None, None, None),
        };
        let head_norm = |name: &str, heads: usize| match self.spec.head_norm {
            Some(_) => {
                let name = format!("{prefix}self_attn.{name}.weight");
                self.head_norm(name, heads).map(Some)
            }
            None => Ok(None),
        };
        Ok(LayerNorms {
            attention: norm("input_layernorm")?,
            post_attention,
            mlp,
            post_mlp,
            query: head_norm("q_norm", self.spec.heads)?,
            key: head_norm("k_norm", self.spec.kv_heads)?,
        })
    }

    fn embedding(&self, key: &str) -> Result<StoredLinear, ModelError> {
        let table = self.vocabulary_matrix(key, "the embedding matrix")?;
        match table.header.encoding {
            Encoding::Float(_) => Ok(table),
            other => Err(ModelError::Contradiction {
                tensor: key.to_owned(),
                what: "encoding",
                found: format!("{other:?}"),
                expected: "unquantised".to_owned(),
                reason: "looking up rows".to_owned(),
            }),
        }
    }

    /// The head, unless it is the embedding matrix: a quantised head counts even where the
    /// configuration ties the two (EXL2 always stores one), a float one then is a copy.
    fn head(&self, key: &str) -> Result<Option<StoredLinear>, ModelError> {
        if self.spec.tied_head {
            match LinearHeader::find(self.tensors, key, self.gptq)? {
                None => return Ok(None),
                Some(header) if matches!(header.encoding, Encoding::Float(_)) => return Ok(None),
                Some(_) => {}
            }
        }
        self.vocabulary_matrix(key, "the head").map(Some)
    }

    /// A matrix of one row for each token, perhaps padded.
    fn vocabulary_matrix(&self, key: &str, what: &str) -> Result<StoredLinear, ModelError> {
        let Some(header) = LinearHeader::find(self.tensors, key, self.gptq)? else {
            return Err(missing(key, what));
        };
        self.check_in_features(key, &header, self.spec.hidden_size, "hidden_size")?;
        let vocab_size = self.spec.vocab_size;
        // EXL2 pads heads to 32 outputs; training scripts pad embeddings to 64 tokens.
        let padded = vocab_size.next_multiple_of(64);
        if !(vocab_size..=padded).contains(&header.out_features) {
            return Err(ModelError::Contradiction {
                tensor: key.to_owned(),
                what: "number of tokens",
                found: header.out_features.to_string(),
                expected: format!("{vocab_size}, or padded up to {padded}"),
                reason: "vocab_size".to_owned(),
            });
        }
        self.check_bias(key, &header, false, "lm_head_bias")?;
        Ok(StoredLinear {
            key: key.to_owned(),
            part: None,
            header,
        })
    }

    /// A linear that may be part of a fused one.
    fn part(
        &self,
        key: String,
        fused: Fused,
        expected: &Expected<'_>,
    ) -> Result<StoredLinear, ModelError> {
        if LinearHeader::find(self.tensors, &key, self.gptq)?.is_some() {
            return self.linear(key, expected);
        }
        let Some(header) = LinearHeader::find(self.tensors, &fused.key, self.gptq)? else {
            let what = format!("{}, or fused in {}", expected.what, fused.key);
            return Err(missing(&key, &what));
        };
        let whole = Expected {
            out_features: fused.out_features,
            ..*expected
        };
        self.check(&fused.key, &header, &whole)?;
        Ok(StoredLinear {
            key: fused.key,
            part: Some(fused.start..fused.start + expected.out_features),
            header: LinearHeader {
                out_features: expected.out_features,
                ..header
            },
        })
    }

    fn linear(&self, key: String, expected: &Expected<'_>) -> Result<StoredLinear, ModelError> {
        let Some(header) = LinearHeader::find(self.tensors, &key, self.gptq)? else {
            return Err(missing(&key, expected.what));
        };
        self.check(&key, &header, expected)?;
        Ok(StoredLinear {
            key,
            part: None,
            header,
        })
    }

    fn check(
        &self,
        key: &str,
        header: &LinearHeader,
        expected: &Expected<'_>,
    ) -> Result<(), ModelError> {
        self.check_in_features(key, header, expected.in_features, expected.reason)?;
        if header.out_features != expected.out_features {
            return Err(ModelError::Contradiction {
                tensor: key.to_owned(),
                what: "out_features",
                found: header.out_features.to_string(),
                expected: expected.out_features.to_string(),
                reason: expected.reason.to_owned(),
            });
        }
        self.check_bias(key, header, expected.bias, expected.bias_key)
    }

    fn check_in_features(
        &self,
        key: &str,
        header: &LinearHeader,
        in_features: usize,
        reason: &str,
    ) -> Result<(), ModelError> {
        if header.in_features == in_features {
            return Ok(());
        }
        Err(ModelError::Contradiction {
            tensor: key.to_owned(),
            what: "in_features",
            found: header.in_features.to_string(),
            expected: in_features.to_string(),
            reason: reason.to_owned(),
        })
    }

    fn check_bias(
        &self,
        key: &str,
        header: &LinearHeader,
        expected: bool,
        bias_key: &str,
    ) -> Result<(), ModelError> {
        let tensor = format!("{key}.bias");
        match (header.bias, expected) {
            (false, true) => Err(missing(
                &tensor,
                &format!("a bias, by {bias_key} or the family"),
            )),
            // GPTQ writers store biases of zeros for every linear; adding them is harmless.
            (true, false) if !matches!(header.encoding, Encoding::Gptq { .. }) => {
                Err(ModelError::UnexpectedWeight {
                    tensor,
                    key: bias_key.to_owned(),
                    value: "false".to_owned(),
                })
            }
            _ => Ok(()),
        }
    }

    fn norm(&self, name: String) -> Result<StoredNorm, ModelError> {
        let hidden = self.spec.hidden_size;
        self.check_vector(&name, &[&[hidden]], "hidden_size")?;
        Ok(StoredNorm { name })
    }

    fn head_norm(&self, name: String, heads: usize) -> Result<StoredHeadNorm, ModelError> {
        let head_dim = self.spec.head_dim;
        let shapes: [&[usize]; 2] = [&[head_dim], &[heads, head_dim]];
        self.check_vector(&name, &shapes, "head_dim and the number of heads")?;
        Ok(StoredHeadNorm { name, heads })
    }

    fn check_vector(
        &self,
        name: &str,
        shapes: &[&[usize]],
        reason: &str,
    ) -> Result<(), ModelError> {
        let Some(info) = self.tensors.info(name) else {
            return Err(missing(name, "a norm's weights"));
        };
        if !info.dtype.is_float() {
            return Err(ModelError::Contradiction {
                tensor: name.to_owned(),
                what: "dtype",
                found: info.dtype.to_string(),
                expected: "F16, BF16 or F32".to_owned(),
                reason: "being a norm".to_owned(),
            });
        }
        if shapes.contains(&&info.shape[..]) {
            return Ok(());
        }
        let expected: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
        Err(ModelError::Contradiction {
            tensor: name.to_owned(),
            what: "shape",
            found: format!("{:?}", info.shape),
            expected: expected.join(" or "),
            reason: reason.to_owned(),
        })
    }
}

/// A place in a fused linear.
struct Fused {
    key: String,
    out_features: usize,
    start: usize,
}

fn missing(tensor: &str, expected: &str) -> ModelError {
    ModelError::MissingWeight {
        tensor: tensor.to_owned(),
        expected: expected.to_owned(),
    }
}
