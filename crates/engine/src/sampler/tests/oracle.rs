//! The sampler's definition over again: in f64, by sorting and summing everything.

use crate::{SamplingSettings, Stage, TokenMask};

/// What a draw depends on.
pub(super) struct Case<'a> {
    pub(super) settings: &'a SamplingSettings,
    pub(super) history: &'a [u32],
    pub(super) logits: &'a [f32],
    pub(super) mask: Option<&'a TokenMask>,
    pub(super) dry_breakers: &'a [u32],
    pub(super) xtc_ignored: &'a [u32],
    /// Whether XTC's random number lets it act.
    pub(super) xtc_acts: bool,
    /// Mirostat's limit.
    pub(super) mu: f64,
}

/// Each token's probability.
pub(super) fn distribution(case: &Case<'_>) -> Vec<f64> {
    let settings = case.settings;
    let mut list: Vec<(usize, f64)> = changed_logits(case)
        .into_iter()
        .enumerate()
        .filter(|(_, logit)| *logit > f64::NEG_INFINITY)
        .collect();
    list.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    if settings.temperature < 0.01 {
        list.truncate(1);
    } else {
        for stage in &settings.sampler_order {
            apply(*stage, &mut list, case);
        }
    }
    let mut distribution = vec![0.0; case.logits.len()];
    for ((token_id, _), probability) in list.iter().zip(softmax(&list)) {
        distribution[*token_id] = probability;
    }
    distribution
}

fn softmax(list: &[(usize, f64)]) -> Vec<f64> {
    let largest = list.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = list.iter().map(|x| (x.1 - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

fn changed_logits(case: &Case<'_>) -> Vec<f64> {
    let settings = case.settings;
    let mut logits: Vec<f64> = case.logits.iter().map(|l| f64::from(*l)).collect();
    let range = settings
        .repetition_range
        .map_or(case.history.len(), |range| range as usize);
    let decay = match settings.repetition_range {
        Some(_) => settings.repetition_decay as usize,
        None => 0,
    };
    let mut seen = vec![false; logits.len()];
    for (distance, &token_id) in case.history.iter().rev().enumerate().take(range + decay) {
        let token = token_id as usize;
        let share = match distance.checked_sub(range) {
            Some(faded) => 1.0 - faded as f64 / decay as f64,
            None => 1.0,
        };
        if !seen[token] {
            seen[token] = true;
            let penalty = 1.0 + (f64::from(settings.repetition_penalty) - 1.0) * share;
            logits[token] = if logits[token] > 0.0 {
                logits[token] / penalty
            } else {
                logits[token] * penalty
            };
            logits[token] -= f64::from(settings.presence_penalty) * share;
        }
        logits[token] -= f64::from(settings.frequency_penalty) * share;
    }
    for (token_id, bias) in &settings.logit_bias {
        logits[*token_id as usize] += f64::from(*bias);
    }
    for (token, logit) in logits.iter_mut().enumerate() {
        *logit -= dry_penalty(case, token as u32);
        if case.mask.is_some_and(|mask| !mask.is_allowed(token as u32)) {
            *logit = f64::NEG_INFINITY;
        }
    }
    logits
}

/// DRY by its definition: try every length from the longest, and every place.
fn dry_penalty(case: &Case<'_>, token: u32) -> f64 {
    let settings = case.settings;
    let history = case.history;
    let is_breaker = |token: &u32| case.dry_breakers.contains(token);
    if settings.dry_multiplier == 0.0 || history.is_empty() {
        return 0.0;
    }
    let first = match settings.dry_range {
        0 => 0,
        range => (history.len() - 1).saturating_sub(range as usize),
    };
    let longest = (settings.dry_max_ngram as usize - 1).min(history.len());
    for length in (settings.dry_allowed_length as usize..=longest).rev() {
        let repeated = &history[history.len() - length..];
        if repeated.iter().any(is_breaker) {
            continue;
        }
        let continuations: Vec<u32> = (first..history.len())
            .filter(|start| start + length < history.len())
            .filter(|&start| &history[start..start + length] == repeated)
            .map(|start| history[start + length])
            .filter(|next| !is_breaker(next))
            .collect();
        if !continuations.is_empty() {
            let times = continuations.iter().filter(|next| **next == token).count();
            let exponent = length as i32 - settings.dry_allowed_length as i32;
            return times as f64
                * f64::from(settings.dry_multiplier)
                * f64::from(settings.dry_base).powi(exponent);
        }
    }
    0.0
}

/// Applies one stage to tokens in falling order, at least one of which stays.
fn apply(stage: Stage, list: &mut Vec<(usize, f64)>, case: &Case<'_>) {
    let settings = case.settings;
    let p = softmax(list);
    let number = |value: f32| f64::from(value);
    let is_share = |value: f32| value > 0.0 && value < 1.0;
    let kept = match stage {
        Stage::Temperature => {
            let best = list[0].1;
            for (_, logit) in &mut *list {
                if settings.smoothing_factor > 0.0 {
                    *logit = -(*logit - best).powi(2) * number(settings.smoothing_factor);
                }
                if !settings.temperature_last {
                    *logit /= number(settings.temperature);
                }
            }
            return;
        }
        Stage::DynamicTemperature => {
            let mut temperature = 1.0;
            if settings.max_temp > settings.min_temp {
                let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
                let largest = match list.len() {
                    1 => 1.0,
                    count => (count as f64).ln(),
                };
                let share = (entropy / largest).powf(number(settings.temp_exponent));
                let range = number(settings.max_temp) - number(settings.min_temp);
                temperature = (number(settings.min_temp) + range * share).max(0.01);
            } else if settings.temperature_last {
                temperature = number(settings.temperature);
            }
            list.iter_mut().for_each(|(_, logit)| *logit /= temperature);
            return;
        }
        Stage::TopNSigma if settings.top_n_sigma > 0.0 => {
            let count = list.len() as f64;
            let mean = list.iter().map(|x| x.1).sum::<f64>() / count;
            let variance = list.iter().map(|x| (x.1 - mean).powi(2)).sum::<f64>() / count;
            let least = list[0].1 - number(settings.top_n_sigma) * variance.sqrt();
            list.iter().filter(|x| x.1 >= least).count()
        }
        Stage::TopK if settings.top_k > 0 => settings.top_k as usize,
        Stage::TopP if is_share(settings.top_p) => {
            let mut reached = 0.0;
            let missing = p.iter().position(|p| {
                reached += p;
                reached >= number(settings.top_p)
            });
            missing.map_or(list.len(), |last| last + 1)
        }
        Stage::TopA => p
            .iter()
            .filter(|x| **x >= number(settings.top_a) * p[0] * p[0])
            .count(),
        Stage::MinP => p
            .iter()
            .filter(|x| **x >= number(settings.min_p) * p[0])
            .count(),
        Stage::Tfs if is_share(settings.tfs) => {
            let seen: Vec<f64> = p.iter().copied().filter(|p| *p >= 1e-8).collect();
            let curvature: Vec<f64> = seen
                .windows(3)
                .map(|w| (w[0] - 2.0 * w[1] + w[2]).abs())
                .collect();
            let total: f64 = curvature.iter().sum();
            let mut reached = 0.0;
            let inside = curvature.iter().take_while(|x| {
                reached += **x / total;
                reached <= number(settings.tfs)
            });
            match total {
                0.0 => seen.len(),
                _ => inside.count() + 1,
            }
        }
        Stage::Typical if is_share(settings.typical) => {
            let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            let mut order: Vec<usize> = (0..list.len()).collect();
            let distance = |rank: usize| (-p[rank].ln() - entropy).abs();
            order.sort_by(|a, b| distance(*a).total_cmp(&distance(*b)));
            let mut reached = 0.0;
            let missing = order.iter().position(|rank| {
                reached += p[*rank];
                reached >= number(settings.typical)
            });
            order.truncate(missing.map_or(list.len(), |last| last + 1));
            order.sort_unstable();
            *list = order.into_iter().map(|rank| list[rank]).collect();
            return;
        }
        Stage::Mirostat if settings.mirostat => p.iter().filter(|p| -p.log2() <= case.mu).count(),
        Stage::Xtc if case.xtc_acts => {
            let counts = |rank: &usize| {
                p[*rank] >= number(settings.xtc_threshold)
                    && !case.xtc_ignored.contains(&(list[*rank].0 as u32))
            };
            let choices: Vec<usize> = (0..list.len()).filter(counts).collect();
            if let Some((_, dropped)) = choices.split_last() {
                let ranks = (0..list.len()).filter(|rank| !dropped.contains(rank));
                *list = ranks.map(|rank| list[rank]).collect();
            }
            return;
        }
        _ => return,
    };
    list.truncate(kept.max(1));
}
