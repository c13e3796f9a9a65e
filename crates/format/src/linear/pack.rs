//! Writing EXL2 linears: from codes to the five tensors of the format.

use half::f16;

use super::exl2::{EXL2_BITS, EXL2_BLOCK};
use crate::{DType, FormatError, TensorInfo};

/// Shape and groups of an EXL2 linear that is to be packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exl2Layout {
    in_features: usize,
    out_features: usize,
    /// `(bits, rows)` of each group in row order.
    groups: Vec<(u32, usize)>,
}

/// The five tensors of an EXL2 linear, as stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Exl2Tensors {
    in_features: usize,
    out_features: usize,
    /// `[Q, N]`.
    pub q_weight: Vec<u32>,
    /// `[G, N/8]`.
    pub q_scale: Vec<u32>,
    /// `[G]`.
    pub q_scale_max: Vec<f16>,
    /// `[2G]`: bits and first word row of each group.
    pub q_groups: Vec<u16>,
    /// `[K]`: packed row of each original feature.
    pub q_invperm: Vec<u32>,
}

impl Exl2Layout {
    /// A layout for `out_features` (N, a multiple of 32) with the given groups `(bits, rows)`:
    /// bits among [`EXL2_BITS`] and never increasing, rows multiples of 32.
    ///
    /// # Errors
    /// A value outside these rules, or more word rows before the last group than the 16-bit
    /// field of the format can say.
    pub fn new(out_features: usize, groups: &[(u32, usize)]) -> Result<Self, FormatError> {
        let invalid = |what: String, found: String, expected: &str| {
            FormatError::malformed(std::path::Path::new(""), what, found, expected)
        };
        if out_features == 0 || !out_features.is_multiple_of(EXL2_BLOCK) {
            return Err(invalid(
                "output features of an EXL2 linear".to_owned(),
                out_features.to_string(),
                "a multiple of 32 above 0",
            ));
        }
        let mut first_word = 0;
        let mut previous_bits = EXL2_BITS[0];
        for (index, &(bits, rows)) in groups.iter().enumerate() {
            if !EXL2_BITS.contains(&bits) || bits > previous_bits {
                return Err(invalid(
                    format!("bits of group {index}"),
                    bits.to_string(),
                    "8, 6, 5, 4, 3 or 2, not above the group before",
                ));
            }
            if rows == 0 || !rows.is_multiple_of(EXL2_BLOCK) {
                return Err(invalid(
                    format!("rows of group {index}"),
                    rows.to_string(),
                    "a multiple of 32 above 0",
                ));
            }
            if first_word > usize::from(u16::MAX) {
                return Err(invalid(
                    format!("first word row of group {index}"),
                    first_word.to_string(),
                    "at most 65535",
                ));
            }
            first_word += rows / 32 * bits as usize;
            previous_bits = bits;
        }
        let in_features = groups.iter().map(|&(_, rows)| rows).sum();
        if in_features == 0 {
            return Err(invalid(
                "groups".to_owned(),
                "none".to_owned(),
                "at least one",
            ));
        }
        Ok(Exl2Layout {
            in_features,
            out_features,
            groups: groups.to_vec(),
        })
    }

    /// Input features (K), the sum of all groups' rows.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Packs codes and scales.
    ///
    /// `codes` `[K, N]` in packed row order, each below 2^bits of its group; `scale_codes`
    /// `[G, N]`, 0..16; `scale_max` `[G]`; `permutation` `[K]`: original feature of each packed
    /// row.
    ///
    /// # Panics
    /// If a length differs, a code is too large or `permutation` is not one: errors of the
    /// caller, not of data.
    pub fn pack(
        &self,
        codes: &[u8],
        scale_codes: &[u8],
        scale_max: &[f16],
        permutation: &[u32],
    ) -> Exl2Tensors {
        let (k, n) = (self.in_features, self.out_features);
        assert_eq!(codes.len(), k * n, "codes [K, N]");
        assert_eq!(
            scale_codes.len(),
            self.groups.len() * n,
            "scale codes [G, N]"
        );
        assert_eq!(scale_max.len(), self.groups.len(), "scale_max [G]");
        assert_eq!(permutation.len(), k, "permutation [K]");
        let mut q_weight = Vec::new();
        let mut q_groups = Vec::with_capacity(2 * self.groups.len());
        let mut first_row = 0;
        for &(bits, rows) in &self.groups {
            q_groups.extend([bits as u16, (q_weight.len() / n) as u16]);
            pack_group(bits, n, &codes[first_row * n..][..rows * n], &mut q_weight);
            first_row += rows;
        }
        let q_scale = scale_codes.chunks_exact(8).map(pack_nibbles).collect();
        let mut q_invperm = vec![u32::MAX; k];
        for (packed_row, &feature) in permutation.iter().enumerate() {
            let slot = &mut q_invperm[feature as usize];
            assert_eq!(*slot, u32::MAX, "feature {feature} has two packed rows");
            *slot = packed_row as u32;
        }
        Exl2Tensors {
            in_features: k,
            out_features: n,
            q_weight,
            q_scale,
            q_scale_max: scale_max.to_vec(),
            q_groups,
            q_invperm,
        }
    }
}

impl Exl2Tensors {
    /// The tensors of the linear `key` with their names, headers and little-endian bytes.
    pub fn named(&self, key: &str) -> [(TensorInfo, &[u8]); 5] {
        let groups = self.q_scale_max.len();
        let words = self.q_weight.len() / self.out_features;
        let info = |part: &str, dtype: DType, shape: &[usize]| TensorInfo {
            name: format!("{key}.{part}"),
            dtype,
            shape: shape.to_vec(),
        };
        [
            (
                info("q_weight", DType::I32, &[words, self.out_features]),
                bytemuck::cast_slice(&self.q_weight),
            ),
            (
                info("q_scale", DType::I32, &[groups, self.out_features / 8]),
                bytemuck::cast_slice(&self.q_scale),
            ),
            (
                info("q_scale_max", DType::F16, &[groups]),
                bytemuck::cast_slice(&self.q_scale_max),
            ),
            (
                info("q_groups", DType::I16, &[2 * groups]),
                bytemuck::cast_slice(&self.q_groups),
            ),
            (
                info("q_invperm", DType::I32, &[self.in_features]),
                bytemuck::cast_slice(&self.q_invperm),
            ),
        ]
    }
}

/// Appends one group's word rows; `codes` is `[rows, n]`.
fn pack_group(bits: u32, n: usize, codes: &[u8], words: &mut Vec<u32>) {
    let rows = codes.len() / n;
    let start = words.len();
    words.resize(start + rows / 32 * bits as usize * n, 0);
    let group = &mut words[start..];
    for (row, row_codes) in codes.chunks_exact(n).enumerate() {
        let first_bit = row * bits as usize;
        let (word, shift) = (first_bit / 32, (first_bit % 32) as u32);
        for (column, &code) in row_codes.iter().enumerate() {
            let code = u64::from(code);
            assert!(code >> bits == 0, "code {code} does not fit in {bits} bits");
            let pair = code << shift;
            group[word * n + column] |= pair as u32;
            if shift + bits > 32 {
                group[(word + 1) * n + column] |= (pair >> 32) as u32;
            }
        }
    }
}

/// Eight 4-bit values as one word, the first in the lowest bits.
fn pack_nibbles(nibbles: &[u8]) -> u32 {
    nibbles.iter().rev().fold(0, |word, &nibble| {
        assert!(nibble < 16, "{nibble} does not fit in 4 bits");
        (word << 4) | u32::from(nibble)
    })
}
