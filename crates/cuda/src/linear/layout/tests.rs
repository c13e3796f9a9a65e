//! A model of the kernels' layout, held to the format's own decoding.

use half::f16;
use oxllama_format::{
    DType, Exl2Layout, Exl2Linear, GptqConfig, LinearHeader, LinearSource, MemoryTensors,
    TensorInfo,
};

use super::*;

const KEY: &str = "linear";

/// Numbers without a pattern.
struct Random(u32);

impl Random {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % end
    }
}

fn exl2_tensors(
    groups: &[(u32, usize)],
    out_features: usize,
    random: &mut Random,
) -> MemoryTensors {
    let layout = Exl2Layout::new(out_features, groups).expect("a valid layout");
    let mut codes = Vec::new();
    for &(bits, rows) in groups {
        codes.extend((0..rows * out_features).map(|_| random.below(1 << bits) as u8));
    }
    let scale_codes: Vec<u8> = (0..groups.len() * out_features)
        .map(|_| random.below(16) as u8)
        .collect();
    let scale_max: Vec<f16> = groups
        .iter()
        .map(|_| f16::from_f32(random.below(1000) as f32 / 1000.0))
        .collect();
    let mut permutation: Vec<u32> = (0..layout.in_features() as u32).collect();
    for index in (1..permutation.len()).rev() {
        permutation.swap(index, random.below(index as u32 + 1) as usize);
    }
    let packed = layout.pack(&codes, &scale_codes, &scale_max, &permutation);
    let mut tensors = MemoryTensors::new();
    for (info, bytes) in packed.named(KEY) {
        tensors
            .insert(info, bytes.to_vec())
            .expect("a whole tensor");
    }
    tensors
}

/// Bits of the low plane and of the high one.
fn planes(bits: u32) -> (u32, u32) {
    match bits {
        8 => (8, 0),
        4.. => (4, bits - 4),
        _ => (2, bits - 2),
    }
}

/// The bit of a half at which the codes of output `g + 8 i` begin; `field_bit` in `tiles.cuh`.
fn field_bit(bits: u32, i: usize) -> u32 {
    match bits {
        8 => 0,
        4.. => 4 * (i as u32 % 2),
        _ => 2 * i as u32,
    }
}

/// Where the low or high plane of a block of so many bits keeps the code of output `g + 8 i` and input
/// `8 t + j`: the byte of its word from the start of the plane, and the bit in that word.
fn place(bits: u32, is_high: bool, lane: usize, i: usize, j: usize) -> (usize, u32) {
    let (pair, half) = (j / 2, 16 * (j as u32 % 2));
    let (step, second) = (pair / 2, pair as u32 % 2);
    let at = half + 8 * second + field_bit(bits, i);
    let word = if bits >= 4 { 2 * (i / 2) + step } else { step };
    match (bits, is_high) {
        (8, _) => {
            let byte = 8 * (i % 2) + j;
            (
                i / 2 * 512 + lane * 16 + byte / 4 * 4,
                8 * (byte as u32 % 4),
            )
        }
        (4.., false) => (lane * 16 + word * 4, at),
        (_, false) => (lane * 8 + word * 4, at),
        (6, true) => (lane * 8 + i / 2 * 4, at + 2 * step as u32),
        (_, true) => (lane * 4, at + word as u32),
    }
}

/// Calls `visit` with the row and column in a block and tile of every weight of every lane.
fn each_weight(mut visit: impl FnMut(usize, usize, usize, (usize, usize))) {
    for lane in 0..32 {
        for i in 0..4 {
            for j in 0..8 {
                visit(lane, 8 * (lane % 4) + j, lane / 4 + 8 * i, (i, j));
            }
        }
    }
}

fn put(block: &mut [u8], start: usize, (byte, bit): (usize, u32), value: u32) {
    let word = &mut block[start + byte..][..4];
    let old = u32::from_le_bytes(word.try_into().expect("four bytes"));
    word.copy_from_slice(&(old | value << bit).to_le_bytes());
}

fn get(block: &[u8], start: usize, (byte, bit): (usize, u32), bits: u32) -> u32 {
    let word = &block[start + byte..][..4];
    u32::from_le_bytes(word.try_into().expect("four bytes")) >> bit & ((1 << bits) - 1)
}

/// The units of a tile before a block, as `units_before` in `tiles.cuh`.
fn units_before(sections: &[i32; 6], block: usize) -> usize {
    let (mut units, mut start) = (0, 0);
    for (bits, &end) in SECTION_BITS.iter().zip(sections) {
        let within = |bound: i32| block.min(bound as usize);
        units += *bits as usize * (within(end) - within(start));
        start = end;
    }
    units
}

/// Repacks and takes apart again, and compares with the format's weights.
fn check(groups_of: &[(u32, usize)], out_features: usize) {
    let mut random = Random(7);
    let tensors = exl2_tensors(groups_of, out_features, &mut random);
    let linear = Exl2Linear::load(&tensors, KEY, 1.0).expect("a valid linear");
    let layout = Layout::new(&linear.header());
    let source = LinearSource::Exl2(linear.clone());
    let groups = groups(&source);
    let (table, sections) = (block_table(&groups), section_ends(&groups));
    assert_eq!(table.len(), layout.blocks);
    assert_eq!(units_before(&sections, layout.blocks), layout.tile_units);
    let mut tiles = vec![0_u8; layout.tiles * layout.tile_units * UNIT_BYTES];
    assert!(tiles.len() <= layout.scales);
    let block_at = |tile: usize, block: usize| {
        (tile * layout.tile_units + units_before(&sections, block)) * UNIT_BYTES
    };
    for tile in 0..layout.tiles {
        for (group, stored) in linear.groups().iter().enumerate() {
            let (low, high) = planes(stored.bits);
            for row in (0..stored.rows).step_by(BLOCK_INPUTS) {
                let start = block_at(tile, (stored.first_row + row) / BLOCK_INPUTS);
                each_weight(|lane, input, output, (i, j)| {
                    let column = tile * TILE_OUTPUTS + output;
                    let code = linear.code(group, row + input, column);
                    put(
                        &mut tiles,
                        start,
                        place(stored.bits, false, lane, i, j),
                        code & ((1 << low) - 1),
                    );
                    if high > 0 {
                        let plane = start + low as usize * UNIT_BYTES;
                        put(
                            &mut tiles,
                            plane,
                            place(stored.bits, true, lane, i, j),
                            code >> low,
                        );
                    }
                });
            }
        }
    }
    let expected = linear.decode_f16();
    for tile in 0..layout.tiles {
        for (block, info) in table.iter().enumerate() {
            let (group, bits) = ((info[0] & 0xff_ffff) as usize, info[0] >> 24);
            assert!(block < (info[1] & 0xffff) as usize);
            let largest = f16::from_bits((info[1] >> 16) as u16).to_f32();
            let (low, high) = planes(bits);
            let start = block_at(tile, block);
            each_weight(|lane, input, output, (i, j)| {
                let mut code = get(&tiles, start, place(bits, false, lane, i, j), low);
                if high > 0 {
                    let plane = start + low as usize * UNIT_BYTES;
                    code |= get(&tiles, plane, place(bits, true, lane, i, j), high) << low;
                }
                let column = tile * TILE_OUTPUTS + output;
                let root = (linear.scale_code(group, column) + 1) as f32;
                let scale = f16::from_f32(root * root * largest).to_f32();
                let level = code as f32 - (1 << (bits - 1)) as f32;
                let input = linear.permutation()[block * BLOCK_INPUTS + input] as usize;
                let weight = f16::from_f32(level * scale);
                assert_eq!(weight, expected[input * out_features + column]);
            });
        }
    }
}

#[test]
fn every_mix_of_widths_comes_back() {
    let widths = SECTION_BITS;
    for mask in 1_usize..64 {
        let chosen = widths
            .iter()
            .enumerate()
            .filter(|(at, _)| mask >> at & 1 == 1);
        let groups: Vec<(u32, usize)> = chosen
            .flat_map(|(at, &bits)| [(bits, 32 * (1 + (at + mask) % 3)), (bits, 32)])
            .collect();
        check(&groups, if mask % 8 == 7 { 96 } else { 32 });
    }
}

/// `moved_fields` of `tiles.cuh` for one half.
fn moved_field(half: u32, bits: u32, from: u32, to: u32) -> u32 {
    let moved = if from < to {
        half << (to - from)
    } else {
        half >> (from - to)
    };
    moved & ((1 << bits) - 1) << to
}

/// Every code at every place, amid bits of others, becomes the subnormal number that the product's scale
/// expects, and the number that `centred` in `dequantise.cu` expects.
#[test]
fn codes_become_numbers_exactly() {
    let exact = |value: f32| {
        assert_eq!(f16::from_f32(value).to_f32(), value, "not a number of fp16");
        value
    };
    for bits in [2, 3, 4, 5, 6, 8] {
        let (low_bits, high_bits) = planes(bits);
        let zero = (1 << (bits - 1)) as f32;
        for (i, j) in (0..4).flat_map(|i| (0..8).map(move |j| (i, j))) {
            let to = field_bit(bits, i);
            for code in 0_u32..1 << bits {
                let mut pair = code;
                if bits < 8 {
                    let at = place(bits, false, 0, i, j).1 % 16;
                    let low = (1 << low_bits) - 1;
                    let others = 0xffff & !(low << at);
                    pair = moved_field(others | (code & low) << at, low_bits, at, to);
                    if high_bits > 0 {
                        let at = place(bits, true, 0, i, j).1 % 16;
                        let others = 0xffff & !(((1 << high_bits) - 1) << at);
                        let half = others | code >> low_bits << at;
                        pair |= moved_field(half, high_bits, at, to + low_bits);
                    }
                }
                assert_eq!(pair, code << to, "{bits} bits, code {code}");
                assert!(pair < 1 << 10, "a subnormal number");
                let number = f16::from_bits(pair as u16).to_f32();
                assert_eq!(number * (1 << (24 - to)) as f32, code as f32);
                let factor = exact(1.0 / (1 << to) as f32);
                let offset = exact(-1024.0 * factor - zero);
                let offset_bits = 0xe400 - (to << 10) + ((zero as u32) << to);
                assert_eq!(f16::from_bits(offset_bits as u16).to_f32(), offset);
                let value = f16::from_bits(pair as u16 | 0x6400).to_f32() * factor + offset;
                assert_eq!(value, code as f32 - zero);
            }
        }
    }
}

#[test]
fn a_header_says_where_every_part_lies() {
    let header = |encoding| LinearHeader {
        in_features: 288,
        out_features: 72,
        bias: true,
        encoding,
    };
    let gptq = Encoding::Gptq {
        groups: 3,
        act_order: true,
    };
    let layout = Layout::new(&header(gptq));
    assert_eq!((layout.tiles, layout.blocks, layout.tile_units), (3, 9, 36));
    assert_eq!(layout.scales, 3 * 36 * UNIT_BYTES);
    assert_eq!(layout.zeros - layout.scales, aligned(3 * 3 * 64));
    assert_eq!(layout.block_table - layout.zeros, aligned(3 * 3 * 32));
    assert_eq!(layout.range_table - layout.block_table, aligned(9 * 8));
    let table_bytes = aligned(most_table_bytes(9));
    assert_eq!(layout.permutation - layout.range_table, table_bytes);
    assert_eq!(layout.places - layout.permutation, aligned(288 * 4));
    assert_eq!(layout.bias - layout.places, aligned(288 * 4));
    assert_eq!(layout.total, layout.bias + aligned(72 * 4));

    let layout = Layout::new(&LinearHeader {
        in_features: 37,
        out_features: 50,
        bias: false,
        encoding: Encoding::Float(DType::BF16),
    });
    assert_eq!((layout.padded_inputs(), layout.tile_units), (64, 32));
    assert_eq!(layout.scales, 2 * 2 * 2048);
    assert_eq!(layout.total - layout.largest, aligned(4));
}

#[test]
fn gptq_groups_end_with_the_matrix() {
    let mut tensors = MemoryTensors::new();
    let mut insert = |name: &str, dtype, shape: &[usize], bytes: usize| {
        let info = TensorInfo {
            name: format!("{KEY}.{name}"),
            dtype,
            shape: shape.to_vec(),
        };
        tensors
            .insert(info, vec![0; bytes])
            .expect("a whole tensor");
    };
    insert("qweight", DType::I32, &[36, 8], 36 * 8 * 4);
    insert("qzeros", DType::I32, &[3, 1], 12);
    insert("scales", DType::F16, &[3, 8], 48);
    let config = GptqConfig::default();
    let source = LinearSource::load(&tensors, KEY, &config, 1.0).expect("a valid linear");
    let groups = groups(&source);
    let blocks: Vec<usize> = groups.iter().map(|group| group.blocks).collect();
    assert_eq!(blocks, [4, 4, 1]);
    assert_eq!(section_ends(&groups), [0, 0, 0, 9, 9, 9]);
    assert_eq!(block_table(&groups)[8], [2 | 4 << 24, 9 | 0x3c00 << 16]);
}
