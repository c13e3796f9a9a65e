//! What the integration tests share: building tensors and files, checksums, error checks.
#![allow(dead_code, reason = "each test binary uses a part of this module")]

use std::fs;
use std::path::{Path, PathBuf};

use bytemuck::NoUninit;
use half::f16;
use oxllama_format::{
    DType, Exl2Layout, Exl2Tensors, FormatError, MemoryTensors, SafetensorsDir, SafetensorsWriter,
    TensorInfo,
};

/// A tensor to be stored: header and little-endian bytes.
pub(crate) type Tensor = (TensorInfo, Vec<u8>);

/// A tensor from elements.
pub(crate) fn tensor<T: NoUninit>(
    name: &str,
    dtype: DType,
    shape: &[usize],
    elements: &[T],
) -> Tensor {
    let info = TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let bytes = bytemuck::cast_slice(elements).to_vec();
    assert_eq!(info.size_bytes(), bytes.len() as u64, "elements of {name}");
    (info, bytes)
}

/// The tensors of a packed EXL2 linear.
pub(crate) fn exl2_tensors(key: &str, packed: &Exl2Tensors) -> Vec<Tensor> {
    packed
        .named(key)
        .into_iter()
        .map(|(info, bytes)| (info, bytes.to_vec()))
        .collect()
}

/// A small valid EXL2 linear: K = 96, N = 32, groups of 6, 4 and 2 bits, identity permutation.
pub(crate) fn small_exl2(key: &str) -> Vec<Tensor> {
    let groups = [(6u32, 32usize), (4, 32), (2, 32)];
    let layout = Exl2Layout::new(32, &groups).expect("a valid layout");
    let codes: Vec<u8> = (0..96 * 32).map(|index| (index % 4) as u8).collect();
    let scale_codes: Vec<u8> = (0..3 * 32).map(|index| (index % 16) as u8).collect();
    let scale_max = [0.5, 0.25, 0.125].map(f16::from_f32);
    let permutation: Vec<u32> = (0..96).collect();
    exl2_tensors(
        key,
        &layout.pack(&codes, &scale_codes, &scale_max, &permutation),
    )
}

/// A small valid GPTQ linear: K = 64, N = 8, two groups, with a sequential `g_idx`.
pub(crate) fn small_gptq(key: &str) -> Vec<Tensor> {
    let name = |part: &str| format!("{key}.{part}");
    let index: Vec<i32> = (0..64).map(|row| row / 32).collect();
    vec![
        tensor(&name("qweight"), DType::I32, &[8, 8], &[0x7654_3210u32; 64]),
        tensor(&name("qzeros"), DType::I32, &[2, 1], &[0x7777_7777u32; 2]),
        tensor(
            &name("scales"),
            DType::F16,
            &[2, 8],
            &[f16::from_f32(0.01); 16],
        ),
        tensor(&name("g_idx"), DType::I32, &[64], &index),
    ]
}

/// The tensor whose name ends in `suffix`, to be changed.
pub(crate) fn part<'t>(tensors: &'t mut [Tensor], suffix: &str) -> &'t mut Tensor {
    tensors
        .iter_mut()
        .find(|(info, _)| info.name.ends_with(suffix))
        .unwrap_or_else(|| panic!("a tensor …{suffix}"))
}

/// Overwrites one element.
pub(crate) fn set<T: NoUninit>(tensor: &mut Tensor, index: usize, element: T) {
    let size = size_of::<T>();
    tensor.1[index * size..][..size].copy_from_slice(bytemuck::bytes_of(&element));
}

/// The tensors as an in-memory source.
pub(crate) fn in_memory(tensors: &[Tensor]) -> MemoryTensors {
    let mut memory = MemoryTensors::new();
    for (info, bytes) in tensors {
        memory
            .insert(info.clone(), bytes.clone())
            .expect("consistent sizes");
    }
    memory
}

/// Writes the tensors to `directory/file`.
pub(crate) fn write_file(directory: &Path, file: &str, tensors: &[Tensor]) -> PathBuf {
    let path = directory.join(file);
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = SafetensorsWriter::create(&path, &infos).expect("a writer");
    for (info, bytes) in tensors {
        writer.write(&info.name, bytes).expect("a write");
    }
    writer.finish().expect("a finished file");
    path
}

/// Writes the tensors to `model.safetensors` in a new directory and opens it.
pub(crate) fn on_disk(tensors: &[Tensor]) -> (tempfile::TempDir, SafetensorsDir) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_file(directory.path(), "model.safetensors", tensors);
    let source = SafetensorsDir::open(directory.path()).expect("a valid file");
    (directory, source)
}

/// The bytes of a safetensors file with this header text and `data_bytes` zeros.
pub(crate) fn raw_file(header: &[u8], data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

/// Opens a directory whose only file `bad.safetensors` has these bytes.
pub(crate) fn open_raw(bytes: &[u8]) -> Result<SafetensorsDir, FormatError> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::write(directory.path().join("bad.safetensors"), bytes).expect("a file");
    SafetensorsDir::open(directory.path())
}

/// Asserts that the message contains every one of `parts`.
pub(crate) fn assert_names(error: &FormatError, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

/// CRC-32/IEEE, bit by bit.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// The folder with models and golden outputs; `None`, said aloud, where it is absent.
#[expect(clippy::print_stderr, reason = "a skipped test must be seen")]
pub(crate) fn shared_folder(needed: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("OXLLAMA_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    if folder.join(needed).exists() {
        return Some(folder);
    }
    eprintln!(
        "SKIPPED: {} not found (set OXLLAMA_SHARED)",
        folder.join(needed).display()
    );
    None
}

#[allow(unused_macros, reason = "not every test file needs every helper")]
/// Asserts the variant and that the message contains every part.
macro_rules! assert_error {
    ($result:expr, $variant:pat, $parts:expr) => {{
        let error = $result.expect_err("must be refused");
        assert!(matches!(error, $variant), "another variant: {error:?}");
        $crate::support::assert_names(&error, &$parts);
    }};
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use assert_error;
