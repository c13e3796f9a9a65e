//! Properties over random input: nothing panics, and what is packed decodes to itself.

mod support;

use std::path::Path;

use half::{bf16, f16};
use oxllama_format::{
    DType, EXL2_BITS, Exl2Layout, Exl2Linear, FloatLinear, GptqConfig, LinearSource,
    SafetensorsHeader, parse_json_object, read_head_norm_f32,
};
use proptest::prelude::*;
use support::{exl2_tensors, in_memory, on_disk, part, small_exl2, small_gptq, tensor};

/// Non-increasing groups `(bits, rows)`: any subset of the widths, one to three groups each.
fn groups() -> impl Strategy<Value = Vec<(u32, usize)>> {
    let per_width = proptest::collection::vec((0usize..3, 1usize..4), EXL2_BITS.len());
    per_width.prop_map(|counts| {
        let widths = EXL2_BITS.into_iter().zip(counts);
        let groups: Vec<(u32, usize)> = widths
            .flat_map(|(bits, (count, blocks))| std::iter::repeat_n((bits, 32 * blocks), count))
            .collect();
        if groups.is_empty() {
            vec![(4, 32)]
        } else {
            groups
        }
    })
}

/// A random number generator of its own for bulk data (splitmix64).
fn bulk(mut state: u64) -> impl FnMut() -> u64 {
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn exl2_layouts_round_trip(groups in groups(), column_blocks in 1usize..4, seed: u64) {
        let n = 32 * column_blocks;
        let layout = Exl2Layout::new(n, &groups).expect("a valid layout");
        let k = layout.in_features();
        let mut random = bulk(seed);
        let mut codes = Vec::with_capacity(k * n);
        for &(bits, rows) in &groups {
            codes.extend((0..rows * n).map(|_| (random() % (1 << bits)) as u8));
        }
        let scale_codes: Vec<u8> = (0..groups.len() * n).map(|_| (random() % 16) as u8).collect();
        // Finite scales of every magnitude, subnormal ones included.
        let scale_max: Vec<f16> =
            groups.iter().map(|_| f16::from_bits((random() % 0x7c00) as u16)).collect();
        let mut permutation: Vec<u32> = (0..k as u32).collect();
        for last in (1..k).rev() {
            permutation.swap(last, (random() % (last as u64 + 1)) as usize);
        }

        let packed = layout.pack(&codes, &scale_codes, &scale_max, &permutation);
        let source = in_memory(&exl2_tensors("p", &packed));
        let linear = Exl2Linear::load(&source, "p", 1.0).expect("a valid linear");
        prop_assert_eq!(linear.permutation(), permutation.as_slice());
        let weights = linear.decode_f16();
        let mut row_codes = vec![0u8; n];
        for (index, group) in linear.groups().iter().enumerate() {
            prop_assert_eq!((group.bits, group.rows), groups[index]);
            let max = f16::from_f32(scale_max[index].to_f32() / 256.0).to_f32();
            for row in 0..group.rows {
                let packed_row = group.first_row + row;
                linear.unpack_row(index, row, 0..n, &mut row_codes);
                prop_assert_eq!(&row_codes[..], &codes[packed_row * n..][..n]);
                let feature = permutation[packed_row] as usize;
                for column in 0..n {
                    let root = f32::from(scale_codes[index * n + column]) + 1.0;
                    let scale = f16::from_f32(root * root * max).to_f32();
                    let centred = f32::from(row_codes[column]) - (1 << (group.bits - 1)) as f32;
                    let expected = f16::from_f32(centred * scale);
                    prop_assert_eq!(weights[feature * n + column].to_bits(), expected.to_bits());
                }
            }
        }
    }

    #[test]
    fn any_bytes_as_a_header(bytes in proptest::collection::vec(any::<u8>(), 0..400), data: u64) {
        let _ = SafetensorsHeader::parse(Path::new("x"), &bytes, data);
        let _ = parse_json_object(Path::new("x"), &bytes);
    }

    #[test]
    fn any_numbers_in_a_header(
        shape in proptest::collection::vec(any::<u64>(), 0..4),
        begin: u64,
        end: u64,
        data: u64,
        dtype in prop_oneof![Just("F16"), Just("I32"), Just("F4")],
    ) {
        let header = format!(
            r#"{{"a":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}}}"#
        );
        if let Ok(header) = SafetensorsHeader::parse(Path::new("x"), header.as_bytes(), data) {
            prop_assert_eq!(header.entries[0].begin, 0);
            prop_assert_eq!(header.entries[0].end, data);
        }
    }

    #[test]
    fn any_damage_to_a_linear_is_an_error_or_decodes(
        gptq: bool,
        which in 0usize..5,
        position: prop::sample::Index,
        bytes: [u8; 2],
    ) {
        let mut tensors = if gptq { small_gptq("p") } else { small_exl2("p") };
        let count = tensors.len();
        let data = &mut tensors[which % count].1;
        let at = position.index(data.len() - 1);
        data[at..at + 2].copy_from_slice(&bytes);
        let source = in_memory(&tensors);
        match LinearSource::load(&source, "p", &GptqConfig::default(), 1.0) {
            Ok(LinearSource::Exl2(linear)) => prop_assert_eq!(linear.decode_f16().len(), 96 * 32),
            Ok(LinearSource::Gptq(linear)) => prop_assert_eq!(linear.decode_f16().len(), 64 * 8),
            Ok(LinearSource::Float(_)) => prop_assert!(false, "another encoding"),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    #[test]
    fn floats_survive_the_way_to_fp16(
        values in proptest::collection::vec(-3.0e38f32..3.0e38, 12),
        exponent in -60i32..0,
    ) {
        let values: Vec<f32> = values.iter().map(|value| value * 2f32.powi(exponent)).collect();
        let source = in_memory(&[tensor("p.weight", DType::F32, &[3, 4], &values)]);
        let linear = FloatLinear::load(&source, "p", 0.5).expect("a valid linear");
        let scaled = linear.to_f16_scaled().expect("finite values");
        let exceeds = values.iter().any(|value| value.abs() >= 65520.0);
        prop_assert_eq!(linear.float_exceeds_f16(), exceeds);
        prop_assert_eq!(scaled.scale > 0.5, exceeds);
        let smallest = f64::from(scaled.scale) * 2f64.powi(-24);
        for (value, half) in values.iter().zip(&scaled.values) {
            let (value, decoded) = (f64::from(*value) * 0.5, half.to_f64() * f64::from(scaled.scale));
            let allowed = (value.abs() * 2f64.powi(-11)).max(smallest);
            prop_assert!((value - decoded).abs() <= allowed, "{} became {}", value, decoded);
        }
    }
}

#[test]
fn float_rows_and_slices() {
    let values: Vec<bf16> = (0..12).map(|index| bf16::from_f32(index as f32)).collect();
    let bias: Vec<f32> = vec![1.0, 2.0, 3.0];
    let (_directory, source) = on_disk(&[
        tensor("p.weight", DType::BF16, &[3, 4], &values),
        tensor("p.bias", DType::F32, &[3], &bias),
    ]);
    let linear = LinearSource::load(&source, "p", &GptqConfig::default(), 2.0).expect("valid");
    assert_eq!((linear.in_features(), linear.out_features()), (4, 3));
    assert_eq!(linear.header().stored_bytes(), 24 + 6);
    assert_eq!(linear.bias(), Some(vec![2.0, 4.0, 6.0]));
    let LinearSource::Float(part) = linear.slice_outputs(1..3).expect("a range") else {
        panic!("a slice keeps its encoding")
    };
    assert_eq!(part.bias(), Some([4.0, 6.0].as_slice()));
    let mut row = [0.0; 4];
    part.row_f32(0, &mut row);
    assert_eq!(row, [8.0, 10.0, 12.0, 14.0]);
    let scaled = part.to_f16_scaled().expect("finite");
    assert_eq!((scaled.values[0].to_f32(), scaled.scale), (4.0, 2.0));
}

#[test]
fn bf16_beyond_fp16_is_scaled_by_a_power_of_two() {
    let values = [1.0e6f32, -65504.0, 3.0, 0.0].map(bf16::from_f32);
    let source = in_memory(&[tensor("p.weight", DType::BF16, &[2, 2], &values)]);
    let linear = FloatLinear::load(&source, "p", 1.0).expect("a valid linear");
    assert!(linear.float_exceeds_f16());
    let scaled = linear.to_f16_scaled().expect("finite values");
    assert_eq!(scaled.scale, 16.0);
    for (value, half) in values.iter().zip(&scaled.values) {
        assert_eq!(value.to_f32(), half.to_f32() * 16.0);
    }
}

#[test]
fn head_norms_of_both_ranks() {
    let one: Vec<f32> = vec![1.0, 2.0];
    let two: Vec<f32> = vec![1.0, 2.0, 3.0, 4.0];
    let mut tensors = vec![
        tensor("one", DType::F32, &[2], &one),
        tensor("two", DType::F32, &[2, 2], &two),
    ];
    assert_eq!(part(&mut tensors, "one").0.shape, [2]);
    let source = in_memory(&tensors);
    let repeated = read_head_norm_f32(&source, "one", 2, 2).expect("valid");
    assert_eq!(repeated, [1.0, 2.0, 1.0, 2.0]);
    assert_eq!(
        read_head_norm_f32(&source, "two", 2, 2).expect("valid"),
        two
    );
}
