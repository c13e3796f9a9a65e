//! Every GGUF tensor type against blocks decoded by the Python `gguf` package.
//!
//! The vectors and the script that made them: tests/fixtures/gguf.

use std::fs;
use std::path::PathBuf;

use oxllama_format::gguf::{GgmlType, dequantize};

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/gguf/dequant")
        .join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_type_decodes_to_the_bits_of_the_python_package() {
    for ggml_type in GgmlType::ALL {
        let blocks = fixture(&format!("{}.blocks", ggml_type.name()));
        let expected = fixture(&format!("{}.f32", ggml_type.name()));
        let expected: Vec<u32> = expected
            .chunks_exact(4)
            .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert!(expected.len() >= 128, "{}", ggml_type.name());
        let mut values = vec![0.0; expected.len()];
        dequantize(ggml_type, &blocks, &mut values);
        for (index, (value, expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(
                value.to_bits(),
                *expected,
                "{} element {index}: {value} against {}",
                ggml_type.name(),
                f32::from_bits(*expected)
            );
        }
    }
}

#[test]
fn types_are_told_by_their_numbers() {
    for ggml_type in GgmlType::ALL {
        assert_eq!(GgmlType::from_number(ggml_type.number()), Some(ggml_type));
    }
    // Q4_2 and Q4_3 were withdrawn; 23 is IQ4_XS.
    for unknown in [4, 5, 23, 31, u32::MAX] {
        assert_eq!(GgmlType::from_number(unknown), None);
    }
}
