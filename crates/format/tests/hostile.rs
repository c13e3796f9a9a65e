//! Hostile safetensors files and linears: each is refused with the right variant, and the
//! message names file, tensor and both values.

mod support;

use std::fs;

use half::f16;
use oxllama_format::{
    DType, Exl2Linear, FloatLinear, FormatError, GptqConfig, GptqLinear, LinearHeader,
    LinearSource, SafetensorsDir, SafetensorsHeader, SafetensorsWriter, TensorInfo, TensorSource,
    read_head_norm_f32, read_vector_f32,
};
use support::{
    Tensor, assert_names, on_disk, open_raw, part, raw_file, set, small_exl2, small_gptq, tensor,
    write_file,
};

/// Asserts the variant and that the message contains every part.
macro_rules! assert_error {
    ($result:expr, $variant:pat, $parts:expr) => {{
        let error = $result.expect_err("must be refused");
        assert!(matches!(error, $variant), "another variant: {error:?}");
        assert_names(&error, &$parts);
    }};
}

/// Opens a file with this header text and `data_bytes` of data.
fn open_header(header: &str, data_bytes: usize) -> Result<SafetensorsDir, FormatError> {
    open_raw(&raw_file(header.as_bytes(), data_bytes))
}

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
fn truncated_files() {
    assert_error!(
        open_raw(b""),
        FormatError::Truncated { .. },
        ["bad.safetensors", "0 bytes", "8"]
    );
    assert_error!(
        open_raw(&100u64.to_le_bytes()),
        FormatError::Truncated { .. },
        ["bad.safetensors", "header", "8 bytes", "108"]
    );
    let header = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    assert_error!(
        open_header(header, 15),
        FormatError::Truncated { .. },
        ["bad.safetensors", "`a`", "15 bytes", "16"]
    );
}

#[test]
fn absurd_header_lengths_allocate_nothing() {
    assert_error!(
        open_raw(&u64::MAX.to_le_bytes()),
        FormatError::Malformed { .. },
        ["bad.safetensors", "18446744073709551615", "100000000"]
    );
    // Within the cap, but larger than the file.
    assert_error!(
        open_raw(&99_999_999u64.to_le_bytes()),
        FormatError::Truncated { .. },
        ["bad.safetensors", "100000007"]
    );
}

#[test]
fn headers_that_are_not_json() {
    assert_error!(
        open_raw(&raw_file(b"{\"a\xff\":1}", 0)),
        FormatError::InvalidUtf8 { offset: 11, .. },
        ["bad.safetensors", "byte 11"]
    );
    for header in [
        "",
        "{",
        "[]",
        "7",
        "{\"a\":1}",
        "{\"a\":{}}",
        "null",
        "{} x",
    ] {
        assert_error!(
            open_header(header, 0),
            FormatError::InvalidJson { .. },
            ["bad.safetensors", "header", "line"]
        );
    }
    let deep = format!("{{\"a\":{}", "{\"shape\":[".repeat(50_000));
    assert_error!(
        open_header(&deep, 0),
        FormatError::InvalidJson { .. },
        ["bad.safetensors", "`a`"]
    );
    let deep_metadata = format!("{{\"__metadata__\":{}", "[".repeat(200_000));
    assert_error!(
        open_header(&deep_metadata, 0),
        FormatError::InvalidJson { .. },
        ["bad"]
    );
}

#[test]
fn entries_with_wrong_fields() {
    for (entry, named) in [
        (r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, "-1"),
        (
            r#"{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}"#,
            "1.5",
        ),
        (
            r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#,
            "length 1",
        ),
        (r#"{"dtype":7,"shape":[1],"data_offsets":[0,4]}"#, "7"),
        (r#"{"dtype":"F32","shape":[1]}"#, "data_offsets"),
        (
            r#"{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}"#,
            "duplicate",
        ),
        (
            r#"{"dtype":"F32","shape":[36893488147419103232],"data_offsets":[0,4]}"#,
            "3.689",
        ),
    ] {
        let header = format!("{{\"a\":{entry}}}");
        assert_error!(
            open_header(&header, 4),
            FormatError::InvalidJson { .. },
            ["bad.safetensors", "`a`", named]
        );
    }
}

#[test]
fn shapes_and_offsets_that_contradict_each_other() {
    let cases = [
        ("[4294967296,4294967296]", "[0,4]", "shape", "4294967296"),
        (
            "[4611686018427387904]",
            "[0,4]",
            "4 bytes",
            "fewer than 2^64",
        ),
        ("[2]", "[0,4]", "4 bytes", "8 bytes"),
        ("[]", "[0,8]", "8 bytes", "4 bytes"),
        ("[1]", "[8,4]", "[8, 4]", "not after its end"),
        (
            "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]",
            "[0,4]",
            "17 dimensions",
            "16",
        ),
    ];
    for (shape, offsets, found, expected) in cases {
        let header =
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
        assert_error!(
            open_header(&header, 8),
            FormatError::InvalidTensor { .. },
            ["bad.safetensors", "`a`", found, expected]
        );
    }
}

#[test]
fn overlaps_gaps_and_left_over_data() {
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{a}}},
                "b":{{"dtype":"F32","shape":[2],"data_offsets":{b}}}}}"#
        )
    };
    assert_error!(
        open_header(&two("[0,8]", "[4,12]"), 12),
        FormatError::InvalidTensor { .. },
        [
            "bad.safetensors",
            "`b`",
            "overlaps `a`",
            "found 4",
            "expected 8"
        ]
    );
    assert_error!(
        open_header(&two("[0,8]", "[12,20]"), 20),
        FormatError::InvalidTensor { .. },
        [
            "bad.safetensors",
            "`b`",
            "gap after `a`",
            "found 12",
            "expected 8"
        ]
    );
    assert_error!(
        open_header(&two("[8,16]", "[0,8]"), 17),
        FormatError::Malformed { .. },
        ["bad.safetensors", "17 bytes", "16 bytes"]
    );
    open_header(&two("[8,16]", "[0,8]"), 16).expect("any order of entries is valid");
}

#[test]
fn duplicate_names() {
    let entry = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    assert_error!(
        open_header(&format!("{{\"a\":{entry},\"a\":{entry}}}"), 1),
        FormatError::DuplicateTensor { .. },
        ["bad.safetensors", "`a`"]
    );
    let directory = tempfile::tempdir().expect("a temporary directory");
    for file in ["one.safetensors", "two.safetensors"] {
        write_file(
            directory.path(),
            file,
            &[tensor("a", DType::U8, &[1], &[7u8])],
        );
    }
    assert_error!(
        SafetensorsDir::open(directory.path()),
        FormatError::DuplicateTensor { .. },
        ["one.safetensors", "two.safetensors", "`a`"]
    );
}

#[test]
fn directories_without_usable_files() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let missing = directory.path().join("nowhere");
    assert_error!(
        SafetensorsDir::open(&missing),
        FormatError::Io { .. },
        ["nowhere"]
    );
    fs::create_dir(directory.path().join("folder.safetensors")).expect("a directory");
    fs::write(directory.path().join(".hidden.safetensors"), b"x").expect("a file");
    assert_error!(
        SafetensorsDir::open(directory.path()),
        FormatError::MissingFile { .. },
        ["*.safetensors", "at least one"]
    );
}

#[cfg(unix)]
#[test]
fn special_files_are_not_opened() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("socket.safetensors");
    let _listener = std::os::unix::net::UnixListener::bind(path).expect("a socket");
    assert_error!(
        SafetensorsDir::open(directory.path()),
        FormatError::Malformed { .. },
        ["socket.safetensors", "regular file"]
    );
}

#[test]
fn shards_merge_and_a_stale_index_is_ignored() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let a = tensor("a", DType::F16, &[2], &[f16::ONE, f16::ZERO]);
    let b = tensor("b", DType::I32, &[1], &[-1i32]);
    write_file(directory.path(), "output-00001-of-00002.safetensors", &[a]);
    write_file(directory.path(), "output-00002-of-00002.safetensors", &[b]);
    let index = directory.path().join("model.safetensors.index.json");
    fs::write(
        index,
        r#"{"weight_map":{"a":"model-00001-of-00009.safetensors"}}"#,
    )
    .expect("a file");
    let source = SafetensorsDir::open(directory.path()).expect("two shards");
    let names: Vec<&str> = source.infos().map(|info| info.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(source.read("b").expect("readable").bytes.as_ref(), [255; 4]);
    assert!(
        source
            .file_of("b")
            .ends_with("output-00002-of-00002.safetensors")
    );
    assert_error!(source.read("c"), FormatError::MissingTensor { .. }, ["`c`"]);
}

#[test]
fn unknown_element_types_fail_only_when_used() {
    let header = r#"{"p.weight":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]},
                     "b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}"#;
    let source = open_header(header, 5).expect("other tensors are usable");
    assert!(source.info("b").is_some());
    assert!(source.info("p.weight").is_none());
    assert_error!(
        LinearHeader::find(&source, "p", &GptqConfig::default()),
        FormatError::WrongDType { .. },
        ["bad.safetensors", "`p.weight`", "F8_E4M3", "BF16"]
    );
}

#[test]
fn a_file_that_shrinks_after_opening() {
    let (directory, source) = on_disk(&[tensor("a", DType::U8, &[100], &[1u8; 100])]);
    let path = directory.path().join("model.safetensors");
    let file = fs::File::options()
        .write(true)
        .open(&path)
        .expect("the file");
    file.set_len(20).expect("a shorter file");
    assert_error!(
        source.read("a"),
        FormatError::Truncated { .. },
        ["model.safetensors", "20 bytes", "opened"]
    );
}

#[test]
fn the_writer_refuses_what_was_not_declared() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("out.safetensors");
    let info = |name: &str| TensorInfo {
        name: name.to_owned(),
        dtype: DType::U8,
        shape: vec![4],
    };
    assert_error!(
        SafetensorsWriter::create(&path, &[info("a"), info("a")]),
        FormatError::DuplicateTensor { .. },
        ["out.safetensors", "`a`"]
    );
    let mut writer = SafetensorsWriter::create(&path, &[info("a"), info("b")]).expect("a writer");
    assert_error!(
        writer.write("b", &[0; 4]),
        FormatError::Malformed { .. },
        ["`b`", "`a`"]
    );
    writer.write("a", &[1; 3]).expect("a part");
    assert_error!(
        writer.write("a", &[1; 2]),
        FormatError::InvalidTensor { .. },
        ["out.safetensors", "`a`", "found 5", "expected 4"]
    );
    writer.write("a", &[1; 1]).expect("the rest");
    assert_error!(
        writer.finish(),
        FormatError::InvalidTensor { .. },
        ["out.safetensors", "`b`", "found 0", "expected 4"]
    );
    let left = fs::read_dir(directory.path()).expect("a listing").count();
    assert_eq!(left, 0, "neither the file nor its temporary one remains");
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

#[test]
fn vectors_and_norms_of_wrong_shape_or_value() {
    let (_directory, source) = on_disk(&[
        tensor("norm", DType::F32, &[3], &[1.0, f32::INFINITY, 1.0f32]),
        tensor("ints", DType::I32, &[3], &[1i32; 3]),
        tensor("heads", DType::F16, &[2, 2], &[f16::ONE; 4]),
    ]);
    assert_error!(
        read_vector_f32(&source, "norm", 4),
        FormatError::WrongShape { .. },
        ["model.safetensors", "`norm`", "[3]", "[4]"]
    );
    assert_error!(
        read_vector_f32(&source, "norm", 3),
        FormatError::InvalidTensor { .. },
        ["`norm`", "element 1", "inf", "finite"]
    );
    assert_error!(
        read_vector_f32(&source, "ints", 3),
        FormatError::WrongDType { .. },
        ["`ints`", "I32", "F16 or BF16 or F32"]
    );
    assert_error!(
        read_head_norm_f32(&source, "heads", 3, 2),
        FormatError::WrongShape { .. },
        ["`heads`", "[2, 2]", "[2] or [3, 2]"]
    );
    assert_error!(
        read_vector_f32(&source, "absent", 3),
        FormatError::MissingTensor { .. },
        ["`absent`"]
    );
}

#[test]
fn the_header_parser_needs_no_file() {
    let path = std::path::Path::new("some.safetensors");
    let header = SafetensorsHeader::parse(path, b"{}", 0).expect("an empty header is valid");
    assert!(header.entries.is_empty());
}
