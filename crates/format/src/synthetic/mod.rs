//! Models of real shapes with random weights, made on demand: for measuring a machine without a
//! download. Speed does not depend on the weights' values, only on shapes and bit widths.
//!
//! Every linear of the layers is EXL2 with groups of 128 rows of two neighbouring bit widths, the
//! head has 6 bits, the embedding is fp16. As the real quantiser writes them, the query, key and
//! value projections of a layer have one row order, and so have gate and up.

mod documents;
mod random;
mod shape;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;

pub use shape::{SyntheticShape, SyntheticShapeError};

use crate::{DType, EXL2_BITS, FormatError, TensorData, TensorInfo, TensorSource};

/// Rows of a group; the last one of a matrix may have fewer.
const GROUP_ROWS: usize = 128;

/// Bits of the head's codes.
const HEAD_BITS: f64 = 6.0;

/// Standard deviation of the embedding's values.
const EMBEDDING_DEVIATION: f64 = 0.02;

/// How the rows of one EXL2 matrix are cut into groups: the wider ones first, as EXL2 asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct GroupMix {
    in_features: usize,
    wide_bits: u32,
    wide_groups: usize,
    narrow_bits: u32,
}

impl GroupMix {
    /// The mix of the two neighbouring widths whose average over groups is closest to
    /// `bits_per_weight` (2 to 8).
    fn new(in_features: usize, bits_per_weight: f64) -> Self {
        let [widest, .., narrowest] = EXL2_BITS;
        let widths = EXL2_BITS.into_iter();
        let narrow_bits = widths
            .clone()
            .find(|&bits| f64::from(bits) <= bits_per_weight)
            .unwrap_or(narrowest);
        let wide_bits = widths
            .rev()
            .find(|&bits| bits > narrow_bits)
            .unwrap_or(widest);
        let above = bits_per_weight - f64::from(narrow_bits);
        let share = above / f64::from((wide_bits - narrow_bits).max(1));
        let groups = in_features.div_ceil(GROUP_ROWS);
        Self {
            in_features,
            wide_bits,
            wide_groups: (share * groups as f64).round_ties_even() as usize,
            narrow_bits,
        }
    }

    /// Bits and rows of each group.
    fn groups(self) -> impl ExactSizeIterator<Item = (u32, usize)> {
        (0..self.in_features.div_ceil(GROUP_ROWS)).map(move |group| {
            let bits = if group < self.wide_groups {
                self.wide_bits
            } else {
                self.narrow_bits
            };
            (bits, GROUP_ROWS.min(self.in_features - group * GROUP_ROWS))
        })
    }

    /// Rows of words that all groups take.
    fn words(self) -> usize {
        self.groups()
            .map(|(bits, rows)| group_words(bits, rows))
            .sum()
    }

    /// The content of `q_groups`: bits and first row of words of each group.
    fn q_groups(self) -> Vec<u8> {
        let mut first_word = 0;
        let mut pairs = Vec::with_capacity(4 * self.groups().len());
        for (bits, rows) in self.groups() {
            pairs.extend((bits as u16).to_le_bytes());
            pairs.extend((first_word as u16).to_le_bytes());
            first_word += group_words(bits, rows);
        }
        pairs
    }

    /// The content of `q_scale_max`: such that the weights' root mean square is
    /// 1/sqrt(in_features), which keeps the size of what goes through the matrix.
    ///
    /// A weight is `(code − 2^(bits−1)) · (e+1)² · q_scale_max / 256`. Over all codes the mean
    /// square of the first factor is (4^bits + 2) / 12; over all e from 0 to 15 that of the second
    /// is 243,848 / 16.
    fn q_scale_max(self) -> Vec<u8> {
        let scale_square = 243_848.0 / 16.0;
        let largest = |bits: u32| {
            let code_square = (f64::from(1u32 << (2 * bits)) + 2.0) / 12.0;
            256.0 / (self.in_features as f64 * code_square * scale_square).sqrt()
        };
        self.groups()
            .flat_map(|(bits, _)| f16::from_f64(largest(bits)).to_le_bytes())
            .collect()
    }
}

fn group_words(bits: u32, rows: usize) -> usize {
    rows / 32 * bits as usize
}

/// What a tensor is filled with.
#[derive(Debug, Clone, Copy)]
enum Content {
    /// Codes and their scales, of which every bit pattern is valid.
    Random,
    GroupTable(GroupMix),
    ScaleMaxima(GroupMix),
    /// Drawn from this seed, which matrices with the same input share.
    Permutation(u64),
    Gaussian,
    Ones,
}

/// The tensors of a synthetic model. Headers are made at once, data by every `read` anew.
pub(crate) struct SyntheticTensors {
    /// Where the model says that it is; there is no such file.
    path: PathBuf,
    seed: u64,
    vocab_size: usize,
    tensors: BTreeMap<String, (TensorInfo, Content)>,
}

impl SyntheticTensors {
    /// The headers of all tensors.
    ///
    /// # Errors
    /// There can be no model of this shape.
    pub(crate) fn new(shape: &SyntheticShape) -> Result<Self, FormatError> {
        shape.check()?;
        let mut model = Self {
            path: PathBuf::from(shape.to_string()),
            seed: shape.seed,
            vocab_size: shape.vocab_size,
            tensors: BTreeMap::new(),
        };
        let (hidden, inner) = (shape.hidden_size, shape.intermediate_size);
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let embedding = [shape.vocab_size, hidden];
        model.add(
            "model.embed_tokens.weight",
            DType::F16,
            &embedding,
            Content::Gaussian,
        );
        model.add("model.norm.weight", DType::F16, &[hidden], Content::Ones);
        let head = GroupMix::new(hidden, HEAD_BITS);
        model.add_linear("lm_head", "lm_head", head, shape.vocab_size);
        for layer in 0..shape.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                let norm = name(&format!("{norm}.weight"));
                model.add(&norm, DType::F16, &[hidden], Content::Ones);
            }
            for (part, input, in_features, out_features) in [
                ("self_attn.q_proj", "self_attn", hidden, queries),
                ("self_attn.k_proj", "self_attn", hidden, keys),
                ("self_attn.v_proj", "self_attn", hidden, keys),
                ("self_attn.o_proj", "self_attn.o_proj", queries, hidden),
                ("mlp.gate_proj", "mlp", hidden, inner),
                ("mlp.up_proj", "mlp", hidden, inner),
                ("mlp.down_proj", "mlp.down_proj", inner, hidden),
            ] {
                let mix = GroupMix::new(in_features, shape.bits_per_weight);
                model.add_linear(&name(part), &name(input), mix, out_features);
            }
        }
        Ok(model)
    }

    fn add(&mut self, name: &str, dtype: DType, shape: &[usize], content: Content) {
        let info = TensorInfo {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
        };
        self.tensors.insert(name.to_owned(), (info, content));
    }

    /// The five tensors of an EXL2 matrix; those of the same `input` have one row order.
    fn add_linear(&mut self, key: &str, input: &str, mix: GroupMix, out_features: usize) {
        let groups = mix.groups().len();
        let order = Content::Permutation(random::seed_of(self.seed, input));
        for (part, dtype, shape, content) in [
            (
                "q_weight",
                DType::I32,
                &[mix.words(), out_features][..],
                Content::Random,
            ),
            (
                "q_scale",
                DType::I32,
                &[groups, out_features / 8],
                Content::Random,
            ),
            (
                "q_scale_max",
                DType::F16,
                &[groups],
                Content::ScaleMaxima(mix),
            ),
            (
                "q_groups",
                DType::I16,
                &[2 * groups],
                Content::GroupTable(mix),
            ),
            ("q_invperm", DType::I32, &[mix.in_features], order),
        ] {
            self.add(&format!("{key}.{part}"), dtype, shape, content);
        }
    }

    /// Bytes of all tensors.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.infos().map(TensorInfo::size_bytes).sum()
    }

    /// tokenizer.json.
    pub(crate) fn tokenizer_json(&self) -> String {
        documents::tokenizer_json(self.vocab_size)
    }
}

impl TensorSource for SyntheticTensors {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn infos(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        Box::new(self.tensors.values().map(|(info, _)| info))
    }

    fn read(&self, name: &str) -> Result<TensorData<'_>, FormatError> {
        let Some((info, content)) = self.tensors.get(name) else {
            return Err(FormatError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
                expected: "expected among the tensors of a synthetic model".to_owned(),
            });
        };
        let elements: usize = info.shape.iter().product();
        let seed = random::seed_of(self.seed, name);
        let bytes = match *content {
            Content::Random => random::random_bytes(seed, elements * info.dtype.size_bytes()),
            Content::GroupTable(mix) => mix.q_groups(),
            Content::ScaleMaxima(mix) => mix.q_scale_max(),
            Content::Permutation(seed) => {
                bytemuck::cast_slice(&random::permutation(seed, elements)).to_vec()
            }
            Content::Gaussian => random::gaussian_bytes(seed, elements, EMBEDDING_DEVIATION),
            Content::Ones => f16::ONE.to_le_bytes().repeat(elements),
        };
        Ok(TensorData {
            info: info.clone(),
            bytes: bytes.into(),
        })
    }

    fn file_of(&self, _name: &str) -> &Path {
        &self.path
    }
}
