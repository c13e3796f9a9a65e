//! The tokenizer: text to token ids with the special tokens that the model's files ask for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde_json::Value;
use tokenizers::{
    AddedVocabulary, Encoding, Model as _, NormalizerWrapper, OffsetType, PreTokenizer as _,
    PreTokenizerWrapper,
};

use crate::decode::{DecodePlan, StreamDecoder};
use crate::error::TextError;
use crate::special::{Affixes, add_tokens_of_config, id_list, token_text};
use crate::tokenizer_file::{Continuation, TokenizerFile, panic_message};

/// When a BOS token goes in front of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AddBos {
    /// As the model's files say: `add_bos_token` and `add_eos_token` of tokenizer_config.json
    /// where they are set, else the post-processor of tokenizer.json (both ends of the text).
    #[default]
    Auto,
    /// BOS in front, nothing behind; an error if the model has no BOS.
    Always,
    /// The text alone. Right for a rendered chat template, which writes its own special tokens.
    Never,
}

/// How a text is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Special tokens to put around the text. A BOS that the text begins with is never doubled.
    pub add_bos: AddBos,
    /// Whether special tokens written in the text (`<|im_end|>`) become those tokens. If not,
    /// they are plain text: a user cannot end a turn by typing its mark.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// For a raw prompt, as transformers encodes one.
    pub const PROMPT: Self = Self {
        add_bos: AddBos::Auto,
        parse_special: true,
    };
    /// For the output of a chat template, as transformers encodes it.
    pub const CHAT: Self = Self {
        add_bos: AddBos::Never,
        parse_special: true,
    };
    /// For text that is only text, with nothing added.
    pub const PLAIN: Self = Self {
        add_bos: AddBos::Never,
        parse_special: false,
    };
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self::PROMPT
    }
}

/// A model's tokenizer. Cheap to clone: clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    encoder: tokenizers::Tokenizer,
    /// The added tokens again, with the special ones not recognised in text.
    added_without_special: AddedVocabulary,
    continuation: Continuation,
    decode_plan: DecodePlan,
    vocab_size: usize,
    /// `vocab_size` of config.json: ids from here on have no embedding.
    model_vocab_size: Option<u64>,
    bos_id: Option<u32>,
    eos_ids: Vec<u32>,
    /// What [`AddBos::Auto`] puts before and after a text.
    affixes: Affixes,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("vocab_size", &self.shared.vocab_size)
            .field("bos_id", &self.shared.bos_id)
            .field("eos_ids", &self.shared.eos_ids)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Builds the tokenizer from the bytes of tokenizer.json and, where the model has them, the
    /// parsed tokenizer_config.json, config.json (null if unknown) and generation_config.json.
    ///
    /// # Errors
    /// If tokenizer.json is malformed, contradicts itself or uses an unknown kind of model or
    /// decoder, or if a token id field of the other files has the wrong type.
    pub fn new(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&Value>,
        config: &Value,
        generation_config: Option<&Value>,
    ) -> Result<Self, TextError> {
        let mut file = TokenizerFile::parse(tokenizer_json)?;
        if let Some(tokenizer_config) = tokenizer_config {
            add_tokens_of_config(&mut file, tokenizer_config);
        }
        // Models that also see or hear keep the language model's fields in text_config.
        let config = if config.get("vocab_size").is_none() {
            config.get("text_config").unwrap_or(config)
        } else {
            config
        };
        let model_vocab_size = config.get("vocab_size").and_then(Value::as_u64);
        let (built, post_processor, decoder) = file.build(model_vocab_size)?;
        let encoder = built.encoder;

        let named = |field: &str| {
            let name = tokenizer_config?.get(field).and_then(token_text)?;
            encoder.token_to_id(name)
        };
        let config_bos = id_list("config.json", "bos_token_id", Some(config))?
            .first()
            .copied();
        let bos_id = match tokenizer_config.and_then(|json| json.get("bos_token")) {
            Some(_) => named("bos_token"),
            None => config_bos.filter(|&id| encoder.id_to_token(id).is_some()),
        };
        let mut eos_ids = id_list("generation_config.json", "eos_token_id", generation_config)?;
        eos_ids.extend(id_list("config.json", "eos_token_id", Some(config))?);
        eos_ids.extend(named("eos_token"));
        eos_ids.sort_unstable();
        eos_ids.dedup();

        let mut affixes = Affixes::of_post_processor(&post_processor)?;
        let flag = |field: &str| tokenizer_config?.get(field)?.as_bool();
        if let Some(add_bos) = flag("add_bos_token") {
            affixes.prefix.retain(|&id| Some(id) != bos_id);
            affixes.prefix.splice(0..0, bos_id.filter(|_| add_bos));
        }
        if let Some(add_eos) = flag("add_eos_token") {
            let eos_id = named("eos_token");
            affixes.suffix.retain(|&id| Some(id) != eos_id);
            affixes.suffix.extend(eos_id.filter(|_| add_eos));
        }

        let mut added_without_special = encoder.get_added_vocabulary().clone();
        added_without_special.set_encode_special_tokens(true);
        let shared = Shared {
            added_without_special,
            continuation: built.continuation,
            decode_plan: DecodePlan::compile(&decoder)?,
            vocab_size: built.vocab_size,
            model_vocab_size,
            bos_id,
            eos_ids,
            affixes,
            encoder,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Encodes a text.
    ///
    /// # Errors
    /// If the tokenizer fails on the text, if a BOS is demanded that the model has not, or if the
    /// text contains a token beyond the model's vocabulary.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TextError> {
        let shared = &*self.shared;
        let text_ids = guard(|| shared.encode(text, options))?;
        let (prefix, suffix): (&[u32], &[u32]) = match options.add_bos {
            AddBos::Auto => (&shared.affixes.prefix, &shared.affixes.suffix),
            AddBos::Always => (shared.bos_id.as_slice(), &[]),
            AddBos::Never => (&[], &[]),
        };
        if options.add_bos == AddBos::Always && prefix.is_empty() {
            return Err(TextError::NoBosToken);
        }
        let prefix = if text_ids.starts_with(prefix) {
            &[]
        } else {
            prefix
        };
        let ids = [prefix, &text_ids, suffix].concat();
        if let Some(vocab_size) = shared.model_vocab_size
            && let Some(&id) = ids.iter().find(|&&id| u64::from(id) >= vocab_size)
        {
            let token = self.token_text(id).unwrap_or_default();
            return Err(TextError::TokenBeyondModel {
                token,
                id,
                vocab_size,
            });
        }
        Ok(ids)
    }

    /// Encodes plain text that continues another: nothing is added, and the tokenizers that put a
    /// space in front of every text put none. Special tokens are not recognised.
    ///
    /// # Errors
    /// If the tokenizer fails on the text.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, TextError> {
        guard(|| self.shared.encode_continuation(text))
    }

    /// The text of a list of tokens, exactly as Hugging Face tokenizers decodes it. Ids that the
    /// tokenizer does not know are passed over.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut decoder = self.stream_decoder(skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(decoder.push(id));
        }
        text.push_str(decoder.finish());
        text
    }

    /// A decoder for tokens that come one at a time.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(self.clone(), skip_special)
    }

    /// The token as written in the vocabulary (`Ġhello`, `▁hello`, `<0x0A>`, `</s>`).
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.shared.encoder.id_to_token(id)
    }

    /// The bytes that one token adds to a text that has already begun; they need not be UTF-8 by
    /// themselves. A special token stands for its name.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.token_text(id)
            .map(|token| self.shared.decode_plan.token_bytes(&token))
    }

    /// The id of a token as written in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.shared.encoder.token_to_id(token)
    }

    /// The largest id plus one. The model's vocabulary may be larger (padding), and some ids below
    /// may be unused.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// Whether a token is special: it steers the model and is no part of its text.
    pub fn is_special(&self, id: u32) -> bool {
        self.token_text(id)
            .is_some_and(|token| self.shared.is_special_text(&token))
    }

    /// The token that begins a text, if the model has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.shared.bos_id
    }

    /// The BOS token's name, for chat templates.
    pub fn bos_token(&self) -> Option<String> {
        self.token_text(self.shared.bos_id?)
    }

    /// Every token that ends a text, in ascending order: those of generation_config.json,
    /// config.json and tokenizer_config.json together.
    pub fn eos_ids(&self) -> &[u32] {
        &self.shared.eos_ids
    }

    pub(crate) fn decode_plan(&self) -> &DecodePlan {
        &self.shared.decode_plan
    }

    /// The token's name for decoding; none if it is unknown or to be skipped.
    pub(crate) fn token_for_decoding(&self, id: u32, skip_special: bool) -> Option<String> {
        self.token_text(id)
            .filter(|token| !(skip_special && self.shared.is_special_text(token)))
    }
}

impl Shared {
    fn is_special_text(&self, token: &str) -> bool {
        self.encoder.get_added_vocabulary().is_special_token(token)
    }

    /// Encodes the text alone.
    fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TextError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let added = if options.parse_special {
            self.encoder.get_added_vocabulary()
        } else {
            &self.added_without_special
        };
        let normalizer = self.encoder.get_normalizer();
        let pre_tokenizer = self.encoder.get_pre_tokenizer();
        let encoding = self.encode_with(text, added, normalizer, pre_tokenizer)?;
        if options.parse_special {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok(self.plain_ids(&encoding))
    }

    /// Encodes a text that continues another.
    fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let Continuation {
            normalizer,
            pre_tokenizer,
        } = &self.continuation;
        let added = &self.added_without_special;
        let encoding =
            self.encode_with(text, added, normalizer.as_ref(), pre_tokenizer.as_ref())?;
        Ok(self.plain_ids(&encoding))
    }

    fn encode_with(
        &self,
        text: &str,
        added: &AddedVocabulary,
        normalizer: Option<&NormalizerWrapper>,
        pre_tokenizer: Option<&PreTokenizerWrapper>,
    ) -> Result<Encoding, TextError> {
        let failed = |error: tokenizers::Error| TextError::Encode {
            detail: error.to_string(),
        };
        let mut pieces = added.extract_and_normalize(normalizer, text);
        if let Some(pre_tokenizer) = pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        self.encoder
            .get_model()
            .tokenize_in_pretokenized(&mut pieces, None)
            .map_err(failed)?;
        pieces
            .into_encoding(None, 0, OffsetType::None)
            .map_err(failed)
    }

    fn plain_ids(&self, encoding: &Encoding) -> Vec<u32> {
        let mut ids = Vec::with_capacity(encoding.len());
        for &id in encoding.get_ids() {
            self.push_plain(id, &mut ids);
        }
        ids
    }

    /// Appends a token of plain text. Some models' plain vocabulary holds the names of special
    /// tokens (Unigram pieces, whole words with `ignore_merges`); these are spelled out.
    fn push_plain(&self, id: u32, ids: &mut Vec<u32>) {
        let model = self.encoder.get_model();
        let special = model
            .id_to_token(id)
            .filter(|token| self.is_special_text(token));
        let Some(token) = special else {
            ids.push(id);
            return;
        };
        for character in token.chars() {
            let mut utf8 = [0; 4];
            let character: &str = character.encode_utf8(&mut utf8);
            match model.token_to_id(character) {
                Some(id) => ids.push(id),
                None => ids.extend(
                    character
                        .bytes()
                        .filter_map(|byte| model.token_to_id(&format!("<0x{byte:02X}>"))),
                ),
            }
        }
    }
}

/// Runs code of the `tokenizers` crate, which panics on some inputs, and turns a panic into an
/// error.
fn guard<T>(work: impl FnOnce() -> Result<T, TextError>) -> Result<T, TextError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(TextError::Encode {
            detail: panic_message(&*panic),
        })
    })
}
