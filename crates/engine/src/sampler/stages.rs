//! The stages, each a few lines over [`Candidates`]. Formulas and order are ExLlamaV2's; where
//! its code departs from the published method (top-p, typical, XTC) the method is followed.

use super::candidates::Candidates;
use crate::settings::GREEDY_TEMPERATURE;
use crate::{SamplingSettings, Stage, TokenMask};

/// What stages need beside the settings.
pub(super) struct Context<'a> {
    /// Mirostat's limit in bits.
    pub(super) mu: f32,
    /// A random number in 0..1: XTC acts if it is below `xtc_probability`.
    pub(super) xtc_random: f64,
    /// The tokens that XTC leaves alone.
    pub(super) xtc_ignored: &'a TokenMask,
}

/// Runs every stage in the order of the settings.
pub(super) fn run(
    candidates: &mut Candidates<'_>,
    settings: &SamplingSettings,
    context: &Context<'_>,
) {
    for stage in &settings.sampler_order {
        match stage {
            Stage::Temperature => temperature(candidates, settings),
            Stage::TopNSigma => top_n_sigma(candidates, settings.top_n_sigma),
            Stage::TopK if settings.top_k > 0 => candidates.keep(settings.top_k as usize),
            Stage::TopK => {}
            Stage::TopP => top_p(candidates, settings.top_p),
            Stage::TopA => top_a(candidates, settings.top_a),
            Stage::MinP => min_p(candidates, settings.min_p),
            Stage::Tfs => tail_free(candidates, settings.tfs),
            Stage::Typical => typical(candidates, settings.typical),
            Stage::Mirostat if settings.mirostat => mirostat(candidates, context.mu),
            Stage::Mirostat => {}
            Stage::DynamicTemperature => dynamic_temperature(candidates, settings),
            Stage::Xtc if context.xtc_random < f64::from(settings.xtc_probability) => {
                exclude_top_choices(candidates, settings.xtc_threshold, context.xtc_ignored);
            }
            Stage::Xtc => {}
        }
    }
}

/// How many tokens a run will rank at least, if the settings say so.
pub(super) fn first_ranks(settings: &SamplingSettings) -> Option<usize> {
    if settings.is_greedy() {
        return Some(1);
    }
    let has_top_k = settings.top_k > 0 && settings.sampler_order.contains(&Stage::TopK);
    has_top_k.then_some(settings.top_k as usize)
}

/// Whether a setting from 0 to 1 cuts anything: both ends are off.
fn cuts(share: f32) -> bool {
    share > 0.0 && share < 1.0
}

fn temperature(candidates: &mut Candidates<'_>, settings: &SamplingSettings) {
    if settings.smoothing_factor > 0.0 {
        candidates.smooth(settings.smoothing_factor);
    }
    if !settings.temperature_last {
        candidates.heat(settings.temperature);
    }
}

/// The temperature that comes last, or one between `min_temp` and `max_temp` by the entropy's
/// share of the largest possible, to the power of `temp_exponent`.
fn dynamic_temperature(candidates: &mut Candidates<'_>, settings: &SamplingSettings) {
    let (low, high) = (settings.min_temp, settings.max_temp);
    if high > low {
        let count = candidates.spread().count;
        if count < 2 {
            return;
        }
        let entropy = candidates.entropy(candidates.total());
        let evenness = (entropy / (count as f64).ln()).clamp(0.0, 1.0);
        let bent = evenness.powf(f64::from(settings.temp_exponent)) as f32;
        // No entropy and a lowest temperature of 0 would divide by 0.
        candidates.heat((low + (high - low) * bent).max(GREEDY_TEMPERATURE));
    } else if settings.temperature_last {
        candidates.heat(settings.temperature);
    }
}

fn top_n_sigma(candidates: &mut Candidates<'_>, deviations: f32) {
    if deviations > 0.0 {
        let least = -f64::from(deviations) * candidates.spread().deviation;
        candidates.keep_while(|candidates, next| candidates.log_weight(next) >= least);
    }
}

/// Keeps the smallest set of most likely tokens that has the share `top_p`.
fn top_p(candidates: &mut Candidates<'_>, top_p: f32) {
    if cuts(top_p) {
        let wanted = candidates.total() * f64::from(top_p);
        let mut reached = 1.0;
        candidates.keep_while(|candidates, next| {
            let goes_on = reached < wanted;
            reached += candidates.weight(next);
            goes_on
        });
    }
}

/// Keeps p >= `top_a` * (best p)^2; in weights, where the best is 1, w >= `top_a` / total.
fn top_a(candidates: &mut Candidates<'_>, top_a: f32) {
    if top_a > 0.0 {
        let least = f64::from(top_a) / candidates.total();
        candidates.keep_while(|candidates, next| candidates.weight(next) >= least);
    }
}

fn min_p(candidates: &mut Candidates<'_>, min_p: f32) {
    if min_p > 0.0 {
        let least = f64::from(min_p);
        candidates.keep_while(|candidates, next| candidates.weight(next) >= least);
    }
}

/// Tail-free sampling: the second differences of the sorted probabilities, as shares of their
/// sum; keeps one more than stay within `share` from the top. As in ExLlamaV2, probabilities
/// below 1e-8 are no part of it.
fn tail_free(candidates: &mut Candidates<'_>, share: f32) {
    const LEAST_PROBABILITY: f64 = 1e-8;
    if !cuts(share) {
        return;
    }
    let total = candidates.total();
    candidates.keep_while(|candidates, next| candidates.weight(next) >= LEAST_PROBABILITY * total);
    let mut curvature = |rank| {
        let first = candidates.get(rank)?;
        let second = candidates.get(rank + 1)?;
        let third = candidates.get(rank + 2)?;
        let [first, second, third] = [first, second, third].map(|c| candidates.weight(c));
        Some((first - 2.0 * second + third).abs())
    };
    let sum: f64 = (0..).map_while(&mut curvature).sum();
    if sum == 0.0 {
        // Fewer than three, or a straight line: there is no tail.
        return;
    }
    let mut reached = 0.0;
    let within = (0..)
        .map_while(&mut curvature)
        .take_while(|curvature| {
            reached += curvature / sum;
            reached <= f64::from(share)
        })
        .count();
    candidates.keep(within + 1);
}

/// Locally typical sampling (Meister et al., 2022): keeps the tokens whose surprise -ln p is
/// nearest to the entropy, up to and with the one that reaches `share`.
///
/// Surprise grows with the rank, so those are always neighbours: the range grows from where
/// surprise crosses the entropy.
fn typical(candidates: &mut Candidates<'_>, share: f32) {
    if !cuts(share) {
        return;
    }
    let total = candidates.total();
    let entropy = candidates.entropy(total);
    let wanted = total * f64::from(share);
    let above_entropy = |candidates: &Candidates<'_>, candidate| {
        total.ln() - candidates.log_weight(candidate) - entropy
    };
    let mut first = 0;
    while let Some(candidate) = candidates.get(first)
        && above_entropy(candidates, candidate) < 0.0
    {
        first += 1;
    }
    let mut end = first;
    let mut reached = 0.0;
    loop {
        let before = first.checked_sub(1).and_then(|rank| candidates.get(rank));
        let after = candidates.get(end);
        let distance = |candidate| above_entropy(candidates, candidate).abs();
        let chosen = match (before, after) {
            (Some(before), Some(after)) if distance(after) < distance(before) => after,
            (Some(before), _) => before,
            (None, Some(after)) => after,
            (None, None) => break,
        };
        if before == Some(chosen) {
            first -= 1;
        } else {
            end += 1;
        }
        reached += candidates.weight(chosen);
        if reached >= wanted {
            break;
        }
    }
    candidates.keep_range(first, end);
}

/// Mirostat's cut: keeps tokens with a surprise of at most `mu` bits.
fn mirostat(candidates: &mut Candidates<'_>, mu: f32) {
    let least = candidates.total() * (-f64::from(mu)).exp2();
    candidates.keep_while(|candidates, next| candidates.weight(next) >= least);
}

/// XTC: of the tokens with at least the probability `threshold`, all but the least likely go.
fn exclude_top_choices(candidates: &mut Candidates<'_>, threshold: f32, ignored: &TokenMask) {
    let least = candidates.total() * f64::from(threshold);
    let mut last_choice = 0;
    let mut rank = 0;
    while let Some(candidate) = candidates.get(rank)
        && candidates.weight(candidate) >= least
    {
        if !ignored.is_allowed(candidate.token_id) {
            last_choice = rank;
        }
        rank += 1;
    }
    candidates.drop_before(last_choice, |token_id| ignored.is_allowed(token_id));
}
