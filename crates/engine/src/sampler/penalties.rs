//! Repetition, frequency and presence penalties.

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
    /// What occurs, in order of ids.
    occurrences: Vec<Occurrence>,
    /// Of how many tokens of the history `occurrences` tells. Kept up only without decay, where
    /// one token more changes little.
    counted_tokens: usize,
    /// Scratch: tokens with their distance from the end.
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

impl Occurrence {
    /// The share of its newest occurrence, and of all together.
    pub(super) fn shares(&self) -> (f32, f32) {
        (self.strongest, self.total)
    }
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
            occurrences: Vec::new(),
            counted_tokens: 0,
            distances: Vec::new(),
        }
    }

    /// Prepares for the history to go back to its first `length` tokens.
    pub(super) fn truncate(&mut self, history: &[u32], length: usize) {
        if self.counted_tokens <= length {
            return;
        }
        if self.is_worth_following(self.counted_tokens - length) {
            for end in (length..self.counted_tokens).rev() {
                if let Some(left) = end.checked_sub(self.range_tokens) {
                    self.add(history[left]);
                }
                self.remove(history[end]);
            }
            self.counted_tokens = length;
        } else {
            self.counted_tokens = 0;
        }
    }

    /// Lists what occurs in `history`, for [`Self::occurrences`] and [`Self::apply`].
    pub(super) fn collect(&mut self, history: &[u32]) {
        if self.repetition == 1.0 && self.frequency == 0.0 && self.presence == 0.0 {
            return;
        }
        if self.is_worth_following(history.len() - self.counted_tokens) {
            for end in self.counted_tokens..history.len() {
                self.add(history[end]);
                if let Some(left) = end.checked_sub(self.range_tokens) {
                    self.remove(history[left]);
                }
            }
        } else {
            self.count_all(history);
        }
        self.counted_tokens = history.len();
    }

    /// Whether so many tokens are sooner added or removed than all counted again.
    fn is_worth_following(&self, tokens: usize) -> bool {
        self.decay_tokens == 0 && self.counted_tokens > 0 && tokens <= 64
    }

    fn add(&mut self, token_id: u32) {
        match self.find(token_id) {
            Ok(index) => self.occurrences[index].total += 1.0,
            Err(index) => {
                let occurrence = Occurrence {
                    token_id,
                    strongest: 1.0,
                    total: 1.0,
                };
                self.occurrences.insert(index, occurrence);
            }
        }
    }

    fn remove(&mut self, token_id: u32) {
        if let Ok(index) = self.find(token_id) {
            self.occurrences[index].total -= 1.0;
            if self.occurrences[index].total == 0.0 {
                self.occurrences.remove(index);
            }
        }
    }

    fn count_all(&mut self, history: &[u32]) {
        let looked_at = self.range_tokens.saturating_add(self.decay_tokens);
        self.distances.clear();
        let newest_first = history.iter().rev().take(looked_at);
        self.distances.extend(newest_first.copied().zip(0u32..));
        self.distances.sort_unstable();
        self.occurrences.clear();
        for &(token_id, distance) in &self.distances {
            let share = match (distance as usize).checked_sub(self.range_tokens) {
                Some(faded) => 1.0 - faded as f32 / self.decay_tokens as f32,
                None => 1.0,
            };
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

    fn find(&self, token_id: u32) -> Result<usize, usize> {
        self.occurrences
            .binary_search_by_key(&token_id, |occurrence| occurrence.token_id)
    }

    /// [`Occurrence::shares`] of a token; zeros if it did not occur.
    pub(super) fn shares(&self, token_id: u32) -> (f32, f32) {
        match self.find(token_id) {
            Ok(index) => self.occurrences[index].shares(),
            Err(_) => (0.0, 0.0),
        }
    }

    /// What occurred, in order of ids.
    pub(super) fn occurrences(&self) -> &[Occurrence] {
        &self.occurrences
    }

    /// The logit of a token after penalties, whether it occurred or not.
    pub(super) fn apply(&self, token_id: u32, logit: f32) -> f32 {
        match self.find(token_id) {
            Ok(index) => self.apply_to(self.occurrences[index], logit),
            Err(_) => logit,
        }
    }

    /// The logit of a token that occurred after penalties.
    #[inline]
    pub(super) fn apply_to(&self, occurrence: Occurrence, logit: f32) -> f32 {
        let Occurrence {
            strongest, total, ..
        } = occurrence;
        let repetition = self.repetition + (1.0 - self.repetition) * (1.0 - strongest);
        let inverse = 1.0 / repetition;
        // A factor to choose, not a way to go: signs are hard to predict.
        let weakened = logit * if logit > 0.0 { inverse } else { repetition };
        weakened - self.presence * strongest - self.frequency * total
    }
}
