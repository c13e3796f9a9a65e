//! How text is cut before byte-level BPE: `tokenizer.ggml.pre` as `tokenizers` documents.
//!
//! The patterns are those of the models' own `tokenizer.json`, where a model has one, and
//! otherwise llama.cpp's.

use serde_json::{Value, json};

use super::GgufError;

/// Words, numbers and punctuation with a space before them; OpenAI's GPT-2.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
/// Contractions in either case, numbers of up to three digits; Llama 3.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Llama 3, digits one by one; Qwen 2.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words split where lower case turns to upper; Mistral's Tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Tekken, with contractions kept on their words; GPT-4o, Llama 4, Phi-4-mini.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What llama.cpp applies, one after the other, to a file that does not say.
const DEFAULT: [&str; 4] = [r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

/// A way of cutting text.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// GPT-2's pattern, built into the byte-level step.
    Gpt2,
    /// Digits one by one, then GPT-2's pattern.
    DigitsThenGpt2,
    /// One pattern whose matches are kept together.
    Pattern(&'static str),
    /// Several patterns in a row.
    Default,
}

/// Everything that follows from `tokenizer.ggml.pre`.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    cut: Cut,
    /// Whether text is composed (NFC) first.
    composed: bool,
    /// Whether a whole word that is in the vocabulary is taken without merging.
    pub(crate) ignore_merges: bool,
    /// Whether the sequence starts with BOS where the file does not say.
    pub(crate) adds_bos: bool,
}

const fn pre(cut: Cut) -> PreTokenizer {
    PreTokenizer {
        cut,
        composed: false,
        ignore_merges: false,
        adds_bos: false,
    }
}

/// A known name's entry: the names, and what they stand for.
type Entry = (&'static [&'static str], PreTokenizer);

const KNOWN: &[Entry] = &[
    (&["default"], pre(Cut::Default)),
    (
        &[
            "gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "exaone4", "trillion", "mellum",
        ],
        pre(Cut::Gpt2),
    ),
    (
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        pre(Cut::DigitsThenGpt2),
    ),
    (
        &["qwen2", "deepseek-r1-qwen", "megrez", "kormo"],
        PreTokenizer {
            composed: true,
            ..pre(Cut::Pattern(QWEN2))
        },
    ),
    (
        &["stablelm2", "hunyuan", "grok-2"],
        pre(Cut::Pattern(QWEN2)),
    ),
    (
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "lfm2",
            "midm-2.0",
        ],
        PreTokenizer {
            ignore_merges: true,
            adds_bos: true,
            ..pre(Cut::Pattern(LLAMA3))
        },
    ),
    (
        &["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"],
        pre(Cut::Pattern(LLAMA3)),
    ),
    (
        &["tekken"],
        PreTokenizer {
            ignore_merges: true,
            adds_bos: true,
            ..pre(Cut::Pattern(TEKKEN))
        },
    ),
    (&["gpt-4o", "llama4"], pre(Cut::Pattern(GPT4O))),
];

impl PreTokenizer {
    /// The entry for `name`, or the default's where the file has none.
    pub(crate) fn find(name: Option<&str>) -> Result<&'static Self, GgufError> {
        let name = name.unwrap_or("default");
        KNOWN
            .iter()
            .find(|(names, _)| names.contains(&name))
            .map(|(_, entry)| entry)
            .ok_or_else(|| GgufError::UnknownTokenizer {
                what: "tokenizer.ggml.pre",
                found: name.to_owned(),
                supported: KNOWN
                    .iter()
                    .flat_map(|(names, _)| names.iter().copied())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// The `normalizer` of `tokenizer.json`.
    pub(crate) fn normalizer(&self) -> Value {
        if self.composed {
            json!({"type": "NFC"})
        } else {
            Value::Null
        }
    }

    /// The `pre_tokenizer` of `tokenizer.json`.
    pub(crate) fn document(&self) -> Value {
        let byte_level = |use_regex: bool| {
            json!({
                "type": "ByteLevel",
                "add_prefix_space": false,
                "trim_offsets": true,
                "use_regex": use_regex,
            })
        };
        let split = |pattern: &str| {
            json!({
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": false,
            })
        };
        let steps = match self.cut {
            Cut::Gpt2 => return byte_level(true),
            Cut::DigitsThenGpt2 => {
                vec![
                    json!({"type": "Digits", "individual_digits": true}),
                    byte_level(true),
                ]
            }
            Cut::Pattern(pattern) => vec![split(pattern), byte_level(false)],
            Cut::Default => {
                let mut steps: Vec<Value> = DEFAULT.into_iter().map(split).collect();
                steps.push(byte_level(false));
                steps
            }
        };
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}
