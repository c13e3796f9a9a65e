//! What a model's files hold, linear by linear, from headers alone.

use oxllama_format::{Encoding, ModelSource};

use crate::weights::StoredLinear;
use crate::{ModelError, ModelSpec};

/// One linear as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearReport {
    /// Name without the suffix that tells the encoding; a part of a fused source has its
    /// outputs in brackets.
    pub name: String,
    /// Input features.
    pub in_features: usize,
    /// Output features as stored, padding included.
    pub out_features: usize,
    /// How the weights are stored.
    pub encoding: Encoding,
    /// Stored bits for each weight, scales and other overheads included.
    pub bits_per_weight: f64,
    /// Bytes in the files.
    pub stored_bytes: u64,
}

/// A model's linears, and sums over them.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// The embedding, the layers' linears in order, and the head if it has weights of its own.
    pub linears: Vec<LinearReport>,
    /// Bits for each weight of the layers' linears: what EXL2 calls a model's bits.
    pub layer_bits_per_weight: f64,
    /// Bits for each weight of all linears.
    pub bits_per_weight: f64,
    /// Weights of all linears, padding included.
    pub parameters: u64,
    /// Bytes of the files that hold the model's tensors.
    pub stored_bytes: u64,
    /// Stored bytes of the linears that a decode step reads: the layers' and the head's.
    pub bytes_per_token: u64,
}

/// Reads the headers of `source`, which `spec` describes.
///
/// # Errors
/// A weight is missing, contradicts the configuration, or its header is malformed.
pub fn inspect(source: &ModelSource, spec: &ModelSpec) -> Result<Inspection, ModelError> {
    let (weights, _) = crate::plan::find_weights(source, spec)?;
    let layers: Vec<LinearReport> = weights
        .layers
        .iter()
        .flat_map(|layer| layer.linears.as_array())
        .map(report)
        .collect();
    let layer_bits_per_weight = bits_per_weight(&layers);
    let head = report(weights.head_linear());
    let bytes_per_token = layers
        .iter()
        .chain([&head])
        .map(|linear| linear.stored_bytes)
        .sum();
    let mut linears = vec![report(&weights.embedding)];
    linears.extend(layers);
    linears.extend(weights.head.as_ref().map(report));
    Ok(Inspection {
        layer_bits_per_weight,
        bits_per_weight: bits_per_weight(&linears),
        parameters: linears.iter().map(parameters).sum(),
        stored_bytes: source.stored_bytes(),
        bytes_per_token,
        linears,
    })
}

fn report(linear: &StoredLinear) -> LinearReport {
    let header = &linear.header;
    LinearReport {
        name: linear.label(),
        in_features: header.in_features,
        out_features: header.out_features,
        encoding: header.encoding,
        bits_per_weight: header.bits_per_weight(),
        stored_bytes: header.stored_bytes(),
    }
}

fn parameters(linear: &LinearReport) -> u64 {
    linear.in_features as u64 * linear.out_features as u64
}

fn bits_per_weight(linears: &[LinearReport]) -> f64 {
    let bytes: u64 = linears.iter().map(|linear| linear.stored_bytes).sum();
    let weights: u64 = linears.iter().map(parameters).sum();
    bytes as f64 * 8.0 / weights as f64
}
