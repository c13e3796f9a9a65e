//! DRY ("don't repeat yourself"): a penalty on tokens that would continue a repetition.

use crate::{SamplingSettings, TokenMask};

/// DRY's settings, and what it found for the token to come.
///
/// The rule: look for the longest end of the history, of at least `allowed_length` tokens, that
/// occurs earlier with a token after it. Each token t that follows such an occurrence loses
/// `multiplier * base^(length - allowed_length)` for each time that it does. Neither the
/// repetition nor t may be a sequence breaker; a repetition and t have at most `max_ngram`
/// tokens together; nothing before the newest `range + 1` tokens counts.
///
/// That is ExLlamaV2's rule but for two things: there a loop ends the penalty once it is
/// `max_ngram` tokens long, and the history's last token never counts as a continuation, so
/// that one token over and over goes unpunished.
#[derive(Debug)]
pub(super) struct Dry {
    allowed_length: usize,
    base: f32,
    multiplier: f32,
    range: usize,
    /// The longest repetition that is looked for.
    longest: usize,
    /// Tokens that continue a repetition, with their penalties, in order of ids.
    found: Vec<(u32, f32)>,
}

impl Dry {
    pub(super) fn new(settings: &SamplingSettings) -> Self {
        Self {
            allowed_length: settings.dry_allowed_length as usize,
            base: settings.dry_base,
            multiplier: settings.dry_multiplier,
            range: match settings.dry_range {
                0 => usize::MAX,
                range => range as usize,
            },
            longest: (settings.dry_max_ngram as usize).saturating_sub(1),
            found: Vec::new(),
        }
    }

    /// Looks for repetitions at the end of `history`.
    pub(super) fn search(&mut self, history: &[u32], breakers: &TokenMask) {
        self.found.clear();
        let Some((last, earlier)) = history.split_last() else {
            return;
        };
        if self.multiplier <= 0.0 || breakers.is_allowed(*last) {
            return;
        }
        let first = earlier.len().saturating_sub(self.range);
        let mut longest = self.allowed_length.max(1);
        for end in first..earlier.len() {
            let next = history[end + 1];
            if history[end] != *last || breakers.is_allowed(next) {
                continue;
            }
            let backwards = history[first..=end].iter().rev();
            let length = backwards
                .zip(history.iter().rev())
                .take(self.longest)
                .take_while(|(a, b)| a == b && !breakers.is_allowed(**a))
                .count();
            if length > longest {
                longest = length;
                self.found.clear();
            }
            if length == longest {
                self.found.push((next, 1.0));
            }
        }
        let exponent = longest.saturating_sub(self.allowed_length);
        let penalty = self.multiplier * self.base.powf(exponent as f32);
        self.found.sort_unstable_by_key(|(token_id, _)| *token_id);
        self.found.dedup_by(|later, earlier| {
            let is_same = later.0 == earlier.0;
            if is_same {
                earlier.1 += later.1;
            }
            is_same
        });
        for (_, times) in &mut self.found {
            *times *= penalty;
        }
    }

    /// The tokens that would continue a repetition.
    pub(super) fn token_ids(&self) -> impl Iterator<Item = u32> {
        self.found.iter().map(|(token_id, _)| *token_id)
    }

    /// What a token loses.
    pub(super) fn penalty(&self, token_id: u32) -> f32 {
        let found = self.found.binary_search_by_key(&token_id, |(id, _)| *id);
        found.map_or(0.0, |index| self.found[index].1)
    }
}
