//! Which model, where and how large.

use clap::{Args, ValueEnum};
use oxllama_memory::{DeviceCap, GpuSplit, VirtualDevices};

/// Which model, where and how large.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A model directory, a GGUF file, a name in the cache (org/name), or a known name
    /// (smollm2-135m)
    pub(crate) model: String,

    #[command(flatten)]
    pub(crate) placement: PlacementArgs,
}

/// Where a model goes and how much of it.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlacementArgs {
    /// What computes: the GPUs where there are any, else the CPU; or one of the two; or the slow
    /// scalar backend that all others are held to
    #[arg(
        long,
        value_enum,
        default_value_t = DeviceKind::Auto,
        env = "OXLLAMA_DEVICE",
        help_heading = "Placement"
    )]
    pub(crate) device: DeviceKind,

    /// CPU threads [default: one per available core]
    #[arg(long, value_name = "N", help_heading = "Placement", value_parser = parse_threads)]
    pub(crate) threads: Option<usize>,

    /// Tokens of context to plan for [default: the longest that fits]
    #[arg(long, value_name = "TOKENS", help_heading = "Placement")]
    pub(crate) context: Option<u64>,

    /// Most tokens of a prompt that go through the model in one step [default: 512]
    #[arg(long, value_name = "TOKENS", help_heading = "Placement")]
    pub(crate) chunk: Option<u64>,

    /// Tokens of the key/value cache, all sequences together [default: the context of every
    /// sequence]
    #[arg(long, value_name = "TOKENS", help_heading = "Placement")]
    pub(crate) cache_tokens: Option<u64>,

    /// Format of the key/value cache: 16, 32, 8.5, 6.5 (keys 8.5, values 4.5) or 4.5 bits a
    /// number
    #[arg(long, value_enum, default_value_t = CacheKind::Fp16, help_heading = "Placement")]
    pub(crate) cache: CacheKind,

    /// Where the embedding goes, of which a step reads only a few rows: on the GPU if everything
    /// fits there and else in the host's memory, where the GPU reads it in place; or one of the
    /// two
    #[arg(long, value_enum, default_value_t = EmbeddingKind::Auto, help_heading = "Placement")]
    pub(crate) embedding: EmbeddingKind,

    /// How layers are laid over several devices: one after the other, or for equal step times
    #[arg(long, value_enum, default_value_t = PolicyKind::Fill, help_heading = "Placement")]
    pub(crate) policy: PolicyKind,

    /// GiB for each device in order, e.g. 20,24 (0 leaves a device out); counts weights,
    /// cache and workspace
    #[arg(long, value_name = "GIB,...", help_heading = "Placement")]
    pub(crate) gpu_split: Option<GpuSplit>,

    /// Use at most this much of a device, e.g. cpu:0=300MiB (may be repeated)
    #[arg(long, value_name = "DEVICE=SIZE", help_heading = "Placement")]
    pub(crate) cap: Vec<DeviceCap>,

    /// Divide the CPU into devices with limits of their own, e.g. 2x300MiB or 300MiB,200MiB
    #[arg(long, value_name = "SPEC", help_heading = "Placement")]
    pub(crate) virtual_devices: Option<VirtualDevices>,

    /// Stretch rotary positions linearly by this factor
    #[arg(
        long,
        value_name = "FACTOR",
        allow_negative_numbers = true,
        help_heading = "Placement"
    )]
    pub(crate) rope_scale: Option<f64>,

    /// Raise the rotary base for longer contexts (NTK alpha, as in ExLlamaV2)
    #[arg(
        long,
        value_name = "ALPHA",
        allow_negative_numbers = true,
        help_heading = "Placement"
    )]
    pub(crate) rope_alpha: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceKind {
    Auto,
    Cpu,
    Cuda,
    Reference,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheKind {
    Fp16,
    Fp32,
    Q8,
    Q6,
    Q4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EmbeddingKind {
    Auto,
    Device,
    Host,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyKind {
    Fill,
    Balanced,
}

fn parse_threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads @ 1..=1024) => Ok(threads),
        _ => Err("expected a number of threads from 1 to 1024".to_owned()),
    }
}
