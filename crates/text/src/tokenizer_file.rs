//! Reads `tokenizer.json` and builds the encoder from it.
//!
//! The `tokenizers` crate can read the file itself, but it buffers the whole model twice (four
//! times slower on a 49k vocabulary), panics on some malformed files, ignores the ids that added
//! tokens declare, and obeys the truncation and padding that training scripts leave behind. So
//! the file is read here, checked, and handed over in parts.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ahash::{AHashMap, AHashSet};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::{AddedToken, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

use crate::error::TextError;

/// Ids may exceed the number of tokens by this many: vocabularies have holes and reserved ranges.
const ID_SLACK: u64 = 65_536;

/// `tokenizer.json` as far as it matters here. `truncation` and `padding` are left out on
/// purpose: a prompt is never cut or padded silently.
#[derive(Deserialize)]
pub(crate) struct TokenizerFile {
    #[serde(default)]
    pub(crate) added_tokens: Vec<AddedTokenEntry>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    pub(crate) post_processor: Value,
    #[serde(default)]
    pub(crate) decoder: Value,
    model: ModelFile,
}

/// One entry of `added_tokens`.
#[derive(Deserialize, Clone)]
pub(crate) struct AddedTokenEntry {
    pub(crate) id: u64,
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) single_word: bool,
    #[serde(default)]
    pub(crate) lstrip: bool,
    #[serde(default)]
    pub(crate) rstrip: bool,
    /// Absent means: normalised unless special, as the `tokenizers` crate has it.
    pub(crate) normalized: Option<bool>,
    #[serde(default)]
    pub(crate) special: bool,
}

impl AddedTokenEntry {
    fn to_added_token(&self) -> AddedToken {
        AddedToken::from(self.content.as_str(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// The `model` object; which fields matter depends on its type.
#[derive(Deserialize)]
struct ModelFile {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: Vocabulary,
    merges: Option<Merges>,
    unk_token: Option<String>,
    unk_id: Option<usize>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
}

/// A vocabulary: token to id (BPE, WordLevel), or scored tokens whose position is the id (Unigram).
enum Vocabulary {
    ById(AHashMap<String, u32>),
    Scored(Vec<(String, f64)>),
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VocabularyVisitor;
        impl<'de> Visitor<'de> for VocabularyVisitor {
            type Value = Vocabulary;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map from token to id, or a list of [token, score]")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
                let mut vocabulary = AHashMap::new();
                while let Some((token, id)) = map.next_entry()? {
                    vocabulary.insert(token, id);
                }
                Ok(Vocabulary::ById(vocabulary))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vocabulary, A::Error> {
                let mut pieces = Vec::new();
                while let Some(piece) = seq.next_element()? {
                    pieces.push(piece);
                }
                Ok(Vocabulary::Scored(pieces))
            }
        }
        deserializer.deserialize_any(VocabularyVisitor)
    }
}

/// BPE merges, written as `["a", "b"]` or, in older files, as `"a b"`.
struct Merges(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::<Merge>::deserialize(deserializer)
            .map(|merges| Self(merges.into_iter().map(|merge| merge.0).collect()))
    }
}

struct Merge((String, String));

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MergeVisitor;
        impl<'de> Visitor<'de> for MergeVisitor {
            type Value = Merge;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a merge as [left, right] or \"left right\"")
            }

            fn visit_str<E: serde::de::Error>(self, line: &str) -> Result<Merge, E> {
                match line.split_once(' ') {
                    Some((left, right)) if !right.contains(' ') => {
                        Ok(Merge((left.to_owned(), right.to_owned())))
                    }
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(line), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
                let left = seq.next_element()?;
                let right = seq.next_element()?;
                match (left, right, seq.next_element::<serde::de::IgnoredAny>()?) {
                    (Some(left), Some(right), None) => Ok(Merge((left, right))),
                    _ => Err(serde::de::Error::custom("a merge must name two tokens")),
                }
            }
        }
        deserializer.deserialize_any(MergeVisitor)
    }
}

/// The encoder half of a tokenizer, and the number of ids it spans.
pub(crate) struct BuiltTokenizer {
    /// Without post-processor and decoder: special tokens and decoding are done in this crate.
    pub(crate) encoder: tokenizers::Tokenizer,
    pub(crate) continuation: Continuation,
    /// Largest id plus one.
    pub(crate) vocab_size: usize,
}

/// The encoder's first steps for a text that continues another: they do not put a space in front.
pub(crate) struct Continuation {
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) pre_tokenizer: Option<PreTokenizerWrapper>,
}

impl TokenizerFile {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, TextError> {
        serde_json::from_slice(bytes).map_err(|error| TextError::TokenizerJson {
            detail: error.to_string(),
        })
    }

    /// Adds a special token by name if the vocabulary has it but `added_tokens` does not: that is
    /// what transformers does with the tokens that tokenizer_config.json names.
    pub(crate) fn add_named_special_token(&mut self, content: &str) {
        if self
            .added_tokens
            .iter()
            .any(|token| token.content == content)
        {
            return;
        }
        let id = match &self.model.vocab {
            Vocabulary::ById(vocabulary) => vocabulary.get(content).map(|&id| u64::from(id)),
            Vocabulary::Scored(pieces) => pieces
                .iter()
                .position(|(piece, _)| piece == content)
                .and_then(|position| u64::try_from(position).ok()),
        };
        if let Some(id) = id {
            self.added_tokens.push(AddedTokenEntry {
                id,
                content: content.to_owned(),
                single_word: false,
                lstrip: false,
                rstrip: false,
                normalized: Some(false),
                special: true,
            });
        }
    }

    /// Builds the encoder. `model_vocab_size` is `vocab_size` of config.json where known.
    pub(crate) fn build(
        self,
        model_vocab_size: Option<u64>,
    ) -> Result<(BuiltTokenizer, Value, Value), TextError> {
        let Self {
            added_tokens,
            normalizer,
            pre_tokenizer,
            post_processor,
            decoder,
            model,
        } = self;
        let entries = model.vocab.len() as u64 + added_tokens.len() as u64;
        let id_limit = entries.max(model_vocab_size.unwrap_or(0).min(1 << 24)) + ID_SLACK;
        for token in &added_tokens {
            check_id(&token.content, token.id, id_limit)?;
        }
        let built = guard(|| {
            let (model, largest_id) = model.build(&added_tokens, id_limit)?;
            let mut encoder = tokenizers::Tokenizer::new(model);
            let continuation = Continuation {
                normalizer: part_from_value("normalizer", without_space(normalizer.clone()))?,
                pre_tokenizer: part_from_value(
                    "pre_tokenizer",
                    without_space(pre_tokenizer.clone()),
                )?,
            };
            if let Some(part) = part_from_value::<NormalizerWrapper>("normalizer", normalizer)? {
                encoder.with_normalizer(Some(part)).map_err(inconsistent)?;
            }
            if let Some(part) =
                part_from_value::<PreTokenizerWrapper>("pre_tokenizer", pre_tokenizer)?
            {
                encoder.with_pre_tokenizer(Some(part));
            }
            encoder
                .add_tokens(added_tokens.iter().map(AddedTokenEntry::to_added_token))
                .map_err(inconsistent)?;
            let largest_id = check_added_ids(&encoder, &added_tokens)?.max(largest_id);
            Ok(BuiltTokenizer {
                encoder,
                continuation,
                vocab_size: largest_id as usize + 1,
            })
        })?;
        Ok((built, post_processor, decoder))
    }
}

impl Vocabulary {
    fn len(&self) -> usize {
        match self {
            Self::ById(vocabulary) => vocabulary.len(),
            Self::Scored(pieces) => pieces.len(),
        }
    }
}

impl ModelFile {
    /// The model and its largest id.
    fn build(
        self,
        added_tokens: &[AddedTokenEntry],
        id_limit: u64,
    ) -> Result<(ModelWrapper, u32), TextError> {
        let kind = match (&self.kind, &self.vocab) {
            (Some(kind), _) => kind.clone(),
            // Files of before 2020 have no type.
            (None, Vocabulary::Scored(_)) => "Unigram".to_owned(),
            (None, Vocabulary::ById(_)) if self.merges.is_some() => "BPE".to_owned(),
            (None, Vocabulary::ById(_)) => "WordLevel".to_owned(),
        };
        match (kind.as_str(), self.vocab) {
            ("BPE", Vocabulary::ById(mut vocabulary)) => {
                let largest_id = complete_vocabulary(&mut vocabulary, added_tokens, id_limit)?;
                let merges = self
                    .merges
                    .ok_or_else(|| TextError::TokenizerInconsistent {
                        detail: "the BPE model has no merges".to_owned(),
                    })?;
                let prefix = self.continuing_subword_prefix.unwrap_or_default();
                check_merges(&vocabulary, &merges.0, &prefix)?;
                let mut builder = BPE::builder()
                    .vocab_and_merges(vocabulary, merges.0)
                    .fuse_unk(self.fuse_unk.unwrap_or(false))
                    .byte_fallback(self.byte_fallback.unwrap_or(false))
                    .ignore_merges(self.ignore_merges.unwrap_or(false));
                if let Some(unk_token) = self.unk_token {
                    builder = builder.unk_token(unk_token);
                }
                if !prefix.is_empty() {
                    builder = builder.continuing_subword_prefix(prefix);
                }
                if let Some(suffix) = self.end_of_word_suffix.filter(|suffix| !suffix.is_empty()) {
                    builder = builder.end_of_word_suffix(suffix);
                }
                Ok((builder.build().map_err(inconsistent)?.into(), largest_id))
            }
            ("WordLevel", Vocabulary::ById(mut vocabulary)) => {
                let largest_id = complete_vocabulary(&mut vocabulary, added_tokens, id_limit)?;
                let unk_token = self.unk_token.unwrap_or_else(|| "<unk>".to_owned());
                let model = WordLevel::builder()
                    .vocab(vocabulary)
                    .unk_token(unk_token)
                    .build();
                Ok((model.map_err(inconsistent)?.into(), largest_id))
            }
            ("Unigram", Vocabulary::Scored(pieces)) => {
                let largest_id = u32::try_from(pieces.len().saturating_sub(1)).map_err(|_| {
                    TextError::TokenizerInconsistent {
                        detail: format!("{} pieces are more than ids can count", pieces.len()),
                    }
                })?;
                let byte_fallback = self.byte_fallback.unwrap_or(false);
                let model = Unigram::from(pieces, self.unk_id, byte_fallback);
                Ok((model.map_err(inconsistent)?.into(), largest_id))
            }
            ("BPE" | "WordLevel" | "Unigram", _) => Err(TextError::TokenizerInconsistent {
                detail: format!("the vocabulary has not the shape that a {kind} model needs"),
            }),
            _ => Err(TextError::UnsupportedPart {
                part: "model",
                found: kind,
                known: "BPE, Unigram, WordLevel",
            }),
        }
    }
}

/// Gives every added token its declared id by entering it in the vocabulary, since the
/// `tokenizers` crate would number them itself. Returns the largest id.
fn complete_vocabulary(
    vocabulary: &mut AHashMap<String, u32>,
    added_tokens: &[AddedTokenEntry],
    id_limit: u64,
) -> Result<u32, TextError> {
    let mut largest_id = 0;
    for (token, &id) in &*vocabulary {
        check_id(token, id.into(), id_limit)?;
        largest_id = largest_id.max(id);
    }
    let missing: Vec<&AddedTokenEntry> = added_tokens
        .iter()
        .filter(|token| !vocabulary.contains_key(&token.content))
        .collect();
    if missing.is_empty() {
        return Ok(largest_id);
    }
    let missing_ids: AHashSet<u64> = missing.iter().map(|token| token.id).collect();
    let taken: AHashMap<u32, String> = vocabulary
        .iter()
        .filter(|&(_, &id)| missing_ids.contains(&u64::from(id)))
        .map(|(token, &id)| (id, token.clone()))
        .collect();
    for token in missing {
        let id = check_id(&token.content, token.id, id_limit)?;
        if let Some(first) = taken.get(&id) {
            let (first, second) = (first.clone(), token.content.clone());
            return Err(TextError::TokenIdTwice { id, first, second });
        }
        vocabulary.insert(token.content.clone(), id);
        largest_id = largest_id.max(id);
    }
    Ok(largest_id)
}

fn check_id(token: &str, id: u64, limit: u64) -> Result<u32, TextError> {
    u32::try_from(id)
        .ok()
        .filter(|_| id < limit)
        .ok_or_else(|| TextError::TokenIdOutOfRange {
            token: token.to_owned(),
            id,
            limit,
        })
}

/// Refuses merges that the BPE builder would panic on or cut inside a character; merges of unknown
/// tokens it reports itself.
fn check_merges(
    vocabulary: &AHashMap<String, u32>,
    merges: &[(String, String)],
    prefix: &str,
) -> Result<(), TextError> {
    let longest_bytes = vocabulary.keys().map(String::len).max().unwrap_or(0);
    for (position, (left, right)) in merges.iter().enumerate() {
        let fits = right.is_char_boundary(prefix.len())
            && left.len() + right.len() - prefix.len() <= longest_bytes;
        if !fits {
            return Err(TextError::TokenizerInconsistent {
                detail: format!(
                    "merge {position} joins {left:?} and {right:?} to a token that is not in the \
                     vocabulary"
                ),
            });
        }
    }
    Ok(())
}

/// Checks that the encoder knows each added token by the id declared for it, and returns the
/// largest of the ids.
fn check_added_ids(
    encoder: &tokenizers::Tokenizer,
    added_tokens: &[AddedTokenEntry],
) -> Result<u32, TextError> {
    let mut largest_id = 0;
    for token in added_tokens {
        let Some(id) = encoder.token_to_id(&token.content) else {
            continue;
        };
        if u64::from(id) != token.id {
            return Err(TextError::TokenizerInconsistent {
                detail: format!(
                    "added token {:?} declares id {}, but the vocabulary gives it id {id}",
                    token.content, token.id
                ),
            });
        }
        largest_id = largest_id.max(id);
    }
    Ok(largest_id)
}

/// A part of the file; none if it is null.
fn part_from_value<T: for<'de> Deserialize<'de>>(
    part: &'static str,
    value: Value,
) -> Result<Option<T>, TextError> {
    if value.is_null() {
        return Ok(None);
    }
    serde_json::from_value(value)
        .map(Some)
        .map_err(|error| TextError::TokenizerJson {
            detail: format!("{part}: {error}"),
        })
}

/// A normalizer or pre-tokenizer that puts no space in front of the text.
fn without_space(mut part: Value) -> Value {
    for list in ["normalizers", "pretokenizers"] {
        for inner in part
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            *inner = without_space(inner.take());
        }
    }
    match part.get("type").and_then(Value::as_str) {
        Some("Prepend") => json!({ "type": "Sequence", "normalizers": [] }),
        Some("ByteLevel") => {
            part["add_prefix_space"] = false.into();
            part
        }
        Some("Metaspace") => {
            part["prepend_scheme"] = "never".into();
            // The older name for the same, which would contradict it.
            part["add_prefix_space"] = false.into();
            part
        }
        _ => part,
    }
}

fn inconsistent(error: impl fmt::Display) -> TextError {
    TextError::TokenizerInconsistent {
        detail: error.to_string(),
    }
}

/// Runs code of the `tokenizers` crate, which panics on some inputs, and turns a panic into an
/// error.
fn guard<T>(work: impl FnOnce() -> Result<T, TextError>) -> Result<T, TextError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(TextError::TokenizerInconsistent {
            detail: panic_message(&*panic),
        })
    })
}

/// The message of a caught panic.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("the tokenizer library panicked")
        .to_owned()
}
