//! Text in, token ids out, and back again: tokenizer, chat templates, stop strings and
//! streaming detokenisation.
//!
//! - [`Tokenizer`] reads a Hugging Face `tokenizer.json` and encodes with the special tokens the
//!   model's files ask for.
//! - [`StreamDecoder`] turns token ids back into text one at a time, never splitting a character.
//! - [`StopMatcher`] cuts streamed text at the first stop string.
//! - [`BannedMatcher`] finds banned strings in streamed text, whatever their case.
//! - [`VocabularyIndex`] knows the tokens by their bytes, and heals prompts that end inside a word.
//! - [`ChatTemplate`] renders a conversation with the Jinja template shipped with the model.
//!
//! Everything here is pure: no files, no clocks except `strftime_now`, no model. Every input is
//! treated as hostile and answered with a [`TextError`].

mod automaton;
mod banned;
mod chat;
mod decode;
mod error;
mod special;
mod stop;
mod tokenizer;
mod tokenizer_file;
mod vocabulary;

pub use banned::BannedMatcher;
pub use chat::{ChatOptions, ChatTemplate, Message, MessageContent};
pub use decode::StreamDecoder;
pub use error::TextError;
pub use stop::{StopMatcher, StopStep};
pub use tokenizer::{AddBos, EncodeOptions, Tokenizer};
pub use vocabulary::{Healing, VocabularyIndex};
