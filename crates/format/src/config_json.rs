//! JSON documents beside the tensors: reading them and taking typed values out of them.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::FormatError;

/// Largest configuration document that is read.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Largest count or size that a configuration may name: more than any real model's, and small
/// enough that products of two of them do not overflow 64 bits.
pub const MAX_CONFIG_COUNT: u64 = 1 << 31;

/// Reads a whole regular file of at most `max_bytes`; `None` if it does not exist.
///
/// # Errors
/// The file cannot be read, is not a regular file or is larger.
pub fn read_optional_file(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, FormatError> {
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(|source| FormatError::io(path, "open", source))?,
    };
    if !metadata.is_file() {
        return Err(FormatError::malformed(
            path,
            "file type",
            "not a file",
            "a regular file",
        ));
    }
    if metadata.len() > max_bytes {
        return Err(FormatError::malformed(
            path,
            "file size",
            format!("{} bytes", metadata.len()),
            format!("at most {max_bytes}"),
        ));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    File::open(path)
        .and_then(|file| file.take(max_bytes).read_to_end(&mut bytes))
        .map_err(|source| FormatError::io(path, "read", source))?;
    Ok(Some(bytes))
}

/// Parses a JSON document; `path` is used in errors.
///
/// # Errors
/// Invalid UTF-8, invalid JSON (nesting deeper than 127 levels included), or a document that is
/// not an object.
pub fn parse_json_object(path: &Path, bytes: &[u8]) -> Result<Value, FormatError> {
    let text = std::str::from_utf8(bytes).map_err(|error| FormatError::InvalidUtf8 {
        path: path.to_path_buf(),
        offset: error.valid_up_to(),
    })?;
    // Some editors write a byte order mark, which JSON does not know.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let value: Value = serde_json::from_str(text).map_err(|error| FormatError::InvalidJson {
        path: path.to_path_buf(),
        line: error.line(),
        column: error.column(),
        message: error.to_string(),
    })?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(FormatError::malformed(
            path,
            "document",
            describe(&value),
            "a JSON object",
        ))
    }
}

/// Reads a JSON object from a file; `None` if the file does not exist.
///
/// # Errors
/// As [`read_optional_file`] and [`parse_json_object`].
pub fn read_json_object(path: &Path) -> Result<Option<Value>, FormatError> {
    read_optional_file(path, MAX_CONFIG_BYTES)?
        .map(|bytes| parse_json_object(path, &bytes))
        .transpose()
}

/// A configuration document with the path that its errors name.
///
/// Getters take dotted keys for nested objects (`rope_scaling.factor`). A key whose value is
/// `null` counts as absent, as in Python's `config.get(key)`.
#[derive(Debug, Clone, Copy)]
pub struct ConfigView<'a> {
    value: &'a Value,
    path: &'a Path,
}

impl<'a> ConfigView<'a> {
    /// A view of `value`, read from `path`.
    pub fn new(value: &'a Value, path: &'a Path) -> Self {
        ConfigView { value, path }
    }

    /// The file.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// The whole document.
    pub fn value(&self) -> &'a Value {
        self.value
    }

    /// The value of `key`; `None` if absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        key.split('.')
            .try_fold(self.value, |value, part| value.get(part))
            .filter(|value| !value.is_null())
    }

    /// A count: an integer from 0 to [`MAX_CONFIG_COUNT`].
    ///
    /// # Errors
    /// Absent, another type, or out of range.
    pub fn usize(&self, key: &str) -> Result<usize, FormatError> {
        self.optional_usize(key)?
            .ok_or_else(|| self.invalid(key, "a whole number"))
    }

    /// A count that may be absent.
    ///
    /// # Errors
    /// Another type, or out of range.
    pub fn optional_usize(&self, key: &str) -> Result<Option<usize>, FormatError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64().or_else(|| whole_number(value)) {
            Some(count) if count <= MAX_CONFIG_COUNT => Ok(Some(count as usize)),
            _ => Err(self.invalid(key, &format!("a whole number from 0 to {MAX_CONFIG_COUNT}"))),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    /// Absent or another type.
    pub fn f64(&self, key: &str) -> Result<f64, FormatError> {
        self.optional_f64(key)?
            .ok_or_else(|| self.invalid(key, "a number"))
    }

    /// A finite number that may be absent.
    ///
    /// # Errors
    /// Another type.
    pub fn optional_f64(&self, key: &str) -> Result<Option<f64>, FormatError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.invalid(key, "a finite number")),
        }
    }

    /// A flag; `default` if absent.
    ///
    /// # Errors
    /// Another type.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, FormatError> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| self.invalid(key, "true or false"))
    }

    /// A string.
    ///
    /// # Errors
    /// Absent or another type.
    pub fn str(&self, key: &str) -> Result<&'a str, FormatError> {
        self.optional_str(key)?
            .ok_or_else(|| self.invalid(key, "a string"))
    }

    /// A string that may be absent.
    ///
    /// # Errors
    /// Another type.
    pub fn optional_str(&self, key: &str) -> Result<Option<&'a str>, FormatError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.invalid(key, "a string"))
    }

    /// A list of finite numbers that may be absent.
    ///
    /// # Errors
    /// Another type.
    pub fn optional_f64_list(&self, key: &str) -> Result<Option<Vec<f64>>, FormatError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let numbers = value.as_array().and_then(|list| {
            list.iter()
                .map(|item| item.as_f64().filter(|number| number.is_finite()))
                .collect()
        });
        match numbers {
            Some(numbers) => Ok(Some(numbers)),
            None => Err(self.invalid(key, "a list of finite numbers")),
        }
    }

    /// A list of strings that may be absent.
    ///
    /// # Errors
    /// Another type.
    pub fn optional_str_list(&self, key: &str) -> Result<Option<Vec<&'a str>>, FormatError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let strings = value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect());
        match strings {
            Some(strings) => Ok(Some(strings)),
            None => Err(self.invalid(key, "a list of strings")),
        }
    }

    /// Token ids, given as one number or a list of them; empty if absent.
    ///
    /// # Errors
    /// Another type, or an id that does not fit in 32 bits.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>, FormatError> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let items = value
            .as_array()
            .map_or(std::slice::from_ref(value), Vec::as_slice);
        items
            .iter()
            .map(|item| item.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<Vec<u32>>>()
            .ok_or_else(|| self.invalid(key, "a token id or a list of token ids"))
    }

    /// The error for a value of `key` that is not `expected`; shows what is there.
    pub fn invalid(&self, key: &str, expected: &str) -> FormatError {
        FormatError::InvalidConfig {
            path: self.path.to_path_buf(),
            key: key.to_owned(),
            found: self.get(key).map_or("nothing".to_owned(), describe),
            expected: expected.to_owned(),
        }
    }
}

/// A float without fraction, such as `2.0`, which some writers use for counts.
fn whole_number(value: &Value) -> Option<u64> {
    let number = value.as_f64()?;
    let whole = number.fract() == 0.0 && (0.0..=MAX_CONFIG_COUNT as f64).contains(&number);
    whole.then_some(number as u64)
}

/// A value for an error message: shortened, and containers by kind.
fn describe(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = match value {
        Value::Array(list) => return format!("a list of {} items", list.len()),
        Value::Object(map) => return format!("an object with {} keys", map.len()),
        other => other.to_string(),
    };
    if text.chars().count() <= LONGEST {
        return text;
    }
    text.chars().take(LONGEST).chain("…".chars()).collect()
}
