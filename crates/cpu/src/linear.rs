//! Weights on the device: sizes from headers, and loading.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use oxllama_backend::{DeviceError, HostBuffer};
use oxllama_format::{
    DType, Encoding, Exl2Linear, FloatLinear, GptqLinear, LinearHeader, LinearSource,
};
use oxllama_memory::{Bytes, DeviceId, Reservation};

use crate::Isa;
use crate::float::FloatWeights;
use crate::integer::{IntegerWeights, Scales};
use crate::pack::{BLOCK_ROWS, Repack, Segment, TILE, block_words, push_group, repack_block};

/// Every part of a buffer starts at a multiple of this, a cache line.
const ALIGNMENT: usize = 64;

/// Weights as the CPU's kernels want them, in one buffer.
#[derive(Debug)]
pub struct CpuLinear {
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    buffer: HostBuffer,
    layout: Layout,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Exl2 {
        segments: Box<[Segment]>,
        /// Whether packed rows come in another order than input features.
        permuted: bool,
    },
    Gptq {
        segments: Box<[Segment]>,
        permuted: bool,
    },
    Float {
        half: bool,
        scale: f32,
    },
}

/// Where the parts of the buffer start, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Words of a tile's codes; 0 for float weights.
    tile_words: usize,
    groups: usize,
    /// Scale codes or scales, `[tiles, groups, …]`.
    scales: usize,
    /// Scale tables (EXL2) or zero points (GPTQ).
    extra: usize,
    /// u32 `[in_features]`
    permutation: usize,
    /// f32 `[tiles · 16]`
    bias: usize,
    has_bias: bool,
    total: usize,
}

impl Layout {
    fn new(header: &LinearHeader) -> Self {
        let tiles = header.out_features.div_ceil(TILE);
        let (tile_words, groups, scale_bytes, extra_bytes, permuted) = match header.encoding {
            Encoding::Exl2 {
                packed_words,
                groups,
            } => (packed_words * TILE, groups, 8, groups * TILE * 4, true),
            Encoding::Gptq { groups, act_order } => (
                header.in_features / 8 * TILE,
                groups,
                2 * TILE,
                tiles * groups * TILE,
                act_order,
            ),
            Encoding::Float(_) => (0, 0, 0, 0, false),
        };
        let weights = match header.encoding {
            Encoding::Float(dtype) => header.in_features * header.out_features * float_bytes(dtype),
            _ => tiles * tile_words * 4,
        };
        let mut end = 0;
        let mut part = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(ALIGNMENT);
            start
        };
        part(weights);
        let scales = part(tiles * groups * scale_bytes);
        let extra = part(extra_bytes);
        let permutation = part(if permuted { header.in_features * 4 } else { 0 });
        let bias = part(if header.bias { tiles * TILE * 4 } else { 0 });
        Self {
            tile_words,
            groups,
            scales,
            extra,
            permutation,
            bias,
            has_bias: header.bias,
            total: end,
        }
    }
}

/// Bytes of an element on the device: f32 stays as it is, narrower floats become f16.
fn float_bytes(dtype: DType) -> usize {
    if matches!(dtype, DType::F16 | DType::BF16) {
        2
    } else {
        4
    }
}

/// Bytes that [`load`] takes.
pub(crate) fn device_bytes(header: &LinearHeader) -> Bytes {
    Bytes::from_usize(Layout::new(header).total)
}

/// Repacks `source` into `reservation`.
pub(crate) fn load(
    device: &DeviceId,
    isa: Isa,
    source: &LinearSource<'_>,
    reservation: Reservation,
) -> Result<CpuLinear, DeviceError> {
    let header = source.header();
    let layout = Layout::new(&header);
    let needed = Bytes::from_usize(layout.total);
    if reservation.bytes() != needed {
        return Err(DeviceError::ReservationSize {
            device: device.clone(),
            what: format!("a linear of {header:?}"),
            needed,
            reserved: reservation.bytes(),
        });
    }
    let mut buffer = HostBuffer::allocate(device, reservation)?;
    let memory = buffer.as_mut_slice::<u8>();
    let kind = match source {
        LinearSource::Exl2(linear) => fill_exl2(linear, &layout, isa, memory),
        LinearSource::Gptq(linear) => fill_gptq(linear, &layout, isa, memory),
        LinearSource::Float(linear) => fill_float(linear, memory)?,
    };
    if let Some(bias) = source.bias() {
        let at = &mut memory[layout.bias..][..bias.len() * 4];
        at.copy_from_slice(bytemuck::cast_slice(&bias));
    }
    Ok(CpuLinear {
        in_features: header.in_features,
        out_features: header.out_features,
        buffer,
        layout,
        kind,
    })
}

/// Repacks the blocks of one group, whose words start at `words`.
fn repack_group(
    isa: Isa,
    words: &[u32],
    bits: u32,
    columns: usize,
    codes: &mut [u32],
    tile_words: usize,
    first_word: usize,
) {
    let tiles = columns.div_ceil(TILE);
    for (block, words) in words.chunks_exact(bits as usize * columns).enumerate() {
        let start = first_word + block * block_words(bits);
        assert!(
            (tiles - 1) * tile_words + start + block_words(bits) <= codes.len(),
            "a group's codes end within the matrix"
        );
        let repack = Repack {
            words: words.as_ptr(),
            columns,
            block: codes[start..].as_mut_ptr(),
            tile_words,
        };
        // SAFETY: `words` has `bits · columns` words, and the assertion says that the last
        // tile's block, and with it every tile's, lies within `codes`.
        unsafe { repack_block(isa, bits, repack) };
    }
}

fn fill_exl2(linear: &Exl2Linear<'_>, layout: &Layout, isa: Isa, memory: &mut [u8]) -> Kind {
    let columns = linear.out_features();
    let tiles = columns.div_ceil(TILE);
    let tile_words = layout.tile_words;
    let mut segments = Vec::new();
    {
        let codes = &mut memory[..tiles * tile_words * 4];
        let codes: &mut [u32] = bytemuck::cast_slice_mut(codes);
        for (index, group) in linear.groups().iter().enumerate() {
            push_group(&mut segments, group.bits, index, group.rows);
            let words = &linear.words()[group.first_word * columns..][..group.words() * columns];
            // Groups follow one another without gaps in the file, and so in a tile.
            let first = group.first_word * TILE;
            repack_group(isa, words, group.bits, columns, codes, tile_words, first);
        }
    }
    let scale_words = linear.scale_words();
    let scales = &mut memory[layout.scales..][..tiles * layout.groups * 8];
    let scales: &mut [[u32; 2]] = bytemuck::cast_slice_mut(scales);
    for (tile, scales) in scales.chunks_exact_mut(layout.groups).enumerate() {
        for (group, scale) in scales.iter_mut().enumerate() {
            let row = &scale_words[group * (columns / 8)..][..columns / 8];
            *scale = [row[tile * 2], row.get(tile * 2 + 1).copied().unwrap_or(0)];
        }
    }
    let tables = &mut memory[layout.extra..][..layout.groups * TILE * 4];
    let tables: &mut [[f32; TILE]] = bytemuck::cast_slice_mut(tables);
    for (group, table) in tables.iter_mut().enumerate() {
        let largest = linear.scale_max_f16(group).to_f32();
        *table = std::array::from_fn(|code| {
            let root = (code + 1) as f32;
            f16::from_f32(root * root * largest).to_f32()
        });
    }
    Kind::Exl2 {
        segments: segments.into_boxed_slice(),
        permuted: store_permutation(linear.permutation(), layout, memory),
    }
}

/// Stores a permutation; false, and nothing is stored, if it is the identity.
fn store_permutation(permutation: &[u32], layout: &Layout, memory: &mut [u8]) -> bool {
    let permuted = permutation
        .iter()
        .enumerate()
        .any(|(row, &feature)| row != feature as usize);
    if permuted {
        let at = &mut memory[layout.permutation..][..permutation.len() * 4];
        at.copy_from_slice(bytemuck::cast_slice(permutation));
    }
    permuted
}

fn fill_gptq(linear: &GptqLinear<'_>, layout: &Layout, isa: Isa, memory: &mut [u8]) -> Kind {
    const BITS: u32 = 4;
    let columns = linear.out_features();
    let tiles = columns.div_ceil(TILE);
    let tile_words = layout.tile_words;
    let permutation = linear.permutation();
    {
        let codes = &mut memory[..tiles * tile_words * 4];
        let codes: &mut [u32] = bytemuck::cast_slice_mut(codes);
        let mut row_codes = vec![0_u8; columns];
        let mut words = vec![0_u32; BITS as usize * columns];
        for (block, features) in permutation.chunks_exact(BLOCK_ROWS).enumerate() {
            words.fill(0);
            for (row, &feature) in features.iter().enumerate() {
                linear.unpack_row(feature as usize, 0..columns, &mut row_codes);
                let shift = BITS as usize * (row % 8);
                for (word, &code) in words[row / 8 * columns..].iter_mut().zip(&row_codes) {
                    *word |= u32::from(code) << shift;
                }
            }
            let first = block * block_words(BITS);
            repack_group(isa, &words, BITS, columns, codes, tile_words, first);
        }
    }
    let mut segments = Vec::new();
    let groups = layout.groups;
    for group in 0..groups {
        let first = group * linear.group_size();
        let rows = (linear.in_features() - first).min(linear.group_size());
        push_group(&mut segments, BITS, group, rows);
    }
    let tile_outputs = |tile: usize| (columns - tile * TILE).min(TILE);
    let scales = &mut memory[layout.scales..][..tiles * groups * TILE * 2];
    let scales: &mut [[u16; TILE]] = bytemuck::cast_slice_mut(scales);
    for (index, scales) in scales.iter_mut().enumerate() {
        let (tile, group) = (index / groups, index % groups);
        let from = &linear.scales()[group * columns + tile * TILE..][..tile_outputs(tile)];
        for (to, from) in scales.iter_mut().zip(from) {
            *to = from.to_bits();
        }
    }
    let zeros = &mut memory[layout.extra..][..tiles * groups * TILE];
    for (index, zeros) in zeros.chunks_exact_mut(TILE).enumerate() {
        let (tile, group) = (index / groups, index % groups);
        for (output, zero) in zeros.iter_mut().enumerate().take(tile_outputs(tile)) {
            *zero = linear.zero(group, tile * TILE + output) as u8;
        }
    }
    Kind::Gptq {
        segments: segments.into_boxed_slice(),
        permuted: store_permutation(&permutation, layout, memory),
    }
}

/// Copies or narrows piece by piece, so that loading takes no memory beside the reservation.
fn fill_float(linear: &FloatLinear<'_>, memory: &mut [u8]) -> Result<Kind, DeviceError> {
    const PIECE: usize = 4096;
    let half = float_bytes(linear.dtype()) == 2;
    let bytes = linear.bytes();
    let mut scale = linear.prescale();
    let mut finite = true;
    match linear.dtype() {
        DType::BF16 if linear.float_exceeds_f16() => {
            let scaled = linear.to_f16_scaled()?;
            memory[..scaled.values.len() * 2].copy_from_slice(bytemuck::cast_slice(&scaled.values));
            scale = scaled.scale;
        }
        DType::BF16 => {
            let mut wide = [0.0_f32; PIECE];
            let to: &mut [f16] = bytemuck::cast_slice_mut(&mut memory[..bytes.len()]);
            for (to, from) in to.chunks_mut(PIECE).zip(bytes.chunks(PIECE * 2)) {
                for (wide, from) in wide.iter_mut().zip(from.chunks_exact(2)) {
                    *wide = bf16::from_le_bytes([from[0], from[1]]).to_f32();
                }
                finite &= wide[..to.len()].iter().all(|value| value.is_finite());
                to.convert_from_f32_slice(&wide[..to.len()]);
            }
        }
        DType::F16 => {
            memory[..bytes.len()].copy_from_slice(bytes);
            let values: &[u16] = bytemuck::cast_slice(&memory[..bytes.len()]);
            // All exponent bits set: infinite or no number.
            finite = values.iter().all(|value| value & 0x7C00 != 0x7C00);
        }
        _ => {
            memory[..bytes.len()].copy_from_slice(bytes);
            let values: &[f32] = bytemuck::cast_slice(&memory[..bytes.len()]);
            finite = values.iter().all(|value| value.is_finite());
        }
    }
    if !finite {
        // Names the weight in its error.
        linear.to_f16_scaled()?;
    }
    Ok(Kind::Float { half, scale })
}

/// A loaded matrix as the kernels take it.
pub(crate) enum Weights<'a> {
    Integer {
        weights: IntegerWeights<'a>,
        /// `None`: packed rows are input features.
        permutation: Option<&'a [u32]>,
    },
    Float(FloatWeights),
}

impl CpuLinear {
    /// Tiles of sixteen outputs, the last perhaps partial.
    pub(crate) fn tiles(&self) -> usize {
        self.out_features.div_ceil(TILE)
    }

    /// What a tile costs to read, in bytes: how work is shared out.
    pub(crate) fn tile_bytes(&self) -> usize {
        match self.kind {
            Kind::Exl2 { .. } | Kind::Gptq { .. } => self.layout.tile_words * 4,
            Kind::Float { half, .. } => self.in_features * TILE * if half { 2 } else { 4 },
        }
    }

    /// f32 `[tiles · 16]`, null if there is none.
    pub(crate) fn bias(&self) -> *const f32 {
        if self.layout.has_bias {
            self.part(self.layout.bias).cast()
        } else {
            std::ptr::null()
        }
    }

    fn part(&self, at: usize) -> *const u8 {
        self.buffer.as_slice::<u8>()[at..].as_ptr()
    }

    /// The matrix as the kernels take it.
    pub(crate) fn weights(&self) -> Weights<'_> {
        let (segments, permuted, scales) = match &self.kind {
            Kind::Float { half, scale } => {
                return Weights::Float(FloatWeights {
                    values: self.part(0),
                    half: *half,
                    in_features: self.in_features,
                    out_features: self.out_features,
                    scale: *scale,
                });
            }
            Kind::Exl2 { segments, permuted } => {
                let scales = Scales::Exl2 {
                    codes: self.part(self.layout.scales).cast(),
                    tables: self.part(self.layout.extra).cast(),
                };
                (segments, permuted, scales)
            }
            Kind::Gptq { segments, permuted } => {
                let scales = Scales::Gptq {
                    scales: self.part(self.layout.scales).cast(),
                    zeros: self.part(self.layout.extra),
                };
                (segments, permuted, scales)
            }
        };
        let permutation = permuted.then(|| {
            let bytes = &self.buffer.as_slice::<u8>()[self.layout.permutation..];
            bytemuck::cast_slice(&bytes[..self.in_features * 4])
        });
        Weights::Integer {
            weights: IntegerWeights {
                codes: self.part(0).cast(),
                tile_words: self.layout.tile_words,
                segments,
                groups: self.layout.groups,
                scales,
            },
            permutation,
        }
    }
}
