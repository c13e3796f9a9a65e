//! Hostile linears: each is refused with the right variant, and the message names file, tensor
//! and both values.

mod support;

use half::f16;
use oxllama_format::{
    DType, Exl2Linear, FloatLinear, FormatError, GptqConfig, GptqLinear, LinearHeader, LinearSource,
};
use support::{Tensor, assert_error, on_disk, part, set, small_exl2, small_gptq, tensor};

/// Loads `p` as EXL2 after `change`.
fn load_exl2(change: impl FnOnce(&mut Vec<Tensor>)) -> Result<(), FormatError> {
    let mut tensors = small_exl2("p");
    change(&mut tensors);
    let (_directory, source) = on_disk(&tensors);
    Exl2Linear::load(&source, "p", 1.0).map(|_| ())
}

/// Loads `p` as GPTQ after `change`.
fn load_gptq(change: impl FnOnce(&mut Vec<Tensor>)) -> Result<(), FormatError> {
    let mut tensors = small_gptq("p");
    change(&mut tensors);
    let (_directory, source) = on_disk(&tensors);
    GptqLinear::load(&source, "p", &GptqConfig::default(), 1.0).map(|_| ())
}

/// Replaces the tensor `p.suffix`.
fn replace(tensors: &mut [Tensor], suffix: &str, replacement: Tensor) {
    *part(tensors, suffix) = replacement;
}

#[test]
fn the_unchanged_linears_are_valid() {
    load_exl2(|_| ()).expect("the EXL2 linear that the tests below damage");
    load_gptq(|_| ()).expect("the GPTQ linear that the tests below damage");
}

#[test]
fn exl2_tensors_of_wrong_type_or_shape() {
    assert_error!(
        load_exl2(|t| replace(
            t,
            ".q_weight",
            tensor("p.q_weight", DType::F32, &[12, 32], &[0f32; 384])
        )),
        FormatError::WrongDType { .. },
        ["model.safetensors", "`p.q_weight`", "F32", "I32"]
    );
    assert_error!(
        load_exl2(|t| replace(
            t,
            ".q_weight",
            tensor("p.q_weight", DType::I32, &[384], &[0u32; 384])
        )),
        FormatError::WrongShape { .. },
        [
            "model.safetensors",
            "`p.q_weight`",
            "[384]",
            "two dimensions"
        ]
    );
    assert_error!(
        load_exl2(|t| replace(
            t,
            ".q_weight",
            tensor("p.q_weight", DType::I32, &[16, 24], &[0u32; 384])
        )),
        FormatError::WrongShape { .. },
        [
            "model.safetensors",
            "`p.q_weight`",
            "[16, 24]",
            "multiple of 32"
        ]
    );
    assert_error!(
        load_exl2(|t| replace(
            t,
            ".q_weight",
            tensor::<u32>("p.q_weight", DType::I32, &[0, 32], &[])
        )),
        FormatError::WrongShape { .. },
        ["`p.q_weight`", "[0, 32]"]
    );
    assert_error!(
        load_exl2(|t| replace(
            t,
            ".q_scale",
            tensor("p.q_scale", DType::I32, &[4, 3], &[0u32; 12])
        )),
        FormatError::WrongShape { .. },
        ["`p.q_scale`", "[4, 3]", "[4, 4]"]
    );
    assert_error!(
        load_exl2(|t| {
            replace(
                t,
                ".q_scale_max",
                tensor("p.q_scale_max", DType::F16, &[2], &[f16::ONE; 2]),
            );
        }),
        FormatError::WrongShape { .. },
        ["`p.q_scale_max`", "[2]", "[3]"]
    );
    assert_error!(
        load_exl2(|t| replace(
            t,
            ".q_groups",
            tensor("p.q_groups", DType::I16, &[5], &[6i16; 5])
        )),
        FormatError::WrongShape { .. },
        ["`p.q_groups`", "[5]", "[6]"]
    );
    assert_error!(
        load_exl2(|t| replace(
            t,
            ".q_invperm",
            tensor("p.q_invperm", DType::I32, &[95], &[0i32; 95])
        )),
        FormatError::WrongShape { .. },
        ["`p.q_invperm`", "[95]", "multiple of 32"]
    );
    assert_error!(
        load_exl2(|t| t.push(tensor("p.bias", DType::F16, &[31], &[f16::ONE; 31]))),
        FormatError::WrongShape { .. },
        ["`p.bias`", "[31]", "[32]"]
    );
}

#[test]
fn exl2_tensors_that_are_missing() {
    for name in ["q_scale", "q_scale_max", "q_groups", "q_invperm"] {
        let full = format!("p.{name}");
        assert_error!(
            load_exl2(|t| t.retain(|(info, _)| info.name != full)),
            FormatError::MissingTensor { .. },
            [full.as_str(), "EXL2"]
        );
    }
    let (_directory, source) = on_disk(&small_exl2("other"));
    assert_error!(
        LinearSource::load(&source, "p", &GptqConfig::default(), 1.0),
        FormatError::MissingTensor { .. },
        ["`p.weight`", "`p.q_weight`", ".qweight"]
    );
}

#[test]
fn q_groups_that_do_not_add_up() {
    // Valid: 6,0, 4,6, 2,10 in 12 word rows.
    let cases: [(usize, i16, &str, &str); 8] = [
        (0, 7, "bits of group 0: found 7", "2, 3, 4, 5, 6 or 8"),
        (0, 0, "bits of group 0: found 0", "2, 3, 4, 5, 6 or 8"),
        (2, 8, "bits of group 1: found 8", "at most 6"),
        (1, 1, "first word row of group 0: found 1", "expected 0"),
        (
            3,
            7,
            "word rows of group 0 (6 bits): found 0..7",
            "multiple of 6",
        ),
        (
            3,
            0,
            "word rows of group 0 (6 bits): found 0..0",
            "multiple of 6",
        ),
        (
            5,
            -1,
            "word rows of group 1 (4 bits): found 6..65535",
            "q_weight's 12",
        ),
        (4, 1, "bits of group 2: found 1", "2, 3, 4, 5, 6 or 8"),
    ];
    for (index, value, found, expected) in cases {
        assert_error!(
            load_exl2(|tensors| set(part(tensors, ".q_groups"), index, value)),
            FormatError::InvalidTensor { .. },
            ["model.safetensors", "`p.q_groups`", found, expected]
        );
    }
    // Each group holds together, but they hold 64 rows more than the permutation has.
    assert_error!(
        load_exl2(|tensors| {
            let groups = [2i16, 0, 2, 2, 2, 4];
            replace(
                tensors,
                ".q_groups",
                tensor("p.q_groups", DType::I16, &[6], &groups),
            );
        }),
        FormatError::InvalidTensor { .. },
        [
            "model.safetensors",
            "`p.q_groups`",
            "found 192",
            "expected 96"
        ]
    );
}

#[test]
fn permutations_that_are_not() {
    for (index, value, found) in [
        (5, 6i32, "6, which feature 5"),
        (0, 96, "96"),
        (95, -1, "-1"),
    ] {
        assert_error!(
            load_exl2(|tensors| set(part(tensors, ".q_invperm"), index, value)),
            FormatError::InvalidTensor { .. },
            [
                "model.safetensors",
                "`p.q_invperm`",
                found,
                "each of 0..96 once"
            ]
        );
    }
}

#[test]
fn scales_that_are_not_finite() {
    for (value, found) in [
        (f16::NAN, "NaN"),
        (f16::INFINITY, "inf"),
        (f16::NEG_INFINITY, "-inf"),
    ] {
        assert_error!(
            load_exl2(|tensors| set(part(tensors, ".q_scale_max"), 1, value)),
            FormatError::InvalidTensor { .. },
            [
                "model.safetensors",
                "`p.q_scale_max`",
                "group 1",
                found,
                "finite"
            ]
        );
        assert_error!(
            load_gptq(|tensors| set(part(tensors, ".scales"), 9, value)),
            FormatError::InvalidTensor { .. },
            [
                "model.safetensors",
                "`p.scales`",
                "group 1, column 1",
                found,
                "finite"
            ]
        );
    }
    let (_directory, source) = on_disk(&small_exl2("p"));
    assert_error!(
        Exl2Linear::load(&source, "p", f32::INFINITY),
        FormatError::InvalidTensor { .. },
        ["`p.q_scale_max`", "prescale inf"]
    );
}

#[test]
fn slices_out_of_range_or_unaligned() {
    let (_directory, source) = on_disk(&small_exl2("p"));
    let linear = Exl2Linear::load(&source, "p", 1.0).expect("a valid linear");
    for range in [0..0, 0..64, 0..16, 16..32] {
        let found = format!("{range:?}");
        assert_error!(
            linear.slice_outputs(range),
            FormatError::InvalidTensor { .. },
            ["`p`", found.as_str(), "0..32"]
        );
    }
}

#[test]
fn gptq_tensors_of_wrong_type_or_shape() {
    assert_error!(
        load_gptq(|t| replace(
            t,
            ".qweight",
            tensor("p.qweight", DType::I32, &[3, 8], &[0u32; 24])
        )),
        FormatError::WrongShape { .. },
        [
            "model.safetensors",
            "`p.qweight`",
            "[3, 8]",
            "multiple of 32"
        ]
    );
    // The shape that 8-bit zeros have.
    assert_error!(
        load_gptq(|t| replace(
            t,
            ".qzeros",
            tensor("p.qzeros", DType::I32, &[2, 2], &[0u32; 4])
        )),
        FormatError::WrongShape { .. },
        ["`p.qzeros`", "[2, 2]", "[2, 1]"]
    );
    assert_error!(
        load_gptq(|t| replace(
            t,
            ".scales",
            tensor("p.scales", DType::F64, &[2, 8], &[1f64; 16])
        )),
        FormatError::WrongDType { .. },
        ["`p.scales`", "F64", "F16"]
    );
    assert_error!(
        load_gptq(|t| {
            replace(
                t,
                ".scales",
                tensor("p.scales", DType::F32, &[4, 8], &[1f32; 32]),
            );
            replace(
                t,
                ".qzeros",
                tensor("p.qzeros", DType::I32, &[4, 1], &[0u32; 4]),
            );
        }),
        FormatError::WrongShape { .. },
        ["`p.scales`", "[4, 8]", "64 rows"]
    );
    assert_error!(
        load_gptq(|t| replace(
            t,
            ".g_idx",
            tensor("p.g_idx", DType::I32, &[32], &[0i32; 32])
        )),
        FormatError::WrongShape { .. },
        ["`p.g_idx`", "[32]", "[64]"]
    );
}

#[test]
fn g_idx_out_of_range_or_uneven() {
    for (value, found) in [(2i32, "found 2"), (-1, "found -1")] {
        assert_error!(
            load_gptq(|tensors| set(part(tensors, ".g_idx"), 7, value)),
            FormatError::InvalidTensor { .. },
            [
                "model.safetensors",
                "`p.g_idx`",
                "group of row 7",
                found,
                "0..2"
            ]
        );
    }
    assert_error!(
        load_gptq(|tensors| set(part(tensors, ".g_idx"), 7, 1i32)),
        FormatError::InvalidTensor { .. },
        ["`p.g_idx`", "rows of group 0", "found 31", "expected 32"]
    );
}

#[test]
fn gptq_of_other_widths_is_refused_by_name() {
    let (_directory, source) = on_disk(&small_gptq("p"));
    let config = GptqConfig {
        bits: 8,
        zeros_plain: false,
    };
    assert_error!(
        LinearHeader::find(&source, "p", &config),
        FormatError::Unsupported { .. },
        ["model.safetensors", "`p.qweight`", "8 bits", "4 bits"]
    );
}

#[test]
fn float_linears_of_wrong_type_or_shape() {
    let (_directory, source) = on_disk(&[
        tensor("p.weight", DType::F64, &[2, 2], &[1f64; 4]),
        tensor("q.weight", DType::F32, &[4], &[1f32; 4]),
        tensor("r.weight", DType::F32, &[2, 2], &[1.0, 2.0, f32::NAN, 4.0]),
    ]);
    assert_error!(
        FloatLinear::load(&source, "p", 1.0),
        FormatError::WrongDType { .. },
        [
            "model.safetensors",
            "`p.weight`",
            "F64",
            "F16 or BF16 or F32"
        ]
    );
    assert_error!(
        FloatLinear::load(&source, "q", 1.0),
        FormatError::WrongShape { .. },
        ["model.safetensors", "`q.weight`", "[4]", "two dimensions"]
    );
    let linear = FloatLinear::load(&source, "r", 1.0).expect("valid headers");
    assert_error!(
        linear.to_f16_scaled(),
        FormatError::InvalidTensor { .. },
        [
            "model.safetensors",
            "`r.weight`",
            "element [1, 0]",
            "NaN",
            "finite"
        ]
    );
}
