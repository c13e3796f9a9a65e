//! What the sampler knows of a vocabulary.

use std::sync::Arc;

use oxllama_text::Tokenizer;

use crate::TokenMask;

/// The sets of tokens that DRY and XTC treat apart by default, and which ids are tokens at all.
/// Made once for a tokenizer; clones share it.
#[derive(Debug, Clone)]
pub struct SamplerVocabulary {
    pub(super) size: usize,
    pub(super) dry_breakers: Arc<TokenMask>,
    pub(super) xtc_ignored: Arc<TokenMask>,
}

impl SamplerVocabulary {
    /// Reads every token of `tokenizer`.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let token = |id| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            (bytes, tokenizer.is_special(id))
        };
        Self::from_tokens((0..tokenizer.vocab_size() as u32).map(token))
    }

    /// The same from the tokens themselves in order of their ids: each one's bytes, and whether
    /// it is special.
    pub fn from_tokens<B: AsRef<[u8]>>(tokens: impl Iterator<Item = (B, bool)>) -> Self {
        const DRY_BREAKERS: &[u8] = b".,!?<>[](){}\n\t\"";
        let (mut breakers, mut ignored) = (Vec::new(), Vec::new());
        let mut size = 0;
        for (id, (bytes, is_special)) in (0u32..).zip(tokens) {
            let bytes = bytes.as_ref();
            if is_special || bytes.iter().any(|byte| DRY_BREAKERS.contains(byte)) {
                breakers.push(id);
            }
            if is_special || bytes.contains(&b'\n') {
                ignored.push(id);
            }
            size = id as usize + 1;
        }
        Self {
            size,
            dry_breakers: Arc::new(token_set(&breakers, size)),
            xtc_ignored: Arc::new(token_set(&ignored, size)),
        }
    }

    /// Tokens that the tokenizer knows. A model's head may be larger (padding); ids from here on
    /// are never drawn.
    pub fn size(&self) -> usize {
        self.size
    }
}

/// The set of these ids: those that the mask "allows".
pub(super) fn token_set(ids: &[u32], vocab_size: usize) -> TokenMask {
    let mut set = TokenMask::none(vocab_size);
    for id in ids {
        set.allow(*id);
    }
    set
}
