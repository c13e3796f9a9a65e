//! Typed reading of `config.json`: every value is checked for its type and range, and an
//! error names the key, what was found and what was expected.

use serde_json::{Map, Value};

use crate::ModelError;

/// Bounds that no real model reaches; they keep products of extents far from overflow and
/// lists of layers small.
pub(crate) const MAX_EXTENT: usize = 1 << 24;
/// Most layers.
pub(crate) const MAX_LAYERS: usize = 4096;
/// Most positions; positions are 32-bit.
pub(crate) const MAX_POSITIONS: usize = 1 << 31;

/// One JSON object of a configuration, with its place for error messages.
#[derive(Clone, Debug)]
pub(crate) struct Config<'a> {
    map: &'a Map<String, Value>,
    /// Dotted path with a final dot, or empty at the top.
    path: String,
}

impl<'a> Config<'a> {
    /// The top-level object.
    pub(crate) fn new(value: &'a Value) -> Result<Self, ModelError> {
        match value {
            Value::Object(map) => Ok(Self {
                map,
                path: String::new(),
            }),
            other => Err(ModelError::Config {
                key: "(the whole file)".to_owned(),
                found: shorten(other),
                expected: "a JSON object".to_owned(),
            }),
        }
    }

    /// The value of `key`; `None` where it is absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is there at all, be it null: families give the two different meanings.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// An error about `key`, with the value it has.
    pub(crate) fn error(&self, key: &str, expected: impl Into<String>) -> ModelError {
        ModelError::Config {
            key: format!("{}{key}", self.path),
            found: self.map.get(key).map_or("nothing".to_owned(), shorten),
            expected: expected.into(),
        }
    }

    /// An object inside this one; `None` where it is absent or null.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Config<'a>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Config {
                map,
                path: format!("{}{key}.", self.path),
            })),
            Some(_) => Err(self.error(key, "an object")),
        }
    }

    /// A whole number of `1..=most`, if present.
    pub(crate) fn optional_count(
        &self,
        key: &str,
        most: usize,
    ) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        // Some writers store whole numbers as floats.
        let whole = value.as_u64().or_else(|| {
            value
                .as_f64()
                .filter(|number| number.fract() == 0.0 && (0.0..=9.0e15).contains(number))
                .map(|number| number as u64)
        });
        match whole.and_then(|number| usize::try_from(number).ok()) {
            Some(number) if (1..=most).contains(&number) => Ok(Some(number)),
            _ => Err(self.error(key, format!("a whole number of 1 to {most}"))),
        }
    }

    /// A whole number of `1..=most` that must be there.
    pub(crate) fn count(&self, key: &str, most: usize) -> Result<usize, ModelError> {
        self.optional_count(key, most)?
            .ok_or_else(|| self.error(key, format!("a whole number of 1 to {most}")))
    }

    /// A whole number of `1..=most`, or `default`.
    pub(crate) fn count_or(
        &self,
        key: &str,
        most: usize,
        default: usize,
    ) -> Result<usize, ModelError> {
        Ok(self.optional_count(key, most)?.unwrap_or(default))
    }

    /// A number above zero that a normal f32 can hold, if present.
    pub(crate) fn optional_positive(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let range = f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX);
        match self.get(key).map(Value::as_f64) {
            None => Ok(None),
            Some(Some(number)) if range.contains(&number) => Ok(Some(number)),
            Some(_) => Err(self.error(key, "a number above 0 that fits a 32-bit float")),
        }
    }

    /// A number above zero, or `default`.
    pub(crate) fn positive_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        Ok(self.optional_positive(key)?.unwrap_or(default))
    }

    /// A number above zero; `default` where the key is absent, `None` where it is null.
    pub(crate) fn positive_unless_null(
        &self,
        key: &str,
        default: f64,
    ) -> Result<Option<f64>, ModelError> {
        if self.has(key) {
            self.optional_positive(key)
        } else {
            Ok(Some(default))
        }
    }

    /// A boolean, or `default` where it is absent or null.
    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.error(key, "true or false")),
        }
    }

    /// A string, if present.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.error(key, "a string")),
        }
    }

    /// A list of exactly `length` strings, if present.
    pub(crate) fn texts(
        &self,
        key: &str,
        length: usize,
    ) -> Result<Option<Vec<&'a str>>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let texts = value
            .as_array()
            .filter(|items| items.len() == length)
            .and_then(|items| items.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        match texts {
            Some(texts) => Ok(Some(texts)),
            None => Err(self.error(key, format!("a list of {length} strings"))),
        }
    }

    /// A list of exactly `length` numbers above zero that must be there.
    pub(crate) fn positives(&self, key: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        let expected = || self.error(key, format!("a list of {length} numbers above 0"));
        let items = self.get(key).and_then(Value::as_array);
        let items = items.filter(|items| items.len() == length);
        items
            .ok_or_else(expected)?
            .iter()
            .map(|item| {
                let number = item.as_f64().map(|number| number as f32);
                number
                    .filter(|number| number.is_normal() && *number > 0.0)
                    .ok_or_else(expected)
            })
            .collect()
    }
}

/// `value` as JSON, cut to a length that suits a message.
fn shorten(value: &Value) -> String {
    const MOST_CHARACTERS: usize = 60;
    match value {
        Value::Array(items) => return format!("a list of {} items", items.len()),
        Value::Object(map) => return format!("an object of {} keys", map.len()),
        _ => {}
    }
    let text = value.to_string();
    match text.char_indices().nth(MOST_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
