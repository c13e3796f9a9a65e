//! The vocabulary by its bytes, and token healing.

use crate::tokenizer::Tokenizer;

/// The bytes of every token, and the ordinary tokens in the order of their bytes.
///
/// Some 20 bytes a token. Building it takes some milliseconds, so an engine makes one for its
/// tokenizer and keeps it.
pub struct VocabularyIndex {
    /// The tokens' bytes, one after the other by id.
    bytes: Vec<u8>,
    /// Where each token ends in `bytes`.
    ends: Vec<usize>,
    /// Ids of the special tokens, ascending.
    special: Vec<u32>,
    /// Ids of the tokens that are text, sorted by bytes, then by id.
    sorted: Vec<u32>,
}

/// How to heal a prompt that ends inside a word: see [`VocabularyIndex::heal`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Healing {
    /// Tokens of the prompt that stay.
    pub kept_tokens: usize,
    /// The bytes of the prompt that come after them, whole characters. The first token drawn must
    /// begin with these, and only what follows them is new.
    pub prefix: Vec<u8>,
}

impl VocabularyIndex {
    /// The index of a tokenizer's vocabulary.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let mut index = Self {
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            sorted: Vec::new(),
        };
        let mut sorted = Vec::new();
        for id in 0..tokenizer.vocab_size() as u32 {
            let token = tokenizer.token_bytes(id).unwrap_or_default();
            if tokenizer.is_special(id) {
                index.special.push(id);
            } else if !token.is_empty() {
                sorted.push(id);
            }
            index.bytes.extend_from_slice(&token);
            index.ends.push(index.bytes.len());
        }
        sorted.sort_by_key(|&id| index.token_bytes(id));
        index.sorted = sorted;
        index
    }

    /// Number of ids, unused ones included.
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The bytes that a token adds to a text that has begun ([`Tokenizer::token_bytes`]); a
    /// special token's name; nothing for an id that is not in use.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..end]
    }

    /// Whether a token is special: it steers the model and is no part of its text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// The tokens whose bytes begin with `prefix`, special tokens excluded, in the order of their
    /// bytes. Finding the first takes logarithmic time.
    pub fn tokens_with_prefix<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = u32> + 'a {
        let first = self
            .sorted
            .partition_point(|&id| self.token_bytes(id) < prefix);
        self.sorted[first..]
            .iter()
            .copied()
            .take_while(move |&id| self.token_bytes(id).starts_with(prefix))
    }

    /// Token healing: what to draw instead of the prompt's last token, so that a prompt may end
    /// in the middle of a word (`"http:"` is followed by `//` inside the token `://`).
    ///
    /// `None` if the prompt stays as it is: its last token is special, is the only one, is not
    /// made of whole characters, or no longer token begins with it.
    pub fn heal(&self, prompt_ids: &[u32]) -> Option<Healing> {
        let (&last, kept) = prompt_ids.split_last()?;
        let prefix = self.token_bytes(last);
        let is_text = !prefix.is_empty() && !self.is_special(last);
        let healable = !kept.is_empty()
            && is_text
            && std::str::from_utf8(prefix).is_ok()
            && self
                .tokens_with_prefix(prefix)
                .any(|id| self.token_bytes(id).len() > prefix.len());
        healable.then(|| Healing {
            kept_tokens: kept.len(),
            prefix: prefix.to_vec(),
        })
    }
}
