//! Real weights in a few megabytes: the first layers of a model and a part of its vocabulary, with
//! the CPU backend's logits for real text.
//!
//! A whole model does not fit where tests have to travel, and most of a small one is its
//! vocabulary (SmolLM2-135M: 57 MB of embedding, 23 MB of head, 2 MB a layer). An embedding's
//! rows and a head's columns do not depend on one another, so those of any tokens can be taken:
//! those of the text, then the lowest ids. What is left of the arithmetic is the original's to
//! the bit, on states that real text makes.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use oxllama_cpu::{CpuDevice, CpuOptions};
use oxllama_format::{DType, HostMemory, ModelSource, SafetensorsWriter, TensorInfo, TensorSource};
use oxllama_memory::{Bytes, DeviceId, DeviceInfo, Inventory, Ledger};
use oxllama_text::{EncodeOptions, Tokenizer};
use serde_json::{Value, json};

use crate::checks::print;
use crate::models::{feed, load, request};

/// Tensors that hold what is expected of a cut.
pub(crate) const TOKEN_IDS: &str = "expected.token_ids";
pub(crate) const LOGITS: &str = "expected.logits";

/// Tokens of the vocabulary that are taken are a multiple of this, as columns of EXL2 are.
const VOCABULARY_BLOCK: usize = 32;

/// How much is taken of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CutSize {
    pub(crate) layers: usize,
    pub(crate) vocabulary: usize,
    /// Tokens of the text.
    pub(crate) tokens: usize,
}

impl CutSize {
    /// Seven megabytes of SmolLM2-135M, and two of logits.
    pub(crate) const OF_BUNDLE: Self = Self {
        layers: 2,
        vocabulary: 2048,
        tokens: 256,
    };
}

/// Writes a cut of the model at `model` into the folder `out`, with what the CPU computes for the
/// start of the text at `text`.
pub(crate) fn make(model: &Path, text: &Path, out: &Path, size: CutSize) -> Result<()> {
    let source = ModelSource::open(model)?;
    let text =
        std::fs::read_to_string(text).with_context(|| format!("cannot read {}", text.display()))?;
    let ids = encode(&source, &text)?;
    ensure!(
        ids.len() >= size.tokens,
        "the text has {} tokens, expected {} or more",
        ids.len(),
        size.tokens
    );
    let cut = Cut::new(&source, &ids[..size.tokens], size)?;
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let expected_path = out.join("expected.safetensors");
    if expected_path.exists() {
        std::fs::remove_file(&expected_path)?;
    }
    cut.write(out)?;
    let logits = on_cpu(out, &cut.token_ids)?;
    write_expected(&expected_path, &cut, &logits)?;
    print(&format!(
        "{}: {} layers and {} tokens of {}, logits of {} tokens",
        out.display(),
        size.layers,
        cut.kept.len(),
        model.display(),
        cut.token_ids.len()
    ));
    Ok(())
}

/// The text's tokens, none added.
pub(crate) fn encode(source: &ModelSource, text: &str) -> Result<Vec<u32>> {
    let tokenizer = Tokenizer::new(
        &source.tokenizer_json()?,
        source.tokenizer_config(),
        source.config(),
        source.generation_config(),
    )?;
    Ok(tokenizer.encode(text, EncodeOptions::PLAIN)?)
}

/// The logits that the CPU backend computes for `token_ids`, f32 `[tokens, vocabulary]`.
pub(crate) fn on_cpu(model: &Path, token_ids: &[u32]) -> Result<Vec<f32>> {
    let device = CpuDevice::new(DeviceId::cpu(0), CpuOptions::default())?;
    let memory = Bytes(HostMemory::read()?.total_bytes);
    let info = DeviceInfo::new(DeviceId::cpu(0), "CPU", memory);
    let inventory = Inventory::new(vec![info])?;
    let ledger = Ledger::new(&inventory);
    let books = (inventory, ledger);
    let mut model = load(model, &request(token_ids.len() as u64, 1), &device, &books)?;
    feed(&mut model, token_ids, 0, 0)
}

/// What a cut takes of a model.
struct Cut<'a> {
    source: &'a ModelSource,
    config: Value,
    layers: usize,
    /// The tokens that are taken, ascending: token `i` of the cut is `kept[i]` of the model.
    kept: Vec<usize>,
    /// The text in the cut's numbers.
    token_ids: Vec<u32>,
}

impl<'a> Cut<'a> {
    fn new(source: &'a ModelSource, text: &[u32], size: CutSize) -> Result<Self> {
        let mut config = source.config().clone();
        let number = |key: &str| {
            let value = config[key].as_u64();
            let value = value.with_context(|| format!("config.json has no {key}"))?;
            Ok::<_, anyhow::Error>(usize::try_from(value)?)
        };
        let (layers, vocab_size) = (number("num_hidden_layers")?, number("vocab_size")?);
        ensure!(
            size.vocabulary.is_multiple_of(VOCABULARY_BLOCK) && size.vocabulary <= vocab_size,
            "{} tokens of a vocabulary, expected a multiple of {VOCABULARY_BLOCK} up to \
             {vocab_size}",
            size.vocabulary
        );
        ensure!(
            (1..=layers).contains(&size.layers),
            "{} layers, expected 1 to {layers}",
            size.layers
        );
        let mut kept: BTreeSet<usize> = text.iter().map(|&id| id as usize).collect();
        for id in 0..vocab_size {
            if kept.len() >= size.vocabulary {
                break;
            }
            kept.insert(id);
        }
        ensure!(
            kept.len() == size.vocabulary,
            "the text has {} different tokens, more than are taken",
            kept.len()
        );
        let kept: Vec<usize> = kept.into_iter().collect();
        let renumbered = |&id: &u32| kept.partition_point(|&other| other < id as usize) as u32;
        let token_ids = text.iter().map(renumbered).collect();
        config["num_hidden_layers"] = json!(size.layers);
        config["vocab_size"] = json!(size.vocabulary);
        Ok(Self {
            source,
            config,
            layers: size.layers,
            kept,
            token_ids,
        })
    }

    /// Writes config.json and model.safetensors.
    fn write(&self, out: &Path) -> Result<()> {
        std::fs::write(out.join("config.json"), format!("{:#}\n", self.config))?;
        let tensors = self.source.tensors();
        let taken: Vec<TensorInfo> = tensors
            .infos()
            .filter(|info| self.takes(&info.name))
            .map(|info| self.info(info))
            .collect::<Result<_>>()?;
        let mut writer = SafetensorsWriter::create(&out.join("model.safetensors"), &taken)?;
        for info in &taken {
            writer.write(&info.name, &self.bytes(tensors, &info.name)?)?;
        }
        Ok(writer.finish()?)
    }

    fn takes(&self, name: &str) -> bool {
        let layer = name.strip_prefix("model.layers.");
        let number = layer.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        number.is_none_or(|number| number < self.layers)
    }

    /// The header of a tensor in the cut.
    fn info(&self, info: &TensorInfo) -> Result<TensorInfo> {
        let kept = self.kept.len();
        let shape = match (VocabularyPart::of(&info.name), &info.shape[..]) {
            (None, shape) => shape.to_vec(),
            (Some(VocabularyPart::Rows), &[_, width]) => vec![kept, width],
            (Some(VocabularyPart::Words), &[words, _]) => vec![words, kept],
            (Some(VocabularyPart::ScaleCodes), &[groups, _]) => vec![groups, kept / 8],
            (Some(_), shape) => bail!("{} has the shape {shape:?}", info.name),
        };
        Ok(TensorInfo {
            shape,
            ..info.clone()
        })
    }

    /// The bytes of a tensor in the cut.
    fn bytes(&self, tensors: &dyn TensorSource, name: &str) -> Result<Vec<u8>> {
        let data = tensors.read(name)?;
        let outer = data.info.shape.first().copied().unwrap_or(1).max(1);
        let row_bytes = data.bytes.len() / outer;
        let rows = || data.bytes.chunks_exact(row_bytes);
        let kept = || self.kept.iter().copied();
        Ok(match VocabularyPart::of(name) {
            None => data.bytes.to_vec(),
            Some(VocabularyPart::Rows) => kept()
                .flat_map(|row| &data.bytes[row * row_bytes..][..row_bytes])
                .copied()
                .collect(),
            Some(VocabularyPart::Words) => rows()
                .flat_map(|row| kept().flat_map(move |column| &row[4 * column..][..4]))
                .copied()
                .collect(),
            // Two codes a byte, the lower half first.
            Some(VocabularyPart::ScaleCodes) => rows()
                .flat_map(|row| {
                    let code = |column: usize| (row[column / 2] >> (4 * (column % 2))) & 15;
                    let pairs = self.kept.chunks_exact(2);
                    pairs.map(move |pair| code(pair[0]) | code(pair[1]) << 4)
                })
                .collect(),
        })
    }
}

/// How tokens of the vocabulary lie in a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VocabularyPart {
    /// A row each.
    Rows,
    /// A column of 32-bit words each: EXL2's codes.
    Words,
    /// A column of 4 bits each, eight a word: EXL2's scales.
    ScaleCodes,
}

impl VocabularyPart {
    fn of(name: &str) -> Option<Self> {
        match name {
            "model.embed_tokens.weight" | "lm_head.weight" => Some(Self::Rows),
            "lm_head.q_weight" => Some(Self::Words),
            "lm_head.q_scale" => Some(Self::ScaleCodes),
            _ => None,
        }
    }
}

fn write_expected(path: &Path, cut: &Cut<'_>, logits: &[f32]) -> Result<()> {
    let tokens = cut.token_ids.len();
    let infos = [
        (LOGITS, DType::F32, vec![tokens, cut.kept.len()]),
        (TOKEN_IDS, DType::I32, vec![tokens]),
    ];
    let infos = infos.map(|(name, dtype, shape)| TensorInfo {
        name: name.to_owned(),
        dtype,
        shape,
    });
    let mut writer = SafetensorsWriter::create(path, &infos)?;
    let logits: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    writer.write(LOGITS, &logits)?;
    let ids: Vec<u8> = cut.token_ids.iter().flat_map(|x| x.to_le_bytes()).collect();
    writer.write(TOKEN_IDS, &ids)?;
    Ok(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use oxllama_format::{SyntheticShape, write_model};

    use super::*;

    #[test]
    fn a_cut_of_all_layers_has_the_models_logits() {
        let shape = SyntheticShape {
            name: "tiny".to_owned(),
            hidden_size: 64,
            intermediate_size: 96,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 32,
            vocab_size: 320,
            rope_theta: 1e4,
            bits_per_weight: 4.0,
            seed: 7,
        };
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("whole");
        let source = ModelSource::synthetic(&shape).unwrap();
        write_model(&source, &path, &mut |_, _| {}).unwrap();
        let text = work.path().join("text");
        // Bytes are tokens of their own; those of "é" lie far from the lowest ids.
        std::fs::write(&text, "some text, é: and ÿ as well").unwrap();
        let size = CutSize {
            layers: 2,
            vocabulary: 64,
            tokens: 27,
        };
        let out = work.path().join("cut");
        make(&path, &text, &out, size).unwrap();

        let ids = encode(&source, &std::fs::read_to_string(&text).unwrap()).unwrap();
        let whole = on_cpu(&path, &ids[..size.tokens]).unwrap();
        let cut = Cut::new(&source, &ids[..size.tokens], size).unwrap();
        assert!(cut.kept.iter().any(|&id| id >= 64) && cut.kept.len() == 64);
        let again = ModelSource::open(&out).unwrap();
        let logits = again.tensors().read(LOGITS).unwrap();
        let (logits, _) = logits.bytes.as_chunks();
        assert_eq!(logits.len(), size.tokens * size.vocabulary);
        for (row, found) in logits.chunks_exact(size.vocabulary).enumerate() {
            for (found, &id) in found.iter().zip(&cut.kept) {
                let expected = whole[row * shape.vocab_size + id];
                assert_eq!(
                    f32::from_le_bytes(*found),
                    expected,
                    "row {row}, token {id}"
                );
            }
        }
        // Made anew over the old one.
        make(&path, &text, &out, CutSize { layers: 1, ..size }).unwrap();
        let fewer = ModelSource::open(&out).unwrap();
        assert_eq!(fewer.config()["num_hidden_layers"], 1);
        assert!(
            fewer
                .tensors()
                .info("model.layers.1.input_layernorm.weight")
                .is_none()
        );
    }
}
