//! `oxllama pull`

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::args::PullArgs;
use crate::fetch::{demo, hub};
use crate::output;

pub(crate) fn run(args: &PullArgs) -> Result<ExitCode> {
    let directory = if args.name == demo::NAME {
        if args.offline && !demo::is_cached()? {
            bail!(
                "{} is not in the cache and offline mode is on: pull it once without --offline \
                 (or HF_HUB_OFFLINE)",
                demo::NAME
            );
        }
        demo::directory_or_fetch()?
    } else {
        let repository: hub::Repository = args.name.parse().with_context(|| {
            format!(
                "expected the known name {} or a hub's org/name[@revision]",
                demo::NAME
            )
        })?;
        hub::pull(&repository, args.offline)?
    };
    output::line(directory.display())?;
    Ok(ExitCode::SUCCESS)
}
