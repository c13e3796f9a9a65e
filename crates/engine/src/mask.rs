//! Which tokens may be drawn.

/// A set of allowed tokens: one bit each, in words of 32 with the lowest id in the lowest bit
/// (the layout of llguidance's masks).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
    vocab_size: usize,
}

impl TokenMask {
    /// Every token of a vocabulary of `vocab_size` is allowed.
    pub fn all(vocab_size: usize) -> Self {
        let mut words = vec![u32::MAX; vocab_size.div_ceil(32)];
        if let (Some(last), used @ 1..) = (words.last_mut(), vocab_size % 32) {
            *last = (1 << used) - 1;
        }
        Self { words, vocab_size }
    }

    /// No token is allowed.
    pub fn none(vocab_size: usize) -> Self {
        Self {
            words: vec![0; vocab_size.div_ceil(32)],
            vocab_size,
        }
    }

    /// Takes over `words`; missing ones count as zero, bits past the vocabulary are ignored.
    pub fn from_words(words: &[u32], vocab_size: usize) -> Self {
        let mut mask = Self::all(vocab_size);
        for (index, word) in mask.words.iter_mut().enumerate() {
            *word &= words.get(index).copied().unwrap_or(0);
        }
        mask
    }

    /// Tokens of the vocabulary, allowed or not.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether `token_id` may be drawn; ids past the vocabulary may not.
    pub fn is_allowed(&self, token_id: u32) -> bool {
        self.words
            .get(token_id as usize / 32)
            .is_some_and(|word| word >> (token_id % 32) & 1 == 1)
    }

    /// Allows `token_id`; ids past the vocabulary change nothing.
    pub fn allow(&mut self, token_id: u32) {
        if (token_id as usize) < self.vocab_size {
            self.words[token_id as usize / 32] |= 1 << (token_id % 32);
        }
    }

    /// Forbids `token_id`; ids past the vocabulary change nothing.
    pub fn forbid(&mut self, token_id: u32) {
        if let Some(word) = self.words.get_mut(token_id as usize / 32) {
            *word &= !(1 << (token_id % 32));
        }
    }

    /// Keeps what `other` allows as well.
    pub fn intersect(&mut self, other: &Self) {
        for (index, word) in self.words.iter_mut().enumerate() {
            *word &= other.words.get(index).copied().unwrap_or(0);
        }
    }

    /// How many tokens are allowed.
    pub fn count(&self) -> usize {
        self.words
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }

    /// The words, the lowest ids first; bits past the vocabulary are zero.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_past_the_vocabulary_are_never_allowed() {
        for vocab_size in [1, 31, 32, 33, 100] {
            let mut mask = TokenMask::all(vocab_size);
            assert_eq!(mask.count(), vocab_size);
            mask.allow(vocab_size as u32);
            assert!(!mask.is_allowed(vocab_size as u32));
            let words = TokenMask::from_words(&[u32::MAX; 8], vocab_size);
            assert_eq!(mask, words);
        }
    }

    #[test]
    fn sets_combine() {
        let mut odd = TokenMask::none(70);
        (1..70).step_by(2).for_each(|id| odd.allow(id));
        let mut mask = TokenMask::all(70);
        mask.forbid(33);
        mask.intersect(&odd);
        assert_eq!(mask.count(), 34);
        assert!(mask.is_allowed(69) && !mask.is_allowed(33) && !mask.is_allowed(2));
    }
}
