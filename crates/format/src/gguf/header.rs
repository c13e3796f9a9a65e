//! The header: metadata, tensor entries, and where the data lie. Pure: bytes in, values out.

use std::collections::{BTreeMap, HashSet};

use super::value::{ArrayRef, Value, ValueType, bytes_at};
use super::{GgmlType, GgufError};

/// Arrays within arrays within ... up to this depth; no known writer goes beyond two.
const MAX_ARRAY_DEPTH: u32 = 4;
/// Longest metadata key that the format allows, in bytes.
const MAX_KEY_BYTES: u64 = 65_535;
/// Longest tensor name accepted, in bytes. ggml itself stores 63.
const MAX_TENSOR_NAME_BYTES: u64 = 1_024;
/// Most dimensions of a tensor that ggml knows.
const MAX_DIMENSIONS: u32 = 4;
/// Where `general.alignment` is absent.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Largest alignment accepted: a huge page.
const MAX_ALIGNMENT: u64 = 1 << 21;

/// Name, type, shape and place of a tensor, as the file has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// The name in the file, e.g. `blk.0.attn_q.weight`.
    pub name: String,
    /// How the elements are stored.
    pub ggml_type: GgmlType,
    /// Extents, outermost first (the file has them innermost first).
    pub shape: Vec<usize>,
    /// Position of the data in the file, in bytes.
    pub(crate) start: usize,
    /// Bytes of the data.
    pub size_bytes: usize,
}

impl GgufTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        // Cannot overflow: checked when the header was parsed.
        self.shape.iter().product()
    }
}

/// A parsed header: everything but the tensors' data.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufHeader {
    /// Format version: 2 or 3.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the file's order.
    pub tensors: Vec<GgufTensor>,
}

impl GgufHeader {
    /// Parses and checks the header of `file`, a whole GGUF file's bytes.
    ///
    /// Reads the header only, allocates no more than a small multiple of its size, and checks
    /// that every tensor's data lie in the file and overlap no other's.
    ///
    /// # Errors
    /// [`GgufError`]: everything that the header can have wrong.
    pub fn parse(file: &[u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor { file, offset: 0 };
        if file.get(..4) != Some(b"GGUF") {
            return Err(GgufError::NotGguf {
                found: file[..file.len().min(4)].to_vec(),
            });
        }
        cursor.offset = 4;
        let version = cursor.u32("the version")?;
        if version != 2 && version != 3 {
            return Err(GgufError::UnsupportedVersion { found: version });
        }
        let tensor_count = cursor.u64("the number of tensors")?;
        let metadata_count = cursor.u64("the number of metadata entries")?;
        // Key length, value type, one byte of value.
        cursor.check_count("metadata entries", metadata_count, 8 + 4 + 1)?;
        let metadata = parse_metadata(&mut cursor, metadata_count)?;
        let alignment = alignment(&metadata)?;
        // Name length, number of dimensions, one dimension, type, offset.
        cursor.check_count("tensors", tensor_count, 8 + 4 + 8 + 4 + 8)?;
        let mut tensors = Vec::with_capacity(tensor_count as usize);
        let mut names = HashSet::with_capacity(tensor_count as usize);
        for _ in 0..tensor_count {
            let tensor = parse_tensor(&mut cursor, alignment)?;
            if !names.insert(tensor.name.clone()) {
                return Err(GgufError::DuplicateTensor {
                    tensor: tensor.name,
                });
            }
            tensors.push(tensor);
        }
        place_tensors(
            &mut tensors,
            cursor.offset as u64,
            file.len() as u64,
            alignment,
        )?;
        Ok(GgufHeader {
            version,
            metadata,
            tensors,
        })
    }
}

/// `general.alignment`, checked.
fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => {
            Ok(alignment)
        }
        Some(alignment) => Err(GgufError::malformed(
            "general.alignment",
            alignment,
            format!("a power of two of at most {MAX_ALIGNMENT}"),
        )),
        None => Err(GgufError::WrongValueType {
            key: "general.alignment".to_owned(),
            found: value.type_name(),
            expected: "an unsigned integer",
        }),
    }
}

fn parse_metadata(
    cursor: &mut Cursor<'_>,
    count: u64,
) -> Result<BTreeMap<String, Value>, GgufError> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let key = cursor.text("a metadata key", MAX_KEY_BYTES)?;
        let value_type = cursor.value_type("a metadata value's type")?;
        let value = cursor.value(value_type)?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(GgufError::DuplicateKey {
                key: key.to_owned(),
            });
        }
    }
    Ok(metadata)
}

/// Reads one tensor entry; `start` is still relative to the data section.
fn parse_tensor(cursor: &mut Cursor<'_>, alignment: u64) -> Result<GgufTensor, GgufError> {
    let name = cursor
        .text("a tensor's name", MAX_TENSOR_NAME_BYTES)?
        .to_owned();
    let dimensions = cursor.u32("a tensor's number of dimensions")?;
    if dimensions == 0 || dimensions > MAX_DIMENSIONS {
        return Err(GgufError::malformed(
            format!("tensor `{name}`: number of dimensions"),
            dimensions,
            "1 to 4",
        ));
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    for _ in 0..dimensions {
        shape.push(cursor.u64("a tensor's dimension")?);
    }
    let number = cursor.u32("a tensor's type")?;
    let offset = cursor.u64("a tensor's offset")?;
    let ggml_type =
        GgmlType::from_number(number).ok_or_else(|| GgufError::UnsupportedTensorType {
            tensor: name.clone(),
            found: GgmlType::describe(number),
            supported: GgmlType::supported_names(),
        })?;
    let block = ggml_type.block_elements() as u64;
    if !shape[0].is_multiple_of(block) {
        return Err(GgufError::malformed(
            format!("tensor `{name}`: innermost dimension"),
            shape[0],
            format!("a multiple of {block}, the block of {}", ggml_type.name()),
        ));
    }
    let too_large = || {
        GgufError::malformed(
            format!("tensor `{name}`: shape"),
            format!("{shape:?}"),
            "extents of at least 1 whose product fits in memory",
        )
    };
    let elements = shape
        .iter()
        .try_fold(1_u64, |product, &extent| product.checked_mul(extent))
        .filter(|&elements| elements > 0 && elements <= (isize::MAX as u64) / 4)
        .ok_or_else(too_large)?;
    let size_bytes = (elements / block)
        .checked_mul(ggml_type.block_bytes() as u64)
        .and_then(|size| usize::try_from(size).ok())
        .ok_or_else(too_large)?;
    if !offset.is_multiple_of(alignment) {
        return Err(GgufError::malformed(
            format!("tensor `{name}`: offset"),
            offset,
            format!("a multiple of the alignment {alignment}"),
        ));
    }
    let start = usize::try_from(offset).map_err(|_| too_large())?;
    let shape = shape.iter().rev().map(|&extent| extent as usize).collect();
    Ok(GgufTensor {
        name,
        ggml_type,
        shape,
        start,
        size_bytes,
    })
}

/// Checks that the data lie in the file and apart, and makes `start` absolute.
fn place_tensors(
    tensors: &mut [GgufTensor],
    header_bytes: u64,
    file_bytes: u64,
    alignment: u64,
) -> Result<(), GgufError> {
    let data_start = header_bytes.next_multiple_of(alignment);
    let data_bytes = file_bytes.saturating_sub(data_start);
    for tensor in tensors.iter() {
        let start = tensor.start as u64;
        let end = start.saturating_add(tensor.size_bytes as u64);
        if end > data_bytes {
            return Err(GgufError::TensorOutOfFile {
                tensor: tensor.name.clone(),
                start,
                end,
                data_bytes,
            });
        }
    }
    let mut order: Vec<&GgufTensor> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.start);
    for pair in order.windows(2) {
        if pair[0].start + pair[0].size_bytes > pair[1].start {
            return Err(GgufError::OverlappingTensors {
                first: pair[0].name.clone(),
                second: pair[1].name.clone(),
            });
        }
    }
    for tensor in tensors {
        tensor.start += data_start as usize;
    }
    Ok(())
}

/// A position in the file. Every read is checked against the file's end.
struct Cursor<'a> {
    file: &'a [u8],
    offset: usize,
}

impl<'a> Cursor<'a> {
    fn remaining(&self) -> u64 {
        (self.file.len() - self.offset) as u64
    }

    fn truncated(&self, what: &'static str, needed_bytes: u64) -> GgufError {
        GgufError::Truncated {
            what,
            offset: self.offset as u64,
            needed_bytes,
            available_bytes: self.remaining(),
        }
    }

    /// The next `length` bytes.
    fn take(&mut self, what: &'static str, length: u64) -> Result<&'a [u8], GgufError> {
        if length > self.remaining() {
            return Err(self.truncated(what, length));
        }
        let end = self.offset + length as usize;
        let bytes = &self.file[self.offset..end];
        self.offset = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let bytes =
            bytes_at(self.file, self.offset).ok_or_else(|| self.truncated(what, N as u64))?;
        self.offset += N;
        Ok(bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Refuses a count that the rest of the file cannot hold, before anything is allocated.
    fn check_count(
        &self,
        what: &'static str,
        count: u64,
        min_bytes_each: u64,
    ) -> Result<(), GgufError> {
        let limit = self.remaining() / min_bytes_each;
        if count > limit {
            return Err(GgufError::CountTooLarge { what, count, limit });
        }
        Ok(())
    }

    fn text(&mut self, what: &'static str, max_bytes: u64) -> Result<&'a str, GgufError> {
        let offset = self.offset as u64;
        let length = self.u64(what)?;
        if length > max_bytes {
            return Err(GgufError::malformed(
                format!("length of {what} at offset {offset}"),
                length,
                format!("at most {max_bytes} bytes"),
            ));
        }
        let bytes = self.take(what, length)?;
        std::str::from_utf8(bytes).map_err(|_| GgufError::InvalidUtf8 { what, offset })
    }

    fn value_type(&mut self, what: &'static str) -> Result<ValueType, GgufError> {
        let number = self.u32(what)?;
        ValueType::from_number(number)
            .ok_or_else(|| GgufError::malformed(what, number, "a type from 0 to 12"))
    }

    fn boolean(&mut self, what: &'static str) -> Result<bool, GgufError> {
        match self.array::<1>(what)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(GgufError::malformed(what, other, "0 or 1")),
        }
    }

    fn value(&mut self, value_type: ValueType) -> Result<Value, GgufError> {
        let what = "a metadata value";
        Ok(match value_type {
            ValueType::U8 => Value::Unsigned(self.array::<1>(what)?[0].into()),
            ValueType::I8 => Value::Signed(i8::from_le_bytes(self.array(what)?).into()),
            ValueType::U16 => Value::Unsigned(u16::from_le_bytes(self.array(what)?).into()),
            ValueType::I16 => Value::Signed(i16::from_le_bytes(self.array(what)?).into()),
            ValueType::U32 => Value::Unsigned(self.u32(what)?.into()),
            ValueType::I32 => Value::Signed(i32::from_le_bytes(self.array(what)?).into()),
            ValueType::U64 => Value::Unsigned(self.u64(what)?),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(self.array(what)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            ValueType::Bool => Value::Bool(self.boolean("a boolean")?),
            ValueType::String => Value::String(self.text("a string", u64::MAX)?.to_owned()),
            ValueType::Array => Value::Array(self.array_value(1)?),
        })
    }

    /// Checks an array and steps over it.
    fn array_value(&mut self, depth: u32) -> Result<ArrayRef, GgufError> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(GgufError::malformed(
                "nesting of arrays",
                depth,
                format!("at most {MAX_ARRAY_DEPTH}"),
            ));
        }
        let element = self.value_type("an array's element type")?;
        let count = self.u64("an array's length")?;
        self.check_count("array elements", count, element.min_size_bytes() as u64)?;
        let start = self.offset;
        match element {
            ValueType::String => {
                for _ in 0..count {
                    self.text("a string of an array", u64::MAX)?;
                }
            }
            ValueType::Array => {
                for _ in 0..count {
                    self.array_value(depth + 1)?;
                }
            }
            ValueType::Bool => {
                for _ in 0..count {
                    self.boolean("a boolean of an array")?;
                }
            }
            fixed => {
                let size = fixed.fixed_size_bytes().unwrap_or(1) as u64;
                // Cannot overflow: the count was checked against the file's size.
                self.take("an array", count * size)?;
            }
        }
        Ok(ArrayRef {
            element,
            count,
            start,
            size_bytes: self.offset - start,
        })
    }
}
