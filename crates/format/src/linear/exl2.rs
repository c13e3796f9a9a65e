//! EXL2 linears: five tensors, checked against one another, and their exact decoding.
//!
//! Rows of the packed matrix are input features in an order of the quantiser's choice; outputs
//! keep their order. Within a group each column is one little-endian bit stream down the rows.

use std::borrow::Cow;
use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Encoding, LinearHeader, check_output_range, copy_columns};
use crate::mmap::cast_bytes;
use crate::tensors::{has_bias, read_bias, read_words, require_matrix, require_shape};
use crate::{DType, FormatError, TensorSource};

/// The bit widths a group may have, in the order that groups are stored.
pub const EXL2_BITS: [u32; 6] = [8, 6, 5, 4, 3, 2];

/// Granularity of rows (per group) and of columns in EXL2 files.
pub(super) const EXL2_BLOCK: usize = 32;

/// A run of packed rows with one bit width and one scale per column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exl2Group {
    /// Bits of each code: 2, 3, 4, 5, 6 or 8.
    pub bits: u32,
    /// First row of words in `q_weight`.
    pub first_word: usize,
    /// First packed row (weight row).
    pub first_row: usize,
    /// Packed rows; a multiple of 32.
    pub rows: usize,
}

impl Exl2Group {
    /// The code that stands for zero, `2^(bits−1)`.
    pub const fn zero_point(&self) -> i32 {
        1 << (self.bits - 1)
    }

    /// Rows of words that the group takes in `q_weight`.
    pub const fn words(&self) -> usize {
        self.rows * self.bits as usize / 32
    }
}

/// An EXL2 linear whose tensors have been read and checked.
#[derive(Debug, Clone)]
pub struct Exl2Linear<'a> {
    key: String,
    in_features: usize,
    out_features: usize,
    /// `q_weight` `[Q, N]`.
    words: Cow<'a, [u32]>,
    /// `q_scale` `[G, N/8]`: eight 4-bit codes a word.
    scale_words: Cow<'a, [u32]>,
    /// m_g `[G]`: `q_scale_max · prescale / 256` rounded to fp16.
    scale_max: Vec<f16>,
    groups: Vec<Exl2Group>,
    /// `[K]`: original input feature of each packed row.
    permutation: Vec<u32>,
    bias: Option<Vec<f32>>,
}

/// Reads the headers of the five tensors (and the bias) and checks them against one another.
pub(super) fn read_header(
    source: &dyn TensorSource,
    key: &str,
) -> Result<LinearHeader, FormatError> {
    let name = |part: &str| format!("{key}.{part}");
    let weight = name("q_weight");
    let (packed_words, out_features) =
        require_matrix(source, &weight, &[DType::I32], "EXL2 codes [Q, N]")?;
    if !out_features.is_multiple_of(EXL2_BLOCK) {
        return Err(FormatError::wrong_shape(
            source.file_of(&weight),
            &weight,
            &[packed_words, out_features],
            format!("a second extent that is a multiple of {EXL2_BLOCK}"),
        ));
    }
    let scale = name("q_scale");
    let (groups, _) = require_matrix(source, &scale, &[DType::I32], "EXL2 scales [G, N/8]")?;
    let scale_shape = [groups, out_features / 8];
    require_shape(
        source,
        &scale,
        &[DType::I32],
        &scale_shape,
        "[G, N/8] for q_weight's N",
    )?;
    let per_group = "one per EXL2 group of q_scale";
    require_shape(
        source,
        &name("q_scale_max"),
        &[DType::F16],
        &[groups],
        per_group,
    )?;
    let pairs = groups.saturating_mul(2);
    require_shape(
        source,
        &name("q_groups"),
        &[DType::I16],
        &[pairs],
        "two per EXL2 group of q_scale",
    )?;
    let in_features = permutation_len(source, &name("q_invperm"))?;
    Ok(LinearHeader {
        in_features,
        out_features,
        bias: has_bias(source, key, out_features)?,
        encoding: Encoding::Exl2 {
            packed_words,
            groups,
        },
    })
}

/// K, which only `q_invperm` states directly.
fn permutation_len(source: &dyn TensorSource, name: &str) -> Result<usize, FormatError> {
    let info = crate::tensors::require(source, name, &[DType::I32], "EXL2 row order [K]")?;
    match info.shape[..] {
        [k] if k > 0 && k.is_multiple_of(EXL2_BLOCK) => Ok(k),
        _ => Err(FormatError::wrong_shape(
            source.file_of(name),
            name,
            &info.shape,
            format!("one dimension, a multiple of {EXL2_BLOCK} above 0"),
        )),
    }
}

impl<'a> Exl2Linear<'a> {
    /// Reads the linear with key `key` and checks its groups, scales and permutation.
    ///
    /// `prescale` (1 for most models) multiplies every weight: it enters m_g before its one
    /// rounding to fp16, as in ExLlamaV2, and multiplies the bias in f32.
    ///
    /// # Errors
    /// A tensor is missing or has the wrong element type or shape; `q_groups` that do not add
    /// up, a scale that is not finite, a `q_invperm` that is not a permutation.
    pub fn load(
        source: &'a dyn TensorSource,
        key: &str,
        prescale: f32,
    ) -> Result<Self, FormatError> {
        let header = read_header(source, key)?;
        let (in_features, out_features) = (header.in_features, header.out_features);
        let words = read_words(source, &format!("{key}.q_weight"))?;
        let scale_words = read_words(source, &format!("{key}.q_scale"))?;
        let packed_words = words.len() / out_features;
        let groups = read_groups(
            source,
            &format!("{key}.q_groups"),
            packed_words,
            in_features,
        )?;
        Ok(Exl2Linear {
            key: key.to_owned(),
            in_features,
            out_features,
            words,
            scale_words,
            scale_max: read_scale_max(source, &format!("{key}.q_scale_max"), prescale)?,
            groups,
            permutation: read_permutation(source, &format!("{key}.q_invperm"))?,
            bias: read_bias(source, key, out_features, prescale)?,
        })
    }

    /// Shape and encoding.
    pub fn header(&self) -> LinearHeader {
        LinearHeader {
            in_features: self.in_features,
            out_features: self.out_features,
            bias: self.bias.is_some(),
            encoding: Encoding::Exl2 {
                packed_words: self.words.len() / self.out_features,
                groups: self.groups.len(),
            },
        }
    }

    /// Input features (K); a multiple of 32.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Output features as stored (N); a multiple of 32.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// The bias `[N]`.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// The groups in row order, bits never increasing.
    pub fn groups(&self) -> &[Exl2Group] {
        &self.groups
    }

    /// `[K]`: the original input feature that each packed row holds (`q_perm`).
    pub fn permutation(&self) -> &[u32] {
        &self.permutation
    }

    /// The packed codes `[Q, N]`, as stored.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The packed scale codes `[G, N/8]`, as stored: column n is nibble `n % 8` of word `n / 8`.
    pub fn scale_words(&self) -> &[u32] {
        &self.scale_words
    }

    /// m_g = f16(q_scale_max\[g\] · prescale / 256); it may be subnormal, which is intended.
    ///
    /// # Panics
    /// If there is no such group.
    pub fn scale_max_f16(&self, group: usize) -> f16 {
        self.scale_max[group]
    }

    /// The 4-bit scale code e of a column in a group.
    ///
    /// # Panics
    /// If there is no such group or column.
    pub fn scale_code(&self, group: usize, column: usize) -> u32 {
        assert!(
            column < self.out_features,
            "column {column} of {}",
            self.out_features
        );
        (self.scale_words[group * (self.out_features / 8) + column / 8] >> (4 * (column % 8))) & 15
    }

    /// s = f16((e+1)² · m_g): what a column's codes in a group are multiplied by.
    ///
    /// # Panics
    /// If there is no such group or column.
    pub fn group_scale(&self, group: usize, column: usize) -> f16 {
        scale_table(self.scale_max[group])[self.scale_code(group, column) as usize]
    }

    /// The scales of one group's `columns`, into `scales` of the same length.
    ///
    /// # Panics
    /// If there is no such group or column, or the lengths differ.
    pub fn group_scales(&self, group: usize, columns: Range<usize>, scales: &mut [f16]) {
        assert_eq!(columns.len(), scales.len(), "one scale per column");
        let table = scale_table(self.scale_max[group]);
        for (scale, column) in scales.iter_mut().zip(columns) {
            *scale = table[self.scale_code(group, column) as usize];
        }
    }

    /// One code, `0..2^bits`; the weight is `(code − zero_point) · group_scale`.
    ///
    /// # Panics
    /// If there is no such group, row or column.
    pub fn code(&self, group: usize, row_in_group: usize, column: usize) -> u32 {
        let mut code = [0u8];
        self.unpack_row(group, row_in_group, column..column + 1, &mut code);
        u32::from(code[0])
    }

    /// The codes of one packed row in `columns`, into `codes` of the same length: the fast way
    /// to repack a matrix (a row has one shift for all its columns).
    ///
    /// # Panics
    /// If there is no such group, row or column, or the lengths differ.
    pub fn unpack_row(
        &self,
        group: usize,
        row_in_group: usize,
        columns: Range<usize>,
        codes: &mut [u8],
    ) {
        assert_eq!(columns.len(), codes.len(), "one code per column");
        let row = self.packed_row(group, row_in_group, columns);
        match row.high {
            None => {
                for (code, low) in codes.iter_mut().zip(row.low) {
                    *code = ((low >> row.shift) & row.mask) as u8;
                }
            }
            Some(high) => {
                for ((code, low), high) in codes.iter_mut().zip(row.low).zip(high) {
                    *code = (((low >> row.shift) | (high << (32 - row.shift))) & row.mask) as u8;
                }
            }
        }
    }

    /// Where the codes of one packed row lie.
    fn packed_row(
        &self,
        group: usize,
        row_in_group: usize,
        columns: Range<usize>,
    ) -> PackedRow<'_> {
        let Exl2Group {
            bits,
            first_word,
            rows,
            ..
        } = self.groups[group];
        assert!(row_in_group < rows, "row {row_in_group} of {rows}");
        assert!(
            columns.end <= self.out_features,
            "columns {columns:?} of {}",
            self.out_features
        );
        let first_bit = row_in_group * bits as usize;
        let shift = (first_bit % 32) as u32;
        let word_row = |index: usize| {
            let start = (first_word + first_bit / 32 + index) * self.out_features;
            &self.words[start + columns.start..start + columns.end]
        };
        let straddles = shift + bits > 32;
        PackedRow {
            low: word_row(0),
            high: straddles.then(|| word_row(1)),
            shift,
            mask: (1 << bits) - 1,
        }
    }

    /// Decodes `W[K, N]` in the original order of input features, exactly as the format defines
    /// it in fp16: `f16(f16(code − zero) · s)`.
    pub fn decode_f16(&self) -> Vec<f16> {
        let n = self.out_features;
        let mut weights = vec![f16::ZERO; self.in_features * n];
        let mut scales = vec![0.0f32; n];
        let mut products = vec![0.0f32; n];
        for (index, group) in self.groups.iter().enumerate() {
            let table = scale_table(self.scale_max[index]).map(f16::to_f32);
            for (column, scale) in scales.iter_mut().enumerate() {
                *scale = table[self.scale_code(index, column) as usize];
            }
            for row_in_group in 0..group.rows {
                // The product of two fp16 values is exact in f32, so that the conversion below
                // is the only rounding.
                self.packed_row(index, row_in_group, 0..n).multiply(
                    group.zero_point(),
                    &scales,
                    &mut products,
                );
                let feature = self.permutation[group.first_row + row_in_group] as usize;
                weights[feature * n..][..n].convert_from_f32_slice(&products);
            }
        }
        weights
    }

    /// The linear that computes only the outputs `range`, at multiples of 32.
    ///
    /// # Errors
    /// An empty or unaligned range, or one beyond the outputs.
    pub fn slice_outputs(&self, range: Range<usize>) -> Result<Exl2Linear<'a>, FormatError> {
        check_output_range(&self.key, &range, self.out_features, EXL2_BLOCK)?;
        let scale_range = range.start / 8..range.end / 8;
        let words = copy_columns(&self.words, self.out_features, &range);
        let scale_words = copy_columns(&self.scale_words, self.out_features / 8, &scale_range);
        Ok(Exl2Linear {
            key: self.key.clone(),
            in_features: self.in_features,
            out_features: range.len(),
            words: Cow::Owned(words),
            scale_words: Cow::Owned(scale_words),
            scale_max: self.scale_max.clone(),
            groups: self.groups.clone(),
            permutation: self.permutation.clone(),
            bias: self.bias.as_ref().map(|bias| bias[range].to_vec()),
        })
    }
}

/// The words that hold one packed row's codes.
struct PackedRow<'w> {
    /// Words with the codes' low bits.
    low: &'w [u32],
    /// Words with their high bits, where codes straddle two words.
    high: Option<&'w [u32]>,
    shift: u32,
    mask: u32,
}

impl PackedRow<'_> {
    /// `(code − zero) · scale` for each column.
    fn multiply(&self, zero: i32, scales: &[f32], products: &mut [f32]) {
        let weight = |bits: u32, scale: f32| ((bits & self.mask) as i32 - zero) as f32 * scale;
        let columns = products.iter_mut().zip(scales).zip(self.low);
        match self.high {
            None => {
                for ((product, &scale), low) in columns {
                    *product = weight(low >> self.shift, scale);
                }
            }
            Some(high) => {
                let up = 32 - self.shift;
                for (((product, &scale), low), high) in columns.zip(high) {
                    *product = weight((low >> self.shift) | (high << up), scale);
                }
            }
        }
    }
}

/// f16((e+1)² · m) for each of the sixteen codes e.
fn scale_table(scale_max: f16) -> [f16; 16] {
    std::array::from_fn(|code| {
        let root = (code + 1) as f32;
        f16::from_f32(root * root * scale_max.to_f32())
    })
}

/// Reads `q_groups` and turns it into groups that cover `in_features` rows exactly.
fn read_groups(
    source: &dyn TensorSource,
    name: &str,
    packed_words: usize,
    in_features: usize,
) -> Result<Vec<Exl2Group>, FormatError> {
    let pairs = cast_bytes::<u16>(source.read(name)?.bytes);
    let invalid = |what: String, found: String, expected: String| {
        FormatError::invalid_tensor(source.file_of(name), name, what, found, expected)
    };
    let mut groups: Vec<Exl2Group> = Vec::with_capacity(pairs.len() / 2);
    let mut first_row = 0;
    for (index, pair) in pairs.chunks_exact(2).enumerate() {
        let (bits, first_word) = (u32::from(pair[0]), usize::from(pair[1]));
        if !EXL2_BITS.contains(&bits) {
            return Err(invalid(
                format!("bits of group {index}"),
                bits.to_string(),
                "2, 3, 4, 5, 6 or 8".to_owned(),
            ));
        }
        if let Some(previous) = groups.last().filter(|previous| previous.bits < bits) {
            return Err(invalid(
                format!("bits of group {index}"),
                bits.to_string(),
                format!("at most {}, as group {} has", previous.bits, index - 1),
            ));
        }
        if index == 0 && first_word != 0 {
            return Err(invalid(
                "first word row of group 0".to_owned(),
                first_word.to_string(),
                "0".to_owned(),
            ));
        }
        let end_word = pairs
            .get(2 * index + 3)
            .map_or(packed_words, |&next| usize::from(next));
        let words = end_word.saturating_sub(first_word);
        // 32 rows take as many words as a code has bits.
        if words == 0 || end_word > packed_words || !words.is_multiple_of(bits as usize) {
            return Err(invalid(
                format!("word rows of group {index} ({bits} bits)"),
                format!("{first_word}..{end_word}"),
                format!("a multiple of {bits} above 0, within q_weight's {packed_words}"),
            ));
        }
        let rows = words / bits as usize * EXL2_BLOCK;
        groups.push(Exl2Group {
            bits,
            first_word,
            first_row,
            rows,
        });
        first_row += rows;
    }
    if first_row != in_features {
        return Err(invalid(
            "rows of all groups".to_owned(),
            first_row.to_string(),
            format!("{in_features}, the length of q_invperm"),
        ));
    }
    Ok(groups)
}

/// Reads `q_scale_max` and computes m_g = f16(q_scale_max · (prescale / 256)), one rounding.
fn read_scale_max(
    source: &dyn TensorSource,
    name: &str,
    prescale: f32,
) -> Result<Vec<f16>, FormatError> {
    let stored = cast_bytes::<f16>(source.read(name)?.bytes);
    let factor = prescale / 256.0;
    let mut scales = Vec::with_capacity(stored.len());
    for (group, value) in stored.iter().enumerate() {
        let scaled = f16::from_f32(value.to_f32() * factor);
        if !value.is_finite() || !scaled.is_finite() {
            return Err(FormatError::invalid_tensor(
                source.file_of(name),
                name,
                format!("scale of group {group} (prescale {prescale})"),
                value,
                "a finite fp16 number, also after the prescale",
            ));
        }
        scales.push(scaled);
    }
    Ok(scales)
}

/// Reads `q_invperm` (original feature → packed row) and returns its inverse.
fn read_permutation(source: &dyn TensorSource, name: &str) -> Result<Vec<u32>, FormatError> {
    let inverse = cast_bytes::<i32>(source.read(name)?.bytes);
    let mut permutation = vec![u32::MAX; inverse.len()];
    for (feature, &packed_row) in inverse.iter().enumerate() {
        let slot = usize::try_from(packed_row)
            .ok()
            .and_then(|row| permutation.get_mut(row));
        match slot {
            Some(slot) if *slot == u32::MAX => *slot = feature as u32,
            Some(slot) => {
                let first = *slot;
                return Err(FormatError::invalid_tensor(
                    source.file_of(name),
                    name,
                    format!("packed row of feature {feature}"),
                    format!("{packed_row}, which feature {first} has as well"),
                    format!("each of 0..{} once", inverse.len()),
                ));
            }
            None => {
                return Err(FormatError::invalid_tensor(
                    source.file_of(name),
                    name,
                    format!("packed row of feature {feature}"),
                    packed_row,
                    format!("each of 0..{} once", inverse.len()),
                ));
            }
        }
    }
    Ok(permutation)
}
