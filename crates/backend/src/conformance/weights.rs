//! Random linears in every stored format, made from the formats' definitions alone: the
//! weights that a linear stands for are known without decoding it.

use std::collections::BTreeMap;

use half::{bf16, f16};
use oxllama_format::{DType, FormatError, TensorData, TensorInfo, TensorSource};

use super::random::Random;

/// Tensors that live in memory.
#[derive(Debug, Default)]
pub(crate) struct MemoryTensors {
    tensors: BTreeMap<String, (TensorInfo, Vec<u8>)>,
}

impl MemoryTensors {
    fn insert<T: bytemuck::NoUninit>(
        &mut self,
        name: &str,
        dtype: DType,
        shape: &[usize],
        elements: &[T],
    ) {
        let info = TensorInfo {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
        };
        // Files are little-endian; so is every machine that this runs on.
        let bytes = bytemuck::cast_slice(elements).to_vec();
        assert_eq!(info.size_bytes(), bytes.len() as u64, "{name}");
        self.tensors.insert(name.to_owned(), (info, bytes));
    }
}

impl TensorSource for MemoryTensors {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn infos(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        Box::new(self.tensors.values().map(|(info, _)| info))
    }

    fn read(&self, name: &str) -> Result<TensorData<'_>, FormatError> {
        let (info, bytes) = self
            .tensors
            .get(name)
            .ok_or_else(|| FormatError::MissingTensor {
                path: self.file_of(name).to_path_buf(),
                tensor: name.to_owned(),
                expected: "a tensor of a conformance case".to_owned(),
            })?;
        Ok(TensorData {
            info: info.clone(),
            bytes: bytes.as_slice().into(),
        })
    }
}

/// Rows of one bit width in an EXL2 linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// 2, 3, 4, 5, 6 or 8.
    pub(crate) bits: u32,
    /// A multiple of 32.
    pub(crate) rows: usize,
    /// Rows of a group; the region's last group may be shorter in a matrix's last region.
    pub(crate) group_size: usize,
}

/// How a linear is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Regions in order of falling bit width.
    Exl2 {
        /// Rows by bit width.
        regions: Vec<Region>,
        /// The order of inputs: seeds a random permutation, `None` for none. Linears with
        /// the same seed share it.
        permutation_seed: Option<u64>,
    },
    /// 4-bit GPTQ.
    Gptq {
        /// Rows of a group; as many groups as it takes.
        group_size: usize,
        /// Whether groups are spread over the inputs by `g_idx`.
        act_order: bool,
    },
    /// Plain numbers.
    Float {
        /// F16, BF16 or F32.
        dtype: DType,
        /// Whether one weight is too large for fp16 (not with F16). It hides the errors of
        /// other outputs, so most cases go without.
        beyond_f16: bool,
    },
}

/// What a linear is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LinearCase {
    /// How the weights are stored.
    pub(crate) stored: Stored,
    /// Inputs.
    pub(crate) in_features: usize,
    /// Outputs.
    pub(crate) out_features: usize,
    /// Whether there is a bias.
    pub(crate) bias: bool,
}

/// A linear as stored, and as the numbers that it stands for.
#[derive(Debug)]
pub(crate) struct RandomLinear {
    /// The tensors, under [`LINEAR_NAME`].
    pub(crate) tensors: MemoryTensors,
    /// `[in_features, out_features]`, exact.
    pub(crate) weights: Vec<f32>,
    /// `[out_features]`; zeros for a linear without.
    pub(crate) bias: Vec<f32>,
    /// Inputs.
    pub(crate) in_features: usize,
    /// Outputs.
    pub(crate) out_features: usize,
}

/// The key under which [`RandomLinear::tensors`] holds its tensors.
pub(crate) const LINEAR_NAME: &str = "linear";

/// The fp16 number nearest to the product of two.
fn multiply_f16(a: f16, b: f16) -> f16 {
    // 11-bit significands: the f32 product is exact, so this rounds once.
    f16::from_f32(a.to_f32() * b.to_f32())
}

impl LinearCase {
    /// Makes a linear of this kind.
    pub(crate) fn random(&self, random: &mut Random) -> RandomLinear {
        let mut linear = RandomLinear {
            tensors: MemoryTensors::default(),
            weights: vec![0.0; self.in_features * self.out_features],
            bias: vec![0.0; self.out_features],
            in_features: self.in_features,
            out_features: self.out_features,
        };
        match &self.stored {
            Stored::Exl2 {
                regions,
                permutation_seed,
            } => linear.fill_exl2(regions, *permutation_seed, random),
            Stored::Gptq {
                group_size,
                act_order,
            } => linear.fill_gptq(*group_size, *act_order, random),
            Stored::Float { dtype, beyond_f16 } => linear.fill_float(*dtype, *beyond_f16, random),
        }
        if self.bias {
            let bias: Vec<f16> = (0..self.out_features)
                .map(|_| f16::from_f32(random.uniform(-1.0, 1.0)))
                .collect();
            linear.bias = bias.iter().map(|bias| bias.to_f32()).collect();
            linear.insert("bias", DType::F16, &[self.out_features], &bias);
        }
        linear
    }
}

impl RandomLinear {
    fn insert<T: bytemuck::NoUninit>(
        &mut self,
        suffix: &str,
        dtype: DType,
        shape: &[usize],
        elements: &[T],
    ) {
        self.tensors
            .insert(&format!("{LINEAR_NAME}.{suffix}"), dtype, shape, elements);
    }

    /// Draws an EXL2 linear and stores it as its definition says.
    fn fill_exl2(&mut self, regions: &[Region], seed: Option<u64>, random: &mut Random) {
        let (in_features, out_features) = (self.in_features, self.out_features);
        let permutation = match seed {
            Some(seed) => Random::for_case(&format!("permutation {seed}")).permutation(in_features),
            None => (0..in_features).collect(),
        };
        let mut q_weight: Vec<u32> = Vec::new();
        let mut q_scale: Vec<u32> = Vec::new();
        let mut q_scale_max: Vec<f16> = Vec::new();
        let mut q_groups: Vec<u16> = Vec::new();
        let mut first_row = 0;
        for group in groups_of(regions) {
            let Region { bits, rows, .. } = group;
            let zero = 1_u32 << (bits - 1);
            q_groups.extend([bits as u16, (q_weight.len() / out_features) as u16]);
            // Wider codes have smaller steps; all the same magnitude of weights.
            let scale_max = f16::from_f32(random.uniform(0.05, 0.2) / zero as f32);
            q_scale_max.push(scale_max);
            let step = f16::from_f32(scale_max.to_f32() / 256.0);
            let codes: Vec<u32> = (0..out_features).map(|_| random.below(16) as u32).collect();
            q_scale.extend(codes.chunks(8).map(pack_nibbles));

            let mut words = vec![0_u32; rows * bits as usize / 32 * out_features];
            for row in 0..rows {
                let input = permutation[first_row + row];
                for (output, scale_code) in codes.iter().enumerate() {
                    let code = random.below(1 << bits) as u32;
                    put_code(&mut words, row, output, out_features, bits, code);
                    let square = (scale_code + 1) * (scale_code + 1);
                    let scale = multiply_f16(f16::from_f32(square as f32), step);
                    let level = f16::from_f32(code as f32 - zero as f32);
                    self.weights[input * out_features + output] =
                        multiply_f16(level, scale).to_f32();
                }
            }
            q_weight.extend(words);
            first_row += rows;
        }
        assert_eq!(first_row, in_features, "regions cover the inputs");

        let mut inverse = vec![0_i32; in_features];
        for (packed, &input) in permutation.iter().enumerate() {
            inverse[input] = packed as i32;
        }
        let groups = q_scale_max.len();
        let word_rows = q_weight.len() / out_features;
        self.insert(
            "q_weight",
            DType::I32,
            &[word_rows, out_features],
            &q_weight,
        );
        self.insert("q_scale", DType::I32, &[groups, out_features / 8], &q_scale);
        self.insert("q_scale_max", DType::F16, &[groups], &q_scale_max);
        self.insert("q_groups", DType::I16, &[2 * groups], &q_groups);
        self.insert("q_invperm", DType::I32, &[in_features], &inverse);
    }

    /// Draws a GPTQ linear (version 1: zero points are stored less one).
    fn fill_gptq(&mut self, group_size: usize, act_order: bool, random: &mut Random) {
        let (in_features, out_features) = (self.in_features, self.out_features);
        let groups = in_features.div_ceil(group_size);
        let order = if act_order {
            random.permutation(in_features)
        } else {
            (0..in_features).collect()
        };
        let mut group_of = vec![0_i32; in_features];
        for (place, &input) in order.iter().enumerate() {
            group_of[input] = (place / group_size) as i32;
        }
        let scales: Vec<f16> = (0..groups * out_features)
            .map(|_| f16::from_f32(random.uniform(0.001, 0.02)))
            .collect();
        let stored_zeros: Vec<u32> = (0..groups * out_features)
            .map(|_| random.below(16) as u32)
            .collect();
        let mut qweight = vec![0_u32; in_features / 8 * out_features];
        for (input, &group) in group_of.iter().enumerate() {
            for output in 0..out_features {
                let code = random.below(16) as u32;
                put_code(&mut qweight, input, output, out_features, 4, code);
                let entry = group as usize * out_features + output;
                let level = code as f32 - (stored_zeros[entry] + 1) as f32;
                self.weights[input * out_features + output] =
                    multiply_f16(f16::from_f32(level), scales[entry]).to_f32();
            }
        }
        let zeros: Vec<u32> = stored_zeros.chunks(8).map(pack_nibbles).collect();
        let words = out_features / 8;
        self.insert(
            "qweight",
            DType::I32,
            &[in_features / 8, out_features],
            &qweight,
        );
        self.insert("qzeros", DType::I32, &[groups, words], &zeros);
        self.insert("scales", DType::F16, &[groups, out_features], &scales);
        if act_order {
            self.insert("g_idx", DType::I32, &[in_features], &group_of);
        }
    }

    /// Draws plain weights, stored `[out_features, in_features]`.
    ///
    /// Their values are fp16 numbers for every dtype (bfloat16: of 8 significant bits), so
    /// that backends may round to fp16 or not; with `beyond_f16`, the last output has one
    /// weight that must not be.
    fn fill_float(&mut self, dtype: DType, beyond_f16: bool, random: &mut Random) {
        let (in_features, out_features) = (self.in_features, self.out_features);
        let mut stored = vec![0.0_f32; in_features * out_features];
        for output in 0..out_features {
            for input in 0..in_features {
                let drawn = f16::from_f32(random.uniform(-0.1, 0.1)).to_f32();
                let mut weight = match dtype {
                    // Truncated to 8 bits, and kept clear of fp16's subnormal numbers.
                    DType::BF16 if drawn.abs() < 1e-4 => 0.0,
                    DType::BF16 => bf16::from_f32(drawn).to_f32(),
                    _ => drawn,
                };
                if beyond_f16 && (input, output) == (0, out_features - 1) {
                    weight = 131_072.0;
                }
                stored[output * in_features + input] = weight;
                self.weights[input * out_features + output] = weight;
            }
        }
        let shape = [out_features, in_features];
        match dtype {
            DType::F16 => {
                let elements: Vec<f16> = stored.iter().map(|&w| f16::from_f32(w)).collect();
                self.insert("weight", dtype, &shape, &elements);
            }
            DType::BF16 => {
                let elements: Vec<bf16> = stored.iter().map(|&w| bf16::from_f32(w)).collect();
                self.insert("weight", dtype, &shape, &elements);
            }
            _ => self.insert("weight", DType::F32, &shape, &stored),
        }
    }
}

/// Divides regions into groups, in order.
fn groups_of(regions: &[Region]) -> impl Iterator<Item = Region> {
    regions.iter().flat_map(|&region| {
        (0..region.rows)
            .step_by(region.group_size)
            .map(move |start| Region {
                rows: region.group_size.min(region.rows - start),
                ..region
            })
    })
}

/// Eight 4-bit values in a word, the first in the lowest bits.
fn pack_nibbles(nibbles: &[u32]) -> u32 {
    let place = |(index, &nibble): (usize, &u32)| nibble << (4 * index);
    nibbles.iter().enumerate().map(place).sum()
}

/// Writes the code of `row` into the bit stream of column `output`: codes follow one
/// another from the lowest bit of the column's first word on.
fn put_code(words: &mut [u32], row: usize, output: usize, width: usize, bits: u32, code: u32) {
    let first_bit = row * bits as usize;
    for bit in 0..bits as usize {
        let at = first_bit + bit;
        words[at / 32 * width + output] |= ((code >> bit) & 1) << (at % 32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The packing vectors of the format's description: codes and words of one column.
    #[test]
    fn packs_codes_as_the_format_says() {
        let cases: [(u32, &[u32]); 6] = [
            (2, &[0xADEA_DEAD]),
            (3, &[0xB6E5_E599, 0x6E5E_599F, 0xE5E5_99FB]),
            (4, &[0xF93E_A631]),
            (
                5,
                &[
                    0x66E5_1861,
                    0x9FD9_C6FE,
                    0xC476_57A6,
                    0x71FB_BCEF,
                    0xFA67_E558,
                ],
            ),
            (6, &[0xCE28_60C1, 0x6BA6_7D94, 0xA9E4_C9FF]),
            (8, &[0x9E92_C943]),
        ];
        for (bits, expected) in cases {
            let mut words = vec![0; expected.len()];
            for row in 0..expected.len() * 32 / bits as usize {
                let code = (row * row / 3 + 2 * row + 1) as u32;
                let code = if bits == 8 { 67 * code } else { code } % (1 << bits);
                put_code(&mut words, row, 0, 1, bits, code);
            }
            assert_eq!(words, expected, "{bits} bits: {words:08x?}");
        }
    }

    #[test]
    fn only_the_last_group_is_ragged() {
        let region = |bits, rows, group_size| Region {
            bits,
            rows,
            group_size,
        };
        let groups: Vec<(u32, usize)> = groups_of(&[region(6, 64, 32), region(4, 160, 64)])
            .map(|group| (group.bits, group.rows))
            .collect();
        assert_eq!(groups, [(6, 32), (6, 32), (4, 64), (4, 64), (4, 32)]);
    }
}
