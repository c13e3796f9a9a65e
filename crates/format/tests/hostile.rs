//! Hostile safetensors files: each is refused with the right variant, and the message names
//! file, tensor and both values.

mod support;

use std::fs;

use half::f16;
use oxllama_format::{
    DType, FormatError, GptqConfig, LinearHeader, SafetensorsDir, SafetensorsHeader,
    SafetensorsWriter, TensorInfo, TensorSource, read_head_norm_f32, read_vector_f32,
};
use support::{assert_error, on_disk, open_raw, raw_file, tensor, write_file};

/// Opens a file with this header text and `data_bytes` of data.
fn open_header(header: &str, data_bytes: usize) -> Result<SafetensorsDir, FormatError> {
    open_raw(&raw_file(header.as_bytes(), data_bytes))
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
