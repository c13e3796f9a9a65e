//! What results are held to.

use oxllama_backend::conformance::Tolerances;

/// How far this backend's results may lie from the oracle's.
///
/// Linears take activations that are rounded to fp16 (half a unit: 4.9e-4 of each term), and in
/// quantised ones the oracle rounds every weight to fp16 besides (2.4e-4), which the kernels do
/// not. Attention multiplies queries, keys, values and weights as fp16, and where scores are
/// large, a rounding of 5e-4 of a score of 16 changes a weight by 1%; over f32 pages it computes
/// in f32. Everything else is f32 in another order of sums than the oracle's, with the device's
/// own functions.
pub const TOLERANCES: Tolerances = Tolerances {
    exl2_linear: 2e-3,
    gptq_linear: 2e-3,
    float_linear: 2e-3,
    norm: 4e-6,
    elementwise: 4e-6,
    attention_f32: 1e-4,
    attention_f16: 1e-2,
    attention_quantised: 1e-2,
};
