//! Project tasks: `cargo xtask <task>`.
//!
//! `test` is the only one most people need: it fetches what the tests want and runs them all.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

#[cfg(test)]
mod tidy;

const USAGE: &str = "\
usage: cargo xtask <task>

tasks:
  test [FILTER...]   fetch the demo model, then run every test (with nextest if it is installed)
  check              formatting and lints, as continuous integration runs them
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((task, rest)) if task == "test" => test(rest),
        Some((task, [])) if task == "check" => check(),
        _ => {
            report(USAGE);
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
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

fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).current_dir(root());
    run(&mut command)
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
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root().join("target"), PathBuf::from);
    let binary = target
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
