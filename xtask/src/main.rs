//! Project tasks: `cargo xtask <task>`.
//!
//! `test` is the only one most people need: it fetches what the tests want and runs them all.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

mod gpu_bundle;
mod kernels;
#[cfg(test)]
mod tidy;
mod toolkit;

const USAGE: &str = "\
usage: cargo xtask <task>

tasks:
  test [FILTER...]   fetch the demo model, then run every test (with nextest if it is installed)
  check              formatting and lints, as continuous integration runs them
  kernels [--arch LIST]
                     compile every CUDA kernel without a GPU, with the nvcc that is installed or
                     else with one from Python packages; fail on a warning, a spill, local memory,
                     or images over 3 MiB an architecture
  gpu-bundle [--arch LIST] [--out DIR]
                     build the programs that test and measure on a machine with a GPU and without
                     Rust, with images for 90a, into target/gpu-bundle; its run.sh runs them
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((task, rest)) if task == "test" => test(rest),
        Some((task, [])) if task == "check" => check(),
        Some((task, rest)) if task == "kernels" => match options(rest, ["--arch"]) {
            Some([list]) => kernels::kernels(list),
            None => return misused(),
        },
        Some((task, rest)) if task == "gpu-bundle" => match options(rest, ["--arch", "--out"]) {
            Some([list, out]) => {
                gpu_bundle::gpu_bundle(list.unwrap_or("90a"), out.map(PathBuf::from))
            }
            None => return misused(),
        },
        _ => return misused(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// The value of each option of `names` in `--name value` pairs; `None` if there is anything else.
fn options<'a, const COUNT: usize>(
    arguments: &'a [String],
    names: [&str; COUNT],
) -> Option<[Option<&'a str>; COUNT]> {
    let mut values = [None; COUNT];
    for pair in arguments.chunks(2) {
        let [name, value] = pair else { return None };
        let place = names.iter().position(|option| option == name)?;
        values[place] = Some(value.as_str());
    }
    Some(values)
}

fn misused() -> ExitCode {
    report(USAGE);
    ExitCode::from(2)
}

#[expect(clippy::print_stdout, reason = "what a task is asked to show")]
fn print(text: &str) {
    println!("{text}");
}

#[expect(clippy::print_stderr, reason = "a command-line tool talks to its user")]
fn report(message: &str) {
    eprintln!("{message}");
}

/// The workspace's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .into()
}

/// Where cargo builds.
fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or(root().join("target"), PathBuf::from)
}

fn cargo_command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).current_dir(root());
    command
}

fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<()> {
    run(&mut cargo_command(arguments))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// Builds the tests, fetches the demo model with the binary that was just built, runs them.
fn test(filters: &[String]) -> Result<()> {
    cargo([
        "build",
        "--workspace",
        "--tests",
        "--bins",
        "--profile",
        "test",
    ])?;
    fetch_demo_model();
    if has_nextest() {
        let profile = if std::env::var_os("CI").is_some() {
            "ci"
        } else {
            "default"
        };
        let arguments = ["nextest", "run", "--workspace", "--profile", profile];
        cargo(
            arguments
                .into_iter()
                .map(str::to_owned)
                .chain(filters.iter().cloned()),
        )
    } else {
        let arguments = ["test", "--workspace", "--tests", "--bins", "--lib", "--"];
        cargo(
            arguments
                .into_iter()
                .map(str::to_owned)
                .chain(filters.iter().cloned()),
        )
    }
}

/// Tests that need the demo model say that they skipped when it is absent, so a machine
/// without a network still runs the rest.
fn fetch_demo_model() {
    let binary = target_folder()
        .join("debug")
        .join(format!("oxllama{}", std::env::consts::EXE_SUFFIX));
    if let Err(error) = run(Command::new(binary).args(["pull", "smollm2-135m"])) {
        report(&format!(
            "xtask: the demo model could not be fetched, its tests will skip: {error:#}"
        ));
    }
}

fn has_nextest() -> bool {
    Command::new(env!("CARGO"))
        .args(["nextest", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
}

fn check() -> Result<()> {
    cargo(["fmt", "--all", "--check"])?;
    cargo([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ])
}
