//! What the sampler knows of a vocabulary.

use std::sync::{Arc, LazyLock};

use oxllama_text::Tokenizer;

use crate::TokenMask;

/// The sets of tokens that DRY and XTC treat apart by default, and which ids are tokens at all.
/// Made once for a tokenizer; clones share it.
#[derive(Clone)]
pub struct SamplerVocabulary {
    pub(super) size: usize,
    /// Made when a job first needs them: few do, and every token has to be read for it.
    sets: Arc<LazyLock<Sets, MakeSets>>,
}

type MakeSets = Box<dyn FnOnce() -> Sets + Send>;

#[derive(Debug)]
pub(super) struct Sets {
    pub(super) dry_breakers: Arc<TokenMask>,
    pub(super) xtc_ignored: Arc<TokenMask>,
}

impl std::fmt::Debug for SamplerVocabulary {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("SamplerVocabulary")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl SamplerVocabulary {
    /// The vocabulary of `tokenizer`.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let tokenizer = tokenizer.clone();
        let size = tokenizer.vocab_size();
        let token = move |id| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            (bytes, tokenizer.is_special(id))
        };
        Self::with_sets(size, move || Sets::of((0..size as u32).map(token), size))
    }

    /// The same from the tokens themselves in order of their ids: each one's bytes, and whether
    /// it is special.
    pub fn from_tokens<B: AsRef<[u8]>>(tokens: impl Iterator<Item = (B, bool)>) -> Self {
        let tokens: Vec<(Vec<u8>, bool)> = tokens
            .map(|(bytes, is_special)| (bytes.as_ref().to_vec(), is_special))
            .collect();
        let size = tokens.len();
        Self::with_sets(size, move || Sets::of(tokens.into_iter(), size))
    }

    fn with_sets(size: usize, make: impl FnOnce() -> Sets + Send + 'static) -> Self {
        let make: MakeSets = Box::new(make);
        Self {
            size,
            sets: Arc::new(LazyLock::new(make)),
        }
    }

    /// Tokens that the tokenizer knows. A model's head may be larger (padding); ids from here on
    /// are never drawn.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The sets; made now if nobody has asked before.
    pub(super) fn sets(&self) -> &Sets {
        &self.sets
    }
}

impl Sets {
    fn of(tokens: impl Iterator<Item = (Vec<u8>, bool)>, size: usize) -> Self {
        const DRY_BREAKERS: &[u8] = b".,!?<>[](){}\n\t\"";
        let (mut breakers, mut ignored) = (Vec::new(), Vec::new());
        for (id, (bytes, is_special)) in (0u32..).zip(tokens) {
            if is_special || bytes.iter().any(|byte| DRY_BREAKERS.contains(byte)) {
                breakers.push(id);
            }
            if is_special || bytes.contains(&b'\n') {
                ignored.push(id);
            }
        }
        Self {
            dry_breakers: Arc::new(token_set(&breakers, size)),
            xtc_ignored: Arc::new(token_set(&ignored, size)),
        }
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
