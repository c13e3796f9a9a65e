//! `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` out of metadata.
//!
//! Two kinds of vocabulary: byte-level BPE (`gpt2`), whose merges are in the file, and
//! SentencePiece BPE (`llama`), whose merges follow from the scores of its pieces.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use super::GgufError;
use super::file::Metadata;
use super::pretokenizer::PreTokenizer;

/// SentencePiece's mark for a space.
const SPACE_MARK: &str = "\u{2581}";

/// Names by which llama.cpp, too, knows a token that ends a turn, whatever the metadata say.
const TURN_ENDS: [&str; 5] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
];

/// Longest token accepted, in bytes: several times what any vocabulary has. Finding the merges
/// of a vocabulary takes time proportional to its tokens' lengths squared.
const MAX_TOKEN_BYTES: usize = 1_024;

/// What a token is, numbered as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenKind {
    fn from_number(number: f64) -> Option<Self> {
        Some(match number as i64 {
            // llama.cpp's "undefined".
            0 | 1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => return None,
        })
    }
}

/// The two kinds of vocabulary.
#[derive(Debug, Clone, Copy)]
enum Kind {
    ByteLevel(&'static PreTokenizer),
    SentencePiece,
}

/// The file's vocabulary and special tokens, checked.
#[derive(Debug)]
pub(crate) struct Tokenizer<'a> {
    metadata: Metadata<'a>,
    kind: Kind,
    /// Gemma orders its pieces by rank and writes placeholders for scores.
    gemma: bool,
    tokens: Vec<&'a str>,
    kinds: Vec<TokenKind>,
    bos: Option<usize>,
    eos: Option<usize>,
    unknown: Option<usize>,
    padding: Option<usize>,
    add_bos: bool,
    add_eos: bool,
}

impl<'a> Tokenizer<'a> {
    /// Reads the vocabulary of a file of `architecture`; `rows` is the embedding's height.
    pub(crate) fn new(
        metadata: Metadata<'a>,
        architecture: &str,
        rows: usize,
    ) -> Result<Self, GgufError> {
        let model = metadata.text("tokenizer.ggml.model")?;
        let kind = match model {
            Some("gpt2") => {
                Kind::ByteLevel(PreTokenizer::find(metadata.text("tokenizer.ggml.pre")?)?)
            }
            Some("llama") => Kind::SentencePiece,
            Some(other) => {
                return Err(GgufError::UnknownTokenizer {
                    what: "tokenizer.ggml.model",
                    found: other.to_owned(),
                    supported: "gpt2, llama".to_owned(),
                });
            }
            None => {
                return Err(GgufError::MissingKey {
                    key: "tokenizer.ggml.model".to_owned(),
                    expected: "the kind of tokenizer, gpt2 or llama",
                });
            }
        };
        let key = "tokenizer.ggml.tokens";
        let tokens = metadata
            .strings(key)?
            .ok_or_else(|| GgufError::MissingKey {
                key: key.to_owned(),
                expected: "the vocabulary",
            })?;
        if tokens.is_empty() || tokens.len() > rows {
            return Err(GgufError::malformed(
                format!("metadata key `{key}`"),
                format!("{} tokens", tokens.len()),
                format!("1 to {rows}, the rows of `token_embd.weight`"),
            ));
        }
        if let Some(id) = tokens
            .iter()
            .position(|token| token.len() > MAX_TOKEN_BYTES)
        {
            return Err(GgufError::malformed(
                format!("token {id}"),
                format!("{} bytes", tokens[id].len()),
                format!("at most {MAX_TOKEN_BYTES} bytes"),
            ));
        }
        let kinds = token_kinds(metadata, tokens.len())?;
        let special = |name: &str| special_token(metadata, name, tokens.len());
        let (bos, eos) = (special("bos_token_id")?, special("eos_token_id")?);
        let (unknown, padding) = (special("unknown_token_id")?, special("padding_token_id")?);
        let adds_bos = match kind {
            Kind::ByteLevel(pre) => pre.adds_bos,
            Kind::SentencePiece => true,
        };
        // A default of the kind needs the token; only the file itself can insist on it.
        let add_bos = metadata.boolean("tokenizer.ggml.add_bos_token")?;
        let add_bos = add_bos.unwrap_or(adds_bos && bos.is_some());
        let add_eos = metadata
            .boolean("tokenizer.ggml.add_eos_token")?
            .unwrap_or(false);
        for (adds, token, key) in [
            (add_bos, bos, "tokenizer.ggml.bos_token_id"),
            (add_eos, eos, "tokenizer.ggml.eos_token_id"),
        ] {
            if adds && token.is_none() {
                return Err(GgufError::MissingKey {
                    key: key.to_owned(),
                    expected: "the token that the file says to add to every text",
                });
            }
        }
        Ok(Tokenizer {
            metadata,
            kind,
            gemma: architecture.starts_with("gemma"),
            tokens,
            kinds,
            bos,
            eos,
            unknown,
            padding,
            add_bos,
            add_eos,
        })
    }

    /// `bos_token_id` and `eos_token_id` for `config.json`, and `pad_token_id` on request.
    pub(crate) fn add_ids(&self, config: &mut Map<String, Value>, with_padding: bool) {
        config.insert("bos_token_id".to_owned(), json!(self.bos));
        config.insert("eos_token_id".to_owned(), json!(self.eos));
        if with_padding {
            config.insert("pad_token_id".to_owned(), json!(self.padding));
        }
    }

    /// `generation_config.json`: BOS, padding, and every token that ends a text or a turn.
    pub(crate) fn generation_config(&self) -> Result<Option<Value>, GgufError> {
        let Some(eos) = self.eos else {
            return Ok(None);
        };
        let mut ends = vec![eos];
        for key in ["eot_token_id", "eom_token_id"] {
            ends.extend(special_token(self.metadata, key, self.tokens.len())?);
        }
        let named = self.tokens.iter().zip(&self.kinds).enumerate();
        ends.extend(
            named
                .filter(|(_, (token, kind))| {
                    **kind == TokenKind::Control && TURN_ENDS.contains(token)
                })
                .map(|(id, _)| id),
        );
        let mut seen = HashSet::new();
        ends.retain(|id| seen.insert(*id));
        let mut document = Map::new();
        if let Some(bos) = self.bos {
            document.insert("bos_token_id".to_owned(), json!(bos));
        }
        let ends = if ends.len() == 1 {
            json!(eos)
        } else {
            json!(ends)
        };
        document.insert("eos_token_id".to_owned(), ends);
        if let Some(padding) = self.padding {
            document.insert("pad_token_id".to_owned(), json!(padding));
        }
        Ok(Some(Value::Object(document)))
    }

    /// `tokenizer_config.json`.
    pub(crate) fn config(&self, context_tokens: Option<&Value>) -> Result<Value, GgufError> {
        let mut document = Map::new();
        for (key, id) in [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unknown),
            ("pad_token", self.padding),
        ] {
            let content = id.map(|id| self.content(id));
            // BOS and EOS are always named: readers ask for them.
            if content.is_some() || matches!(key, "bos_token" | "eos_token") {
                document.insert(key.to_owned(), json!(content));
            }
        }
        document.insert("add_bos_token".to_owned(), json!(self.add_bos));
        document.insert("add_eos_token".to_owned(), json!(self.add_eos));
        document.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        if let Some(context_tokens) = context_tokens {
            document.insert("model_max_length".to_owned(), context_tokens.clone());
        }
        if let Some(template) = self.metadata.text("tokenizer.chat_template")? {
            document.insert("chat_template".to_owned(), json!(template));
        }
        document.insert(
            "tokenizer_class".to_owned(),
            json!("PreTrainedTokenizerFast"),
        );
        Ok(Value::Object(document))
    }

    /// `tokenizer.json`.
    pub(crate) fn document(&self) -> Result<Value, GgufError> {
        let (normalizer, pre_tokenizer, decoder, model) = match self.kind {
            Kind::ByteLevel(pre) => (
                pre.normalizer(),
                pre.document(),
                json!({
                    "type": "ByteLevel",
                    "add_prefix_space": true,
                    "trim_offsets": true,
                    "use_regex": true,
                }),
                self.model(&self.stored_merges()?, pre.ignore_merges),
            ),
            Kind::SentencePiece => {
                let prefix = self.metadata.boolean("tokenizer.ggml.add_space_prefix")?;
                let prefix = prefix.unwrap_or(!self.gemma);
                (
                    space_normalizer(prefix),
                    Value::Null,
                    space_decoder(prefix),
                    self.model(&self.scored_merges()?, false),
                )
            }
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": decoder,
            "model": model,
        }))
    }

    /// A token as `tokenizer.json` spells it.
    ///
    /// Gemma's files have its runs of spaces as spaces, its own `tokenizer.json` as marks.
    fn content(&self, id: usize) -> String {
        let token = self.tokens[id];
        let spaces = !token.is_empty() && token.bytes().all(|byte| byte == b' ');
        if spaces && matches!(self.kind, Kind::SentencePiece) {
            SPACE_MARK.repeat(token.len())
        } else {
            token.to_owned()
        }
    }

    /// Tokens that are matched in the text before anything else.
    fn added_tokens(&self) -> Vec<Value> {
        let named = [self.bos, self.eos, self.unknown, self.padding];
        let mut added = Vec::new();
        for (id, kind) in self.kinds.iter().enumerate() {
            let special = match kind {
                _ if named.contains(&Some(id)) => true,
                TokenKind::Control => true,
                TokenKind::Unknown => matches!(self.kind, Kind::SentencePiece),
                TokenKind::UserDefined => false,
                TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => continue,
            };
            if !special && *kind != TokenKind::UserDefined || self.tokens[id].is_empty() {
                continue;
            }
            added.push(json!({
                "id": id,
                "content": self.content(id),
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special,
            }));
        }
        added
    }

    fn model(&self, merges: &[(String, String)], ignore_merges: bool) -> Value {
        let vocabulary: Map<String, Value> = (0..self.tokens.len())
            .map(|id| (self.content(id), json!(id)))
            .collect();
        let sentencepiece = matches!(self.kind, Kind::SentencePiece);
        let unknown = self.unknown.filter(|_| sentencepiece);
        json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown.map(|id| self.content(id)),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": sentencepiece,
            "byte_fallback": sentencepiece,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        })
    }

    /// The file's merges, best first.
    fn stored_merges(&self) -> Result<Vec<(String, String)>, GgufError> {
        let key = "tokenizer.ggml.merges";
        let merges = self.metadata.strings(key)?;
        let merges = merges.ok_or_else(|| GgufError::MissingKey {
            key: key.to_owned(),
            expected: "the merges of byte-level BPE",
        })?;
        let known: HashMap<&str, ()> = self.tokens.iter().map(|token| (*token, ())).collect();
        let mut joined = String::new();
        let mut pairs = Vec::with_capacity(merges.len());
        for (rank, merge) in merges.iter().enumerate() {
            let malformed = |expected: &str| {
                GgufError::malformed(format!("merge {rank}"), format!("`{merge}`"), expected)
            };
            let (left, right) = merge
                .split_once(' ')
                .filter(|(_, right)| !right.contains(' '))
                .ok_or_else(|| malformed("two tokens with one space between them"))?;
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            for part in [left, right, &joined] {
                if !known.contains_key(part) {
                    return Err(malformed("parts and a result that are in the vocabulary"));
                }
            }
            pairs.push((left.to_owned(), right.to_owned()));
        }
        Ok(pairs)
    }

    /// The merges that SentencePiece's scores stand for, best first.
    ///
    /// SentencePiece joins the two neighbours whose piece scores highest; a list of merges says
    /// the same if each way of cutting a piece in two stands at the rank of the piece. Pieces
    /// that text can never be merged into (control, unknown, bytes) take no part. Equal scores
    /// go longest left part first, then longest right part, as Hugging Face's converter has it.
    fn scored_merges(&self) -> Result<Vec<(String, String)>, GgufError> {
        let key = "tokenizer.ggml.scores";
        let scores = match self.metadata.numbers(key)? {
            Some(scores) => scores,
            None if self.gemma => Vec::new(),
            None => {
                return Err(GgufError::MissingKey {
                    key: key.to_owned(),
                    expected: "the scores of the SentencePiece pieces",
                });
            }
        };
        if !self.gemma && scores.len() != self.tokens.len() {
            return Err(GgufError::malformed(
                format!("metadata key `{key}`"),
                format!("{} scores", scores.len()),
                format!("{}, one for each token", self.tokens.len()),
            ));
        }
        let contents: Vec<String> = (0..self.tokens.len()).map(|id| self.content(id)).collect();
        let takes_part = |id: usize| {
            matches!(
                self.kinds[id],
                TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused
            )
        };
        let ids: HashMap<&str, usize> = contents
            .iter()
            .enumerate()
            .filter(|&(id, _)| takes_part(id))
            .map(|(id, content)| (content.as_str(), id))
            .collect();
        let mut merges: Vec<Merge<'_>> = Vec::new();
        for (id, content) in contents
            .iter()
            .enumerate()
            .filter(|&(id, _)| takes_part(id))
        {
            let score = if self.gemma {
                -(id as f64)
            } else if self.kinds[id] == TokenKind::UserDefined {
                // SentencePiece takes these whole; converters lose the score that says so.
                0.0
            } else {
                scores[id]
            };
            let first = merges.len();
            for (cut, _) in content.char_indices().skip(1) {
                let (left, right) = content.split_at(cut);
                if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
                    merges.push(Merge {
                        score,
                        left,
                        right,
                        ids: (left_id, right_id),
                    });
                }
            }
            merges[first..].sort_by_key(|merge| merge.ids);
        }
        let lengths = |merge: &Merge<'_>| (merge.left.chars().count(), merge.right.chars().count());
        merges.sort_by(|a, b| {
            b.score
                .total_cmp(&a.score)
                .then_with(|| lengths(b).cmp(&lengths(a)))
        });
        Ok(merges
            .iter()
            .map(|merge| (merge.left.to_owned(), merge.right.to_owned()))
            .collect())
    }

    /// Adds BOS and EOS, where the file says so.
    fn post_processor(&self) -> Value {
        let bos = self.bos.filter(|_| self.add_bos);
        let eos = self.eos.filter(|_| self.add_eos);
        if bos.is_none() && eos.is_none() {
            return Value::Null;
        }
        let piece = |id: usize, type_id: u32| json!({"SpecialToken": {"id": self.content(id), "type_id": type_id}});
        let around = |sequence: &str, type_id: u32| {
            let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            bos.map(|id| piece(id, type_id))
                .into_iter()
                .chain([text])
                .chain(eos.map(|id| piece(id, type_id)))
                .collect::<Vec<Value>>()
        };
        let (first, second) = (around("A", 0), around("B", 1));
        let pair = [first.clone(), second].concat();
        let special: Map<String, Value> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|id| {
                let content = self.content(id);
                let entry = json!({"id": content, "ids": [id], "tokens": [content]});
                (content, entry)
            })
            .collect();
        json!({
            "type": "TemplateProcessing",
            "single": first,
            "pair": pair,
            "special_tokens": special,
        })
    }
}

/// Two pieces that make a third.
struct Merge<'a> {
    /// The third's score.
    score: f64,
    left: &'a str,
    right: &'a str,
    ids: (usize, usize),
}

/// The kind of each token; all normal where the file does not say.
fn token_kinds(metadata: Metadata<'_>, count: usize) -> Result<Vec<TokenKind>, GgufError> {
    let key = "tokenizer.ggml.token_type";
    let Some(numbers) = metadata.numbers(key)? else {
        return Ok(vec![TokenKind::Normal; count]);
    };
    if numbers.len() != count {
        return Err(GgufError::malformed(
            format!("metadata key `{key}`"),
            format!("{} types", numbers.len()),
            format!("{count}, one for each token"),
        ));
    }
    numbers
        .into_iter()
        .map(|number| {
            TokenKind::from_number(number).ok_or_else(|| {
                GgufError::malformed(format!("metadata key `{key}`"), number, "types from 0 to 6")
            })
        })
        .collect()
}

/// The id of a special token; `None` where the file has none, or has all bits set for none.
fn special_token(
    metadata: Metadata<'_>,
    name: &str,
    count: usize,
) -> Result<Option<usize>, GgufError> {
    let key = format!("tokenizer.ggml.{name}");
    if metadata.get(&key).and_then(super::Value::as_u64) == Some(u64::from(u32::MAX)) {
        return Ok(None);
    }
    match metadata.integer(&key)? {
        Some(id) if id >= count as u64 => Err(GgufError::malformed(
            format!("metadata key `{key}`"),
            id,
            format!("an id below {count}"),
        )),
        id => Ok(id.map(|id| id as usize)),
    }
}

/// Spaces become marks; `prefix` puts one before each stretch of text.
fn space_normalizer(prefix: bool) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK});
    if !prefix {
        return replace;
    }
    json!({
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": SPACE_MARK}, replace],
    })
}

/// Undoes [`space_normalizer`], and joins bytes to characters.
fn space_decoder(prefix: bool) -> Value {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}
