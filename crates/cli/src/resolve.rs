//! From what the user calls a model to a path.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::fetch::{demo, hub};

/// The directory or GGUF file that `model` names. A known name is fetched on first use.
pub(crate) fn model_path(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if model == demo::NAME {
        return demo::directory_or_fetch();
    }
    if let Ok(repository) = model.parse::<hub::Repository>() {
        return match hub::cached_snapshot(&repository)? {
            Some(snapshot) => Ok(snapshot),
            None => bail!(
                "{model} is neither a path nor in the cache ({}): `oxllama pull {model}` \
                 downloads it",
                hub::cache_directory()?.display()
            ),
        };
    }
    bail!(
        "{model} was not found: expected a model directory, a .gguf file, a downloaded \
         org/name, or the known name {}",
        demo::NAME
    )
}
