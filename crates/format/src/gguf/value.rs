//! Metadata values: scalars are decoded, arrays stay in the file and are decoded on demand.

use super::GgufError;

/// Type of a metadata value, numbered as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 16-bit integer.
    U16,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 32-bit integer.
    I32,
    /// IEEE binary32.
    F32,
    /// One byte, zero or one.
    Bool,
    /// UTF-8 text with a 64-bit length before it.
    String,
    /// Element type, 64-bit count, elements.
    Array,
    /// Unsigned 64-bit integer.
    U64,
    /// Signed 64-bit integer.
    I64,
    /// IEEE binary64.
    F64,
}

impl ValueType {
    /// The type with this number in the file, if there is one.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        use ValueType::{Array, Bool, F32, F64, I8, I16, I32, I64, String, U8, U16, U32, U64};
        const BY_NUMBER: [ValueType; 13] = [
            U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64,
        ];
        BY_NUMBER.get(number as usize).copied()
    }

    /// Bytes of one value, for the types of fixed size.
    pub(crate) fn fixed_size_bytes(self) -> Option<usize> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }

    /// Fewest bytes that a value of this type takes in the file.
    pub(crate) fn min_size_bytes(self) -> usize {
        match self {
            ValueType::String => 8,
            ValueType::Array => 12,
            _ => self.fixed_size_bytes().unwrap_or(1),
        }
    }
}

/// An array of metadata: checked when the header is parsed, decoded when it is asked for, so that
/// opening a file with a vocabulary of 256,000 strings allocates nothing for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArrayRef {
    /// Type of the elements; `Array` where arrays are nested.
    pub element: ValueType,
    /// Number of elements.
    pub count: u64,
    /// Position of the first element in the file, in bytes.
    pub(crate) start: usize,
    /// Bytes of all elements.
    pub(crate) size_bytes: usize,
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// binary32.
    F32(f32),
    /// binary64.
    F64(f64),
    /// Boolean.
    Bool(bool),
    /// Text.
    String(String),
    /// An array, still in the file.
    Array(ArrayRef),
}

impl Value {
    /// Name of the value's type, for messages.
    pub(crate) fn type_name(&self) -> String {
        match self {
            Value::Unsigned(_) => "an unsigned integer".to_owned(),
            Value::Signed(_) => "a signed integer".to_owned(),
            Value::F32(_) | Value::F64(_) => "a float".to_owned(),
            Value::Bool(_) => "a boolean".to_owned(),
            Value::String(_) => "a string".to_owned(),
            Value::Array(array) => format!("an array of {} {:?}", array.count, array.element),
        }
    }

    /// The value as a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(value) => Some(value),
            Value::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// The value as a float; binary32 is widened exactly.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(value) => Some(f64::from(value)),
            Value::F64(value) => Some(value),
            _ => None,
        }
    }

    /// The value as text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(value) => Some(value),
            _ => None,
        }
    }

    /// The value as a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }
}

/// Little-endian bytes of fixed length at `offset`; `None` past the end.
pub(crate) fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

impl ArrayRef {
    /// The strings of an array of strings, borrowed from `file`, the bytes that were parsed.
    ///
    /// # Errors
    /// The elements are of another type, or `file` is not what was parsed.
    pub fn strings<'a>(&self, key: &str, file: &'a [u8]) -> Result<Vec<&'a str>, GgufError> {
        if self.element != ValueType::String {
            return Err(self.wrong_element(key, "an array of strings"));
        }
        let changed = || GgufError::malformed(format!("array `{key}`"), "changed", "as parsed");
        let mut strings = Vec::with_capacity(self.count.min(self.size_bytes as u64 / 8) as usize);
        let mut offset = self.start;
        for _ in 0..self.count {
            let length = u64::from_le_bytes(bytes_at(file, offset).ok_or_else(changed)?);
            let start = offset + 8;
            let end = usize::try_from(length)
                .ok()
                .and_then(|length| start.checked_add(length))
                .ok_or_else(changed)?;
            let text = file.get(start..end).ok_or_else(changed)?;
            strings.push(std::str::from_utf8(text).map_err(|_| changed())?);
            offset = end;
        }
        Ok(strings)
    }

    /// The numbers of an array of integers or floats, widened to `f64`.
    ///
    /// Exact but for 64-bit integers beyond 2^53, which no array that is read here holds.
    ///
    /// # Errors
    /// The elements are of another type, or `file` is not what was parsed.
    pub fn numbers(&self, key: &str, file: &[u8]) -> Result<Vec<f64>, GgufError> {
        let wrong = || self.wrong_element(key, "an array of numbers");
        let size = self.element.fixed_size_bytes().ok_or_else(wrong)?;
        let end = self.start + self.size_bytes;
        let elements = file.get(self.start..end).ok_or_else(wrong)?;
        elements
            .chunks_exact(size)
            .map(|element| scalar(self.element, element).ok_or_else(wrong))
            .collect()
    }

    fn wrong_element(&self, key: &str, expected: &'static str) -> GgufError {
        GgufError::WrongValueType {
            key: key.to_owned(),
            found: Value::Array(*self).type_name(),
            expected,
        }
    }
}

/// One scalar of an array, widened to `f64`.
fn scalar(element: ValueType, bytes: &[u8]) -> Option<f64> {
    Some(match element {
        ValueType::U8 | ValueType::Bool => f64::from(*bytes.first()?),
        ValueType::I8 => f64::from(i8::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::U16 => f64::from(u16::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::I16 => f64::from(i16::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::U32 => f64::from(u32::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::I32 => f64::from(i32::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::F32 => f64::from(f32::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::U64 => u64::from_le_bytes(bytes.try_into().ok()?) as f64,
        ValueType::I64 => i64::from_le_bytes(bytes.try_into().ok()?) as f64,
        ValueType::F64 => f64::from_le_bytes(bytes.try_into().ok()?),
        ValueType::String | ValueType::Array => return None,
    })
}
