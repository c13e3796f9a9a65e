//! Constraints through their public interface, obeyed by a model that draws at random.

mod grammars;
mod hostile;
mod rollback;
mod schema_generator;
mod schemas;
mod writer;

use std::path::{Path, PathBuf};

use oxllama_engine::ConstraintCompiler;
use oxllama_text::{Tokenizer, VocabularyIndex};
use serde_json::{Value, json};

/// A tokenizer with its compiler.
struct Model {
    tokenizer: Tokenizer,
    index: VocabularyIndex,
    compiler: ConstraintCompiler,
    vocab_size: usize,
}

impl Model {
    fn new(tokenizer: Tokenizer) -> Self {
        // As models do, round the vocabulary up.
        let vocab_size = tokenizer.vocab_size().next_multiple_of(64);
        let compiler = ConstraintCompiler::new(&tokenizer, vocab_size).unwrap();
        Self {
            index: VocabularyIndex::new(&tokenizer),
            tokenizer,
            compiler,
            vocab_size,
        }
    }

    /// The tiny tokenizers of the text crate's tests, with `eos_ids` as stop tokens.
    fn tiny(name: &str, eos_ids: &[u32]) -> Self {
        let path = format!("../text/tests/fixtures/{name}.tokenizer.json");
        let file = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        let generation_config = json!({ "eos_token_id": eos_ids });
        let tokenizer = Tokenizer::new(&file, None, &Value::Null, Some(&generation_config));
        Self::new(tokenizer.unwrap())
    }

    /// Bytes and the merges of some English words, two stop tokens.
    fn byte_level() -> Self {
        Self::tiny("byte_level", &[1, 321])
    }

    /// The tokens with exactly these texts, in the same order, as far as there are any.
    fn ids_of<'a>(&'a self, texts: &'a [&str]) -> impl Iterator<Item = u32> + 'a {
        texts.iter().filter_map(|text| {
            let first = self.index.tokens_with_prefix(text.as_bytes()).next();
            first.filter(|&id| self.index.token_bytes(id) == text.as_bytes())
        })
    }

    /// The tokenizer of a real model with 49,152 tokens; without it the test is skipped, loudly.
    #[expect(clippy::print_stderr, reason = "a skipped test has to be seen")]
    fn smollm2() -> Option<Self> {
        let shared = std::env::var_os("OXLLAMA_SHARED").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
            PathBuf::from,
        );
        let folder = shared.join("models/smollm2-135m-exl2-4.0bpw");
        let Some(file) = read(&folder.join("tokenizer.json")) else {
            eprintln!("SKIPPED: {} not found", folder.display());
            return None;
        };
        let config = |name: &str| {
            let file = read(&folder.join(name))?;
            serde_json::from_slice::<Value>(&file).ok()
        };
        let tokenizer = Tokenizer::new(
            &file,
            config("tokenizer_config.json").as_ref(),
            &config("config.json").unwrap_or_default(),
            config("generation_config.json").as_ref(),
        );
        Some(Self::new(tokenizer.unwrap()))
    }
}

fn read(path: &Path) -> Option<Vec<u8>> {
    std::fs::read(path).ok()
}
