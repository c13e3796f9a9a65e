//! What must hold on a real GPU, as one program that needs only a driver.
//!
//! `oxllama-gpu-tests FIXTURES [--model DIR --golden FILE] [FILTER...]` runs the conformance suite
//! of the backends on the first GPU, the tiny models of `FIXTURES` (tests/fixtures/models)
//! against the logits that transformers computed and against the CPU backend, and, if it is
//! given, a real model against its golden outputs. It ends with the number of failures.

mod checks;
mod conformance;
mod generator;
mod loading;
mod models;
mod real;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use oxllama_cuda::{CudaDevice, CudaUnavailable};

use checks::Checks;

/// What is tested, and with what.
struct Options {
    fixtures: PathBuf,
    real_model: Option<(PathBuf, PathBuf)>,
    filters: Vec<String>,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut arguments = std::env::args().skip(1);
        let (mut fixtures, mut model, mut golden) = (None, None, None);
        let mut filters = Vec::new();
        while let Some(argument) = arguments.next() {
            let mut value = || {
                let value = arguments.next();
                value.map(PathBuf::from).context("a path is missing")
            };
            match argument.as_str() {
                "--model" => model = Some(value()?),
                "--golden" => golden = Some(value()?),
                _ if fixtures.is_none() => fixtures = Some(PathBuf::from(argument)),
                _ => filters.push(argument),
            }
        }
        Ok(Self {
            fixtures: fixtures.context(
                "usage: oxllama-gpu-tests FIXTURES [--model DIR --golden FILE] [FILTER...]",
            )?,
            real_model: match (model, golden) {
                (Some(model), Some(golden)) => Some((model, golden)),
                (None, None) => None,
                _ => bail!("--model and --golden go together"),
            },
            filters,
        })
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            checks::print(&format!("cannot test: {error:#}"));
            // No GPU is no failure of one.
            ExitCode::from(if error.is::<CudaUnavailable>() { 3 } else { 2 })
        }
    }
}

/// Returns how many checks failed.
fn run() -> Result<usize> {
    let options = Options::parse()?;
    let gpus = oxllama_cuda::gpus()?;
    let device = CudaDevice::open(&gpus[0])?;
    let mut checks = Checks::new(&device, options.filters);
    checks::print(&format!(
        "on {}, compute capability {}.{}",
        gpus[0].name, gpus[0].capability.0, gpus[0].capability.1
    ));
    conformance::run(&mut checks)?;
    models::run(&mut checks, &options.fixtures)?;
    generator::run(&mut checks, &options.fixtures)?;
    loading::run(&mut checks, &options.fixtures)?;
    if let Some((model, golden)) = &options.real_model {
        real::run(&mut checks, model, golden)?;
    }
    Ok(checks.finish())
}
