//! The command line, defined once.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use oxllama_memory::{DeviceCap, GpuSplit, VirtualDevices};

use crate::sampling::SamplingArgs;

/// Run EXL2 language models (and GPTQ, FP16/BF16, GGUF) with every byte planned.
#[derive(Debug, Parser)]
#[command(
    name = "oxllama",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt and stream the text
    Generate(GenerateArgs),
    /// Talk to a model in the terminal
    Chat(ChatArgs),
    /// Say what a model needs on which device, before reading a single weight
    Plan(PlanArgs),
    /// Show a model's architecture, bits per weight and sizes
    Inspect(InspectArgs),
    /// Turn a GGUF file into a Hugging Face directory (fp16)
    Import(ImportArgs),
    /// Download a model: a known name, or org/name[@revision] from a Hugging Face hub
    Pull(PullArgs),
    /// Measure tokens per second, and the share of what the memory allows
    Bench(BenchArgs),
    /// Measure perplexity, and distance from a reference model
    Eval(EvalArgs),
    /// List the devices that models can run on
    Devices(DevicesArgs),
}

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
    /// What computes: the fast CPU backend, or the slow scalar one that all others are held to
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu, help_heading = "Placement")]
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
    Cpu,
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

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// The prompt; - reads it from standard input
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) prompt: String,

    /// Most tokens to generate
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,

    /// Continue the prompt as it stands (the default)
    #[arg(long, conflicts_with = "chat")]
    pub(crate) raw: bool,

    /// Put the prompt through the model's chat template as a user's message
    #[arg(long)]
    pub(crate) chat: bool,

    /// A system message before the prompt; implies --chat
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,

    /// Report each token's log probability and those of the K most likely (needs --json)
    #[arg(long, value_name = "K", requires = "json")]
    pub(crate) logprobs: Option<usize>,

    /// Print one JSON object at the end instead of streaming text
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// The system message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,

    /// Most tokens of an answer
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1000)]
    pub(crate) max_tokens: usize,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Sequences at once, each with the whole context
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) batch: u64,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A model directory, a GGUF file, a name in the cache, or a known name
    pub(crate) model: String,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The GGUF file
    pub(crate) file: PathBuf,

    /// The directory to make; must not exist, or be empty
    pub(crate) out_dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// smollm2-135m, or org/name[@revision]
    pub(crate) name: String,

    /// Use what is in the cache and do not touch the network
    #[arg(
        long,
        env = "HF_HUB_OFFLINE",
        action = clap::ArgAction::SetTrue,
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub(crate) offline: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Tokens of the prefill measurement
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) prefill: usize,

    /// Tokens of the decode measurement, from an empty context
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) decode: usize,

    /// Decode so many sequences at a time as well, e.g. 2,4,8 (each compared with one alone)
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub(crate) batch: Vec<usize>,

    /// Take the best of this many runs
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) repeat: usize,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// The text
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,

    /// Rows of the text to evaluate
    #[arg(long, value_name = "R", default_value_t = 24)]
    pub(crate) rows: usize,

    /// Tokens of a row
    #[arg(long, value_name = "L", default_value_t = 1024)]
    pub(crate) length: usize,

    /// The model that this one was made from: reports KL divergence and top-1 agreement. It
    /// always runs with an fp16 cache, so that MODEL --cache q4 --reference MODEL measures what
    /// the cache alone costs
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<String>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
