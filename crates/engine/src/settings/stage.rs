//! The stages between logits and the draw, and their order.

use serde::Serialize;

/// One step that reshapes or cuts the distribution.
///
/// Penalties, logit bias and DRY come before all stages and the draw (with its skew) after
/// them; the stages themselves may stand in any order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// `smoothing_factor` and `temperature`.
    Temperature,
    /// `top_n_sigma`.
    TopNSigma,
    /// `top_k`.
    TopK,
    /// `top_p`.
    TopP,
    /// `top_a`.
    TopA,
    /// `min_p`.
    MinP,
    /// `tfs`.
    Tfs,
    /// `typical`.
    Typical,
    /// `mirostat`'s cut.
    Mirostat,
    /// `min_temp` to `max_temp`, and `temperature` here if it is to come last.
    DynamicTemperature,
    /// `xtc_probability`.
    Xtc,
}

impl Stage {
    /// Every stage in ExLlamaV2's order, which is the default. Top-n-sigma, which ExLlamaV2 has
    /// not, stands before the first cut: its deviation is meant for the whole vocabulary.
    pub const DEFAULT_ORDER: [Self; 11] = [
        Self::Temperature,
        Self::TopNSigma,
        Self::TopK,
        Self::TopP,
        Self::TopA,
        Self::MinP,
        Self::Tfs,
        Self::Typical,
        Self::Mirostat,
        Self::DynamicTemperature,
        Self::Xtc,
    ];

    /// The name in `sampler_order`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Temperature => "temperature",
            Self::TopNSigma => "top_n_sigma",
            Self::TopK => "top_k",
            Self::TopP => "top_p",
            Self::TopA => "top_a",
            Self::MinP => "min_p",
            Self::Tfs => "tfs",
            Self::Typical => "typical",
            Self::Mirostat => "mirostat",
            Self::DynamicTemperature => "dynamic_temperature",
            Self::Xtc => "xtc",
        }
    }

    /// The stage of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::DEFAULT_ORDER
            .into_iter()
            .find(|stage| stage.name() == name)
    }

    /// Whether the stage may drop the most likely token while keeping others.
    pub(crate) fn may_drop_the_best(self) -> bool {
        matches!(self, Self::Typical | Self::Xtc)
    }
}
