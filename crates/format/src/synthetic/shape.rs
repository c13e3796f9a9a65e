//! What a synthetic model is like.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde_json::Value;

use super::documents;
use crate::FormatError;

/// Extents of linears are multiples of this, which EXL2 asks for.
const BLOCK: usize = 32;

/// Bounds far above every known model. Rows of 8-bit codes up to the first keep the 16-bit word
/// numbers of `q_groups` from overflowing.
const MOST_FEATURES: usize = 1 << 17;
const MOST_TOKENS: usize = 1 << 20;
const MOST_LAYERS: usize = 1024;

/// A Llama's extents, its bits per weight, and the seed of its weights. Written `SHAPE:BPW` on the
/// command line, e.g. `llama2-7b:4.0`, which [`FromStr`] reads for the known shapes.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntheticShape {
    /// What the model is called before the colon.
    pub name: String,
    /// Width of the residual stream; a multiple of 32, as all widths are.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Tokens: at least 259, and a multiple of 32.
    pub vocab_size: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Average bits of the codes of the layers' linears, 2 to 8 (scales add 0.03).
    pub bits_per_weight: f64,
    /// Models of one shape and different seeds have different weights.
    pub seed: u64,
}

/// A shape that [`FromStr`] knows.
struct KnownShape {
    name: &'static str,
    /// Hidden and intermediate size.
    widths: [usize; 2],
    layers: usize,
    /// Query heads, key heads, dimensions of each.
    heads: [usize; 3],
    vocab_size: usize,
    rope_theta: f64,
}

const KNOWN_SHAPES: [KnownShape; 5] = [
    KnownShape {
        name: "tinyllama-1b",
        widths: [2048, 5632],
        layers: 22,
        heads: [32, 4, 64],
        vocab_size: 32_000,
        rope_theta: 1e4,
    },
    KnownShape {
        name: "llama2-7b",
        widths: [4096, 11_008],
        layers: 32,
        heads: [32, 32, 128],
        vocab_size: 32_000,
        rope_theta: 1e4,
    },
    KnownShape {
        name: "llama3-8b",
        widths: [4096, 14_336],
        layers: 32,
        heads: [32, 8, 128],
        vocab_size: 128_256,
        rope_theta: 5e5,
    },
    KnownShape {
        name: "codellama-34b",
        widths: [8192, 22_016],
        layers: 48,
        heads: [64, 8, 128],
        vocab_size: 32_000,
        rope_theta: 1e6,
    },
    KnownShape {
        name: "llama3-70b",
        widths: [8192, 28_672],
        layers: 80,
        heads: [64, 8, 128],
        vocab_size: 128_256,
        rope_theta: 5e5,
    },
];

/// Why a text is not `SHAPE:BPW`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SyntheticShapeError {
    /// There is no colon.
    #[error(
        "found `{found}`, expected SHAPE:BPW, e.g. llama2-7b:4.0, where SHAPE is one of {} and \
         BPW, bits per weight, a number from 2 to 8",
        known_names()
    )]
    Form {
        /// The text.
        found: String,
    },
    /// The part before the colon is no known shape.
    #[error("unknown shape `{found}`, expected one of {}", known_names())]
    Shape {
        /// The part before the colon.
        found: String,
    },
    /// The part after the colon is no usable number.
    #[error("found `{found}` bits per weight, expected a number from 2 to 8, e.g. 4.0 or 2.5")]
    BitsPerWeight {
        /// The part after the colon.
        found: String,
    },
}

fn known_names() -> String {
    KNOWN_SHAPES.map(|known| known.name).join(", ")
}

impl FromStr for SyntheticShape {
    type Err = SyntheticShapeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((name, bits)) = text.split_once(':') else {
            return Err(SyntheticShapeError::Form {
                found: text.to_owned(),
            });
        };
        let known = KNOWN_SHAPES.iter().find(|known| known.name == name);
        let Some(known) = known else {
            return Err(SyntheticShapeError::Shape {
                found: name.to_owned(),
            });
        };
        let bits_per_weight = match bits.parse::<f64>() {
            Ok(number) if is_possible(number) => number,
            _ => {
                return Err(SyntheticShapeError::BitsPerWeight {
                    found: bits.to_owned(),
                });
            }
        };
        let [hidden_size, intermediate_size] = known.widths;
        let [heads, kv_heads, head_dim] = known.heads;
        Ok(Self {
            name: name.to_owned(),
            hidden_size,
            intermediate_size,
            layers: known.layers,
            heads,
            kv_heads,
            head_dim,
            vocab_size: known.vocab_size,
            rope_theta: known.rope_theta,
            bits_per_weight,
            seed: 1,
        })
    }
}

impl fmt::Display for SyntheticShape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Debug keeps the `.0` of whole numbers.
        write!(formatter, "{}:{:?}", self.name, self.bits_per_weight)
    }
}

/// Whether EXL2's bit widths can have this average.
fn is_possible(bits_per_weight: f64) -> bool {
    (2.0..=8.0).contains(&bits_per_weight)
}

impl SyntheticShape {
    /// config.json.
    pub(crate) fn config(&self) -> Value {
        documents::config(self)
    }

    /// tokenizer_config.json.
    pub(crate) fn tokenizer_config() -> Value {
        documents::tokenizer_config()
    }

    /// Whether there can be such a model.
    pub(super) fn check(&self) -> Result<(), FormatError> {
        let invalid = |what: &str, found: String, expected: String| {
            FormatError::malformed(Path::new(&self.to_string()), what, found, expected)
        };
        for (what, found, least, most) in [
            ("hidden size", self.hidden_size, BLOCK, MOST_FEATURES),
            (
                "intermediate size",
                self.intermediate_size,
                BLOCK,
                MOST_FEATURES,
            ),
            (
                "width of all query heads",
                self.query_width(),
                BLOCK,
                MOST_FEATURES,
            ),
            (
                "width of all key heads",
                self.key_width(),
                BLOCK,
                MOST_FEATURES,
            ),
            (
                "vocabulary",
                self.vocab_size,
                documents::LEAST_VOCABULARY,
                MOST_TOKENS,
            ),
        ] {
            if !(least..=most).contains(&found) || !found.is_multiple_of(BLOCK) {
                let expected = format!("a multiple of {BLOCK} from {least} to {most}");
                return Err(invalid(what, found.to_string(), expected));
            }
        }
        if !(1..=MOST_LAYERS).contains(&self.layers) {
            let expected = format!("1 to {MOST_LAYERS}");
            return Err(invalid("layers", self.layers.to_string(), expected));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of the {} query heads", self.heads);
            return Err(invalid("key heads", self.kv_heads.to_string(), expected));
        }
        if !is_possible(self.bits_per_weight) {
            let found = self.bits_per_weight.to_string();
            return Err(invalid("bits per weight", found, "2 to 8".to_owned()));
        }
        Ok(())
    }

    pub(super) fn query_width(&self) -> usize {
        self.heads.saturating_mul(self.head_dim)
    }

    pub(super) fn key_width(&self) -> usize {
        self.kv_heads.saturating_mul(self.head_dim)
    }
}
