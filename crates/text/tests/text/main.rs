//! Tests of the text crate through its public interface.

mod banned;
mod chat;
mod encode;
mod hostile;
mod stop;
mod stream;
mod vocabulary;

use std::path::PathBuf;

use oxllama_text::Tokenizer;
use serde_json::Value;

const TINY_TOKENIZERS: [&str; 3] = ["byte_level", "sentencepiece", "unigram"];

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json_fixture(name: &str) -> Value {
    serde_json::from_slice(&fixture(name)).expect("fixtures are JSON")
}

fn tiny_file(name: &str) -> Vec<u8> {
    fixture(&format!("{name}.tokenizer.json"))
}

/// A tokenizer from its tokenizer.json alone.
fn tiny(name: &str) -> Tokenizer {
    Tokenizer::new(&tiny_file(name), None, &Value::Null, None).expect("fixtures are valid")
}

/// A file of the folder of larger test data; without it the test is skipped, loudly.
#[expect(clippy::print_stderr, reason = "a skipped test has to be seen")]
fn shared(path: &str) -> Option<Vec<u8>> {
    let folder = std::env::var_os("OXLLAMA_SHARED").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let found = std::fs::read(folder.join(path)).ok();
    if found.is_none() {
        eprintln!("SKIPPED: {} not found", folder.join(path).display());
    }
    found
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of token ids")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a string")
}
