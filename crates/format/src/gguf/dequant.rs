//! ggml's tensor types and their exact decoding.
//!
//! Each decoder repeats the arithmetic of ggml's reference in the same order and in binary32, so
//! that results are bit-identical to it. Layouts are those of ggml's block structures; `d` is a
//! block's scale, `dmin` the scale of its minima, all little-endian.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// How a GGUF tensor's elements are stored, for the types that can be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// binary32.
    F32,
    /// binary16.
    F16,
    /// bfloat16.
    BF16,
    /// 4 bits, scale per 32.
    Q4_0,
    /// 4 bits, scale and minimum per 32.
    Q4_1,
    /// 5 bits, scale per 32.
    Q5_0,
    /// 5 bits, scale and minimum per 32.
    Q5_1,
    /// 8 bits, scale per 32.
    Q8_0,
    /// 2 bits in blocks of 256, scale and minimum per 16.
    Q2K,
    /// 3 bits in blocks of 256, scale per 16.
    Q3K,
    /// 4 bits in blocks of 256, scale and minimum per 32.
    Q4K,
    /// 5 bits in blocks of 256, scale and minimum per 32.
    Q5K,
    /// 6 bits in blocks of 256, scale per 16.
    Q6K,
}

/// Elements of a block of the types without `K` in their names.
const BLOCK: usize = 32;
/// Elements of a block of the `K` types.
const SUPER_BLOCK: usize = 256;
/// Elements converted at a time: a multiple of every block, small enough to stay in the L1 cache.
const CHUNK: usize = 2_048;

impl GgmlType {
    /// Every type that can be decoded.
    pub const ALL: [GgmlType; 13] = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::BF16,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2K,
        GgmlType::Q3K,
        GgmlType::Q4K,
        GgmlType::Q5K,
        GgmlType::Q6K,
    ];

    /// The type's number in the file.
    pub const fn number(self) -> u32 {
        match self {
            GgmlType::F32 => 0,
            GgmlType::F16 => 1,
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q5_0 => 6,
            GgmlType::Q5_1 => 7,
            GgmlType::Q8_0 => 8,
            GgmlType::Q2K => 10,
            GgmlType::Q3K => 11,
            GgmlType::Q4K => 12,
            GgmlType::Q5K => 13,
            GgmlType::Q6K => 14,
            GgmlType::BF16 => 30,
        }
    }

    /// The type with this number in the file, if it can be decoded.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.number() == number)
    }

    /// ggml's name of the type.
    pub const fn name(self) -> &'static str {
        match self {
            GgmlType::F32 => "F32",
            GgmlType::F16 => "F16",
            GgmlType::BF16 => "BF16",
            GgmlType::Q4_0 => "Q4_0",
            GgmlType::Q4_1 => "Q4_1",
            GgmlType::Q5_0 => "Q5_0",
            GgmlType::Q5_1 => "Q5_1",
            GgmlType::Q8_0 => "Q8_0",
            GgmlType::Q2K => "Q2_K",
            GgmlType::Q3K => "Q3_K",
            GgmlType::Q4K => "Q4_K",
            GgmlType::Q5K => "Q5_K",
            GgmlType::Q6K => "Q6_K",
        }
    }

    /// Elements that share a block.
    pub const fn block_elements(self) -> usize {
        match self {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => 1,
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q5_0 | GgmlType::Q5_1 | GgmlType::Q8_0 => {
                BLOCK
            }
            GgmlType::Q2K | GgmlType::Q3K | GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K => {
                SUPER_BLOCK
            }
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            GgmlType::F32 => 4,
            GgmlType::F16 | GgmlType::BF16 => 2,
            GgmlType::Q4_0 => 18,
            GgmlType::Q4_1 => 20,
            GgmlType::Q5_0 => 22,
            GgmlType::Q5_1 => 24,
            GgmlType::Q8_0 => 34,
            GgmlType::Q2K => 84,
            GgmlType::Q3K => 110,
            GgmlType::Q4K => 144,
            GgmlType::Q5K => 176,
            GgmlType::Q6K => 210,
        }
    }

    /// Name for messages of a type that cannot be decoded.
    pub(crate) fn describe(number: u32) -> String {
        let name = match number {
            9 => "Q8_1",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => return format!("number {number}"),
        };
        format!("{name} (number {number})")
    }

    /// Names of the types that can be decoded, for messages.
    pub(crate) fn supported_names() -> String {
        Self::ALL.map(GgmlType::name).join(", ")
    }
}

/// Decodes whole blocks to binary32, exactly as ggml's reference does.
///
/// `blocks`: little-endian blocks of `ggml_type`; `out`: one element for each of theirs.
///
/// # Panics
/// The lengths do not belong together.
pub fn dequantize(ggml_type: GgmlType, blocks: &[u8], out: &mut [f32]) {
    let block_bytes = ggml_type.block_bytes();
    let block_elements = ggml_type.block_elements();
    assert_eq!(blocks.len() % block_bytes, 0, "whole blocks");
    assert_eq!(
        out.len(),
        blocks.len() / block_bytes * block_elements,
        "one output for each element"
    );
    match ggml_type {
        GgmlType::F32 => {
            for (value, &bytes) in out.iter_mut().zip(blocks.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(bytes);
            }
        }
        GgmlType::F16 => {
            for (value, &bytes) in out.iter_mut().zip(blocks.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(bytes).to_f32();
            }
        }
        GgmlType::BF16 => {
            for (value, &bytes) in out.iter_mut().zip(blocks.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
            }
        }
        GgmlType::Q4_0 => each_block(blocks, out, q4_0),
        GgmlType::Q4_1 => each_block(blocks, out, q4_1),
        GgmlType::Q5_0 => each_block(blocks, out, q5_0),
        GgmlType::Q5_1 => each_block(blocks, out, q5_1),
        GgmlType::Q8_0 => each_block(blocks, out, q8_0),
        GgmlType::Q2K => each_block(blocks, out, q2_k),
        GgmlType::Q3K => each_block(blocks, out, q3_k),
        GgmlType::Q4K => each_block(blocks, out, q4_k),
        GgmlType::Q5K => each_block(blocks, out, q5_k),
        GgmlType::Q6K => each_block(blocks, out, q6_k),
    }
}

/// Decodes whole blocks, adds `bias` in binary32 (where there is one) and rounds to fp16, to
/// nearest even; `out` receives two little-endian bytes for each element.
///
/// # Errors
/// The first element that is not a finite fp16 number: its position and its value before
/// rounding. All of `out` is written even then.
///
/// # Panics
/// The lengths do not belong together.
pub(crate) fn dequantize_to_f16(
    ggml_type: GgmlType,
    blocks: &[u8],
    bias: Option<f32>,
    out: &mut [u8],
) -> Result<(), (u64, f32)> {
    let chunk_bytes = CHUNK / ggml_type.block_elements() * ggml_type.block_bytes();
    let mut values = [0_f32; CHUNK];
    let mut halves = [f16::ZERO; CHUNK];
    let mut first_bad = None;
    let chunks = blocks.chunks(chunk_bytes).zip(out.chunks_mut(CHUNK * 2));
    for (chunk, (blocks, out)) in chunks.enumerate() {
        let count = out.len() / 2;
        let (values, halves) = (&mut values[..count], &mut halves[..count]);
        dequantize(ggml_type, blocks, values);
        if let Some(bias) = bias {
            for value in values.iter_mut() {
                *value += bias;
            }
        }
        halves.convert_from_f32_slice(values);
        let mut finite = true;
        for (bytes, half) in out.as_chunks_mut::<2>().0.iter_mut().zip(halves.iter()) {
            finite &= half.to_bits() & 0x7c00 != 0x7c00;
            *bytes = half.to_le_bytes();
        }
        if !finite && first_bad.is_none() {
            first_bad = halves
                .iter()
                .position(|half| !half.is_finite())
                .map(|index| ((chunk * CHUNK + index) as u64, values[index]));
        }
    }
    first_bad.map_or(Ok(()), Err)
}

fn each_block<const BYTES: usize, const ELEMENTS: usize>(
    blocks: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let blocks = blocks.as_chunks::<BYTES>().0;
    for (block, out) in blocks.iter().zip(out.as_chunks_mut::<ELEMENTS>().0) {
        decode(block, out);
    }
}

/// The fp16 number at `offset` of a block.
fn half_at(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

/// `d`, then 16 bytes: low nibbles are elements 0-15, high nibbles 16-31; offset 8.
fn q4_0(block: &[u8; 18], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((low, high), &code) in low.iter_mut().zip(high).zip(&block[2..]) {
        *low = d * (f32::from(code & 15) - 8.0);
        *high = d * (f32::from(code >> 4) - 8.0);
    }
}

/// `d`, minimum, then nibbles as in Q4_0.
fn q4_1(block: &[u8; 20], out: &mut [f32; BLOCK]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((low, high), &code) in low.iter_mut().zip(high).zip(&block[4..]) {
        *low = d * f32::from(code & 15) + min;
        *high = d * f32::from(code >> 4) + min;
    }
}

/// The 5-bit code of element `index`: nibbles as in Q4_0, fifth bits in a 32-bit word.
fn five_bits(nibbles: &[u8], fifth_bits: u32, index: usize) -> u8 {
    let nibble = (nibbles[index % 16] >> (index / 16 * 4)) & 15;
    nibble | (((fifth_bits >> index) & 1) as u8) << 4
}

/// `d`, fifth bits, nibbles; offset 16.
fn q5_0(block: &[u8; 22], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    let fifth_bits = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (index, value) in out.iter_mut().enumerate() {
        *value = d * (f32::from(five_bits(&block[6..], fifth_bits, index)) - 16.0);
    }
}

/// `d`, minimum, fifth bits, nibbles.
fn q5_1(block: &[u8; 24], out: &mut [f32; BLOCK]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    let fifth_bits = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (index, value) in out.iter_mut().enumerate() {
        *value = d * f32::from(five_bits(&block[8..], fifth_bits, index)) + min;
    }
}

/// `d`, then signed bytes.
fn q8_0(block: &[u8; 34], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    for (value, &code) in out.iter_mut().zip(&block[2..]) {
        *value = f32::from(code.cast_signed()) * d;
    }
}

/// 16 bytes of (scale, minimum) nibbles, 64 bytes of codes, `d`, `dmin`.
///
/// Codes: 32 bytes hold 128 elements, bits 0-1 the first 32, bits 2-3 the next, and so on.
fn q2_k(block: &[u8; 84], out: &mut [f32; SUPER_BLOCK]) {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(block[group] & 15);
        let min = dmin * f32::from(block[group] >> 4);
        let (start, shift) = two_bit_codes(group);
        for (value, &code) in out.iter_mut().zip(&block[16 + start..]) {
            *value = scale * f32::from((code >> shift) & 3) - min;
        }
    }
}

/// Where the 2-bit codes of a group of 16 are: first byte of 64, and shift.
fn two_bit_codes(group: usize) -> (usize, usize) {
    (group / 8 * 32 + group % 2 * 16, group % 8 / 2 * 2)
}

/// 32 bytes of third bits, 64 bytes of codes as in Q2_K, 12 bytes of 6-bit scales, `d`.
///
/// A third bit that is *clear* subtracts 4. Bit `b` of byte `i` belongs to element `32 b + i`.
fn q3_k(block: &[u8; 110], out: &mut [f32; SUPER_BLOCK]) {
    let d = half_at(block, 108);
    let scales = &block[96..108];
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = (scales[group % 8] >> (group / 8 * 4)) & 15;
        let high = (scales[8 + group % 4] >> (group / 4 * 2)) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        let (start, shift) = two_bit_codes(group);
        let codes = &block[32 + start..];
        let third_bits = &block[group % 2 * 16..];
        for ((value, &code), &third) in out.iter_mut().zip(codes).zip(third_bits) {
            let low = (code >> shift) & 3;
            let third = (third >> (group / 2)) & 1;
            *value = scale * (f32::from(low | third << 2) - 4.0);
        }
    }
}

/// The 6-bit (scale, minimum) of sub-block `group` of 8, from the 12 bytes of Q4_K and Q5_K.
///
/// The first four are the low 6 bits of bytes 0-3 and 4-7; the others have their low 4 bits in
/// bytes 8-11 and their high 2 bits in the top of bytes 0-7.
fn scale_and_min(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (
            low & 15 | packed[group - 4] >> 2 & 48,
            low >> 4 | packed[group] >> 2 & 48,
        )
    }
}

/// `d`, `dmin`, 12 bytes of scales and minima, 128 bytes of nibbles.
///
/// Nibbles: 32 bytes hold 64 elements, the low nibbles the first 32.
fn q4_k(block: &[u8; 144], out: &mut [f32; SUPER_BLOCK]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], group);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let codes = &block[16 + group / 2 * 32..];
        let shift = group % 2 * 4;
        for (value, &code) in out.iter_mut().zip(codes) {
            *value = scale * f32::from((code >> shift) & 15) - min;
        }
    }
}

/// `d`, `dmin`, 12 bytes of scales and minima, 32 bytes of fifth bits, nibbles as in Q4_K.
///
/// Bit `g` of byte `i` is the fifth bit of element `32 g + i`.
fn q5_k(block: &[u8; 176], out: &mut [f32; SUPER_BLOCK]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let fifth_bits = &block[16..48];
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], group);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let codes = &block[48 + group / 2 * 32..];
        let shift = group % 2 * 4;
        for ((value, &code), &fifth) in out.iter_mut().zip(codes).zip(fifth_bits) {
            let code = (code >> shift) & 15 | ((fifth >> group) & 1) << 4;
            *value = scale * f32::from(code) - min;
        }
    }
}

/// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, `d`; offset 32.
///
/// Nibbles: 64 bytes hold 128 elements, the low nibbles the first 64. Pairs: as Q2_K's codes.
fn q6_k(block: &[u8; 210], out: &mut [f32; SUPER_BLOCK]) {
    let d = half_at(block, 208);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(block[192 + group].cast_signed());
        let nibbles = &block[group / 8 * 64 + group % 4 * 16..];
        let nibble_shift = group % 8 / 4 * 4;
        let (pair_start, pair_shift) = two_bit_codes(group);
        let pairs = &block[128 + pair_start..];
        for ((value, &nibble), &pair) in out.iter_mut().zip(nibbles).zip(pairs) {
            let code = (nibble >> nibble_shift) & 15 | ((pair >> pair_shift) & 3) << 4;
            *value = scale * (f32::from(code) - 32.0);
        }
    }
}
