//! What is asked of an answer besides how its tokens are drawn.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
#[command(next_help_heading = "Answer")]
pub(crate) struct AnswerArgs {
    /// Do not end before this many tokens; --stop still ends it
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) min_tokens: usize,

    /// Never write this text, in whatever case (may be repeated)
    #[arg(long, value_name = "TEXT")]
    pub(crate) ban: Vec<String>,

    #[command(flatten)]
    pub(crate) constraint: ConstraintArgs,
}

/// What an answer must look like: one of these at most.
#[derive(Debug, Args)]
#[command(next_help_heading = "Answer")]
#[group(multiple = false)]
pub(crate) struct ConstraintArgs {
    /// Answer with a JSON document that this JSON schema accepts
    #[arg(long, value_name = "FILE")]
    pub(crate) json_schema: Option<PathBuf>,

    /// Answer with a text that this regular expression matches as a whole
    #[arg(long, value_name = "PATTERN")]
    pub(crate) regex: Option<String>,

    /// Answer with a text of this grammar (llguidance's variant of Lark)
    #[arg(long, value_name = "FILE")]
    pub(crate) grammar: Option<PathBuf>,

    /// Answer with this text or another --choice (repeat it)
    #[arg(long, value_name = "TEXT")]
    pub(crate) choice: Vec<String>,
}
