//! Linear layers `y[N] = x[K] · W[K,N] (+ bias[N])` in every encoding that is read.
//!
//! The encoding is found per linear from tensor names, so a model may mix them:
//! `P.q_weight` is EXL2, else `P.qweight` is GPTQ, else `P.weight` is float.

mod exl2;
mod float;
mod gptq;
mod pack;

use std::ops::Range;

pub use exl2::{EXL2_BITS, Exl2Group, Exl2Linear};
pub use float::{FloatLinear, ScaledF16};
pub use gptq::{GptqConfig, GptqLinear};
pub use pack::{Exl2Layout, Exl2Tensors};

use crate::tensors::lookup;
use crate::{DType, FormatError, TensorSource};

/// How a linear's weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// EXL2: groups of input features with 2 to 8 bits each.
    Exl2 {
        /// Rows of 32-bit words in `q_weight` (Q).
        packed_words: usize,
        /// Groups (G).
        groups: usize,
    },
    /// GPTQ with 4 bits.
    Gptq {
        /// Groups (G).
        groups: usize,
        /// Whether a `g_idx` tensor is stored; whether it changes the order of the groups is
        /// known when it is read.
        act_order: bool,
    },
    /// Unquantised.
    Float(DType),
}

/// What the file headers say of a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearHeader {
    /// Input features (K).
    pub in_features: usize,
    /// Output features as stored (N): EXL2 pads them to a multiple of 32.
    pub out_features: usize,
    /// Whether there is a bias `[N]`.
    pub bias: bool,
    /// How the weights are stored.
    pub encoding: Encoding,
}

impl LinearHeader {
    /// Reads the headers of the linear with key `key`; `None` if the source has none.
    ///
    /// # Errors
    /// A tensor of the linear is missing or has the wrong element type or shape.
    pub fn find(
        source: &dyn TensorSource,
        key: &str,
        gptq: &GptqConfig,
    ) -> Result<Option<LinearHeader>, FormatError> {
        if lookup(source, &format!("{key}.q_weight"))?.is_some() {
            exl2::read_header(source, key).map(Some)
        } else if lookup(source, &format!("{key}.qweight"))?.is_some() {
            gptq::read_header(source, key, gptq).map(Some)
        } else if lookup(source, &format!("{key}.weight"))?.is_some() {
            float::read_header(source, key).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Bytes of the linear's tensors as stored, scales and bias counted as F16.
    pub fn stored_bytes(&self) -> u64 {
        let k = self.in_features as u64;
        let n = self.out_features as u64;
        let bias_element = match self.encoding {
            Encoding::Float(dtype) => dtype.size_bytes() as u64,
            Encoding::Exl2 { .. } | Encoding::Gptq { .. } => 2,
        };
        let bias_bytes = if self.bias { n * bias_element } else { 0 };
        let weight_bytes = match self.encoding {
            // q_weight, q_scale, q_scale_max with q_groups, q_invperm.
            Encoding::Exl2 {
                packed_words,
                groups,
            } => 4 * packed_words as u64 * n + groups as u64 * (n / 2 + 6) + 4 * k,
            // qweight, qzeros with scales, g_idx.
            Encoding::Gptq { groups, act_order } => {
                k * n / 2 + groups as u64 * (n / 2 + 2 * n) + if act_order { 4 * k } else { 0 }
            }
            Encoding::Float(dtype) => k * n * dtype.size_bytes() as u64,
        };
        weight_bytes + bias_bytes
    }

    /// Stored bits for each weight, overheads included.
    pub fn bits_per_weight(&self) -> f64 {
        let weights = self.in_features as f64 * self.out_features as f64;
        self.stored_bytes() as f64 * 8.0 / weights
    }
}

/// A linear's data, checked, in the encoding it is stored in.
#[derive(Debug, Clone)]
pub enum LinearSource<'a> {
    /// EXL2.
    Exl2(Exl2Linear<'a>),
    /// GPTQ.
    Gptq(GptqLinear<'a>),
    /// Unquantised.
    Float(FloatLinear<'a>),
}

impl<'a> LinearSource<'a> {
    /// Reads and checks the linear with key `key`; its weights and bias are those of the file
    /// times `prescale` (1 for most models; see [`Exl2Linear::load`] for the rounding).
    ///
    /// # Errors
    /// Everything that [`LinearHeader::find`] reports, no linear of that key, and data that
    /// contradicts the format.
    pub fn load(
        source: &'a dyn TensorSource,
        key: &str,
        gptq: &GptqConfig,
        prescale: f32,
    ) -> Result<Self, FormatError> {
        let Some(header) = LinearHeader::find(source, key, gptq)? else {
            let name = format!("{key}.weight");
            return Err(FormatError::MissingTensor {
                path: source.file_of(&name).to_path_buf(),
                tensor: name,
                expected: format!("expected `{key}.q_weight`, `.qweight` or `.weight`"),
            });
        };
        Ok(match header.encoding {
            Encoding::Exl2 { .. } => LinearSource::Exl2(Exl2Linear::load(source, key, prescale)?),
            Encoding::Gptq { .. } => {
                LinearSource::Gptq(GptqLinear::load(source, key, gptq, prescale)?)
            }
            Encoding::Float(_) => LinearSource::Float(FloatLinear::load(source, key, prescale)?),
        })
    }

    /// Shape and encoding; after [`LinearSource::slice_outputs`], those of the slice.
    pub fn header(&self) -> LinearHeader {
        match self {
            LinearSource::Exl2(linear) => linear.header(),
            LinearSource::Gptq(linear) => linear.header(),
            LinearSource::Float(linear) => linear.header(),
        }
    }

    /// Input features (K).
    pub fn in_features(&self) -> usize {
        self.header().in_features
    }

    /// Output features as stored (N).
    pub fn out_features(&self) -> usize {
        self.header().out_features
    }

    /// The bias `[N]`, if there is one.
    pub fn bias(&self) -> Option<Vec<f32>> {
        match self {
            LinearSource::Exl2(linear) => linear.bias().map(<[f32]>::to_vec),
            LinearSource::Gptq(linear) => linear.bias().map(<[f32]>::to_vec),
            LinearSource::Float(linear) => linear.bias().map(<[f32]>::to_vec),
        }
    }

    /// The linear that computes only the outputs `range`: a part of a fused source such as
    /// `qkv_proj`. Quantised data is copied; float rows stay borrowed where they were.
    ///
    /// # Errors
    /// The range is empty, beyond the outputs, or not at multiples of 32 (EXL2) or 8 (GPTQ).
    pub fn slice_outputs(&self, range: Range<usize>) -> Result<LinearSource<'a>, FormatError> {
        Ok(match self {
            LinearSource::Exl2(linear) => LinearSource::Exl2(linear.slice_outputs(range)?),
            LinearSource::Gptq(linear) => LinearSource::Gptq(linear.slice_outputs(range)?),
            LinearSource::Float(linear) => LinearSource::Float(linear.slice_outputs(range)?),
        })
    }
}

/// Checks a range of outputs against the linear's width and the encoding's granularity.
fn check_output_range(
    name: &str,
    range: &Range<usize>,
    out_features: usize,
    granularity: usize,
) -> Result<(), FormatError> {
    let fits = range.start < range.end && range.end <= out_features;
    let aligned = range.start.is_multiple_of(granularity) && range.end.is_multiple_of(granularity);
    if fits && aligned {
        return Ok(());
    }
    Err(FormatError::invalid_tensor(
        std::path::Path::new(""),
        name,
        "range of outputs to take",
        format!("{range:?}"),
        format!("a range within 0..{out_features} at multiples of {granularity}"),
    ))
}

/// Copies columns `range` of a row-major matrix with `width` columns.
fn copy_columns<T: Copy>(matrix: &[T], width: usize, range: &Range<usize>) -> Vec<T> {
    let mut part = Vec::with_capacity(matrix.len() / width * range.len());
    for row in matrix.chunks_exact(width) {
        part.extend_from_slice(&row[range.clone()]);
    }
    part
}
