//! Draws of tokens that a device makes by itself, so that no logits are copied to the host.

use bytemuck::{Pod, Zeroable};

/// Drawn where a logit that may be drawn is NaN or positive infinity.
pub const NOT_FINITE: u32 = u32::MAX;

/// Drawn where changes and negative infinities leave no token.
pub const NOTHING_LEFT: u32 = u32::MAX - 1;

/// Ranks that a draw without cuts passes first; see [`Draw`].
pub const FIRST_RANKS: usize = 64;

/// How one token is drawn from a row of logits.
///
/// First the logits that [`Self::change_count`] changes name are changed ([`LogitChange`]). Tokens
/// are ranked by logit, equal ones by id, and a token's weight at a scale is
/// `exp(scale * (logit - best logit))`. Then top-k, top-p and min-p cut, in this order, by the
/// weights at `cut_scale`; the best token always stays. At last the ranks are passed from the best on
/// until the weights at `draw_scale` together exceed `random` times the sum of all that are left:
/// that token is drawn. Without any cut only the first [`FIRST_RANKS`] are passed by rank, and the
/// rest by id, changed tokens after all others in the order of the changes.
///
/// Weights of different devices differ in their last bits, so a `random` or a share within 1e-5 of
/// a border between two tokens may fall on either side. A greedy draw is exact.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Decides, in 0..1.
    pub random: f64,
    /// 1 / temperature as it acts before the cuts: 1 where temperature comes last.
    pub cut_scale: f32,
    /// 1 / temperature of the draw. 0: greedy, the best token is taken.
    pub draw_scale: f32,
    /// Keep this many, up to [`DrawLimits::top_k`]; 0 is off.
    pub top_k: u32,
    /// Keep the fewest tokens with this share of what top-k leaves; off unless above 0 and below 1.
    pub top_p: f32,
    /// Drop tokens below this share of the best one's weight; 0 is off.
    pub min_p: f32,
    /// See [`LogitChange`]; 1 is off.
    pub repetition_penalty: f32,
    /// See [`LogitChange`]; 0 is off.
    pub frequency_penalty: f32,
    /// See [`LogitChange`]; 0 is off.
    pub presence_penalty: f32,
    /// Ids below are drawn.
    pub vocab_size: u32,
    /// Where the row's changes begin in [`StepBatch::changes`](crate::StepBatch::changes).
    pub first_change: u32,
    /// How many they are, up to [`DrawLimits::changes`].
    pub change_count: u32,
}

impl Draw {
    /// The most likely of the first `vocab_size` tokens, of equal ones the first.
    pub const fn greedy(vocab_size: u32) -> Self {
        Self {
            random: 0.0,
            cut_scale: 0.0,
            draw_scale: 0.0,
            top_k: 0,
            top_p: 0.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            vocab_size,
            first_change: 0,
            change_count: 0,
        }
    }

    /// Whether the best token is taken, whatever `random` is.
    pub fn is_greedy(&self) -> bool {
        self.draw_scale == 0.0
    }

    /// Whether top-p cuts anything.
    pub fn cuts_by_share(&self) -> bool {
        self.top_p > 0.0 && self.top_p < 1.0
    }

    /// Whether anything cuts.
    pub fn has_cuts(&self) -> bool {
        self.top_k > 0 || self.cuts_by_share() || self.min_p > 0.0
    }
}

/// A token whose logit is changed before a draw; a draw names none twice.
///
/// If the token occurred: with `r = repetition + (1 - repetition) * (1 - strongest)`, a positive
/// logit is multiplied by `1 / r` and any other by `r`; then `presence * strongest` and
/// `frequency * total` are subtracted. Then `bias` is added. All in f32, one rounding each.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct LogitChange {
    /// The token; without effect where it is none that can be drawn.
    pub token_id: u32,
    /// The share of the penalties that its newest occurrence has.
    pub strongest: f32,
    /// The shares of all its occurrences together; 0: it did not occur.
    pub total: f32,
    /// Added at last; negative infinity forbids the token.
    pub bias: f32,
}

impl LogitChange {
    /// The logit after the change.
    pub fn apply(&self, draw: &Draw, logit: f32) -> f32 {
        let mut logit = logit;
        if self.total > 0.0 {
            let penalty = draw.repetition_penalty;
            let repetition = penalty + (1.0 - penalty) * (1.0 - self.strongest);
            let inverse = 1.0 / repetition;
            logit *= if logit > 0.0 { inverse } else { repetition };
            logit -= draw.presence_penalty * self.strongest;
            logit -= draw.frequency_penalty * self.total;
        }
        // A penalty below 1 can push a huge logit over the edge.
        (logit + self.bias).min(f32::MAX)
    }
}

/// The largest draws that a device makes by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawLimits {
    /// Most tokens that top-k may keep.
    pub top_k: u32,
    /// Most changes of one draw.
    pub changes: usize,
}

/// What kinds of draws a step makes: which operations its sequence has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DrawKinds {
    /// None.
    None,
    /// Only greedy ones.
    Greedy,
    /// Random ones as well.
    Random,
}

impl DrawKinds {
    /// The kinds of `draws`.
    pub fn of(draws: &[Draw]) -> Self {
        match draws {
            [] => Self::None,
            draws if draws.iter().all(Draw::is_greedy) => Self::Greedy,
            _ => Self::Random,
        }
    }
}
