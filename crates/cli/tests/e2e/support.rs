//! Models to run the binary on.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{Output, Oxllama};

/// A whole tiny model in a file of the repository: weights, tokenizer and chat template.
pub(crate) fn tiny(family: &str) -> PathBuf {
    root().join(format!("tests/fixtures/gguf/{family}.gguf"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the workspace is there")
}

/// A path in the folder of larger data; says loudly when it is not there.
pub(crate) fn shared(relative: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("OXLLAMA_SHARED")
        .map_or_else(|| root().join("../shared"), |folder| root().join(folder));
    let path = folder.join(relative);
    if path.exists() {
        return Some(path);
    }
    skipped(&format!("{} not found", path.display()));
    None
}

/// Says why a test does not test anything on this machine.
#[expect(clippy::print_stderr, reason = "a skipped test must be seen")]
pub(crate) fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// Standard output as JSON.
#[track_caller]
pub(crate) fn json(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// A list of token ids.
#[track_caller]
pub(crate) fn ids(value: &Value) -> Vec<u64> {
    let ids = value.as_array().expect("a list");
    ids.iter().map(|id| id.as_u64().expect("an id")).collect()
}

/// The names of an object's fields, in order.
#[track_caller]
pub(crate) fn keys(value: &Value) -> Vec<&str> {
    let object = value.as_object().expect("an object");
    object.keys().map(String::as_str).collect()
}

/// `oxllama generate MODEL --prompt PROMPT --json ARGUMENTS` to its end.
#[track_caller]
pub(crate) fn generate(model: &Path, prompt: &str, arguments: &[&str]) -> Value {
    let output = Oxllama::new()
        .arg("generate")
        .arg(model)
        .args(["--prompt", prompt, "--json"])
        .args(arguments)
        .run()
        .succeeded();
    json(&output)
}

/// A tiny model as a Hugging Face directory, in a folder of its own.
pub(crate) fn tiny_directory(family: &str) -> (TempDir, PathBuf) {
    let folder = TempDir::new().expect("a temporary directory");
    let directory = folder.path().join(family);
    Oxllama::new()
        .arg("import")
        .arg(tiny(family))
        .arg(&directory)
        .run()
        .succeeded();
    (folder, directory)
}

/// Changes one JSON document of a model's directory.
pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let text = fs::read_to_string(path).expect("the document is there");
    let mut document = serde_json::from_str(&text).expect("it is JSON");
    edit(&mut document);
    fs::write(path, document.to_string()).expect("it can be written");
}

/// Writes a directory of a model's real headers, with fp16 weights that are holes in the file.
pub(crate) fn write_sparse_model(
    directory: &Path,
    config: &Value,
    tensors: impl IntoIterator<Item = (String, Vec<u64>)>,
) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        header.insert(
            name,
            json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]}),
        );
    }
    let mut header = Value::Object(header).to_string();
    let padding = header.len().next_multiple_of(8) - header.len();
    header.push_str(&" ".repeat(padding));
    fs::create_dir_all(directory).expect("a directory");
    fs::write(directory.join("config.json"), config.to_string()).expect("a config");
    let mut file = File::create(directory.join("model.safetensors")).expect("a file");
    let header_bytes = header.len() as u64;
    file.write_all(&header_bytes.to_le_bytes())
        .and_then(|()| file.write_all(header.as_bytes()))
        .and_then(|()| file.set_len(8 + header_bytes + end))
        .expect("the disk holds sparse files");
}
