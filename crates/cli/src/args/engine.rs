//! What the engine runs besides the model.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

/// Guesses, adapters and how steps are filled: none of it is a job's own business.
#[derive(Debug, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// A smaller model of the same vocabulary that guesses tokens ahead; the answers stay the
    /// same
    #[arg(long, value_name = "MODEL", conflicts_with = "ngram")]
    pub(crate) draft: Option<String>,

    /// Guess tokens ahead from what followed the same words before; the answers stay the same
    #[arg(long)]
    pub(crate) ngram: bool,

    /// Most tokens guessed ahead in a step [default: 4]
    #[arg(
        long,
        value_name = "N",
        requires = "guesses",
        value_parser = clap::value_parser!(u8).range(1..=64)
    )]
    pub(crate) draft_tokens: Option<u8>,

    /// A LoRA adapter (a PEFT directory) for all answers, its effect multiplied by SCALE
    #[arg(long, value_name = "DIR[=SCALE]")]
    pub(crate) lora: Option<LoraArg>,

    /// Let prompts make a step of running answers at most this many times as long; step times
    /// are measured first [default: no limit]
    #[arg(long, value_name = "FACTOR", value_parser = parse_factor)]
    pub(crate) latency_factor: Option<f64>,
}

/// Tokens guessed ahead if nothing else is said.
const DRAFT_TOKENS: u8 = 4;

impl EngineArgs {
    /// Most tokens guessed ahead; 0 without guesses.
    pub(crate) fn most_drafts(&self) -> usize {
        if self.ngram || self.draft.is_some() {
            usize::from(self.draft_tokens.unwrap_or(DRAFT_TOKENS))
        } else {
            0
        }
    }
}

/// An adapter's directory and the factor on its effect.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LoraArg {
    pub(crate) directory: PathBuf,
    pub(crate) scale: f32,
}

impl FromStr for LoraArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scaled = text
            .rsplit_once('=')
            .and_then(|(directory, scale)| Some((directory, scale.parse::<f32>().ok()?)));
        let (directory, scale) = scaled.unwrap_or((text, 1.0));
        if directory.is_empty() || !scale.is_finite() {
            return Err("expected a directory, or a directory=0.5".to_owned());
        }
        Ok(Self {
            directory: PathBuf::from(directory),
            scale,
        })
    }
}

fn parse_factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if (1.0..=1000.0).contains(&factor) => Ok(factor),
        _ => Err("expected a number from 1 to 1000".to_owned()),
    }
}
