//! The commands that generate text.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::{AnswerArgs, EngineArgs, ModelArgs};
use crate::sampling::SamplingArgs;

#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("source").args(["prompt", "input"]).required(true),
    group = ArgGroup::new("objects").args(["json", "input"]),
    group = ArgGroup::new("negative_source").args(["negative_prompt", "input"]).multiple(true),
    group = ArgGroup::new("guesses").args(["draft", "ngram"])
)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// The prompt; - reads it from standard input. May be repeated: all run together
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) prompt: Vec<String>,

    /// A file of jobs, one JSON object a line with "custom_id" and "prompt" or "messages";
    /// other options are their defaults. - is standard input
    #[arg(long, value_name = "JSONL", requires = "output")]
    pub(crate) input: Option<PathBuf>,

    /// Where the answers to --input go, one JSON object a line. What it holds already is not
    /// done again
    #[arg(long, value_name = "JSONL", requires = "input")]
    pub(crate) output: Option<PathBuf>,

    /// Most tokens to generate
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,

    /// Answers to each prompt, with seeds of their own
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=MOST_CHOICES)
    )]
    pub(crate) choices: u8,

    /// Answers at a time [default: as many as there are, 8 at most]
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..=MOST_AT_A_TIME)
    )]
    pub(crate) batch: Option<u64>,

    /// Continue the prompt as it stands (the default)
    #[arg(long, conflicts_with = "chat")]
    pub(crate) raw: bool,

    /// Put the prompt through the model's chat template as a user's message
    #[arg(long)]
    pub(crate) chat: bool,

    /// A system message before the prompt; implies --chat
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,

    /// Report each token's log probability and those of the K most likely (needs --json or
    /// --input)
    #[arg(long, value_name = "K", requires = "objects")]
    pub(crate) logprobs: Option<usize>,

    /// Print JSON at the end instead of streaming text: one object, or a list of them for
    /// several prompts
    #[arg(long)]
    pub(crate) json: bool,

    /// Draw the prompt's last token anew, so that a prompt may end within a word
    #[arg(long, help_heading = "Answer")]
    pub(crate) heal: bool,

    /// Steer away from the answers to this prompt (classifier-free guidance)
    #[arg(long, value_name = "TEXT", help_heading = "Answer")]
    pub(crate) negative_prompt: Option<String>,

    /// How strongly: 1 is not at all [default: 1.5]
    #[arg(
        long,
        value_name = "SCALE",
        requires = "negative_source",
        allow_negative_numbers = true,
        help_heading = "Answer"
    )]
    pub(crate) cfg_scale: Option<f32>,

    #[command(flatten)]
    pub(crate) answer: AnswerArgs,

    #[command(flatten)]
    pub(crate) engine: EngineArgs,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// As many as OpenAI's interface allows.
pub(crate) const MOST_CHOICES: i64 = 128;

/// More sequences in a step than any machine is quicker for.
const MOST_AT_A_TIME: u64 = 4096;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("guesses").args(["draft", "ngram"]))]
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
    pub(crate) answer: AnswerArgs,

    #[command(flatten)]
    pub(crate) engine: EngineArgs,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}
