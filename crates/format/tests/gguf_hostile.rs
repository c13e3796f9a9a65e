//! Damaged and hostile GGUF files: each is refused with the right error, none panics, hangs or
//! allocates more than its bytes justify.

use std::fs;
use std::path::PathBuf;

use oxllama_format::FormatError;
use oxllama_format::gguf::{GgufError, GgufFile, GgufHeader, GgufModel};
use proptest::prelude::*;

const U32: u32 = 4;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;

/// Writes GGUF files field by field, right or wrong.
#[derive(Default, Clone)]
struct Writer {
    metadata: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

fn array(element: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

impl Writer {
    fn entry(mut self, key: &str, value_type: u32, value: &[u8]) -> Self {
        let entry = [
            &string(key.as_bytes())[..],
            &value_type.to_le_bytes(),
            value,
        ]
        .concat();
        self.metadata.push(entry);
        self
    }

    fn integer(self, key: &str, value: u32) -> Self {
        self.entry(key, U32, &value.to_le_bytes())
    }

    fn text(self, key: &str, value: &str) -> Self {
        self.entry(key, STRING, &string(value.as_bytes()))
    }

    fn strings(self, key: &str, values: &[&str]) -> Self {
        let elements: Vec<u8> = values.iter().flat_map(|v| string(v.as_bytes())).collect();
        self.entry(key, ARRAY, &array(STRING, values.len() as u64, &elements))
    }

    fn tensor(mut self, name: &str, extents: &[u64], ggml_type: u32, offset: u64) -> Self {
        let mut entry = string(name.as_bytes());
        entry.extend((extents.len() as u32).to_le_bytes());
        entry.extend(extents.iter().flat_map(|extent| extent.to_le_bytes()));
        entry.extend(ggml_type.to_le_bytes());
        entry.extend(offset.to_le_bytes());
        self.tensors.push(entry);
        self
    }

    fn data(mut self, bytes: usize) -> Self {
        self.data = vec![0; bytes];
        self
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes_with_counts(self.tensors.len() as u64, self.metadata.len() as u64)
    }

    fn bytes_with_counts(&self, tensors: u64, metadata: u64) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(metadata.to_le_bytes());
        bytes.extend(self.metadata.concat());
        bytes.extend(self.tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }

    fn error(&self) -> GgufError {
        GgufHeader::parse(&self.bytes()).expect_err("the file is wrong")
    }
}

/// The field that a `Malformed` error is about.
fn malformed_field(error: GgufError) -> String {
    match error {
        GgufError::Malformed { what, .. } => what,
        other => panic!("expected a malformed field, got: {other}"),
    }
}

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/gguf")
        .join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Opens bytes as a model, by way of a file.
fn open_model(bytes: &[u8]) -> Result<GgufModel, FormatError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    GgufModel::open(file.path())
}

fn model_error(bytes: &[u8]) -> GgufError {
    match open_model(bytes).expect_err("the model is wrong") {
        FormatError::Gguf { source, path } => {
            assert!(!path.as_os_str().is_empty());
            source
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_right_file_is_read_in_both_versions() {
    let writer = Writer::default()
        .integer("general.alignment", 64)
        .text("general.name", "x")
        .tensor("a", &[32, 2], 2, 0)
        .tensor("b", &[3], 0, 64)
        .data(64 + 12);
    // The writer aligns to 32, the file says 64: pad the header to match.
    let mut bytes = writer.bytes();
    let header_bytes = bytes.len() - (64 + 12);
    let padding = header_bytes.next_multiple_of(64) - header_bytes;
    bytes.splice(header_bytes..header_bytes, vec![0; padding]);
    for version in [2_u8, 3] {
        bytes[4] = version;
        let header = GgufHeader::parse(&bytes).unwrap();
        assert_eq!(header.version, u32::from(version));
        assert_eq!(header.tensors[0].shape, [2, 32]);
        assert_eq!(header.tensors[0].size_bytes, 36);
        assert_eq!(header.tensors[1].elements(), 3);
        assert_eq!(header.metadata["general.name"].as_str(), Some("x"));
    }
}

#[test]
fn other_files_and_versions_are_named() {
    assert!(matches!(
        GgufHeader::parse(b""),
        Err(GgufError::NotGguf { found }) if found.is_empty()
    ));
    assert!(matches!(
        GgufHeader::parse(b"PK\x03\x04 a zip file"),
        Err(GgufError::NotGguf { found }) if found == b"PK\x03\x04"
    ));
    for version in [0_u32, 1, 4, 3_u32.swap_bytes()] {
        let mut bytes = Writer::default().bytes();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        assert_eq!(
            GgufHeader::parse(&bytes),
            Err(GgufError::UnsupportedVersion { found: version })
        );
    }
    assert!(matches!(model_error(b""), GgufError::NotGguf { .. }));
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(
        GgufFile::open(directory.path()),
        Err(FormatError::Io { .. })
    ));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = fixture("phi3.gguf");
    let header_bytes = whole.len() - 60_000;
    // Every byte where fields are, then in steps through the vocabulary and the data.
    let cuts = (0..400)
        .chain((400..header_bytes).step_by(97))
        .chain((header_bytes..whole.len() - 32).step_by(7_919))
        .chain([whole.len() - 129]);
    for cut in cuts {
        match GgufHeader::parse(&whole[..cut]) {
            Err(
                GgufError::NotGguf { .. }
                | GgufError::Truncated { .. }
                | GgufError::CountTooLarge { .. }
                | GgufError::TensorOutOfFile { .. },
            ) => {}
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
}

#[test]
fn counts_beyond_the_file_are_refused_before_anything_is_allocated() {
    let writer = Writer::default()
        .integer("a", 1)
        .tensor("t", &[1], 0, 0)
        .data(4);
    for count in [3, 1 << 32, u64::MAX] {
        for (tensors, metadata, what) in [(count, 1, "tensors"), (1, count, "metadata entries")] {
            let bytes = writer.bytes_with_counts(tensors, metadata);
            match GgufHeader::parse(&bytes).unwrap_err() {
                GgufError::CountTooLarge {
                    what: found,
                    count: n,
                    ..
                } => {
                    assert_eq!((found, n), (what, count));
                }
                // Three entries do fit by size; the next one is then not what it should be.
                _ if count == 3 => {}
                other => panic!("{other}"),
            }
        }
    }
    for (element, count) in [
        (0, u64::MAX),
        (U64, 1 << 61),
        (STRING, 1 << 40),
        (ARRAY, 1 << 30),
    ] {
        let error = Writer::default()
            .entry("k", ARRAY, &array(element, count, &[0; 64]))
            .error();
        assert!(matches!(error, GgufError::CountTooLarge { .. }), "{error}");
    }
    for length in [200, 1 << 32, u64::MAX] {
        let value = [&u64::to_le_bytes(length)[..], b"text"].concat();
        let error = Writer::default().entry("k", STRING, &value).error();
        assert!(matches!(error, GgufError::Truncated { .. }), "{error}");
    }
    let mut long_key = b"GGUF\x03\0\0\0".to_vec();
    long_key.extend([0; 8]);
    long_key.extend(1_u64.to_le_bytes());
    long_key.extend(u64::MAX.to_le_bytes());
    long_key.extend([0; 64]);
    let error = GgufHeader::parse(&long_key).unwrap_err();
    assert!(malformed_field(error).contains("a metadata key"));
}

#[test]
fn metadata_of_wrong_types_and_values_are_refused() {
    let error = Writer::default().entry("k", 13, &[0; 8]).error();
    assert_eq!(malformed_field(error), "a metadata value's type");
    let error = Writer::default().entry("k", BOOL, &[2]).error();
    assert_eq!(malformed_field(error), "a boolean");
    let error = Writer::default()
        .entry("k", ARRAY, &array(99, 1, &[0; 8]))
        .error();
    assert_eq!(malformed_field(error), "an array's element type");
    let error = Writer::default()
        .entry("k", ARRAY, &array(BOOL, 3, &[0, 1, 7]))
        .error();
    assert_eq!(malformed_field(error), "a boolean of an array");
    let error = Writer::default()
        .entry("k", STRING, &string(b"\xff\xfe"))
        .error();
    assert!(matches!(error, GgufError::InvalidUtf8 { .. }), "{error}");
    let error = Writer::default().integer("k", 1).integer("k", 2).error();
    assert_eq!(
        error,
        GgufError::DuplicateKey {
            key: "k".to_owned()
        }
    );
    let mut nested = array(U32, 1, &[0; 4]);
    for _ in 0..3 {
        nested = array(ARRAY, 1, &nested);
    }
    assert!(GgufHeader::parse(&Writer::default().entry("k", ARRAY, &nested).bytes()).is_ok());
    for _ in 0..2_000 {
        nested = array(ARRAY, 1, &nested);
    }
    let error = Writer::default().entry("k", ARRAY, &nested).error();
    assert_eq!(malformed_field(error), "nesting of arrays");
    for alignment in [0, 3, 33, 1 << 30] {
        let error = Writer::default()
            .integer("general.alignment", alignment)
            .error();
        assert_eq!(malformed_field(error), "general.alignment");
    }
    let error = Writer::default().text("general.alignment", "32").error();
    assert!(matches!(error, GgufError::WrongValueType { .. }), "{error}");
}

#[test]
fn tensors_that_cannot_be_are_refused() {
    let base = Writer::default().data(256);
    for extents in [&[][..], &[1, 1, 1, 1, 1]] {
        let error = base.clone().tensor("t", extents, 0, 0).error();
        assert_eq!(malformed_field(error), "tensor `t`: number of dimensions");
    }
    for extents in [
        &[0][..],
        &[4, 0],
        &[u64::MAX],
        &[1 << 32, 1 << 32],
        &[1 << 62],
    ] {
        let error = base.clone().tensor("t", extents, 0, 0).error();
        assert_eq!(malformed_field(error), "tensor `t`: shape", "{extents:?}");
    }
    let error = base.clone().tensor("t", &[33], 2, 0).error();
    assert_eq!(malformed_field(error), "tensor `t`: innermost dimension");
    let error = base.clone().tensor("t", &[4], 0, 8).error();
    assert_eq!(malformed_field(error), "tensor `t`: offset");
    for unknown in [4, 23, u32::MAX] {
        let error = base.clone().tensor("t", &[256], unknown, 0).error();
        assert!(
            matches!(error, GgufError::UnsupportedTensorType { .. }),
            "{error}"
        );
    }
    for (extent, offset) in [(65, 0), (1, 256), (1, u64::MAX - 31), (1 << 40, 0)] {
        let error = base.clone().tensor("t", &[extent], 0, offset).error();
        assert!(
            matches!(error, GgufError::TensorOutOfFile { .. }),
            "{error}"
        );
    }
    let error = base
        .clone()
        .tensor("t", &[4], 0, 0)
        .tensor("t", &[4], 0, 32)
        .error();
    assert_eq!(
        error,
        GgufError::DuplicateTensor {
            tensor: "t".to_owned()
        }
    );
    let error = base
        .clone()
        .tensor("b", &[4], 0, 32)
        .tensor("a", &[9], 0, 0)
        .error();
    let (first, second) = ("a".to_owned(), "b".to_owned());
    assert_eq!(error, GgufError::OverlappingTensors { first, second });
}

/// The least that names a family and its sizes.
fn tiny_llama() -> Writer {
    Writer::default()
        .text("general.architecture", "llama")
        .integer("llama.block_count", 1)
        .integer("llama.attention.head_count", 2)
        .integer("llama.attention.head_count_kv", 1)
}

#[test]
fn models_that_cannot_be_converted_say_why() {
    let error = model_error(&Writer::default().bytes());
    assert!(matches!(error, GgufError::MissingKey { .. }), "{error}");
    let error = model_error(
        &Writer::default()
            .text("general.architecture", "mamba")
            .bytes(),
    );
    let GgufError::UnknownArchitecture { found, supported } = error else {
        panic!("{error}");
    };
    assert_eq!(found, "mamba");
    assert_eq!(supported, "llama, qwen2, qwen3, gemma2, gemma3, phi3");
    let error = model_error(&tiny_llama().integer("split.count", 2).bytes());
    assert!(matches!(error, GgufError::Unsupported { .. }), "{error}");
    let error = model_error(&tiny_llama().bytes());
    let GgufError::MissingTensor { tensor, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(tensor, "token_embd.weight");
    let stray = tiny_llama()
        .tensor("blk.0.ffn_gate_inp.weight", &[4], 0, 0)
        .data(16);
    let error = model_error(&stray.bytes());
    assert!(
        matches!(error, GgufError::UnexpectedTensor { .. }),
        "{error}"
    );
    for name in [
        "blk.1.attn_q.weight",
        "blk.00.attn_q.weight",
        "blk.0.attn_q",
        "attn_q.weight",
    ] {
        let error = model_error(&tiny_llama().tensor(name, &[4], 0, 0).data(16).bytes());
        assert!(
            matches!(error, GgufError::UnexpectedTensor { .. }),
            "{name}: {error}"
        );
    }
    let error = model_error(
        &tiny_llama()
            .tensor("blk.0.attn_q.weight", &[4, 6], 0, 0)
            .data(96)
            .bytes(),
    );
    assert_eq!(malformed_field(error), "tensor `blk.0.attn_q.weight`: rows");
    let zero_heads = Writer::default()
        .text("general.architecture", "llama")
        .integer("llama.block_count", 1)
        .integer("llama.attention.head_count", 0);
    assert!(malformed_field(model_error(&zero_heads.bytes())).contains("head_count"));
    // Two thousand million layers cost no more than one.
    let tall = Writer::default()
        .text("general.architecture", "llama")
        .integer("llama.block_count", i32::MAX as u32)
        .integer("llama.attention.head_count", 2);
    assert!(matches!(
        model_error(&tall.bytes()),
        GgufError::MissingTensor { .. }
    ));
}

/// A whole one-layer model around a tokenizer.
fn model_with(tokenizer: impl Fn(Writer) -> Writer) -> Vec<u8> {
    let names = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    let mut writer = tiny_llama()
        .integer("llama.embedding_length", 8)
        .integer("llama.feed_forward_length", 8)
        .integer("llama.context_length", 16)
        .entry(
            "llama.attention.layer_norm_rms_epsilon",
            F32,
            &1e-5_f32.to_le_bytes(),
        );
    writer = tokenizer(writer)
        .tensor("token_embd.weight", &[8, 4], 0, 0)
        .tensor("output_norm.weight", &[8], 0, 128);
    for (index, name) in names.iter().enumerate() {
        let offset = 160 + 256 * index as u64;
        writer = writer.tensor(&format!("blk.0.{name}.weight"), &[8, 8], 0, offset);
    }
    writer.data(160 + 256 * names.len()).bytes()
}

#[test]
fn tokenizers_that_do_not_hold_together_are_refused() {
    let tokens = ["a", "b", "ab", "<eos>"];
    let byte_level = |pre: &'static str, merges: &'static [&'static str]| {
        model_with(move |writer| {
            writer
                .text("tokenizer.ggml.model", "gpt2")
                .text("tokenizer.ggml.pre", pre)
                .strings("tokenizer.ggml.tokens", &tokens)
                .strings("tokenizer.ggml.merges", merges)
        })
    };
    let model = open_model(&byte_level("gpt-2", &["a b"])).unwrap();
    assert!(model.tokenizer_json().is_ok());
    assert!(model.generation_config().is_none());
    let wrong: [&'static [&'static str]; 4] = [&["ab"], &["a  b"], &["b a"], &["a c"]];
    for merges in wrong {
        let error = open_model(&byte_level("gpt-2", merges))
            .unwrap()
            .tokenizer_json();
        let Err(FormatError::Gguf { source, .. }) = error else {
            panic!("{merges:?}");
        };
        assert_eq!(malformed_field(source), "merge 0");
    }
    let GgufError::UnknownTokenizer { what, found, .. } = model_error(&byte_level("klingon", &[]))
    else {
        panic!("the pre-tokenizer is unknown");
    };
    assert_eq!((what, found.as_str()), ("tokenizer.ggml.pre", "klingon"));
    let error = model_error(&model_with(|writer| {
        writer.text("tokenizer.ggml.model", "bert")
    }));
    assert!(
        matches!(error, GgufError::UnknownTokenizer { .. }),
        "{error}"
    );
    let error = model_error(&model_with(|writer| writer));
    assert!(matches!(error, GgufError::MissingKey { .. }), "{error}");

    let sentence_piece = |extend: fn(Writer) -> Writer| {
        model_with(move |writer| extend(writer.text("tokenizer.ggml.model", "llama")))
    };
    let long = "x".repeat(2_000);
    let five = ["a", "b", "c", "d", "e"];
    let cases: [(Vec<u8>, &str); 4] = [
        (
            sentence_piece(|w| w.strings("tokenizer.ggml.tokens", &[])),
            "metadata key `tokenizer.ggml.tokens`",
        ),
        (
            model_with(|w| {
                w.text("tokenizer.ggml.model", "llama")
                    .strings("tokenizer.ggml.tokens", &five)
            }),
            "metadata key `tokenizer.ggml.tokens`",
        ),
        (
            model_with(|w| {
                w.text("tokenizer.ggml.model", "llama")
                    .strings("tokenizer.ggml.tokens", &[&long])
            }),
            "token 0",
        ),
        (
            model_with(|w| {
                w.text("tokenizer.ggml.model", "llama")
                    .strings("tokenizer.ggml.tokens", &tokens)
                    .integer("tokenizer.ggml.eos_token_id", 4)
            }),
            "metadata key `tokenizer.ggml.eos_token_id`",
        ),
    ];
    for (bytes, field) in cases {
        assert_eq!(malformed_field(model_error(&bytes)), field);
    }
    // A token that is to be added to every text has to exist.
    let error = model_error(&model_with(|w| {
        w.text("tokenizer.ggml.model", "llama")
            .strings("tokenizer.ggml.tokens", &tokens)
            .entry("tokenizer.ggml.add_bos_token", BOOL, &[1])
    }));
    assert!(matches!(error, GgufError::MissingKey { .. }), "{error}");
    // SentencePiece without scores opens (a plan needs no tokenizer) but gives no tokenizer.
    let model = open_model(&model_with(|w| {
        w.text("tokenizer.ggml.model", "llama")
            .strings("tokenizer.ggml.tokens", &tokens)
    }));
    assert!(model.unwrap().tokenizer_json().is_err());
}

/// Opens bytes and, where that works, reads all there is: nothing may panic.
fn exercise(bytes: &[u8]) {
    use oxllama_format::TensorSource;
    let parsed = GgufHeader::parse(bytes);
    let opened = open_model(bytes);
    assert!(parsed.is_ok() || opened.is_err());
    if let Ok(model) = opened {
        let _ = model.tokenizer_json();
        let names: Vec<String> = model.infos().map(|info| info.name.clone()).collect();
        for name in names {
            let _ = model.read(&name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn changed_bytes_never_panic(
        changes in prop::collection::vec((0_usize..16_000, any::<u8>()), 1..6),
        gemma in any::<bool>(),
    ) {
        let mut bytes = fixture(if gemma { "gemma2.gguf" } else { "llama3.gguf" });
        for (position, value) in changes {
            bytes[position] = value;
        }
        exercise(&bytes);
    }

    #[test]
    fn changed_fields_never_panic(
        position in 0_usize..16_000,
        value in prop_oneof![Just(0), Just(u64::MAX), Just(1 << 31), any::<u64>(), 0_u64..70_000],
        cut in 0_usize..20_000,
    ) {
        let mut bytes = fixture("qwen3.gguf");
        bytes[position..position + 8].copy_from_slice(&value.to_le_bytes());
        exercise(&bytes);
        bytes.remove(cut);
        exercise(&bytes);
    }

    #[test]
    fn random_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..300)) {
        let bytes = [b"GGUF\x03\0\0\0", &tail[..]].concat();
        if let Ok(header) = GgufHeader::parse(&bytes) {
            let held: usize = header.tensors.iter().map(|tensor| tensor.size_bytes).sum();
            prop_assert!(held < bytes.len());
        }
    }
}
