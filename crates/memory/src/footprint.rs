//! What a model asks of memory, as known from its headers.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use crate::bytes::Bytes;

/// How the elements of one vector of keys or values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementFormat {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// Codes of 8 bits with one fp16 scale for each group.
    Q8,
    /// Codes of 4 bits with one fp16 scale for each group.
    Q4,
}

impl ElementFormat {
    /// Elements that share a scale in the quantised formats.
    pub const GROUP: u64 = 32;

    /// Bits of one element, without its share of a scale.
    pub const fn bits(self) -> u64 {
        match self {
            Self::F32 => 32,
            Self::F16 => 16,
            Self::Q8 => 8,
            Self::Q4 => 4,
        }
    }

    /// Whether elements are codes in groups of [`Self::GROUP`].
    pub const fn is_quantised(self) -> bool {
        matches!(self, Self::Q8 | Self::Q4)
    }

    /// Bytes of `elements` elements with their scales; `None` when that exceeds 64 bits.
    pub fn bytes(self, elements: u64) -> Option<Bytes> {
        let per_byte = 8 / self.bits().min(8);
        let codes = Bytes(elements.div_ceil(per_byte)).checked_mul(self.bits().div_ceil(8))?;
        if !self.is_quantised() {
            return Some(codes);
        }
        codes.checked_add(Bytes(elements.div_ceil(Self::GROUP)).checked_mul(2)?)
    }
}

/// The format in which keys and values of the context are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheFormat {
    /// IEEE single precision, 4 bytes an element.
    F32,
    /// IEEE half precision, 2 bytes an element.
    F16,
    /// 8 bits an element and an fp16 scale for each 32, as all formats below: 8.5 bits.
    Q8,
    /// Keys at 8 bits, values at 4: 6.5 bits on average.
    Q6,
    /// 4 bits an element: 4.5 bits.
    Q4,
}

impl CacheFormat {
    /// All formats, the largest first.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Q8, Self::Q6, Self::Q4];

    /// How keys are stored.
    pub const fn keys(self) -> ElementFormat {
        match self {
            Self::F32 => ElementFormat::F32,
            Self::F16 => ElementFormat::F16,
            Self::Q8 | Self::Q6 => ElementFormat::Q8,
            Self::Q4 => ElementFormat::Q4,
        }
    }

    /// How values are stored.
    pub const fn values(self) -> ElementFormat {
        match self {
            Self::F32 => ElementFormat::F32,
            Self::F16 => ElementFormat::F16,
            Self::Q8 => ElementFormat::Q8,
            Self::Q6 | Self::Q4 => ElementFormat::Q4,
        }
    }

    /// Whether elements are codes in groups of [`ElementFormat::GROUP`], which only heads
    /// of whole groups can be kept in.
    pub const fn is_quantised(self) -> bool {
        self.keys().is_quantised()
    }

    /// Bytes of one token's keys and values of one layer, which are `kv_elements`
    /// numbers together, half of them keys; `None` when that exceeds 64 bits.
    pub fn bytes_per_token(self, kv_elements: u64) -> Option<Bytes> {
        let keys = kv_elements / 2;
        let values = kv_elements - keys;
        let keys = self.keys().bytes(keys)?;
        keys.checked_add(self.values().bytes(values)?)
    }
}

impl fmt::Display for CacheFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8 => "q8",
            Self::Q6 => "q6",
            Self::Q4 => "q4",
        })
    }
}

/// One decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LayerFootprint {
    /// All its parameters, in the layout in which a device keeps them.
    pub weights: Bytes,
    /// The number of parameters behind [`LayerFootprint::weights`].
    pub weight_elements: u64,
    /// Numbers kept per token of context: 2 × kv_heads × head_dim.
    pub kv_elements_per_token: u64,
}

/// The parts of a model in the order in which a token passes them: embedding, layers,
/// head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelFootprint {
    /// The name under which the ledger knows the model.
    pub name: String,
    /// The embedding table, held by the first device of the chain.
    pub embedding: Bytes,
    /// The norm before the head, held by the last device of the chain.
    pub final_norm: Bytes,
    /// The head's matrix, held by the last device of the chain.
    pub head: Bytes,
    /// The head is the embedding table: a device which holds both keeps one copy, of
    /// the larger of the two sizes.
    pub head_tied_to_embedding: bool,
    /// The decoder layers in order.
    pub layers: Vec<LayerFootprint>,
    /// The longest context that the model was made for.
    pub max_context_tokens: u64,
    /// Tokens in a page of the cache, the unit in which it is taken.
    pub page_tokens: u64,
    /// Heads are whole groups of [`ElementFormat::GROUP`] elements, so that the cache may
    /// be quantised. Otherwise no alternative proposes that.
    pub quantisable_cache: bool,
}

impl ModelFootprint {
    /// The formats in which the model's cache can be kept, the largest first.
    pub fn cache_formats(&self) -> impl Iterator<Item = CacheFormat> {
        let quantisable = self.quantisable_cache;
        CacheFormat::ALL
            .into_iter()
            .filter(move |format| quantisable || !format.is_quantised())
    }

    /// Average bits of a layer parameter in hundredths, rounded down; `None` for a
    /// model without layer parameters.
    pub fn layer_bits_per_weight_hundredths(&self) -> Option<u64> {
        let bytes: u128 = self
            .layers
            .iter()
            .map(|layer| u128::from(layer.weights.0))
            .sum();
        let elements: u128 = self
            .layers
            .iter()
            .map(|layer| u128::from(layer.weight_elements))
            .sum();
        // Below 2^64 layers of 2^64 bytes... the product fits: 800 < 2^10, bytes < 2^96.
        (bytes * 800)
            .checked_div(elements)
            .and_then(|bits| u64::try_from(bits).ok())
    }

    /// The same model with every layer parameter at this many hundredths of a bit.
    /// Embedding and head stay as they are.
    pub fn with_layer_bits_per_weight_hundredths(&self, hundredths: u64) -> Self {
        let mut model = self.clone();
        for layer in &mut model.layers {
            let bytes = (u128::from(layer.weight_elements) * u128::from(hundredths)).div_ceil(800);
            layer.weights = Bytes(u64::try_from(bytes).unwrap_or(u64::MAX));
        }
        model
    }
}

/// What a device does in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRole {
    /// It holds the embedding, and with it is the first of the chain.
    pub first: bool,
    /// It holds the head, and with it is the last of the chain.
    pub last: bool,
    /// The layers it holds; may be empty on a device with only embedding or head.
    pub layers: Range<usize>,
}

/// The largest step that a plan has to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StepLimits {
    /// Tokens of one step, all sequences together.
    pub chunk_tokens: u64,
    /// Sequences in one step.
    pub batch: u64,
    /// Tokens of context of one sequence.
    pub context_tokens: u64,
    /// Tokens of the cache, all sequences together: whole pages.
    pub cache_tokens: u64,
}

/// The memory that a step needs besides weights and cache, as the backend allocates it.
///
/// The planner relies on this never to shrink when the role takes in more layers, the
/// embedding or the head, or when a limit grows. Where it did, a plan could be missed;
/// a plan made is checked by exact sums all the same.
///
/// Functions of the same shape implement it, for devices that record nothing.
pub trait WorkspaceModel {
    /// Bytes of intermediate results, logits included, on a device of this role.
    fn workspace(&self, role: &DeviceRole, limits: &StepLimits) -> Bytes;

    /// Bytes of the steps that a device of this role records.
    fn recordings(&self, _role: &DeviceRole, _limits: &StepLimits) -> Bytes {
        Bytes::ZERO
    }
}

impl<F: Fn(&DeviceRole, &StepLimits) -> Bytes> WorkspaceModel for F {
    fn workspace(&self, role: &DeviceRole, limits: &StepLimits) -> Bytes {
        self(role, limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_token_are_those_of_exllamav2() {
        // 1,024 keys and 1,024 values: Llama 3 8B.
        for (format, eighths) in [
            (CacheFormat::F32, 64),
            (CacheFormat::F16, 32),
            (CacheFormat::Q8, 17),
            (CacheFormat::Q6, 13),
            (CacheFormat::Q4, 9),
        ] {
            let bytes = format.bytes_per_token(2048);
            assert_eq!(bytes, Some(Bytes(1024 * eighths / 8)), "{format}");
        }
    }

    #[test]
    fn a_started_group_or_byte_counts_whole() {
        assert_eq!(ElementFormat::Q4.bytes(33), Some(Bytes(17 + 4)));
        assert_eq!(ElementFormat::Q8.bytes(1), Some(Bytes(3)));
        assert_eq!(ElementFormat::Q8.bytes(0), Some(Bytes::ZERO));
        assert_eq!(ElementFormat::Q8.bytes(u64::MAX), None);
    }

    #[test]
    fn formats_come_the_largest_first() {
        let bytes = CacheFormat::ALL.map(|format| format.bytes_per_token(64));
        assert!(bytes.is_sorted_by(|a, b| a > b), "{bytes:?}");
    }
}
