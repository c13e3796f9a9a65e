//! The test vectors of the EXL2 and GPTQ formats.

mod support;

use half::f16;
use oxllama_format::{
    DType, EXL2_BITS, Encoding, Exl2Group, Exl2Layout, Exl2Linear, Exl2Tensors, GptqConfig,
    GptqLinear, LinearHeader, LinearSource,
};
use support::{crc32, exl2_tensors, in_memory, tensor};

/// CRC-32 of a slice's little-endian bytes.
fn crc<T: bytemuck::NoUninit>(elements: &[T]) -> u32 {
    crc32(bytemuck::cast_slice(elements))
}

#[test]
fn crc32_is_the_ieee_one() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

/// Codes of one column and the words they are stored as, for each width.
const PACKING: [(u32, usize, &[u32]); 6] = [
    (2, 16, &[0xadea_dead]),
    (3, 32, &[0xb6e5_e599, 0x6e5e_599f, 0xe5e5_99fb]),
    (4, 8, &[0xf93e_a631]),
    (
        5,
        32,
        &[
            0x66e5_1861,
            0x9fd9_c6fe,
            0xc476_57a6,
            0x71fb_bcef,
            0xfa67_e558,
        ],
    ),
    (6, 16, &[0xce28_60c1, 0x6ba6_7d94, 0xa9e4_c9ff]),
    (8, 4, &[0x9e92_c943]),
];

/// The codes that the vectors are made of.
fn vector_code(bits: u32, row: usize) -> u8 {
    let value = row * row / 3 + 2 * row + 1;
    if bits == 8 {
        (67 * value % 256) as u8
    } else {
        (value % (1 << bits)) as u8
    }
}

#[test]
fn every_width_packs_to_the_stored_words() {
    for (bits, block_rows, words) in PACKING {
        let layout = Exl2Layout::new(32, &[(bits, 32)]).expect("a layout");
        let row_codes: Vec<u8> = (0..32)
            .map(|row| vector_code(bits, row % block_rows))
            .collect();
        let codes: Vec<u8> = row_codes.iter().flat_map(|&code| [code; 32]).collect();
        let permutation: Vec<u32> = (0..32).collect();
        let packed = layout.pack(&codes, &[0; 32], &[f16::ONE], &permutation);

        let column: Vec<u32> = packed.q_weight.iter().step_by(32).copied().collect();
        assert_eq!(column, words.repeat(32 / block_rows), "{bits} bits");

        let source = in_memory(&exl2_tensors("p", &packed));
        let linear = Exl2Linear::load(&source, "p", 1.0).expect("a valid linear");
        let mut unpacked = [0u8; 32];
        for (row, &code) in row_codes.iter().enumerate() {
            assert_eq!(
                linear.code(0, row, 31),
                u32::from(code),
                "{bits} bits, row {row}"
            );
            linear.unpack_row(0, row, 0..32, &mut unpacked);
            assert_eq!(unpacked, [code; 32], "{bits} bits, row {row}");
        }
    }
}

/// The end-to-end vector: K = 160, N = 32, four groups.
fn end_to_end() -> Exl2Tensors {
    let groups = [(6u32, 32usize), (4, 64), (3, 32), (2, 32)];
    let layout = Exl2Layout::new(32, &groups).expect("a layout");
    let bits_of_rows = groups
        .iter()
        .flat_map(|&(bits, rows)| std::iter::repeat_n(bits, rows));
    let codes: Vec<u8> = bits_of_rows
        .enumerate()
        .flat_map(|(k, bits)| (0..32).map(move |n| ((7 * k + 3 * n + k * n) % (1 << bits)) as u8))
        .collect();
    let scale_codes: Vec<u8> = (0..4)
        .flat_map(|g| (0..32).map(move |n| ((5 * g + n) % 16) as u8))
        .collect();
    let scale_max: Vec<f16> = (1..=4)
        .map(|g| f16::from_f64(0.01 * f64::from(g)))
        .collect();
    let permutation: Vec<u32> = (0..160).map(|row| (37 * row + 11) % 160).collect();
    layout.pack(&codes, &scale_codes, &scale_max, &permutation)
}

#[test]
fn end_to_end_tensors() {
    let packed = end_to_end();
    assert_eq!(packed.q_groups, [6, 0, 4, 6, 3, 14, 2, 17]);
    assert_eq!(packed.q_weight.len(), 19 * 32);
    let scale_bits: Vec<u16> = packed
        .q_scale_max
        .iter()
        .map(|scale| scale.to_bits())
        .collect();
    assert_eq!(scale_bits, [0x211f, 0x251f, 0x27ae, 0x291f]);
    let column: Vec<u32> = packed
        .q_weight
        .iter()
        .step_by(32)
        .take(4)
        .copied()
        .collect();
    assert_eq!(column, [0xdc54_e1c0, 0x6ff8_c6a8, 0xa626_d434, 0xcc17_edf0]);
    assert_eq!(crc(&packed.q_weight), 0x37bf_1cc1);
    assert_eq!(crc(&packed.q_scale), 0x3676_b1d2);
    assert_eq!(crc(&packed.q_scale_max), 0x4d8c_765d);
    assert_eq!(crc(&packed.q_groups), 0xfc67_e481);
    assert_eq!(crc(&packed.q_invperm), 0x43de_7ca9);
}

#[test]
fn end_to_end_weights() {
    let source = in_memory(&exl2_tensors("p", &end_to_end()));
    let linear = Exl2Linear::load(&source, "p", 1.0).expect("a valid linear");
    let scale_max: Vec<u16> = (0..4).map(|g| linear.scale_max_f16(g).to_bits()).collect();
    assert_eq!(scale_max, [0x0290, 0x051f, 0x07ae, 0x091f]);
    assert_eq!(
        linear.groups()[2],
        Exl2Group {
            bits: 3,
            first_word: 14,
            first_row: 96,
            rows: 32
        }
    );
    assert_eq!(linear.permutation()[0], 11);
    assert_eq!(linear.permutation()[17], 0);

    let weights = linear.decode_f16();
    assert_eq!(crc(&weights), 0x2b8f_8483);
    let at = |k: usize, n: usize| weights[k * 32 + n].to_bits();
    assert_eq!(
        [at(11, 0), at(0, 0), at(48, 5), at(159, 31), at(100, 17)],
        [0x9520, 0x135e, 0x9f35, 0x32ba, 0x21e1]
    );
    for (n, expected) in [(0, 0.103_445_05), (1, -0.032_806_52), (31, -1.817_626_95)] {
        let y: f64 = (0..160)
            .map(|k| (f64::from(k as u32 % 7) - 3.0) * weights[k * 32 + n].to_f64())
            .sum();
        assert!((y - expected).abs() < 1e-8, "y[{n}] = {y}");
    }
}

#[test]
fn single_elements_agree_with_the_whole_decode() {
    let source = in_memory(&exl2_tensors("p", &end_to_end()));
    let linear = Exl2Linear::load(&source, "p", 1.0).expect("a valid linear");
    let weights = linear.decode_f16();
    let mut scales = [f16::ZERO; 32];
    for (index, group) in linear.groups().iter().enumerate() {
        linear.group_scales(index, 0..32, &mut scales);
        for row in 0..group.rows {
            let feature = linear.permutation()[group.first_row + row] as usize;
            for (n, scale) in scales.iter().enumerate() {
                assert_eq!(*scale, linear.group_scale(index, n));
                let code = linear.code(index, row, n) as i32 - group.zero_point();
                let expected = f16::from_f32(code as f32 * scale.to_f32());
                assert_eq!(weights[feature * 32 + n].to_bits(), expected.to_bits());
            }
        }
    }
}

#[test]
fn stored_size_is_the_formats() {
    let tensors = exl2_tensors("p", &end_to_end());
    let stored: usize = tensors.iter().map(|(_, bytes)| bytes.len()).sum();
    let source = in_memory(&tensors);
    let header = LinearHeader::find(&source, "p", &GptqConfig::default())
        .expect("valid headers")
        .expect("an EXL2 linear");
    assert_eq!(
        header.encoding,
        Encoding::Exl2 {
            packed_words: 19,
            groups: 4
        }
    );
    assert_eq!((header.in_features, header.out_features), (160, 32));
    assert_eq!(header.stored_bytes(), stored as u64);
    // Σ N·b + G·(16 + 32 + 4N) + 32·K bits.
    let bits = 32 * (6 * 32 + 4 * 64 + 3 * 32 + 2 * 32) + 4 * (16 + 32 + 4 * 32) + 32 * 160;
    assert_eq!(header.stored_bytes() * 8, bits);
    assert!((header.bits_per_weight() - bits as f64 / 5120.0).abs() < 1e-12);
}

#[test]
fn subnormal_scales_are_kept() {
    let layout = Exl2Layout::new(32, &[(8, 32)]).expect("a layout");
    let permutation: Vec<u32> = (0..32).collect();
    let scale_max = [f16::from_bits(0x1266)];
    let packed = layout.pack(&[129; 32 * 32], &[15; 32], &scale_max, &permutation);
    let source = in_memory(&exl2_tensors("p", &packed));
    let linear = Exl2Linear::load(&source, "p", 1.0).expect("a valid linear");
    assert_eq!(linear.scale_max_f16(0).to_bits(), 0x0033);
    // 256 · 51 · 2^-24, exact in fp16.
    assert_eq!(
        linear.group_scale(0, 0).to_f32(),
        256.0 * 51.0 / 16_777_216.0
    );
    assert_eq!(linear.decode_f16()[0], linear.group_scale(0, 0));
}

#[test]
fn prescale_enters_before_the_one_rounding() {
    let source = in_memory(&exl2_tensors("p", &end_to_end()));
    let linear = Exl2Linear::load(&source, "p", 0.22).expect("a valid linear");
    let expected = f16::from_f32(f16::from_bits(0x211f).to_f32() * (0.22f32 / 256.0));
    assert_eq!(linear.scale_max_f16(0), expected);
}

#[test]
fn a_slice_of_outputs_decodes_to_those_columns() {
    let groups = [(5u32, 32usize), (3, 32)];
    let layout = Exl2Layout::new(96, &groups).expect("a layout");
    let codes: Vec<u8> = (0..64 * 96).map(|index| (index * 7 % 8) as u8).collect();
    let scale_codes: Vec<u8> = (0..2 * 96).map(|index| (index * 5 % 16) as u8).collect();
    let permutation: Vec<u32> = (0..64).rev().collect();
    let scale_max = [f16::from_f32(0.3), f16::from_f32(0.7)];
    let packed = layout.pack(&codes, &scale_codes, &scale_max, &permutation);
    let mut tensors = exl2_tensors("p", &packed);
    let bias: Vec<f16> = (0..96).map(|n| f16::from_f32(n as f32)).collect();
    tensors.push(tensor("p.bias", DType::F16, &[96], &bias));
    let source = in_memory(&tensors);
    let whole = Exl2Linear::load(&source, "p", 1.0).expect("a valid linear");
    let part = whole.slice_outputs(32..96).expect("an aligned range");
    assert_eq!(part.header().out_features, 64);
    assert_eq!(part.bias().expect("a bias")[0], 32.0);
    let (whole, part) = (whole.decode_f16(), part.decode_f16());
    for k in 0..64 {
        assert_eq!(part[k * 64..][..64], whole[k * 96 + 32..][..64], "row {k}");
    }
}

#[test]
fn widths_are_the_formats_in_order() {
    assert_eq!(EXL2_BITS, [8, 6, 5, 4, 3, 2]);
}

/// The GPTQ vector: K = 64, N = 8, groups of 32.
fn gptq_tensors(g_idx: Option<&[i32]>) -> Vec<support::Tensor> {
    let code = |k: usize, n: usize| ((3 * k + 5 * n + k * n) % 16) as u32;
    let mut words = vec![0u32; 8 * 8];
    for k in 0..64 {
        for n in 0..8 {
            words[k / 8 * 8 + n] |= code(k, n) << (4 * (k % 8));
        }
    }
    let zeros: Vec<u32> = (0..2)
        .map(|g| (0..8).fold(0, |word, n| word | (((3 * g + n) % 16) << (4 * n))))
        .collect();
    let scales: Vec<f16> = (1..=2)
        .flat_map(|g| (1..=8).map(move |n| f16::from_f64(0.002 * f64::from(g) * f64::from(n))))
        .collect();
    let mut tensors = vec![
        tensor("p.qweight", DType::I32, &[8, 8], &words),
        tensor("p.qzeros", DType::I32, &[2, 1], &zeros),
        tensor("p.scales", DType::F16, &[2, 8], &scales),
    ];
    tensors.extend(g_idx.map(|g_idx| tensor("p.g_idx", DType::I32, &[64], g_idx)));
    tensors
}

#[test]
fn gptq_tensors_are_the_vectors() {
    let tensors = gptq_tensors(None);
    let words: Vec<u32> = bytemuck::cast_slice(&tensors[0].1).to_vec();
    assert_eq!(
        words[..8],
        [
            0x52fc_9630,
            0x1d95_1d95,
            0xd83e_94fa,
            0x93d7_1b5f,
            0x5e70_92b4,
            0x1919_1919,
            0xd4b2_907e,
            0x9f5b_17d3
        ]
    );
    assert_eq!(crc(&words), 0x8d88_90a7);
    let zeros: Vec<u32> = bytemuck::cast_slice(&tensors[1].1).to_vec();
    assert_eq!(zeros, [0x7654_3210, 0xa987_6543]);
    assert_eq!(crc32(&tensors[2].1), 0x702c_e875);
}

#[test]
fn gptq_decodes_with_and_without_act_order() {
    let all_zero = vec![0; 64];
    let sequential: Vec<i32> = (0..64).map(|row| row / 32).collect();
    let alternating: Vec<i32> = (0..64).map(|row| row % 2).collect();
    for (g_idx, expected) in [
        (None, 0xd5d8_dc91),
        (Some(&all_zero), 0xd5d8_dc91),
        (Some(&sequential), 0xd5d8_dc91),
        (Some(&alternating), 0x8f5f_796d),
    ] {
        let source = in_memory(&gptq_tensors(g_idx.map(Vec::as_slice)));
        let linear =
            GptqLinear::load(&source, "p", &GptqConfig::default(), 1.0).expect("a valid linear");
        assert_eq!(linear.group_size(), 32);
        assert_eq!(crc(&linear.decode_f16()), expected, "g_idx {g_idx:?}");
    }
}

#[test]
fn gptq_permutation_sorts_rows_by_group_stably() {
    let alternating: Vec<i32> = (0..64).map(|row| row % 2).collect();
    let source = in_memory(&gptq_tensors(Some(&alternating)));
    let linear =
        GptqLinear::load(&source, "p", &GptqConfig::default(), 1.0).expect("a valid linear");
    let permutation = linear.permutation();
    assert_eq!(permutation[..3], [0, 2, 4]);
    assert_eq!(permutation[32..35], [1, 3, 5]);
}

#[test]
fn gptq_v2_zeros_are_not_offset() {
    let source = in_memory(&gptq_tensors(None));
    let v1 = GptqConfig::default();
    let v2 = GptqConfig {
        zeros_plain: true,
        ..v1
    };
    let v1 = GptqLinear::load(&source, "p", &v1, 1.0).expect("a valid linear");
    let v2 = GptqLinear::load(&source, "p", &v2, 1.0).expect("a valid linear");
    assert_eq!((v1.zero(1, 2), v2.zero(1, 2)), (6, 5));
    // A stored zero of 0 stays 0: no borrow from the nibble above.
    assert_eq!(v2.zero(0, 0), 0);
    let (v1, v2) = (v1.decode_f16(), v2.decode_f16());
    let scale = f16::from_f64(0.002).to_f32();
    assert_eq!(v1[0].to_f32(), -scale);
    assert_eq!(v2[0].to_f32(), 0.0);
}

#[test]
fn gptq_elements_and_slices_agree_with_the_whole() {
    let name = |part: &str| format!("q.{part}");
    let words: Vec<u32> = (0..4 * 16)
        .map(|index: u32| index.wrapping_mul(0x9e37_79b9))
        .collect();
    let scales: Vec<f16> = (0..16)
        .map(|n| f16::from_f32(0.01 * (n + 1) as f32))
        .collect();
    let source = in_memory(&[
        tensor(&name("qweight"), DType::I32, &[4, 16], &words),
        tensor(
            &name("qzeros"),
            DType::I32,
            &[1, 2],
            &[0x0123_4567u32, 0xfedc_ba98],
        ),
        tensor(&name("scales"), DType::F16, &[1, 16], &scales),
    ]);
    let config = GptqConfig::default();
    let linear = LinearSource::load(&source, "q", &config, 1.0).expect("a valid linear");
    let LinearSource::Gptq(whole) = &linear else {
        panic!("{linear:?}")
    };
    let LinearSource::Gptq(part) = linear.slice_outputs(8..16).expect("an aligned range") else {
        panic!("a slice keeps its encoding")
    };
    let (weights, half) = (whole.decode_f16(), part.decode_f16());
    let mut codes = [0u8; 16];
    for k in 0..32 {
        whole.unpack_row(k, 0..16, &mut codes);
        for n in 0..16 {
            assert_eq!(u32::from(codes[n]), whole.code(k, n));
            let centred = whole.code(k, n) as f32 - whole.zero(0, n) as f32;
            let expected = f16::from_f32(centred * scales[n].to_f32());
            assert_eq!(weights[k * 16 + n].to_bits(), expected.to_bits());
        }
        assert_eq!(half[k * 8..][..8], weights[k * 16 + 8..][..8]);
    }
    let stored = 4 * 16 * 4 + 2 * 4 + 16 * 2;
    assert_eq!(linear.header().stored_bytes(), stored);
}
