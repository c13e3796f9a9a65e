//! The settings by name: how each is read from JSON, and its range.

use serde_json::Value;

use super::{SamplingSettings, SettingsError, Stage};
use crate::near_names;

type Access<T> = fn(&mut SamplingSettings) -> &mut T;

/// A setting.
struct Entry {
    name: &'static str,
    /// What other programs call it.
    alias: Option<&'static str>,
    field: Field,
}

/// Where a setting is kept, and what it may be.
enum Field {
    Number(Access<f32>, fn(&SamplingSettings) -> f32, Range<f32>),
    Count(Access<u32>, fn(&SamplingSettings) -> u32, Range<u32>),
    Flag(Access<bool>),
    /// A count of tokens, -1 for all.
    OptionalCount(Access<Option<u32>>),
    TokenIds(Access<Option<Vec<u32>>>),
    LogitBias,
    Order,
}

/// The values allowed, with words for them.
struct Range<T> {
    holds: fn(T) -> bool,
    words: &'static str,
}

impl<T: Copy + ToString> Range<T> {
    /// The value and the range in words, if it is outside.
    fn fault(&self, value: T) -> Option<(String, &'static str)> {
        (!(self.holds)(value)).then(|| (value.to_string(), self.words))
    }
}

macro_rules! number {
    ($name:ident, $alias:expr, $words:literal, $holds:expr) => {
        Entry {
            name: stringify!($name),
            alias: $alias,
            field: Field::Number(
                |settings| &mut settings.$name,
                |settings| settings.$name,
                Range {
                    holds: $holds,
                    words: $words,
                },
            ),
        }
    };
}

macro_rules! count {
    ($name:ident, $alias:expr, $words:literal, $holds:expr) => {
        Entry {
            name: stringify!($name),
            alias: $alias,
            field: Field::Count(
                |settings| &mut settings.$name,
                |settings| settings.$name,
                Range {
                    holds: $holds,
                    words: $words,
                },
            ),
        }
    };
}

macro_rules! field {
    ($name:ident, $kind:ident) => {
        Entry {
            name: stringify!($name),
            alias: None,
            field: Field::$kind(|settings| &mut settings.$name),
        }
    };
}

/// Every setting, in the order in which [`super::SamplingSettings`] has them.
static TABLE: [Entry; 34] = [
    number!(
        repetition_penalty,
        Some("token_repetition_penalty"),
        "above 0, at most 100 (1 is off)",
        |x| x > 0.0 && x <= 100.0
    ),
    Entry {
        name: "repetition_range",
        alias: Some("token_repetition_range"),
        field: Field::OptionalCount(|settings| &mut settings.repetition_range),
    },
    count!(
        repetition_decay,
        Some("token_repetition_decay"),
        "a whole number from 0",
        |_| true
    ),
    number!(
        frequency_penalty,
        Some("token_frequency_penalty"),
        "-100 to 100",
        within_hundred
    ),
    number!(
        presence_penalty,
        Some("token_presence_penalty"),
        "-100 to 100",
        within_hundred
    ),
    number!(temperature, None, "0 to 100", to_hundred),
    field!(temperature_last, Flag),
    number!(smoothing_factor, None, "0 to 100", to_hundred),
    number!(min_temp, None, "0 to 100", to_hundred),
    number!(max_temp, None, "0 to 100", to_hundred),
    number!(temp_exponent, None, "above 0, at most 100", |x| x > 0.0
        && x <= 100.0),
    count!(top_k, None, "a whole number from 0", |_| true),
    number!(top_p, None, "0 to 1", to_one),
    number!(top_a, None, "0 to 1", to_one),
    number!(min_p, None, "0 to 1", to_one),
    number!(tfs, None, "0 to 1", to_one),
    number!(typical, Some("typical_p"), "0 to 1", to_one),
    number!(top_n_sigma, None, "0 to 100", to_hundred),
    number!(skew, None, "-10 to 10", |x| (-10.0..=10.0).contains(&x)),
    field!(mirostat, Flag),
    number!(mirostat_tau, None, "0 to 100", to_hundred),
    number!(mirostat_eta, None, "0 to 1", to_one),
    number!(mirostat_mu, None, "0 to 100", to_hundred),
    Entry {
        name: "logit_bias",
        alias: Some("token_bias"),
        field: Field::LogitBias,
    },
    count!(dry_allowed_length, None, "a whole number from 1", |x| x
        >= 1),
    number!(dry_base, None, "1 to 100", |x| (1.0..=100.0).contains(&x)),
    number!(dry_multiplier, None, "0 to 100", to_hundred),
    field!(dry_sequence_breakers, TokenIds),
    count!(dry_range, None, "a whole number from 0", |_| true),
    count!(dry_max_ngram, None, "a whole number from 2 to 256", |x| (2
        ..=256)
        .contains(&x)),
    number!(xtc_probability, None, "0 to 1", to_one),
    number!(xtc_threshold, None, "above 0, at most 1", |x| x > 0.0
        && x <= 1.0),
    field!(xtc_ignore_tokens, TokenIds),
    Entry {
        name: "sampler_order",
        alias: None,
        field: Field::Order,
    },
];

fn to_one(x: f32) -> bool {
    (0.0..=1.0).contains(&x)
}

fn to_hundred(x: f32) -> bool {
    (0.0..=100.0).contains(&x)
}

fn within_hundred(x: f32) -> bool {
    (-100.0..=100.0).contains(&x)
}

pub(super) fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|entry| entry.name)
}

fn find(name: &str) -> Result<&'static Entry, SettingsError> {
    let wanted = |entry: &&Entry| entry.name == name || entry.alias == Some(name);
    TABLE
        .iter()
        .find(wanted)
        .ok_or_else(|| SettingsError::Unknown {
            name: shortened(name),
            near: near_names(name, names()),
        })
}

pub(super) fn set(
    settings: &mut SamplingSettings,
    name: &str,
    value: &Value,
) -> Result<(), SettingsError> {
    let entry = find(name)?;
    if value.is_null() {
        return Ok(());
    }
    let wrong = |expected: &str| {
        SettingsError::invalid(entry.name, shortened(&value.to_string()), expected)
    };
    match &entry.field {
        Field::Number(access, _, range) => {
            let number = value.as_f64().ok_or_else(|| wrong(range.words))?;
            *access(settings) = number as f32;
        }
        Field::Count(access, _, range) => {
            *access(settings) = count(value).ok_or_else(|| wrong(range.words))?;
        }
        Field::Flag(access) => {
            *access(settings) = value.as_bool().ok_or_else(|| wrong("true or false"))?;
        }
        Field::OptionalCount(access) => {
            *access(settings) = match value.as_i64() {
                Some(-1) => None,
                _ => Some(count(value).ok_or_else(|| wrong("a number of tokens, or -1 for all"))?),
            };
        }
        Field::TokenIds(access) => {
            let ids = value
                .as_array()
                .and_then(|ids| ids.iter().map(token_id).collect());
            *access(settings) = Some(ids.ok_or_else(|| wrong("a list of token ids"))?);
        }
        Field::LogitBias => {
            let pair =
                |(id, bias): (&String, &Value)| Some((id.parse().ok()?, bias.as_f64()? as f32));
            let map = value
                .as_object()
                .and_then(|map| map.iter().map(pair).collect());
            settings.logit_bias = map.ok_or_else(|| {
                wrong("an object of token ids and numbers, such as {\"50256\": -100}")
            })?;
        }
        Field::Order => {
            settings.sampler_order = order(value).ok_or_else(|| wrong(&order_words()))?;
        }
    }
    Ok(())
}

pub(super) fn set_number(
    settings: &mut SamplingSettings,
    name: &str,
    value: f32,
) -> Result<(), SettingsError> {
    let entry = find(name)?;
    let Field::Number(access, ..) = entry.field else {
        return Err(SettingsError::invalid(
            entry.name,
            value,
            "another type than a real number",
        ));
    };
    *access(settings) = value;
    Ok(())
}

pub(super) fn check_ranges(settings: &SamplingSettings) -> Result<(), SettingsError> {
    for entry in &TABLE {
        let fault = match &entry.field {
            Field::Number(_, read, range) => range.fault(read(settings)),
            Field::Count(_, read, range) => range.fault(read(settings)),
            _ => None,
        };
        if let Some((found, words)) = fault {
            return Err(SettingsError::invalid(entry.name, found, words));
        }
    }
    Ok(())
}

/// A whole number; what is beyond `u32` is as good as its largest.
fn count(value: &Value) -> Option<u32> {
    let count = value.as_u64()?;
    Some(u32::try_from(count).unwrap_or(u32::MAX))
}

fn token_id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

fn order(value: &Value) -> Option<Vec<Stage>> {
    match value {
        Value::String(list) => list
            .split(',')
            .map(|name| Stage::from_name(name.trim()))
            .collect(),
        Value::Array(list) => list
            .iter()
            .map(|name| Stage::from_name(name.as_str()?))
            .collect(),
        _ => None,
    }
}

fn order_words() -> String {
    let names = Stage::DEFAULT_ORDER.map(Stage::name);
    format!("a list of {}", names.join(", "))
}

/// A user's text, cut to what an error message can bear.
fn shortened(text: &str) -> String {
    const LONGEST_CHARS: usize = 60;
    match text.char_indices().nth(LONGEST_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// What to say after "unknown sampling setting".
pub(super) fn suggestion(near: &[&str]) -> String {
    if near.is_empty() {
        format!("there are {}", names().collect::<Vec<_>>().join(", "))
    } else {
        format!("is {} meant?", near.join(" or "))
    }
}
