//! The command line, defined once.

mod answer;
mod bench;
mod engine;
mod generate;
mod placement;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use answer::{AnswerArgs, ConstraintArgs};
pub(crate) use bench::{BenchArgs, SynthArgs};
pub(crate) use engine::{EngineArgs, LoraArg};
pub(crate) use generate::{ChatArgs, GenerateArgs, MOST_CHOICES};
pub(crate) use placement::{
    CacheKind, DeviceKind, EmbeddingKind, ModelArgs, PlacementArgs, PolicyKind,
};

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
    /// Write a model of a known shape with random weights, to measure other programs with
    Synth(SynthArgs),
    /// Download a model: a known name, or org/name[@revision] from a Hugging Face hub
    Pull(PullArgs),
    /// Measure tokens per second, and the share of what memory and arithmetic allow
    Bench(BenchArgs),
    /// Measure perplexity, and distance from a reference model
    Eval(EvalArgs),
    /// List the devices that models can run on
    Devices(DevicesArgs),
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
