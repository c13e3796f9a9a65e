//! What stands in the way of a plan, and what would have to change, in types and in words.

use std::fmt;

use serde::Serialize;

use crate::bytes::Bytes;
use crate::device::DeviceId;
use crate::footprint::CacheFormat;

/// What stands in the way of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum BindingConstraint {
    /// Without caps, exclusions and split the request fits.
    Limits,
    /// With the shortest context the request fits.
    Context,
    /// With a cache of fewer tokens, and no more context than that, the request fits.
    CacheTokens,
    /// With a single sequence the request fits.
    Batch,
    /// With steps of a single token the request fits.
    Chunk,
    /// The model fits only with less of several: context, batch, chunk, cache format.
    CacheAndWorkspace,
    /// One part, with the cache and workspace of the smallest step, exceeds every device.
    Part {
        /// The part: "the embedding", "layer 7", "the head".
        part: String,
        /// What it needs on a device of its own.
        needed: Bytes,
        /// The most that any device offers.
        largest_limit: Bytes,
    },
    /// The smallest request exceeds all devices together.
    Weights {
        /// What it would need on a single device.
        needed: Bytes,
        /// What all devices offer together.
        limits: Bytes,
    },
    /// All devices together offer enough for the smallest request, but no cut between
    /// layers divides it so.
    Division,
}

impl fmt::Display for BindingConstraint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limits => formatter.write_str("caps, exclusions or split: without them it fits"),
            Self::Context => formatter.write_str("the cache for so long a context"),
            Self::CacheTokens => formatter.write_str("the cache of so many tokens"),
            Self::Batch => formatter.write_str("the cache and workspace for so many sequences"),
            Self::Chunk => formatter.write_str("the workspace for so large a chunk"),
            Self::CacheAndWorkspace => {
                formatter.write_str("cache and workspace together: the weights alone fit")
            }
            Self::Part {
                part,
                needed,
                largest_limit,
            } => write!(
                formatter,
                "{part}: it needs {needed} on one device, and none offers more than \
                 {largest_limit}"
            ),
            Self::Weights { needed, limits } => write!(
                formatter,
                "the weights: even the smallest request needs {needed}, and the devices offer \
                 {limits} together"
            ),
            Self::Division => formatter.write_str(
                "the division: the devices offer enough together, but layers cannot be cut to \
                 their sizes",
            ),
        }
    }
}

/// One difference between a request that does not fit and one that does.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// A shorter context.
    Context {
        /// The longest that fits.
        tokens: u64,
    },
    /// A cache of fewer tokens.
    CacheTokens {
        /// The most that fit, in whole pages.
        tokens: u64,
    },
    /// Fewer sequences.
    Batch {
        /// The most that fit.
        sequences: u64,
    },
    /// A smaller chunk.
    Chunk {
        /// The largest that fits.
        tokens: u64,
    },
    /// A smaller format of the cache.
    Cache {
        /// The format.
        format: CacheFormat,
    },
    /// No caps, exclusions or split.
    WithoutLimits,
    /// More of one device.
    MoreMemory {
        /// The device for which this is the least.
        device: DeviceId,
        /// What is missing.
        extra: Bytes,
        /// What the plan may use of it then.
        limit: Bytes,
    },
    /// A version of the model with fewer bits per weight.
    BitsPerWeight {
        /// The most bits per layer weight that fit, on average, in hundredths.
        at_most_hundredths: u64,
        /// What the layers have now, in hundredths.
        now_hundredths: u64,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Context { tokens } => write!(formatter, "a context of at most {tokens} tokens"),
            Self::CacheTokens { tokens } => {
                write!(formatter, "a cache of at most {tokens} tokens")
            }
            Self::Batch { sequences } => write!(formatter, "a batch of at most {sequences}"),
            Self::Chunk { tokens } => write!(formatter, "a chunk of at most {tokens} tokens"),
            Self::Cache { format } => write!(formatter, "a cache of format {format}"),
            Self::WithoutLimits => formatter.write_str("no caps, exclusions or split"),
            Self::MoreMemory {
                device,
                extra,
                limit,
            } => {
                write!(formatter, "{extra} more on {device} ({limit} to use there)")
            }
            Self::BitsPerWeight {
                at_most_hundredths,
                now_hundredths,
            } => write!(
                formatter,
                "a version of the model with at most {}.{:02} bits per layer weight (now \
                 {}.{:02})",
                at_most_hundredths / 100,
                at_most_hundredths % 100,
                now_hundredths / 100,
                now_hundredths % 100
            ),
        }
    }
}
