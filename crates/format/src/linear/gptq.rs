//! GPTQ linears with 4 bits, in the layouts of AutoGPTQ (v1) and GPTQModel (v2), with and
//! without act-order.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;
use serde_json::Value;

use super::{Encoding, LinearHeader, check_output_range, copy_columns};
use crate::mmap::cast_bytes;
use crate::tensors::{
    FLOATS, floats_to_f32, has_bias, lookup, read_bias, read_words, require_matrix, require_shape,
};
use crate::{DType, FormatError, TensorSource};

/// Smallest group size, and the granularity of input features.
const GPTQ_BLOCK: usize = 32;

/// What `quantization_config` says about GPTQ tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GptqConfig {
    /// Bits of each code; only 4 is read.
    pub bits: u64,
    /// Whether `qzeros` holds zero points as they are (`checkpoint_format` `gptq_v2`), not minus
    /// one.
    pub zeros_plain: bool,
}

impl Default for GptqConfig {
    fn default() -> Self {
        GptqConfig {
            bits: 4,
            zeros_plain: false,
        }
    }
}

impl GptqConfig {
    /// Reads `quantization_config` of config.json, which lies at `path`; without one, v1 with 4
    /// bits is assumed, and the shapes must agree.
    ///
    /// # Errors
    /// A `quant_method` other than `gptq` and `exl2`: tensors of other methods can have the same
    /// names.
    pub fn from_config(config: &Value, path: &Path) -> Result<Self, FormatError> {
        let Some(quantization) = config.get("quantization_config") else {
            return Ok(Self::default());
        };
        match quantization
            .get("quant_method")
            .map(|method| method.as_str().unwrap_or(""))
        {
            None | Some("gptq" | "exl2") => {}
            Some(_) => {
                return Err(FormatError::Unsupported {
                    path: path.to_path_buf(),
                    what: "quantization_config.quant_method".to_owned(),
                    found: quantization["quant_method"].to_string(),
                    supported: "\"exl2\", \"gptq\" with 4 bits, or an unquantised model".to_owned(),
                });
            }
        }
        let is_exl2 = quantization
            .get("quant_method")
            .is_some_and(|method| method == "exl2");
        let bits = match quantization.get("bits") {
            // EXL2's "bits" is an average over the model.
            Some(bits) if !is_exl2 => bits.as_u64().ok_or_else(|| FormatError::InvalidConfig {
                path: path.to_path_buf(),
                key: "quantization_config.bits".to_owned(),
                found: bits.to_string(),
                expected: "4, the width of GPTQ codes that is read".to_owned(),
            })?,
            _ => 4,
        };
        let checkpoint_format = quantization
            .get("checkpoint_format")
            .and_then(Value::as_str);
        Ok(GptqConfig {
            bits,
            zeros_plain: checkpoint_format == Some("gptq_v2"),
        })
    }
}

/// Reads the headers of the tensors and checks them against one another.
pub(super) fn read_header(
    source: &dyn TensorSource,
    key: &str,
    config: &GptqConfig,
) -> Result<LinearHeader, FormatError> {
    let name = |part: &str| format!("{key}.{part}");
    let weight = name("qweight");
    if config.bits != 4 {
        return Err(FormatError::Unsupported {
            path: source.file_of(&weight).to_path_buf(),
            what: format!("tensor `{weight}`: GPTQ codes of quantization_config.bits"),
            found: format!("{} bits", config.bits),
            supported: "4 bits".to_owned(),
        });
    }
    let (word_rows, out_features) =
        require_matrix(source, &weight, &[DType::I32], "GPTQ codes [K/8, N]")?;
    let in_features = word_rows.saturating_mul(8);
    if !in_features.is_multiple_of(GPTQ_BLOCK) || !out_features.is_multiple_of(8) {
        return Err(FormatError::wrong_shape(
            source.file_of(&weight),
            &weight,
            &[word_rows, out_features],
            format!("[K/8, N] with K a multiple of {GPTQ_BLOCK} and N of 8"),
        ));
    }
    let scales = name("scales");
    let (groups, _) = require_matrix(source, &scales, &FLOATS, "GPTQ scales [G, N]")?;
    require_shape(
        source,
        &scales,
        &FLOATS,
        &[groups, out_features],
        "[G, N] for qweight's N",
    )?;
    let zeros_shape = [groups, out_features / 8];
    require_shape(
        source,
        &name("qzeros"),
        &[DType::I32],
        &zeros_shape,
        "[G, N/8], 4 bits each",
    )?;
    let size = group_size(in_features, groups);
    if size < GPTQ_BLOCK || groups != in_features.div_ceil(size) {
        return Err(FormatError::wrong_shape(
            source.file_of(&scales),
            &scales,
            &[groups, out_features],
            format!(
                "a number of groups that divides {in_features} rows by a power of two not below \
                 {GPTQ_BLOCK}"
            ),
        ));
    }
    let index = name("g_idx");
    let act_order = lookup(source, &index)?.is_some();
    if act_order {
        require_shape(
            source,
            &index,
            &[DType::I32],
            &[in_features],
            "one group per row",
        )?;
    }
    Ok(LinearHeader {
        in_features,
        out_features,
        bias: has_bias(source, key, out_features)?,
        encoding: Encoding::Gptq { groups, act_order },
    })
}

/// The smallest power of two that, times `groups`, covers the rows.
fn group_size(in_features: usize, groups: usize) -> usize {
    in_features.div_ceil(groups).next_power_of_two()
}

/// A GPTQ linear whose tensors have been read and checked.
#[derive(Debug, Clone)]
pub struct GptqLinear<'a> {
    key: String,
    in_features: usize,
    out_features: usize,
    group_size: usize,
    /// `qweight` `[K/8, N]`: row k is nibble `k % 8` of word row `k / 8`.
    words: Cow<'a, [u32]>,
    /// `qzeros` `[G, N/8]`.
    zero_words: Cow<'a, [u32]>,
    /// 1 if stored zeros are one less than meant.
    zero_offset: u32,
    /// `scales` `[G, N]`.
    scales: Vec<f16>,
    /// Group of each row `[K]`, where a `g_idx` reorders them.
    row_groups: Option<Vec<u32>>,
    has_index: bool,
    bias: Option<Vec<f32>>,
}

impl<'a> GptqLinear<'a> {
    /// Reads the linear with key `key`. `prescale` multiplies the scales (rounded once more to
    /// fp16) and the bias.
    ///
    /// # Errors
    /// A tensor is missing or has the wrong element type or shape; another width than 4 bits; a
    /// scale that is not finite; a `g_idx` out of range or with groups of unequal size.
    pub fn load(
        source: &'a dyn TensorSource,
        key: &str,
        config: &GptqConfig,
        prescale: f32,
    ) -> Result<Self, FormatError> {
        let header = read_header(source, key, config)?;
        let (in_features, out_features) = (header.in_features, header.out_features);
        let zero_words = read_words(source, &format!("{key}.qzeros"))?;
        let groups = zero_words.len() / (out_features / 8);
        let size = group_size(in_features, groups);
        let index = format!("{key}.g_idx");
        let has_index = source.info(&index).is_some();
        Ok(GptqLinear {
            key: key.to_owned(),
            in_features,
            out_features,
            group_size: size,
            words: read_words(source, &format!("{key}.qweight"))?,
            zero_words,
            zero_offset: u32::from(!config.zeros_plain),
            scales: read_scales(source, &format!("{key}.scales"), out_features, prescale)?,
            row_groups: if has_index {
                read_index(source, &index, groups, size)?
            } else {
                None
            },
            has_index,
            bias: read_bias(source, key, out_features, prescale)?,
        })
    }

    /// Shape and encoding.
    pub fn header(&self) -> LinearHeader {
        LinearHeader {
            in_features: self.in_features,
            out_features: self.out_features,
            bias: self.bias.is_some(),
            encoding: Encoding::Gptq {
                groups: self.groups(),
                act_order: self.has_index,
            },
        }
    }

    /// Input features (K); a multiple of 32.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Output features (N); a multiple of 8.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Groups (G).
    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features
    }

    /// Rows of a group: a power of two not below 32; the last group may have fewer.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// The bias `[N]`.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Group of input feature `row`.
    ///
    /// # Panics
    /// If a `g_idx` is stored and there is no such row.
    pub fn group_of(&self, row: usize) -> usize {
        match &self.row_groups {
            Some(groups) => groups[row] as usize,
            None => row / self.group_size,
        }
    }

    /// `[K]`: input features sorted by group, stably, so that each group is a run of
    /// [`GptqLinear::group_size`] rows; the identity without act-order.
    pub fn permutation(&self) -> Vec<u32> {
        let mut rows: Vec<u32> = (0..self.in_features as u32).collect();
        rows.sort_by_key(|&row| self.group_of(row as usize));
        rows
    }

    /// Whether a `g_idx` changes the order of the groups; without, [`GptqLinear::permutation`]
    /// is the identity.
    pub fn is_reordered(&self) -> bool {
        self.row_groups.is_some()
    }

    /// The packed codes `[K/8, N]`, as stored: input k is nibble `k % 8` of word row `k / 8`.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The packed zero points `[G, N/8]`, as stored: column n is nibble `n % 8` of word `n / 8`.
    pub fn zero_words(&self) -> &[u32] {
        &self.zero_words
    }

    /// What is added to a stored zero point: 1 in v1, 0 in v2.
    pub fn zero_offset(&self) -> u32 {
        self.zero_offset
    }

    /// The scales `[G, N]`.
    pub fn scales(&self) -> &[f16] {
        &self.scales
    }

    /// The zero point that is subtracted from codes: 1..=16 in v1, 0..=15 in v2.
    ///
    /// # Panics
    /// If there is no such group or column.
    pub fn zero(&self, group: usize, column: usize) -> u32 {
        assert!(
            column < self.out_features,
            "column {column} of {}",
            self.out_features
        );
        let word = self.zero_words[group * (self.out_features / 8) + column / 8];
        ((word >> (4 * (column % 8))) & 15) + self.zero_offset
    }

    /// The code of a weight, 0..16.
    ///
    /// # Panics
    /// If there is no such row or column.
    pub fn code(&self, row: usize, column: usize) -> u32 {
        assert!(
            column < self.out_features,
            "column {column} of {}",
            self.out_features
        );
        (self.words[row / 8 * self.out_features + column] >> (4 * (row % 8))) & 15
    }

    /// The codes of input feature `row` in `columns`, into `codes` of the same length.
    ///
    /// # Panics
    /// If there is no such row or column, or the lengths differ.
    pub fn unpack_row(&self, row: usize, columns: Range<usize>, codes: &mut [u8]) {
        assert_eq!(columns.len(), codes.len(), "one code per column");
        assert!(
            columns.end <= self.out_features,
            "columns {columns:?} of {}",
            self.out_features
        );
        let start = row / 8 * self.out_features;
        let shift = 4 * (row % 8);
        let words = &self.words[start + columns.start..start + columns.end];
        for (code, word) in codes.iter_mut().zip(words) {
            *code = ((word >> shift) & 15) as u8;
        }
    }

    /// Decodes `W[K, N]` in fp16: `f16((code − zero) · scale)`.
    pub fn decode_f16(&self) -> Vec<f16> {
        let n = self.out_features;
        let zeros: Vec<f32> = (0..self.groups())
            .flat_map(|group| (0..n).map(move |column| (group, column)))
            .map(|(group, column)| self.zero(group, column) as f32)
            .collect();
        let mut scales = vec![0.0f32; self.scales.len()];
        self.scales.convert_to_f32_slice(&mut scales);
        let mut products = vec![0.0f32; n];
        let mut weights = vec![f16::ZERO; self.in_features * n];
        for (row, target) in weights.chunks_exact_mut(n).enumerate() {
            let group = self.group_of(row) * n;
            let shift = 4 * (row % 8);
            let words = &self.words[row / 8 * n..][..n];
            let columns = scales[group..][..n]
                .iter()
                .zip(&zeros[group..][..n])
                .zip(words);
            for (product, ((scale, zero), word)) in products.iter_mut().zip(columns) {
                // Exact in f32, so that the conversion below is the only rounding.
                *product = (((word >> shift) & 15) as f32 - zero) * scale;
            }
            target.convert_from_f32_slice(&products);
        }
        weights
    }

    /// The linear that computes only the outputs `range`, at multiples of 8.
    ///
    /// # Errors
    /// An empty or unaligned range, or one beyond the outputs.
    pub fn slice_outputs(&self, range: Range<usize>) -> Result<GptqLinear<'a>, FormatError> {
        check_output_range(&self.key, &range, self.out_features, 8)?;
        let zero_range = range.start / 8..range.end / 8;
        let zero_words = copy_columns(&self.zero_words, self.out_features / 8, &zero_range);
        Ok(GptqLinear {
            key: self.key.clone(),
            in_features: self.in_features,
            out_features: range.len(),
            group_size: self.group_size,
            words: Cow::Owned(copy_columns(&self.words, self.out_features, &range)),
            zero_words: Cow::Owned(zero_words),
            zero_offset: self.zero_offset,
            scales: copy_columns(&self.scales, self.out_features, &range),
            row_groups: self.row_groups.clone(),
            has_index: self.has_index,
            bias: self.bias.as_ref().map(|bias| bias[range].to_vec()),
        })
    }
}

/// Reads `scales`, casts them to fp16 where they are wider, and refuses what is not finite.
fn read_scales(
    source: &dyn TensorSource,
    name: &str,
    out_features: usize,
    prescale: f32,
) -> Result<Vec<f16>, FormatError> {
    let data = source.read(name)?;
    let mut values = floats_to_f32(data.info.dtype, data.bytes);
    if prescale != 1.0 {
        values.iter_mut().for_each(|value| *value *= prescale);
    }
    let mut scales = vec![f16::ZERO; values.len()];
    scales.convert_from_f32_slice(&values);
    match scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(scales),
        Some(index) => Err(FormatError::invalid_tensor(
            source.file_of(name),
            name,
            format!(
                "scale of group {}, column {}",
                index / out_features,
                index % out_features
            ),
            values[index],
            "a finite fp16 number",
        )),
    }
}

/// Reads `g_idx`; `None` if it is all zero, which stands for groups in order.
fn read_index(
    source: &dyn TensorSource,
    name: &str,
    groups: usize,
    group_size: usize,
) -> Result<Option<Vec<u32>>, FormatError> {
    let index = cast_bytes::<i32>(source.read(name)?.bytes);
    if index.iter().all(|&group| group == 0) {
        return Ok(None);
    }
    let invalid = |what: String, found: String, expected: String| {
        FormatError::invalid_tensor(source.file_of(name), name, what, found, expected)
    };
    let mut rows_of_group = vec![0usize; groups];
    for (row, &group) in index.iter().enumerate() {
        match usize::try_from(group)
            .ok()
            .and_then(|group| rows_of_group.get_mut(group))
        {
            Some(rows) => *rows += 1,
            None => {
                let expected = format!("0..{groups}");
                return Err(invalid(
                    format!("group of row {row}"),
                    group.to_string(),
                    expected,
                ));
            }
        }
    }
    for (group, &rows) in rows_of_group.iter().enumerate() {
        let expected = group_size.min(index.len() - group * group_size);
        if rows != expected {
            let what = format!("rows of group {group}");
            return Err(invalid(what, rows.to_string(), expected.to_string()));
        }
    }
    Ok(Some(index.iter().map(|&group| group as u32).collect()))
}
