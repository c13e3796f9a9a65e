//! What a step has to read and compute, however it is done.

use oxllama_backend::{CacheShape, PAGE_TOKENS};
use oxllama_memory::CacheFormat;
use oxllama_model::ModelSpec;

use super::measure::DecodeCase;

/// Bytes of keys and values that one step of `case` reads, on average over its steps.
pub(super) fn kv_bytes_per_step(spec: &ModelSpec, format: CacheFormat, case: DecodeCase) -> f64 {
    let page = CacheShape {
        pages: 1,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        format,
    };
    let page_bytes = page.key_page_bytes() + page.value_page_bytes();
    let bytes_per_token = page_bytes as f64 / PAGE_TOKENS as f64;
    // The row at a position sees the positions up to its own.
    let contexts = case.first + 2..=case.context_tokens();
    let seen = seen_tokens(spec, contexts);
    case.sequences as f64 * bytes_per_token * seen / case.tokens as f64
}

/// Multiplications and additions of bringing `tokens` tokens into an empty cache and computing the
/// logits of the last: matrix products, scores, and sums of values.
pub(super) fn prefill_flops(spec: &ModelSpec, tokens: usize) -> f64 {
    let query_width = spec.heads * spec.head_dim;
    let key_width = spec.kv_heads * spec.head_dim;
    let attention = spec.hidden_size * (2 * query_width + 2 * key_width);
    let layer = attention + 3 * spec.hidden_size * spec.intermediate_size;
    let layers = layer as f64 * spec.layers.len() as f64;
    let head = (spec.hidden_size * spec.vocab_size) as f64;
    let products = layers * tokens as f64 + head;
    let scores_and_sums = 2.0 * query_width as f64 * seen_tokens(spec, 1..=tokens);
    2.0 * (products + scores_and_sums)
}

/// Tokens seen by rows with these many tokens up to their own, all layers together.
fn seen_tokens(spec: &ModelSpec, contexts: std::ops::RangeInclusive<usize>) -> f64 {
    let layer = |window: Option<usize>| {
        let seen = contexts
            .clone()
            .map(|tokens| tokens.min(window.unwrap_or(tokens)));
        seen.sum::<usize>() as f64
    };
    spec.layers.iter().map(|spec| layer(spec.window)).sum()
}

#[cfg(test)]
mod tests {
    use oxllama_format::{ModelSource, SyntheticShape};

    use super::*;

    fn spec(shape: &str) -> ModelSpec {
        let shape: SyntheticShape = shape.parse().unwrap();
        let source = ModelSource::synthetic(&shape).unwrap();
        ModelSpec::from_config(source.config()).unwrap()
    }

    #[test]
    fn a_step_reads_every_key_and_value_once() {
        let spec = spec("llama3-8b:4.0");
        let case = |first, sequences| DecodeCase {
            sequences,
            first,
            tokens: 1,
        };
        // 32 layers, 8 heads of 128, keys and values of 2 bytes: 128 KiB a token.
        let per_token = 131_072.0;
        let one = kv_bytes_per_step(&spec, CacheFormat::F16, case(8190, 1));
        assert_eq!(one, 8192.0 * per_token);
        let four = kv_bytes_per_step(&spec, CacheFormat::F16, case(98, 4));
        assert_eq!(four, 4.0 * 100.0 * per_token);
        let quantised = kv_bytes_per_step(&spec, CacheFormat::Q4, case(8190, 1));
        assert_eq!(quantised, 8192.0 * per_token * 4.5 / 16.0);
        let several = DecodeCase {
            sequences: 1,
            first: 8,
            tokens: 3,
        };
        // Rows 9, 10 and 11 see 10, 11 and 12 tokens.
        let average = kv_bytes_per_step(&spec, CacheFormat::F16, several);
        assert_eq!(average, 11.0 * per_token);
    }

    #[test]
    fn a_window_bounds_what_is_seen() {
        let mut spec = spec("tinyllama-1b:4.0");
        spec.layers.truncate(2);
        spec.layers[0].window = Some(4);
        assert_eq!(seen_tokens(&spec, 1..=6), 21.0 + 18.0);
    }

    #[test]
    fn a_prompt_costs_two_operations_a_weight_and_token() {
        let spec = spec("llama2-7b:4.0");
        let weights = 32.0 * (4.0 * 4096.0 * 4096.0 + 3.0 * 4096.0 * 11_008.0);
        let head = 4096.0 * 32_000.0;
        let scores = 32.0 * 2.0 * 4096.0 * (2048.0 * 2049.0 / 2.0);
        let expected = 2.0 * (2048.0 * weights + head + scores);
        assert_eq!(prefill_flops(&spec, 2048), expected);
    }
}
