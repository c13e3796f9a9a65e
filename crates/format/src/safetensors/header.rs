//! The JSON header of one safetensors file: parsing and every check that needs no data.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::{DType, FormatError};

/// Largest header that is read, as in the safetensors library.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most dimensions a tensor may have; real ones have at most five.
const MAX_RANK: usize = 16;

/// Key of the free-form string map that a header may carry.
const METADATA_KEY: &str = "__metadata__";

/// Element type of a header entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredDType {
    /// One that this crate reads.
    Known(DType),
    /// Another one, by its name in the file; an error only when the tensor is used.
    Unknown(String),
}

/// One tensor of a header, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Tensor name.
    pub name: String,
    /// Element type.
    pub dtype: StoredDType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// First byte, counted from the end of the header.
    pub begin: u64,
    /// One past the last byte, counted from the end of the header.
    pub end: u64,
}

/// The checked header of one file: its entries sorted by position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsHeader {
    /// Entries sorted by `begin`; together they cover the data without gap or overlap.
    pub entries: Vec<HeaderEntry>,
}

/// A header entry as JSON.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's entries in file order; repeated names are kept so that they can be reported.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object that maps tensor names to their entries")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let entry = map.next_value::<RawEntry>().map_err(|error| {
                            serde::de::Error::custom(format!("tensor `{name}`: {error}"))
                        })?;
                        entries.push((name, entry));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

impl SafetensorsHeader {
    /// Parses and checks the JSON header of the file `path`, whose data (all that follows the
    /// header) is `data_bytes` long. `path` is used for errors only.
    ///
    /// # Errors
    /// Invalid UTF-8 or JSON, a name twice, a shape that overflows or contradicts its
    /// `data_offsets`, tensors that overlap, leave gaps or reach beyond the data.
    pub fn parse(path: &Path, json: &[u8], data_bytes: u64) -> Result<Self, FormatError> {
        let text = std::str::from_utf8(json).map_err(|error| FormatError::InvalidUtf8 {
            path: path.to_path_buf(),
            offset: error.valid_up_to() + 8,
        })?;
        let RawHeader(raw) =
            serde_json::from_str(text).map_err(|error| FormatError::InvalidJson {
                path: path.to_path_buf(),
                line: error.line(),
                column: error.column(),
                message: format!("in the safetensors header: {error}"),
            })?;
        let mut entries = raw
            .into_iter()
            .map(|(name, entry)| check_entry(path, name, entry, data_bytes))
            .collect::<Result<Vec<_>, _>>()?;
        check_names(path, &mut entries)?;
        check_coverage(path, &mut entries, data_bytes)?;
        Ok(Self { entries })
    }
}

/// Checks one entry by itself: its shape, its size and that it lies within the data.
fn check_entry(
    path: &Path,
    name: String,
    raw: RawEntry,
    data_bytes: u64,
) -> Result<HeaderEntry, FormatError> {
    let invalid = |what: &str, found: String, expected: String| {
        FormatError::invalid_tensor(path, &name, what, found, expected)
    };
    let (begin, end) = raw.data_offsets;
    if begin > end {
        return Err(invalid(
            "data_offsets",
            format!("[{begin}, {end}]"),
            "a begin not after its end".to_owned(),
        ));
    }
    if raw.shape.len() > MAX_RANK {
        return Err(invalid(
            "shape",
            format!("{} dimensions", raw.shape.len()),
            format!("at most {MAX_RANK}"),
        ));
    }
    let elements = raw
        .shape
        .iter()
        .try_fold(1u64, |total, &extent| total.checked_mul(extent));
    let shape = raw.shape.iter().map(|&extent| usize::try_from(extent).ok());
    let (Some(elements), Some(shape)) = (elements, shape.collect::<Option<Vec<usize>>>()) else {
        return Err(invalid(
            "shape",
            format!("{:?}", raw.shape),
            "fewer than 2^64 elements".to_owned(),
        ));
    };
    let dtype = match DType::from_name(&raw.dtype) {
        Some(known) => StoredDType::Known(known),
        None => StoredDType::Unknown(raw.dtype),
    };
    if let StoredDType::Known(known) = dtype {
        let size = elements.checked_mul(known.size_bytes() as u64);
        if size != Some(end - begin) {
            let expected = size.map_or("fewer than 2^64".to_owned(), |size| size.to_string());
            return Err(invalid(
                "data_offsets",
                format!("{} bytes", end - begin),
                format!("{expected} bytes for shape {shape:?} of {known}"),
            ));
        }
    }
    if end > data_bytes {
        return Err(FormatError::Truncated {
            path: path.to_path_buf(),
            what: format!("the data up to the end of tensor `{name}`"),
            found_bytes: data_bytes,
            expected_bytes: end,
        });
    }
    Ok(HeaderEntry {
        name,
        dtype,
        shape,
        begin,
        end,
    })
}

/// Refuses a name that stands twice in the header.
fn check_names(path: &Path, entries: &mut [HeaderEntry]) -> Result<(), FormatError> {
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    match entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
        None => Ok(()),
        Some(pair) => Err(FormatError::DuplicateTensor {
            tensor: pair[0].name.clone(),
            first: path.to_path_buf(),
            second: path.to_path_buf(),
        }),
    }
}

/// Sorts by position and refuses overlaps and gaps, as the safetensors library does.
fn check_coverage(
    path: &Path,
    entries: &mut [HeaderEntry],
    data_bytes: u64,
) -> Result<(), FormatError> {
    entries.sort_by_key(|entry| (entry.begin, entry.end));
    let mut position = 0u64;
    let mut previous = "the header";
    for entry in entries.iter() {
        if entry.begin != position {
            let relation = if entry.begin < position {
                "overlaps"
            } else {
                "leaves a gap after"
            };
            return Err(FormatError::invalid_tensor(
                path,
                &entry.name,
                format!("data_offsets: {relation} `{previous}`: first byte"),
                entry.begin,
                position,
            ));
        }
        position = entry.end;
        previous = &entry.name;
    }
    if position != data_bytes {
        return Err(FormatError::malformed(
            path,
            "data after the header",
            format!("{data_bytes} bytes"),
            format!("{position} bytes, where the last tensor ends"),
        ));
    }
    Ok(())
}
