//! Measuring, and models made for it.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use oxllama_format::SyntheticShape;

use super::PlacementArgs;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("subject").args(["model", "synthetic"]).required(true))]
pub(crate) struct BenchArgs {
    /// A model directory, a GGUF file, a name in the cache (org/name), or a known name
    /// (smollm2-135m)
    pub(crate) model: Option<String>,

    /// Instead of a model: one of a known shape with random weights, made in memory, e.g.
    /// llama2-7b:4.0. Shapes: tinyllama-1b, llama2-7b, llama3-8b, codellama-34b, llama3-70b;
    /// BPW, bits per weight: 2 to 8
    #[arg(long, value_name = "SHAPE:BPW")]
    pub(crate) synthetic: Option<SyntheticShape>,

    #[command(flatten)]
    pub(crate) placement: PlacementArgs,

    /// Tokens of the prefill measurements [default: 512; on a GPU 512,2048]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub(crate) prefill: Vec<usize>,

    /// Sequences that decode at a time, each from a prompt of 8 tokens and compared with one alone
    /// [default: 1; on a GPU 1,2,4,8,16,32]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub(crate) batch: Vec<usize>,

    /// Tokens of each sequence in the decode measurements [default: 128 of one alone, 64 of
    /// several]
    #[arg(long, value_name = "N")]
    pub(crate) decode: Option<usize>,

    /// Decode one sequence in a long context as well, up to a cache of so many tokens
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub(crate) depth: Vec<usize>,

    /// Take the best of this many rounds, in each of which a case runs for 0.3 s or once
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) repeat: usize,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// tinyllama-1b, llama2-7b, llama3-8b, codellama-34b or llama3-70b, and bits per weight, 2 to
    /// 8: e.g. llama2-7b:4.0
    #[arg(value_name = "SHAPE:BPW")]
    pub(crate) shape: SyntheticShape,

    /// The directory to make; must not exist, or be empty
    pub(crate) out_dir: PathBuf,
}
