//! The model's vocabulary as llguidance wants it.

use oxllama_text::{Tokenizer, VocabularyIndex};
use toktrie::{TokRxInfo, TokTrie, TokenId, TokenizerEnv};

/// Longer tokens do not fit llguidance's tree; no constraint allows them.
const TOKEN_BYTES_LIMIT: usize = 1_000;

/// A tokenizer and the tree of its tokens' bytes.
///
/// The tree has one id more than the model's vocabulary, which stands for the end of the text: so
/// it does not matter how many stop tokens the model has, and none of them is ever text.
pub(super) struct Vocabulary {
    tokenizer: Tokenizer,
    trie: TokTrie,
}

impl Vocabulary {
    pub(super) fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Self {
        let index = VocabularyIndex::new(tokenizer);
        let mut words = vec![Vec::new(); vocab_size + 1];
        for (word, id) in words[..vocab_size].iter_mut().zip(0..) {
            let bytes = index.token_bytes(id);
            // A token without bytes (unused, or padding of the vocabulary) is never allowed.
            if bytes.is_empty()
                || bytes.len() > TOKEN_BYTES_LIMIT
                || tokenizer.eos_ids().contains(&id)
            {
                continue;
            }
            // This byte is in no UTF-8 text, so only a grammar that names the token allows it.
            if index.is_special(id) {
                word.push(TokTrie::SPECIAL_TOKEN_MARKER);
            }
            word.extend_from_slice(bytes);
        }
        let info = TokRxInfo::new(words.len() as u32, vocab_size as TokenId);
        Self {
            tokenizer: tokenizer.clone(),
            trie: TokTrie::from(&info, &words),
        }
    }

    /// The tokenizer's ids of a text that continues another. If it changes the text (normalises
    /// or cuts it), the longest tokens that spell the text as it is.
    fn tokenize(&self, text: &str) -> Vec<TokenId> {
        self.tokenizer
            .encode_continuation(text)
            .ok()
            .filter(|ids| self.trie.decode_raw(ids) == text.as_bytes())
            .unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie
            .tokenize_with_greedy_fallback(bytes, |text| self.tokenize(text))
    }
}
