//! From token ids back to text, one token at a time.
//!
//! A `decoder` of tokenizer.json is defined on the whole list of tokens. Here each of its steps
//! becomes a [`Stage`] that is fed one token (or, after the tokens were fused, one piece of the
//! text) and passes on what is settled, so that the work for a token does not grow with the text
//! before it and the pieces put together are exactly what decoding the whole list gives.

use serde_json::Value;
use tokenizers::Decoder as _;
use tokenizers::normalizers::Replace;

use crate::error::TextError;
use crate::tokenizer::Tokenizer;

const KNOWN_DECODERS: &str = "ByteLevel, Metaspace, Sequence, Replace, ByteFallback, Fuse, Strip";

/// One step of decoding.
enum Stage {
    /// Replaces a string in every token.
    ReplaceText { find: String, with: String },
    /// Replaces a pattern in every token.
    ReplacePattern(Box<Replace>),
    /// Replaces the SentencePiece space mark by a space; in the first token it goes away instead
    /// if `drop_in_first`.
    Metaspace { mark: char, drop_in_first: bool },
    /// Cuts up to `start` and `stop` characters `content` from both ends of every token.
    StripToken {
        content: char,
        start: usize,
        stop: usize,
    },
    /// Cuts up to `start` characters `content` from the start of the whole text.
    StripText { content: char, start: usize },
    /// Turns runs of `<0xHH>` tokens into the characters that their bytes spell. A run that is
    /// not UTF-8 as a whole becomes one U+FFFD a byte, so a run is held back until it ends.
    ByteFallback,
    /// Turns the byte-level alphabet into bytes and these into text.
    ByteLevel,
    /// No decoder at all: tokens are separated by spaces.
    JoinWithSpaces,
}

/// What a stage remembers between tokens.
#[derive(Clone)]
struct StageState {
    /// Bytes of a character, or of a byte-fallback run, that is not complete yet.
    pending: Vec<u8>,
    /// No token has come yet.
    at_start: bool,
    /// Characters that `StripText` may still remove.
    strip_left: usize,
}

/// The decoder of a tokenizer.json, ready for streaming.
pub(crate) struct DecodePlan {
    stages: Vec<Stage>,
}

impl DecodePlan {
    /// Compiles the `decoder` object of tokenizer.json (null if it has none).
    pub(crate) fn compile(decoder: &Value) -> Result<Self, TextError> {
        let mut stages = Vec::new();
        if decoder.is_null() {
            stages.push(Stage::JoinWithSpaces);
        } else {
            let mut fused = false;
            compile_into(decoder, &mut fused, &mut stages)?;
        }
        Ok(Self { stages })
    }

    fn start(&self) -> Vec<StageState> {
        self.stages
            .iter()
            .map(|stage| StageState {
                pending: Vec::new(),
                at_start: true,
                strip_left: match stage {
                    Stage::StripText { start, .. } => *start,
                    _ => 0,
                },
            })
            .collect()
    }

    /// The bytes that one token stands for in the middle of a text.
    pub(crate) fn token_bytes(&self, token: &str) -> Vec<u8> {
        let mut text = token.to_owned();
        for stage in &self.stages {
            match stage {
                Stage::ReplaceText { find, with } => text = text.replace(find, with),
                Stage::ReplacePattern(replace) => text = replace_pattern(replace, text),
                Stage::Metaspace { mark, .. } => text = text.replace(*mark, " "),
                Stage::StripToken {
                    content,
                    start,
                    stop,
                } => {
                    text = strip_token(&text, *content, *start, *stop).to_owned();
                }
                Stage::ByteFallback => {
                    if let Some(byte) = fallback_byte(&text) {
                        return vec![byte];
                    }
                }
                Stage::ByteLevel => return byte_level_bytes(&text),
                Stage::StripText { .. } | Stage::JoinWithSpaces => {}
            }
        }
        text.into_bytes()
    }
}

/// Appends the stages of one decoder object. `fused` says whether the tokens have been joined to
/// one text already.
fn compile_into(
    decoder: &Value,
    fused: &mut bool,
    stages: &mut Vec<Stage>,
) -> Result<(), TextError> {
    let kind = decoder
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default();
    match (kind, *fused) {
        ("Sequence", _) => {
            for part in decoder
                .get("decoders")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                compile_into(part, fused, stages)?;
            }
        }
        ("Fuse", _) => *fused = true,
        ("ByteLevel", false) => {
            stages.push(Stage::ByteLevel);
            *fused = true;
        }
        ("ByteFallback", false) => stages.push(Stage::ByteFallback),
        ("Metaspace", _) => stages.push(compile_metaspace(decoder, *fused)?),
        ("Strip", _) => stages.push(compile_strip(decoder, *fused)?),
        ("Replace", _) => stages.push(compile_replace(decoder, *fused)?),
        _ => return Err(unsupported(decoder)),
    }
    Ok(())
}

fn compile_metaspace(decoder: &Value, fused: bool) -> Result<Stage, TextError> {
    let mark = char_field(decoder, "replacement")?;
    let never = decoder.get("prepend_scheme").and_then(Value::as_str) == Some("never")
        || decoder.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
    if fused {
        // The whole text is then the first token.
        let with = if never { " " } else { "" };
        return Ok(Stage::ReplaceText {
            find: mark.to_string(),
            with: with.to_owned(),
        });
    }
    Ok(Stage::Metaspace {
        mark,
        drop_in_first: !never,
    })
}

fn compile_strip(decoder: &Value, fused: bool) -> Result<Stage, TextError> {
    let content = char_field(decoder, "content")?;
    let count = |field: &str| {
        decoder
            .get(field)
            .and_then(Value::as_u64)
            .and_then(|count| usize::try_from(count).ok())
            .ok_or_else(|| unsupported(decoder))
    };
    match (fused, count("start")?, count("stop")?) {
        (true, start, 0) => Ok(Stage::StripText { content, start }),
        (true, ..) => Err(unsupported(decoder)),
        (false, start, stop) => Ok(Stage::StripToken {
            content,
            start,
            stop,
        }),
    }
}

fn compile_replace(decoder: &Value, fused: bool) -> Result<Stage, TextError> {
    let with = decoder.get("content").and_then(Value::as_str);
    let find = decoder
        .get("pattern")
        .and_then(|pattern| pattern.get("String"));
    if let (Some(find), Some(with)) = (find.and_then(Value::as_str), with) {
        // In a fused text only a single character cannot straddle two pieces.
        let length = find.chars().count();
        if length == 1 || (length > 1 && !fused) {
            return Ok(Stage::ReplaceText {
                find: find.to_owned(),
                with: with.to_owned(),
            });
        }
        return Err(unsupported(decoder));
    }
    if fused {
        return Err(unsupported(decoder));
    }
    serde_json::from_value(decoder.clone())
        .map(|replace| Stage::ReplacePattern(Box::new(replace)))
        .map_err(|error| TextError::TokenizerJson {
            detail: format!("decoder: {error}"),
        })
}

fn char_field(decoder: &Value, field: &str) -> Result<char, TextError> {
    let mut chars = decoder
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .chars();
    match (chars.next(), chars.next()) {
        (Some(only), None) => Ok(only),
        _ => Err(unsupported(decoder)),
    }
}

fn unsupported(decoder: &Value) -> TextError {
    let mut found = decoder.to_string();
    if found.len() > 200 {
        found = found.chars().take(200).collect::<String>() + "…";
    }
    TextError::UnsupportedPart {
        part: "decoder",
        found,
        known: KNOWN_DECODERS,
    }
}

/// Passes one token through the stages and appends what comes out to `out`.
fn feed(stages: &[Stage], states: &mut [StageState], token: String, out: &mut String) {
    let (Some((stage, stages)), Some((state, states))) =
        (stages.split_first(), states.split_first_mut())
    else {
        out.push_str(&token);
        return;
    };
    let at_start = std::mem::replace(&mut state.at_start, false);
    match stage {
        Stage::ReplaceText { find, with } => {
            feed(stages, states, token.replace(find, with), out);
        }
        Stage::ReplacePattern(replace) => {
            feed(stages, states, replace_pattern(replace, token), out);
        }
        Stage::Metaspace {
            mark,
            drop_in_first,
        } => {
            let with = if at_start && *drop_in_first { "" } else { " " };
            feed(stages, states, token.replace(*mark, with), out);
        }
        Stage::StripToken {
            content,
            start,
            stop,
        } => {
            feed(
                stages,
                states,
                strip_token(&token, *content, *start, *stop).to_owned(),
                out,
            );
        }
        Stage::StripText { content, .. } => {
            let mut text = token.as_str();
            while state.strip_left > 0 && !text.is_empty() {
                match text.strip_prefix(*content) {
                    Some(rest) => {
                        text = rest;
                        state.strip_left -= 1;
                    }
                    None => state.strip_left = 0,
                }
            }
            feed(stages, states, text.to_owned(), out);
        }
        Stage::ByteFallback => match fallback_byte(&token) {
            Some(byte) => state.pending.push(byte),
            None => {
                end_fallback_run(&mut state.pending, |text| feed(stages, states, text, out));
                feed(stages, states, token, out);
            }
        },
        Stage::ByteLevel => {
            state.pending.extend(byte_level_bytes(&token));
            let text = take_complete_text(&mut state.pending);
            feed(stages, states, text, out);
        }
        Stage::JoinWithSpaces => {
            let text = if at_start { token } else { format!(" {token}") };
            feed(stages, states, text, out);
        }
    }
}

/// Passes on what every stage still holds back.
fn flush(stages: &[Stage], states: &mut [StageState], out: &mut String) {
    for index in 0..stages.len() {
        let (state, later_states) = states[index..]
            .split_first_mut()
            .expect("index is in range");
        let later = &stages[index + 1..];
        match stages[index] {
            Stage::ByteFallback => {
                end_fallback_run(&mut state.pending, |text| {
                    feed(later, later_states, text, out);
                });
            }
            Stage::ByteLevel if !state.pending.is_empty() => {
                let text = String::from_utf8_lossy(&state.pending).into_owned();
                state.pending.clear();
                feed(later, later_states, text, out);
            }
            _ => {}
        }
    }
}

fn replace_pattern(replace: &Replace, token: String) -> String {
    // The only possible error is a pattern that backtracks too long; the token stays as it is.
    replace
        .decode_chain(vec![token.clone()])
        .map_or(token, |tokens| tokens.concat())
}

fn strip_token(token: &str, content: char, start: usize, stop: usize) -> &str {
    let mut text = token;
    for _ in 0..start {
        match text.strip_prefix(content) {
            Some(rest) => text = rest,
            None => break,
        }
    }
    for _ in 0..stop {
        match text.strip_suffix(content) {
            Some(rest) => text = rest,
            None => break,
        }
    }
    text
}

/// The byte of a `<0xHH>` token.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

fn end_fallback_run(pending: &mut Vec<u8>, mut emit: impl FnMut(String)) {
    if pending.is_empty() {
        return;
    }
    match String::from_utf8(std::mem::take(pending)) {
        Ok(text) => emit(text),
        Err(error) => {
            for _ in 0..error.as_bytes().len() {
                emit(char::REPLACEMENT_CHARACTER.to_string());
            }
        }
    }
}

/// Takes all text from the front of `pending` that later bytes cannot change, with U+FFFD for
/// what is no UTF-8, as `String::from_utf8_lossy` on the whole would give.
fn take_complete_text(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        let at_end = taken + invalid.len() == pending.len();
        let incomplete =
            std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if at_end && incomplete {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        taken += invalid.len();
    }
    pending.drain(..taken);
    text
}

/// The bytes of a token in the byte-level alphabet; a token with any other character (an added
/// token) stands for its own UTF-8.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(byte_of_char)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a character of GPT-2's byte-level alphabet stands for: printable Latin-1
/// characters stand for themselves, the other 68 bytes follow in order from U+0100.
fn byte_of_char(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Decodes a stream of token ids to text.
///
/// The texts that [`StreamDecoder::push`] returns, put together with that of
/// [`StreamDecoder::finish`], are what [`Tokenizer::decode`] gives for the whole list. Each piece
/// is complete: a character whose bytes are spread over several tokens comes with the last one.
/// The work for a token does not depend on how many came before.
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    states: Vec<StageState>,
    text: String,
}

impl StreamDecoder {
    pub(crate) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let states = tokenizer.decode_plan().start();
        Self {
            tokenizer,
            skip_special,
            states,
            text: String::new(),
        }
    }

    /// Takes the next token and returns the text that it settles, often empty. An id that the
    /// tokenizer does not know (models pad their vocabulary) adds nothing.
    pub fn push(&mut self, id: u32) -> &str {
        self.text.clear();
        if let Some(token) = self.tokenizer.token_for_decoding(id, self.skip_special) {
            let plan = self.tokenizer.decode_plan();
            feed(&plan.stages, &mut self.states, token, &mut self.text);
        }
        &self.text
    }

    /// Ends the text: returns what was held back, with U+FFFD for an incomplete character. The
    /// decoder then stands at the start of a new text.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        let plan = self.tokenizer.decode_plan();
        flush(&plan.stages, &mut self.states, &mut self.text);
        self.states = plan.start();
        &self.text
    }
}
