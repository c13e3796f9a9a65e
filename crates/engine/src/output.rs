//! A job's answer as it grows: tokens to text, and what may be shown of it.

use oxllama_text::{BannedMatcher, StopMatcher, StreamDecoder, TextError, Tokenizer};

use crate::TokenLogprob;
use crate::job::Event;

/// What a new token did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// Generation goes on.
    Continues,
    /// A stop string is complete.
    Stopped,
    /// A banned string is complete: generation must go on in place of this token.
    Banned {
        /// Index of the banned string's first token in the answer.
        first_token: usize,
    },
}

#[derive(Debug)]
struct Token {
    token_id: u32,
    /// Bytes of the text with this token.
    text_end: usize,
    logprob: Option<TokenLogprob>,
    logits: Option<Vec<f32>>,
}

/// The answer as it grows. Text passes the banned strings first and the stop strings next; each
/// holds back what may become one of its own.
pub(crate) struct Output {
    tokenizer: Tokenizer,
    decoder: StreamDecoder,
    /// Bytes of text that the prompt has already: those of the token that was healed.
    healed_bytes: usize,
    /// Of those, bytes that the decoder has not given yet.
    to_skip: usize,
    banned: Option<BannedMatcher>,
    stops: StopMatcher,
    text: String,
    /// Bytes of `text` that the stop strings have seen.
    passed: usize,
    /// Bytes of `text` that may be shown.
    released: usize,
    /// Of those, bytes that were.
    shown: usize,
    tokens: Vec<Token>,
    /// Tokens that were shown.
    shown_tokens: usize,
    stopped: bool,
}

impl Output {
    /// An empty answer. `healed` is the prompt's token that the first one replaces.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        stop_strings: &[String],
        banned_strings: &[String],
        healed: Option<u32>,
    ) -> Result<Self, TextError> {
        let healed_bytes = healed.map_or(0, |token_id| {
            let mut decoder = tokenizer.stream_decoder(true);
            decoder.push(token_id).len() + decoder.finish().len()
        });
        Ok(Self {
            tokenizer: tokenizer.clone(),
            decoder: tokenizer.stream_decoder(true),
            healed_bytes,
            to_skip: healed_bytes,
            banned: match banned_strings {
                [] => None,
                strings => Some(BannedMatcher::new(strings)?),
            },
            stops: StopMatcher::new(stop_strings)?,
            text: String::new(),
            passed: 0,
            released: 0,
            shown: 0,
            tokens: Vec::new(),
            shown_tokens: 0,
            stopped: false,
        })
    }

    /// Tokens of the answer.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The `index`-th token.
    pub(crate) fn token_id(&self, index: usize) -> Option<u32> {
        self.tokens.get(index).map(|token| token.token_id)
    }

    /// Adds a token.
    pub(crate) fn push(
        &mut self,
        token_id: u32,
        logprob: Option<TokenLogprob>,
        logits: Option<Vec<f32>>,
    ) -> Pushed {
        let start = self.text.len();
        append_after(
            self.decoder.push(token_id),
            &mut self.to_skip,
            &mut self.text,
        );
        self.tokens.push(Token {
            token_id,
            text_end: self.text.len(),
            logprob,
            logits,
        });
        let releasable = match &mut self.banned {
            Some(banned) => {
                if let Some(offset) = banned.push(&self.text[start..]) {
                    // What may have been shown stays, though after another way on from there
                    // its end turned out to be the string's beginning.
                    let kept = offset.max(self.released);
                    let first_token = self.tokens.partition_point(|token| token.text_end <= kept);
                    return Pushed::Banned { first_token };
                }
                banned.releasable()
            }
            None => self.text.len(),
        };
        self.pass(releasable);
        if self.stopped {
            Pushed::Stopped
        } else {
            Pushed::Continues
        }
    }

    /// Forgets all but the first `tokens` tokens, none of which may have been shown.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
        // The decoder's state after those tokens is that of a new one that has seen them.
        self.decoder = self.tokenizer.stream_decoder(true);
        self.to_skip = self.healed_bytes;
        self.text.clear();
        for token in &self.tokens {
            append_after(
                self.decoder.push(token.token_id),
                &mut self.to_skip,
                &mut self.text,
            );
        }
        if let Some(banned) = &mut self.banned {
            banned.truncate(self.text.len());
        }
    }

    /// What may be shown and was not, if there is anything.
    pub(crate) fn take(&mut self) -> Option<Event> {
        let tokens = self.tokens[self.shown_tokens..]
            .iter()
            .take_while(|token| token.text_end <= self.released)
            .count();
        self.take_tokens(tokens)
    }

    /// Ends the text: all that was held back may be shown.
    pub(crate) fn finish(&mut self) -> Option<Event> {
        if !self.stopped {
            append_after(self.decoder.finish(), &mut self.to_skip, &mut self.text);
            self.pass(self.text.len());
        }
        if !self.stopped {
            self.stops.finish();
            self.released = self.text.len();
        }
        self.take_tokens(self.tokens.len() - self.shown_tokens)
    }

    /// Lets the stop strings see the text up to `end`.
    fn pass(&mut self, end: usize) {
        if end <= self.passed || self.stopped {
            return;
        }
        let step = self.stops.push(&self.text[self.passed..end]);
        self.passed = end;
        self.released += step.text.len();
        self.stopped = step.matched.is_some();
    }

    fn take_tokens(&mut self, tokens: usize) -> Option<Event> {
        let text = self.text[self.shown..self.released].to_owned();
        self.shown = self.released;
        let taken = &mut self.tokens[self.shown_tokens..][..tokens];
        self.shown_tokens += tokens;
        if text.is_empty() && tokens == 0 {
            return None;
        }
        Some(Event::Token {
            text,
            ids: taken.iter().map(|token| token.token_id).collect(),
            logprobs: taken
                .iter_mut()
                .filter_map(|token| token.logprob.take())
                .collect(),
            logits: taken
                .iter_mut()
                .filter_map(|token| token.logits.take())
                .collect(),
        })
    }
}

/// Appends `piece` without its first `to_skip` bytes.
fn append_after(piece: &str, to_skip: &mut usize, text: &mut String) {
    let mut skipped = piece.len().min(*to_skip);
    while !piece.is_char_boundary(skipped) {
        skipped += 1;
    }
    *to_skip = to_skip.saturating_sub(skipped);
    text.push_str(&piece[skipped..]);
}
