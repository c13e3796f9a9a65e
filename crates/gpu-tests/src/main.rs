//! What must hold on a real GPU, as one program that needs only a driver.
//!
//! `oxllama-gpu-tests FIXTURES [OPTION...] [FILTER...]` runs the conformance suite of the backends
//! on the first GPU; the tiny models of `FIXTURES` (tests/fixtures/models) against the logits that
//! transformers computed; the generator over one of them; faults; and real weights where there
//! are some. With filters, only checks whose names contain one of them. It ends with the number
//! of failures. Each check prints a line that starts with PASS, FAIL or SKIPPED.
//!
//! - `--cut DIR`: what `oxllama-gpu-tests cut` made
//! - `--model DIR --text FILE`: a whole model, compared with the CPU on the start of the text
//! - `--golden FILE`: what the model's outputs are besides
//! - `--unrecorded`: launches every kernel by itself
//!
//! Two more commands need no GPU: `oxllama-gpu-tests cut MODEL TEXT DIR` writes a part of a real
//! model with what the CPU computes of the text, small enough to travel; `oxllama-gpu-tests table
//! FILE...` prints what `oxllama bench --json` wrote as tables.

mod checks;
mod conformance;
mod cut;
mod draws;
mod faults;
mod generator;
mod loading;
mod models;
mod real;
mod recordings;
mod repeats;
mod split;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use oxllama_cuda::{CudaDevice, CudaUnavailable};

use checks::Checks;
use cut::CutSize;
use real::RealModels;

const USAGE: &str = "\
usage: oxllama-gpu-tests FIXTURES [--cut DIR] [--model DIR --text FILE] [--golden FILE]
                         [--unrecorded] [FILTER...]
       oxllama-gpu-tests cut MODEL TEXT DIR
       oxllama-gpu-tests table FILE...";

/// What is tested, and with what.
#[derive(Debug, Default)]
struct Options {
    fixtures: PathBuf,
    real: RealModels,
    is_unrecorded: bool,
    injects_fault: bool,
    filters: Vec<String>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self::default();
        let mut arguments = arguments.iter();
        options.fixtures = arguments.next().context(USAGE)?.into();
        while let Some(argument) = arguments.next() {
            let mut path = || {
                let value = arguments.next();
                value.map(PathBuf::from).context("a path is missing")
            };
            match argument.as_str() {
                "--cut" => options.real.cut = Some(path()?),
                "--model" => options.real.model = Some(path()?),
                "--text" => options.real.text = Some(path()?),
                "--golden" => options.real.golden = Some(path()?),
                "--unrecorded" => options.is_unrecorded = true,
                faults::INJECT_FAULT => options.injects_fault = true,
                option if option.starts_with("--") => bail!("unknown option {option}\n{USAGE}"),
                filter => options.filters.push(filter.to_owned()),
            }
        }
        Ok(options)
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
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((command, rest)) if command == "cut" => {
            let [model, text, out] = rest else {
                bail!(USAGE)
            };
            let [model, text, out] = [model, text, out].map(Path::new);
            cut::make(model, text, out, CutSize::OF_BUNDLE)?;
            Ok(0)
        }
        Some((command, files)) if command == "table" => {
            checks::print(&table::of_files(files)?);
            Ok(0)
        }
        _ => test(Options::parse(&arguments)?),
    }
}

fn test(options: Options) -> Result<usize> {
    let gpus = oxllama_cuda::gpus()?;
    let device = CudaDevice::open(&gpus[0])?;
    device.record_steps(!options.is_unrecorded);
    let mut checks = Checks::new(&device, options.filters);
    if options.injects_fault {
        let books = checks.books()?;
        checks::print(&faults::inject(&device, &books, &options.fixtures)?);
        return Ok(0);
    }
    checks::print(&format!(
        "on {}, compute capability {}.{}",
        gpus[0].name, gpus[0].capability.0, gpus[0].capability.1
    ));
    conformance::run(&mut checks)?;
    models::run(&mut checks, &options.fixtures)?;
    repeats::run(&mut checks, &options.fixtures)?;
    recordings::run(&mut checks)?;
    split::run(&mut checks, &options.fixtures)?;
    draws::run(&mut checks, &options.fixtures)?;
    real::run(&mut checks, &options.real)?;
    generator::run(&mut checks, &options.fixtures)?;
    loading::run(&mut checks, &options.fixtures)?;
    faults::run(&mut checks, &options.fixtures)?;
    Ok(checks.finish())
}
