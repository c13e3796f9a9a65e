//! Which special tokens a model's files ask for.

use serde_json::Value;

use crate::error::TextError;
use crate::tokenizer_file::{AddedTokenEntry, TokenizerFile};

/// Fields of tokenizer_config.json that name one special token.
const TOKEN_FIELDS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
];

/// A special token of tokenizer_config.json: a string, or an object with `content`.
pub(crate) fn token_text(value: &Value) -> Option<&str> {
    value
        .as_str()
        .or_else(|| value.get("content").and_then(Value::as_str))
}

/// Adds to the file the special tokens that only tokenizer_config.json knows of, as transformers
/// does when it loads a tokenizer.
pub(crate) fn add_tokens_of_config(file: &mut TokenizerFile, tokenizer_config: &Value) {
    let declared = tokenizer_config
        .get("added_tokens_decoder")
        .and_then(Value::as_object);
    for (id, token) in declared.into_iter().flatten() {
        let (Ok(id), Some(content)) = (id.parse::<u64>(), token_text(token)) else {
            continue;
        };
        if file
            .added_tokens
            .iter()
            .any(|known| known.content == content)
        {
            continue;
        }
        let flag = |name| token.get(name).and_then(Value::as_bool);
        file.added_tokens.push(AddedTokenEntry {
            id,
            content: content.to_owned(),
            single_word: flag("single_word").unwrap_or(false),
            lstrip: flag("lstrip").unwrap_or(false),
            rstrip: flag("rstrip").unwrap_or(false),
            normalized: flag("normalized"),
            special: flag("special").unwrap_or(false),
        });
    }
    let named = TOKEN_FIELDS
        .iter()
        .filter_map(|&field| tokenizer_config.get(field));
    let further = tokenizer_config
        .get("additional_special_tokens")
        .and_then(Value::as_array);
    for token in named
        .chain(further.into_iter().flatten())
        .filter_map(token_text)
    {
        file.add_named_special_token(token);
    }
}

/// Token ids in an integer-or-list field such as `eos_token_id`.
pub(crate) fn id_list(
    file: &'static str,
    field: &'static str,
    json: Option<&Value>,
) -> Result<Vec<u32>, TextError> {
    let value = json
        .and_then(|json| json.get(field))
        .unwrap_or(&Value::Null);
    let items = match value {
        Value::Null => &[],
        Value::Array(items) => items.as_slice(),
        other => std::slice::from_ref(other),
    };
    let mut ids = Vec::new();
    for item in items {
        match item.as_i64() {
            // -1 means "none" in some configs; other ids no vocabulary has never occur either.
            Some(id) => ids.extend(u32::try_from(id)),
            None => {
                return Err(TextError::ConfigField {
                    file,
                    field,
                    found: value.to_string(),
                    expected: "an integer, a list of integers, or null",
                });
            }
        }
    }
    Ok(ids)
}

/// Token ids that a `post_processor` of tokenizer.json puts before and after a single text.
#[derive(Default)]
pub(crate) struct Affixes {
    pub(crate) prefix: Vec<u32>,
    pub(crate) suffix: Vec<u32>,
}

impl Affixes {
    pub(crate) fn of_post_processor(post_processor: &Value) -> Result<Self, TextError> {
        let mut affixes = Self::default();
        affixes.extend(post_processor)?;
        Ok(affixes)
    }

    fn extend(&mut self, processor: &Value) -> Result<(), TextError> {
        match processor.get("type").and_then(Value::as_str) {
            Some("Sequence") => {
                let parts = processor.get("processors").and_then(Value::as_array);
                parts
                    .into_iter()
                    .flatten()
                    .try_for_each(|part| self.extend(part))
            }
            Some("TemplateProcessing") => self.extend_by_template(processor),
            Some("BertProcessing" | "RobertaProcessing") => {
                let id = |field: &str| {
                    let id = processor.get(field).and_then(|pair| pair.get(1)?.as_u64());
                    id.and_then(|id| u32::try_from(id).ok())
                        .ok_or_else(|| malformed(processor))
                };
                self.prefix.insert(0, id("cls")?);
                self.suffix.push(id("sep")?);
                Ok(())
            }
            // ByteLevel only moves offsets.
            _ => Ok(()),
        }
    }

    fn extend_by_template(&mut self, processor: &Value) -> Result<(), TextError> {
        let mut before = Vec::new();
        let mut after = None;
        let pieces = processor.get("single").and_then(Value::as_array);
        for piece in pieces.ok_or_else(|| malformed(processor))? {
            if piece.get("Sequence").is_some() {
                after = Some(Vec::new());
                continue;
            }
            let name = piece
                .get("SpecialToken")
                .and_then(|token| token.get("id")?.as_str());
            let ids = name
                .and_then(|name| {
                    processor
                        .get("special_tokens")?
                        .get(name)?
                        .get("ids")?
                        .as_array()
                })
                .ok_or_else(|| malformed(processor))?;
            for id in ids {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                after
                    .as_mut()
                    .unwrap_or(&mut before)
                    .push(id.ok_or_else(|| malformed(processor))?);
            }
        }
        before.append(&mut self.prefix);
        self.prefix = before;
        self.suffix.extend(after.unwrap_or_default());
        Ok(())
    }
}

fn malformed(processor: &Value) -> TextError {
    let kind = processor
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or("unknown");
    TextError::TokenizerInconsistent {
        detail: format!("the post_processor of type {kind} names a special token without ids"),
    }
}
