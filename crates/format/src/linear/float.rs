//! Unquantised linears: `P.weight` `[N, K]` of F16, BF16 or F32.

use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Encoding, LinearHeader, check_output_range};
use crate::mmap::cast_bytes;
use crate::tensors::{FLOATS, floats_to_f32, has_bias, read_bias, require_matrix};
use crate::{DType, FormatError, TensorSource};

/// Reads the headers of the weight and the bias.
pub(super) fn read_header(
    source: &dyn TensorSource,
    key: &str,
) -> Result<LinearHeader, FormatError> {
    let name = format!("{key}.weight");
    let why = "weights [out_features, in_features]";
    let (out_features, in_features) = require_matrix(source, &name, &FLOATS, why)?;
    let dtype = source.info(&name).map_or(DType::F16, |info| info.dtype);
    Ok(LinearHeader {
        in_features,
        out_features,
        bias: has_bias(source, key, out_features)?,
        encoding: Encoding::Float(dtype),
    })
}

/// An unquantised linear, or an embedding table, whose tensor has been read.
///
/// Unlike the quantised encodings it is stored transposed: one row for each output.
#[derive(Debug, Clone)]
pub struct FloatLinear<'a> {
    key: String,
    /// For errors in the data, which is looked at later.
    path: PathBuf,
    in_features: usize,
    out_features: usize,
    dtype: DType,
    /// `[N, K]`, little-endian.
    bytes: Cow<'a, [u8]>,
    bias: Option<Vec<f32>>,
    prescale: f32,
}

/// Weights as fp16 numbers and one factor: `W = values · scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct ScaledF16 {
    /// `[N, K]`.
    pub values: Vec<f16>,
    /// The linear's prescale, times a power of two where values exceed the fp16 range.
    pub scale: f32,
}

impl<'a> FloatLinear<'a> {
    /// Reads `{key}.weight` and `{key}.bias`. The weights stay as stored; `prescale` multiplies
    /// the bias now and is part of [`ScaledF16::scale`] and of [`FloatLinear::row_f32`].
    ///
    /// # Errors
    /// The weight is missing or has the wrong element type or shape; the bias has.
    pub fn load(
        source: &'a dyn TensorSource,
        key: &str,
        prescale: f32,
    ) -> Result<Self, FormatError> {
        let header = read_header(source, key)?;
        let name = format!("{key}.weight");
        let data = source.read(&name)?;
        Ok(FloatLinear {
            key: key.to_owned(),
            path: source.file_of(&name).to_path_buf(),
            in_features: header.in_features,
            out_features: header.out_features,
            dtype: data.info.dtype,
            bytes: data.bytes,
            bias: read_bias(source, key, header.out_features, prescale)?,
            prescale,
        })
    }

    /// Shape and encoding.
    pub fn header(&self) -> LinearHeader {
        LinearHeader {
            in_features: self.in_features,
            out_features: self.out_features,
            bias: self.bias.is_some(),
            encoding: Encoding::Float(self.dtype),
        }
    }

    /// Input features (K); for an embedding the hidden size.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Output features (N); for an embedding the vocabulary.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Element type as stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The bias `[N]`.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// What every stored weight is multiplied by.
    pub fn prescale(&self) -> f32 {
        self.prescale
    }

    /// The stored elements `[N, K]`, little-endian, without the prescale.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Decodes output row `row` `[K]` to f32, prescale included.
    ///
    /// # Panics
    /// If there is no such row or `values` is not `in_features` long.
    pub fn row_f32(&self, row: usize, values: &mut [f32]) {
        let row_bytes = self.in_features * self.dtype.size_bytes();
        let bytes = &self.bytes[row * row_bytes..][..row_bytes];
        values.copy_from_slice(&floats_to_f32(self.dtype, Cow::Borrowed(bytes)));
        if self.prescale != 1.0 {
            values.iter_mut().for_each(|value| *value *= self.prescale);
        }
    }

    /// Whether a stored value would become infinite in fp16 (BF16 and F32 can hold such).
    pub fn float_exceeds_f16(&self) -> bool {
        self.largest_magnitude() >= F16_OVERFLOW
    }

    /// The weights as fp16, rounded to nearest even.
    ///
    /// If a value exceeds the fp16 range, all of them are divided by the smallest power of two
    /// that brings the largest within it, and the scale says so: `W = values · scale`. Relative
    /// precision is kept except for values that become subnormal thereby.
    ///
    /// # Errors
    /// A weight is NaN or infinite.
    pub fn to_f16_scaled(&self) -> Result<ScaledF16, FormatError> {
        if self.dtype == DType::F16 {
            let values = cast_bytes::<f16>(Cow::Borrowed(&self.bytes)).into_owned();
            self.check_finite(values.iter().position(|value| !value.is_finite()))?;
            return Ok(ScaledF16 {
                values,
                scale: self.prescale,
            });
        }
        let largest = self.largest_magnitude();
        let mut divisor = 1.0f32;
        while largest.is_finite() && largest / divisor >= F16_OVERFLOW {
            divisor *= 2.0;
        }
        let row_bytes = self.in_features * self.dtype.size_bytes();
        let mut values = vec![f16::ZERO; self.in_features * self.out_features];
        let rows = self.bytes.chunks_exact(row_bytes);
        for (target, bytes) in values.chunks_exact_mut(self.in_features).zip(rows) {
            let mut row = floats_to_f32(self.dtype, Cow::Borrowed(bytes));
            if divisor != 1.0 {
                row.iter_mut().for_each(|value| *value /= divisor);
            }
            target.convert_from_f32_slice(&row);
        }
        self.check_finite(values.iter().position(|value| !value.is_finite()))?;
        Ok(ScaledF16 {
            values,
            scale: self.prescale * divisor,
        })
    }

    /// The outputs `range`: rows of the matrix, still borrowed where they were.
    ///
    /// # Errors
    /// An empty range, or one beyond the outputs.
    pub fn slice_outputs(&self, range: Range<usize>) -> Result<FloatLinear<'a>, FormatError> {
        check_output_range(&self.key, &range, self.out_features, 1)?;
        let row_bytes = self.in_features * self.dtype.size_bytes();
        let byte_range = range.start * row_bytes..range.end * row_bytes;
        Ok(FloatLinear {
            key: self.key.clone(),
            path: self.path.clone(),
            in_features: self.in_features,
            out_features: range.len(),
            dtype: self.dtype,
            bytes: match &self.bytes {
                Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[byte_range]),
                Cow::Owned(bytes) => Cow::Owned(bytes[byte_range].to_vec()),
            },
            bias: self.bias.as_ref().map(|bias| bias[range].to_vec()),
            prescale: self.prescale,
        })
    }

    /// The largest magnitude among the stored values, NaN left out.
    fn largest_magnitude(&self) -> f32 {
        let row_bytes = self.in_features * self.dtype.size_bytes();
        let rows = self.bytes.chunks_exact(row_bytes);
        rows.map(|row| {
            let values = floats_to_f32(self.dtype, Cow::Borrowed(row));
            values
                .iter()
                .fold(0.0f32, |largest, value| largest.max(value.abs()))
        })
        .fold(0.0, f32::max)
    }

    /// Reports the weight at `position`, which is NaN or infinite.
    fn check_finite(&self, position: Option<usize>) -> Result<(), FormatError> {
        let Some(position) = position else {
            return Ok(());
        };
        let (row, column) = (position / self.in_features, position % self.in_features);
        let size = self.dtype.size_bytes();
        let bytes = &self.bytes[position * size..][..size];
        Err(FormatError::invalid_tensor(
            &self.path,
            &format!("{}.weight", self.key),
            format!("element [{row}, {column}]"),
            floats_to_f32(self.dtype, Cow::Borrowed(bytes))[0],
            "a finite number",
        ))
    }
}

/// The smallest magnitude that rounds to infinity in fp16: half a step above 65504.
const F16_OVERFLOW: f32 = 65520.0;
