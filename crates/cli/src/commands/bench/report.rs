//! What was measured, as JSON and as a page.

use anyhow::Result;
use oxllama_memory::Bytes;
use serde::Serialize;

use crate::output;

/// The object that `--json` prints.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    /// The first one, whose rates the ceilings are.
    pub(super) device: String,
    /// Devices that the model's layers are on.
    pub(super) devices: usize,
    /// Threads that compute; null where they are not the user's to choose.
    pub(super) threads: Option<usize>,
    pub(super) cache: String,
    /// Whether the weights were made rather than read from files.
    pub(super) synthetic: bool,
    /// Opening the devices: on a GPU, creating the context and loading kernels and libraries.
    pub(super) open_s: f64,
    /// Planning the model and bringing it onto the open devices.
    pub(super) load_s: f64,
    /// Weights that a decode step reads.
    pub(super) weight_bytes: Bytes,
    pub(super) read_bandwidth_gb_per_s: f64,
    /// Null where nothing measures the device's arithmetic.
    pub(super) arithmetic_tflops: Option<f64>,
    /// Whether a step ends with greedy tokens, drawn on the device, and not with logits.
    pub(super) draws_on_device: bool,
    pub(super) decode: Vec<Decode>,
    pub(super) prefill: Vec<Prefill>,
}

/// Decoding sequences together.
#[derive(Serialize)]
pub(super) struct Decode {
    pub(super) sequences: usize,
    /// Tokens in the cache of each at the end.
    pub(super) context_tokens: usize,
    /// Tokens measured of each.
    pub(super) tokens: usize,
    /// Of all sequences together.
    pub(super) tokens_per_s: f64,
    pub(super) step_ms: f64,
    /// Keys and values that a step reads, on average.
    pub(super) kv_bytes_per_step: Bytes,
    /// What reading weights, keys and values once a step at the measured bandwidth allows.
    pub(super) floor_tokens_per_s: f64,
    /// Of the floor.
    pub(super) share: f64,
    /// Times one sequence alone, from the same short prompt.
    pub(super) speedup: f64,
}

/// Bringing a prompt into an empty cache.
#[derive(Serialize)]
pub(super) struct Prefill {
    pub(super) tokens: usize,
    /// Most tokens of a step.
    pub(super) chunk_tokens: usize,
    pub(super) tokens_per_s: f64,
    /// Of the measured arithmetic of all devices that work at a time; null where nothing measures it.
    pub(super) share: Option<f64>,
}

impl Report {
    pub(super) fn print(&self, json: bool) -> Result<()> {
        if json {
            return output::json(self);
        }
        let threads = self
            .threads
            .map_or_else(String::new, |threads| format!(", {threads} threads"));
        let devices = match self.devices {
            1 => String::new(),
            devices => format!(" and {} more", devices - 1),
        };
        output::line(format_args!(
            "{} on {}{devices}{threads}, {} cache; device opened in {:.3} s, model loaded in {:.3} s",
            self.model, self.device, self.cache, self.open_s, self.load_s
        ))?;
        let arithmetic = self
            .arithmetic_tflops
            .map_or_else(String::new, |rate| format!(", computes {rate:.1} Tflop/s"));
        output::line(format_args!(
            "memory    reads {:.1} GB/s{arithmetic}; a step reads {} of weights",
            self.read_bandwidth_gb_per_s, self.weight_bytes
        ))?;
        for prefill in &self.prefill {
            let share = prefill.share.map_or_else(String::new, |share| {
                format!(", {:.0}% of the arithmetic", 100.0 * share)
            });
            output::line(format_args!(
                "prefill   {:10.1} tokens/s, {} tokens in steps of up to {}{share}",
                prefill.tokens_per_s, prefill.tokens, prefill.chunk_tokens
            ))?;
        }
        output::line(format_args!(
            "a step ends with {} on the host",
            if self.draws_on_device {
                "greedy tokens, drawn on the device,"
            } else {
                "all logits"
            }
        ))?;
        for decode in &self.decode {
            output::line(format_args!(
                "batch {:3} {:10.1} tokens/s up to context {}, {:.0}% of what the memory allows \
                 ({:.1}), {:.2} times one alone",
                decode.sequences,
                decode.tokens_per_s,
                decode.context_tokens,
                100.0 * decode.share,
                decode.floor_tokens_per_s,
                decode.speedup
            ))?;
        }
        Ok(())
    }
}
