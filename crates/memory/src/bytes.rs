//! Sizes in bytes that carry their unit.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// Unit names, largest first, with the number of bytes each stands for. "GB" and
/// "GiB" are the same: every program of this field means 1024^3 by either.
const UNITS: [(&str, &str, u64); 4] = [
    ("TiB", "TB", 1 << 40),
    ("GiB", "GB", 1 << 30),
    ("MiB", "MB", 1 << 20),
    ("KiB", "KB", 1 << 10),
];

/// A number of bytes.
///
/// Arithmetic is checked or saturating by name; there are no operators that could
/// wrap or panic. As text, a unit is required (`"1.5GiB"`); serialized, it is the
/// plain integer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);
    /// The largest size that can be expressed.
    pub const MAX: Self = Self(u64::MAX);

    /// `count` × 1024 bytes, at most [`Bytes::MAX`].
    pub const fn from_kib(count: u64) -> Self {
        Self(count.saturating_mul(1 << 10))
    }

    /// `count` × 1024² bytes, at most [`Bytes::MAX`].
    pub const fn from_mib(count: u64) -> Self {
        Self(count.saturating_mul(1 << 20))
    }

    /// `count` × 1024³ bytes, at most [`Bytes::MAX`].
    pub const fn from_gib(count: u64) -> Self {
        Self(count.saturating_mul(1 << 30))
    }

    /// A size in memory, as a number of bytes.
    pub const fn from_usize(bytes: usize) -> Self {
        // No supported target has addresses wider than 64 bits.
        Self(bytes as u64)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether this is no bytes at all.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The sum, or `None` when it exceeds [`Bytes::MAX`].
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    /// The difference, or `None` when `other` is larger.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// `count` times this size, or `None` when it exceeds [`Bytes::MAX`].
    pub fn checked_mul(self, count: u64) -> Option<Self> {
        self.0.checked_mul(count).map(Self)
    }

    /// The sum of all sizes, or `None` when it exceeds [`Bytes::MAX`].
    pub fn checked_sum(sizes: impl IntoIterator<Item = Self>) -> Option<Self> {
        sizes.into_iter().try_fold(Self::ZERO, Self::checked_add)
    }

    /// The sum, at most [`Bytes::MAX`].
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, zero when `other` is larger.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// `count` times this size, at most [`Bytes::MAX`].
    pub const fn saturating_mul(self, count: u64) -> Self {
        Self(self.0.saturating_mul(count))
    }
}

impl From<u64> for Bytes {
    fn from(bytes: u64) -> Self {
        Self(bytes)
    }
}

/// `"512 B"` exactly below 1 KiB, above it the largest unit that leaves at least one,
/// to two decimals: `"1.25 GiB"`. Width and alignment of the format string apply.
impl fmt::Display for Bytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, _, unit) in UNITS {
            // Rounded to hundredths first, so that 1023.999 KiB reads "1.00 MiB".
            let unit_size = u128::from(unit);
            let hundredths = (u128::from(self.0) * 100 + unit_size / 2) / unit_size;
            if hundredths >= 100 && (self.0 >= 1 << 10) {
                let text = format!("{}.{:02} {name}", hundredths / 100, hundredths % 100);
                return formatter.pad(&text);
            }
        }
        formatter.pad(&format!("{} B", self.0))
    }
}

/// Why a text is not a size. Each message quotes the text and says what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BytesError {
    /// A number without a unit, which could mean either of two things.
    #[error(
        "\"{text}\" has no unit: write \"{text}GiB\" if gigabytes are meant (the unit of \
         ExLlamaV2's gpu_split) or \"{text}B\" if bytes are (the unit of its reserve_vram)"
    )]
    MissingUnit {
        /// The text found.
        text: String,
    },
    /// The unit is none of those known.
    #[error("\"{text}\" has the unknown unit \"{unit}\": expected B, KiB, MiB, GiB or TiB")]
    UnknownUnit {
        /// The text found.
        text: String,
        /// The unknown part of it.
        unit: String,
    },
    /// There is no number where one was expected.
    #[error("\"{text}\" is not a size: expected a number and a unit, such as \"1.5GiB\"")]
    NotANumber {
        /// The text found.
        text: String,
    },
    /// The size exceeds what 64 bits hold.
    #[error("\"{text}\" is more than the largest size that can be expressed, 16777215TiB")]
    TooLarge {
        /// The text found.
        text: String,
    },
}

/// Splits `text` behind its leading digits and decimal point: `("1.5", "GiB")`.
fn split_number(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

/// `number` (decimal digits, optionally with a fraction) times `unit`, rounded down.
/// Integer arithmetic: no size that a user writes is changed by floating point.
pub(crate) fn scale_decimal(number: &str, unit: u64, text: &str) -> Result<Bytes, BytesError> {
    let not_a_number = || BytesError::NotANumber {
        text: text.to_owned(),
    };
    let too_large = || BytesError::TooLarge {
        text: text.to_owned(),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let only_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !only_digits(whole) || !only_digits(fraction) {
        return Err(not_a_number());
    }
    let whole = match whole {
        "" => 0,
        digits => digits.parse::<u64>().map_err(|_| too_large())?,
    };
    // 18 digits are below a byte of the largest unit, and fit 64 bits.
    let fraction = &fraction[..fraction.len().min(18)];
    let fraction_bytes = match fraction {
        "" => 0,
        digits => {
            let numerator = u128::from(digits.parse::<u64>().map_err(|_| not_a_number())?);
            let denominator = 10u128.pow(digits.len() as u32);
            numerator * u128::from(unit) / denominator
        }
    };
    let bytes = u128::from(whole) * u128::from(unit) + fraction_bytes;
    u64::try_from(bytes).map(Bytes).map_err(|_| too_large())
}

/// Reads `"300MiB"`, `"1.5 gb"`, `"4096B"`; the unit is required.
impl FromStr for Bytes {
    type Err = BytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim();
        let (number, unit) = split_number(trimmed);
        if number.is_empty() {
            return Err(BytesError::NotANumber {
                text: trimmed.to_owned(),
            });
        }
        if unit.is_empty() {
            // Only a number that would be one with a unit is ambiguous.
            scale_decimal(number, 1, trimmed)?;
            return Err(BytesError::MissingUnit {
                text: trimmed.to_owned(),
            });
        }
        if unit.eq_ignore_ascii_case("B") {
            return scale_decimal(number, 1, trimmed);
        }
        let known = UNITS.iter().find(|(binary, short, _)| {
            unit.eq_ignore_ascii_case(binary) || unit.eq_ignore_ascii_case(short)
        });
        match known {
            Some(&(_, _, size)) => scale_decimal(number, size, trimmed),
            None => Err(BytesError::UnknownUnit {
                text: trimmed.to_owned(),
                unit: unit.to_owned(),
            }),
        }
    }
}
