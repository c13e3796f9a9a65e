//! `oxllama inspect`

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use oxllama_format::Encoding;
use oxllama_memory::Bytes;
use oxllama_model::{Inspection, LinearReport, ModelSpec, inspect};
use serde::Serialize;

use crate::args::InspectArgs;
use crate::{output, session};

/// The object that `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    architecture: &'a str,
    layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_context_tokens: usize,
    parameters: u64,
    /// Of the layers' linears, which is what EXL2 calls a model's bits.
    layer_bits_per_weight: f64,
    bits_per_weight: f64,
    stored_bytes: u64,
    bytes_per_token: u64,
    linears: Vec<Linear<'a>>,
}

#[derive(Serialize)]
struct Linear<'a> {
    name: &'a str,
    in_features: usize,
    out_features: usize,
    encoding: String,
    bits_per_weight: f64,
    stored_bytes: u64,
}

pub(crate) fn run(args: &InspectArgs) -> Result<ExitCode> {
    let opened = session::open(&args.model, None)?;
    let inspection = inspect(&opened.source, &opened.spec)
        .map_err(|error| session::name_files(error, &opened.source))?;
    if args.json {
        output::json(&answer(&opened.spec, &inspection))?;
    } else {
        output::text(&page(&opened.spec, &inspection))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn answer<'a>(spec: &'a ModelSpec, inspection: &'a Inspection) -> Answer<'a> {
    let linear = |linear: &'a LinearReport| Linear {
        name: &linear.name,
        in_features: linear.in_features,
        out_features: linear.out_features,
        encoding: encoding_name(linear.encoding),
        bits_per_weight: linear.bits_per_weight,
        stored_bytes: linear.stored_bytes,
    };
    Answer {
        architecture: &spec.architecture,
        layers: spec.layers.len(),
        hidden_size: spec.hidden_size,
        intermediate_size: spec.intermediate_size,
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        vocab_size: spec.vocab_size,
        max_context_tokens: spec.max_position_embeddings,
        parameters: inspection.parameters,
        layer_bits_per_weight: inspection.layer_bits_per_weight,
        bits_per_weight: inspection.bits_per_weight,
        stored_bytes: inspection.stored_bytes,
        bytes_per_token: inspection.bytes_per_token,
        linears: inspection.linears.iter().map(linear).collect(),
    }
}

fn encoding_name(encoding: Encoding) -> String {
    match encoding {
        Encoding::Exl2 { .. } => "exl2".to_owned(),
        Encoding::Gptq {
            act_order: true, ..
        } => "gptq (act-order)".to_owned(),
        Encoding::Gptq { .. } => "gptq".to_owned(),
        Encoding::Float(dtype) => format!("{dtype:?}").to_lowercase(),
    }
}

fn page(spec: &ModelSpec, inspection: &Inspection) -> String {
    let mut encodings: BTreeMap<String, usize> = BTreeMap::new();
    for linear in &inspection.linears {
        *encodings.entry(encoding_name(linear.encoding)).or_default() += 1;
    }
    let encodings: Vec<String> = encodings
        .into_iter()
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    let mut page = format!(
        "{}: {} layers, hidden {}, intermediate {}, {} heads ({} kv) of {}, vocabulary {}, \
         context {}\n{} parameters in {} linears ({}), {} on disk, {} read a token\n\
         {:.2} bits per weight in the layers, {:.2} over all linears\n\n",
        spec.architecture,
        spec.layers.len(),
        spec.hidden_size,
        spec.intermediate_size,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        spec.vocab_size,
        spec.max_position_embeddings,
        inspection.parameters,
        inspection.linears.len(),
        encodings.join(", "),
        Bytes(inspection.stored_bytes),
        Bytes(inspection.bytes_per_token),
        inspection.layer_bits_per_weight,
        inspection.bits_per_weight,
    );
    let width = inspection
        .linears
        .iter()
        .map(|linear| linear.name.len())
        .max()
        .unwrap_or(0);
    page.push_str(&format!(
        "{:width$}     in    out   bits        size  format\n",
        "linear"
    ));
    for linear in &inspection.linears {
        page.push_str(&format!(
            "{:width$} {:6} {:6} {:6.2} {:>11}  {}\n",
            linear.name,
            linear.in_features,
            linear.out_features,
            linear.bits_per_weight,
            Bytes(linear.stored_bytes).to_string(),
            encoding_name(linear.encoding),
        ));
    }
    page
}
