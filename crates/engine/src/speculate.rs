//! Guesses at the tokens that come next.
//!
//! The target model checks all guesses in one step: at each place it draws with the job's own
//! seed and number, and goes on as long as the guess is what it drew. So every token is drawn
//! from the target's own distribution, and is the same token as without guesses. A draft model
//! draws its guesses with the same seed and numbers: where the two distributions are alike,
//! the same random number picks the same token.

/// Decides how many tokens to guess, from counts of how guesses fared.
#[derive(Debug, Clone)]
pub struct DraftLength {
    most: usize,
    /// What one guessed token costs, as a share of a step without guesses.
    cost: f64,
    /// Guesses that were right, older ones counting less.
    right: f64,
    /// Guesses that were looked at, likewise.
    tried: f64,
    /// Steps without guesses since the last try.
    idle_steps: u32,
    /// Steps without guesses before the next try.
    patience: u32,
}

/// What each step leaves of older counts.
const MEMORY: f64 = 0.9;
/// Counts to begin with: as if half of some guesses had been right.
const PRIOR: f64 = 2.0;
/// Steps without guesses before the first try, which doubles to the last.
const PATIENCE: std::ops::RangeInclusive<u32> = 16..=256;

impl DraftLength {
    /// At most `most` tokens, of which each costs `cost` steps.
    pub fn new(most: usize, cost: f64) -> Self {
        Self {
            most,
            cost,
            right: PRIOR / 2.0,
            tried: PRIOR,
            idle_steps: 0,
            patience: *PATIENCE.start(),
        }
    }

    /// Whether it may ever be more than none.
    pub fn may_guess(&self) -> bool {
        self.most > 0
    }

    /// How many tokens to guess for the next step: as many as give the most tokens for the
    /// cost, if each is right as often as lately. None where that does not pay, but for a try
    /// now and then.
    pub fn choose(&mut self) -> usize {
        let right = (self.right / self.tried).min(0.999);
        let mut best = (1.0, 0);
        let (mut tokens, mut chance) = (1.0, 1.0);
        for drafts in 1..=self.most {
            chance *= right;
            tokens += chance;
            let gain = tokens / (1.0 + self.cost * drafts as f64);
            if gain > best.0 {
                best = (gain, drafts);
            }
        }
        if best.1 > 0 {
            return best.1;
        }
        self.idle_steps += 1;
        if self.idle_steps < self.patience || self.most == 0 {
            return 0;
        }
        self.idle_steps = 0;
        self.patience = (self.patience * 2).min(*PATIENCE.end());
        1
    }

    /// Notes that of `drafted` guesses the first `accepted` were right.
    pub fn observe(&mut self, drafted: usize, accepted: usize) {
        if drafted == 0 {
            return;
        }
        let looked_at = drafted.min(accepted + 1);
        self.right = self.right * MEMORY + accepted as f64;
        self.tried = self.tried * MEMORY + looked_at as f64;
        if accepted == drafted {
            self.patience = *PATIENCE.start();
        }
    }
}

/// Longest run of tokens that is looked up.
const LONGEST_NGRAM: usize = 4;
/// Shortest.
const SHORTEST_NGRAM: usize = 2;
/// Tokens that are searched, from the end.
const SEARCHED_TOKENS: usize = 8192;

/// Up to `most` tokens that followed the last few of `token_ids` where they last occurred
/// before; longer matches win.
pub fn ngram_drafts(token_ids: &[u32], most: usize) -> &[u32] {
    let searched = &token_ids[token_ids.len().saturating_sub(SEARCHED_TOKENS)..];
    for length in (SHORTEST_NGRAM..=LONGEST_NGRAM).rev() {
        let Some(end) = searched.len().checked_sub(length) else {
            continue;
        };
        let (before, last) = searched.split_at(end);
        // A match may reach into `last` itself: a repetition of period one is the shortest.
        let found = (0..before.len())
            .rev()
            .find(|&start| searched[start..start + length] == *last);
        if let Some(start) = found {
            let follows = &searched[start + length..];
            return &follows[..follows.len().min(most)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(rate: f64, cost: f64) -> DraftLength {
        let mut length = DraftLength::new(8, cost);
        let mut owed = 0.0;
        for _ in 0..200 {
            let drafted = length.choose();
            let mut accepted = 0;
            for _ in 0..drafted {
                owed += rate;
                if owed < 1.0 {
                    break;
                }
                owed -= 1.0;
                accepted += 1;
            }
            length.observe(drafted, accepted);
        }
        length
    }

    #[test]
    fn drafting_stops_where_it_does_not_pay() {
        let mut hopeless = settled(0.0, 0.1);
        let drafted: usize = (0..100).map(|_| hopeless.choose()).sum();
        assert!(drafted <= 2, "{drafted} guesses in 100 steps");
        let mut dear = settled(0.5, 1.0);
        let drafted: usize = (0..100).map(|_| dear.choose()).sum();
        assert!(drafted <= 10, "{drafted}");
    }

    #[test]
    fn good_guesses_make_longer_drafts() {
        assert_eq!(settled(1.0, 0.1).choose(), 8);
        let fair = settled(0.6, 0.1).choose();
        assert!((1..=4).contains(&fair), "{fair}");
    }

    #[test]
    fn a_hopeless_start_can_recover() {
        let mut length = settled(0.0, 0.1);
        for _ in 0..2000 {
            let drafted = length.choose();
            length.observe(drafted, drafted);
        }
        assert_eq!(length.choose(), 8);
    }

    #[test]
    fn ngrams_find_the_last_longest_match() {
        assert_eq!(ngram_drafts(&[1, 2, 3, 9, 1, 2, 4, 8, 7, 1, 2], 2), [4, 8]);
        assert_eq!(
            ngram_drafts(&[5, 1, 2, 3, 9, 1, 2, 4, 5, 1, 2], 3),
            [3, 9, 1]
        );
        assert_eq!(ngram_drafts(&[7, 7, 7, 7], 4), [7]);
        assert!(ngram_drafts(&[1, 2, 3], 4).is_empty());
        assert!(ngram_drafts(&[], 4).is_empty());
    }
}
