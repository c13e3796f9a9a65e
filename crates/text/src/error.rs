//! What can go wrong between text and token ids.

/// An error of the tokenizer, the stop or banned strings, or the chat template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// `tokenizer.json` is not JSON, is cut short, or lacks a required part.
    #[error(
        "tokenizer.json cannot be read: {detail}; expected a complete Hugging Face \
         tokenizer.json, so fetch the file again"
    )]
    TokenizerJson {
        /// What the parser met, with line and column where it knows them.
        detail: String,
    },
    /// `tokenizer.json` is well-formed but its parts contradict each other.
    #[error("tokenizer.json is inconsistent: {detail}")]
    TokenizerInconsistent {
        /// Which entries disagree, with both values.
        detail: String,
    },
    /// A part of `tokenizer.json` has a type this program does not know.
    #[error("tokenizer.json has a {part} of type {found:?}, expected one of {known}")]
    UnsupportedPart {
        /// `model` or `decoder`.
        part: &'static str,
        /// The type found.
        found: String,
        /// The types that are supported.
        known: &'static str,
    },
    /// A token id is far beyond what the vocabulary can hold.
    #[error("token {token:?} has id {id}, expected an id below {limit}")]
    TokenIdOutOfRange {
        /// The token's text.
        token: String,
        /// The id in the file.
        id: u64,
        /// The first id that is refused.
        limit: u64,
    },
    /// Two tokens claim one id.
    #[error("tokens {first:?} and {second:?} both have id {id}")]
    TokenIdTwice {
        /// The id claimed twice.
        id: u32,
        /// The token that has it in the vocabulary.
        first: String,
        /// The added token that wants it.
        second: String,
    },
    /// A field of `config.json`, `generation_config.json` or `tokenizer_config.json` has the
    /// wrong type.
    #[error("{file}: {field} is {found}, expected {expected}")]
    ConfigField {
        /// The file's name.
        file: &'static str,
        /// The field's name.
        field: &'static str,
        /// What the field holds.
        found: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// The tokenizer failed on this text.
    #[error("the text could not be tokenized: {detail}")]
    Encode {
        /// The tokenizer's own words.
        detail: String,
    },
    /// The text encodes to a token that the model has no embedding for.
    #[error(
        "the text contains token {token:?} with id {id}, but the model has only {vocab_size} \
         tokens; tokenizer and model do not belong together"
    )]
    TokenBeyondModel {
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// `vocab_size` of config.json.
        vocab_size: u64,
    },
    /// A BOS token was asked for, but the model has none.
    #[error(
        "a BOS token was asked for, but neither tokenizer_config.json nor config.json names one"
    )]
    NoBosToken,
    /// A stop or banned string is empty, so it would be found before the first token.
    #[error("{list} string {index} is empty; give at least one character")]
    EmptyString {
        /// `stop` or `banned`.
        list: &'static str,
        /// Position in the list given, from 0.
        index: usize,
    },
    /// There are more stop or banned strings than the matcher accepts.
    #[error("there are {found} {list} strings, at most {limit} are accepted; leave some out")]
    TooManyStrings {
        /// `stop` or `banned`.
        list: &'static str,
        /// Strings given.
        found: usize,
        /// The most that are accepted.
        limit: usize,
    },
    /// A stop or banned string is longer than the matcher accepts.
    #[error("{list} string {index} has {bytes} bytes, at most {limit} are accepted; shorten it")]
    StringTooLong {
        /// `stop` or `banned`.
        list: &'static str,
        /// Position in the list given, from 0.
        index: usize,
        /// Its length.
        bytes: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// The stop or banned strings are longer, all together, than the matcher accepts.
    #[error(
        "the {list} strings have {bytes} bytes in all, at most {limit} are accepted; leave some \
         out"
    )]
    StringsTooLong {
        /// `stop` or `banned`.
        list: &'static str,
        /// Bytes of all strings of the list.
        bytes: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// The model has no chat template.
    #[error(
        "the model has no chat template (no chat_template in tokenizer_config.json); \
         use raw mode, or write the prompt in the model's format yourself"
    )]
    NoChatTemplate,
    /// `chat_template` has neither of the known shapes.
    #[error(
        "chat_template in tokenizer_config.json is {found}; expected a string, or a list of \
         {{\"name\", \"template\"}} with one named \"default\""
    )]
    ChatTemplateShape {
        /// What was found instead.
        found: String,
    },
    /// The chat template is not valid Jinja.
    #[error("the model's chat template cannot be parsed: {detail}")]
    ChatTemplateSyntax {
        /// The parser's message with the line.
        detail: String,
    },
    /// The chat template called `raise_exception`: it refuses these messages.
    #[error("the model's chat template refuses these messages: {message}")]
    ChatTemplateRaised {
        /// The template's own message.
        message: String,
    },
    /// The chat template failed while it was rendered.
    #[error("the model's chat template failed: {detail}")]
    ChatTemplateFailed {
        /// The interpreter's message with the line.
        detail: String,
    },
    /// The chat template did not end within its limit of instructions or depth.
    #[error(
        "the model's chat template does not come to an end (stopped after {instructions} \
         instructions); use raw mode"
    )]
    ChatTemplateEndless {
        /// Instructions allowed for these messages.
        instructions: u64,
    },
    /// The chat template wrote far more text than it was given.
    #[error(
        "the model's chat template wrote more than {limit_bytes} bytes for {input_bytes} bytes \
         of messages; use raw mode"
    )]
    ChatTemplateTooLong {
        /// The limit for these messages.
        limit_bytes: usize,
        /// Bytes of messages, tools and template.
        input_bytes: usize,
    },
}
