//! Loading and unloading, over and over: nothing may be left behind.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::checks::Checks;
use crate::models::{feed, load, request};

/// Cycles after the first few, in which the driver still takes memory for itself.
const CYCLES: usize = 1000;
const WARM_UP: usize = 10;

pub(crate) fn run(checks: &mut Checks<'_>, folder: &Path) -> Result<()> {
    let path = folder.join("llama3");
    let (device, books) = (checks.device, checks.books()?);
    checks.check("a thousand loads leave the memory as it was", || {
        let mut before = None;
        for cycle in 0..WARM_UP + CYCLES {
            if cycle == WARM_UP {
                before = Some((device.free_memory()?, open_files()?));
            }
            let mut model = load(&path, &request(256, 1), device, &books)?;
            let logits = feed(&mut model, &[1, 2, 3], 0, 0)?;
            ensure!(
                logits.iter().all(|x| x.is_finite()),
                "cycle {cycle}: no numbers"
            );
            feed(&mut model, &[4], 3, 0)?;
            feed(&mut model, &[5], 4, 0)?;
        }
        let after = (device.free_memory()?, open_files()?);
        ensure!(
            Some(after) == before,
            "free memory and open files: {before:?}, then {after:?}"
        );
        let used = books.1.usage(&device.info().id).map(|usage| usage.used);
        ensure!(
            used.is_some_and(|used| used.get() == 0),
            "the books hold {used:?}"
        );
        let (free, files) = after;
        Ok(format!(
            "{free} free and {files} files open before and after"
        ))
    });
    Ok(())
}

/// How many files (devices among them) this process has open.
pub(crate) fn open_files() -> Result<usize> {
    let entries = std::fs::read_dir("/proc/self/fd").context("cannot look at open files")?;
    Ok(entries.count())
}
