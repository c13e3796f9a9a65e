//! Repetition, frequency and presence penalties.

use std::collections::BTreeMap;

use crate::SamplingSettings;

/// Counts what occurred, so that the work for a token is in the number of different tokens, not
/// in the history's length.
#[derive(Debug)]
pub(super) struct Penalties {
    repetition: f32,
    frequency: f32,
    presence: f32,
    /// The newest tokens with the full penalty.
    range_tokens: usize,
    /// The tokens before those over which it falls off.
    decay_tokens: usize,
    /// How often each token occurs within the range. Kept only where there is no decay.
    counts: BTreeMap<u32, u32>,
    /// What occurs, in order of ids: made by [`Self::collect`].
    occurrences: Vec<Occurrence>,
    /// Scratch: tokens within range and decay, with their distance from the end.
    distances: Vec<(u32, u32)>,
}

/// A token that occurred.
#[derive(Debug, Clone, Copy)]
pub(super) struct Occurrence {
    pub(super) token_id: u32,
    /// The share of the penalty that its newest occurrence has, 1 without decay.
    strongest: f32,
    /// The shares of all its occurrences together.
    total: f32,
}

impl Penalties {
    pub(super) fn new(settings: &SamplingSettings) -> Self {
        let range_tokens = settings
            .repetition_range
            .map_or(usize::MAX, |range| range as usize);
        Self {
            repetition: settings.repetition_penalty,
            frequency: settings.frequency_penalty,
            presence: settings.presence_penalty,
            range_tokens,
            // Past everything nothing can fall off.
            decay_tokens: settings
                .repetition_range
                .map_or(0, |_| settings.repetition_decay as usize),
            counts: BTreeMap::new(),
            occurrences: Vec::new(),
            distances: Vec::new(),
        }
    }

    fn is_off(&self) -> bool {
        self.repetition == 1.0 && self.frequency == 0.0 && self.presence == 0.0
    }

    fn keeps_counts(&self) -> bool {
        self.decay_tokens == 0 && !self.is_off()
    }

    /// Notes the last token of `history`.
    pub(super) fn observe(&mut self, history: &[u32]) {
        let Some((newest, earlier)) = history.split_last() else {
            return;
        };
        if self.keeps_counts() {
            *self.counts.entry(*newest).or_default() += 1;
            if let Some(left) = earlier.len().checked_sub(self.range_tokens) {
                self.forget(history[left]);
            }
        }
    }

    /// Takes back the last token of `history`.
    pub(super) fn rewind(&mut self, history: &[u32]) {
        let Some((newest, earlier)) = history.split_last() else {
            return;
        };
        if self.keeps_counts() {
            if let Some(left) = earlier.len().checked_sub(self.range_tokens) {
                *self.counts.entry(history[left]).or_default() += 1;
            }
            self.forget(*newest);
        }
    }

    fn forget(&mut self, token_id: u32) {
        if let Some(count) = self.counts.get_mut(&token_id) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&token_id);
            }
        }
    }

    /// Lists what occurs in `history`, for [`Self::occurrences`] and [`Self::apply`].
    pub(super) fn collect(&mut self, history: &[u32]) {
        self.occurrences.clear();
        if self.is_off() {
            return;
        }
        if self.decay_tokens == 0 {
            let occurrences = self.counts.iter().map(|(&token_id, &count)| Occurrence {
                token_id,
                strongest: 1.0,
                total: count as f32,
            });
            self.occurrences.extend(occurrences);
            return;
        }
        let looked_at = self.range_tokens.saturating_add(self.decay_tokens);
        self.distances.clear();
        let newest_first = history.iter().rev().take(looked_at);
        self.distances.extend(newest_first.copied().zip(0u32..));
        self.distances.sort_unstable();
        for &(token_id, distance) in &self.distances {
            let faded = (distance as usize).saturating_sub(self.range_tokens);
            let share = 1.0 - faded as f32 / self.decay_tokens as f32;
            match self.occurrences.last_mut() {
                Some(last) if last.token_id == token_id => last.total += share,
                _ => self.occurrences.push(Occurrence {
                    token_id,
                    strongest: share,
                    total: share,
                }),
            }
        }
    }

    /// What occurred, in order of ids.
    pub(super) fn occurrences(&self) -> &[Occurrence] {
        &self.occurrences
    }

    /// The logit of a token after penalties, whether it occurred or not.
    pub(super) fn apply(&self, token_id: u32, logit: f32) -> f32 {
        let found = self
            .occurrences
            .binary_search_by_key(&token_id, |occurrence| occurrence.token_id);
        match found {
            Ok(index) => self.apply_to(self.occurrences[index], logit),
            Err(_) => logit,
        }
    }

    /// The logit of a token that occurred after penalties.
    pub(super) fn apply_to(&self, occurrence: Occurrence, logit: f32) -> f32 {
        let Occurrence {
            strongest, total, ..
        } = occurrence;
        let repetition = self.repetition + (1.0 - self.repetition) * (1.0 - strongest);
        let weakened = if logit > 0.0 {
            logit / repetition
        } else {
            logit * repetition
        };
        weakened - self.presence * strongest - self.frequency * total
    }
}
