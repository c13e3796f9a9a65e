//! The `oxllama` command: the only crate that prints and the only one that knows HTTP.

mod args;
mod batch;
mod commands;
mod fetch;
mod interrupt;
mod jobs;
mod output;
mod resolve;
mod sampling;
mod serving;
mod session;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Generate(args) => commands::generate::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Import(args) => commands::import::run(&args),
        Command::Synth(args) => commands::synth::run(&args),
        Command::Pull(args) => commands::pull::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Devices(args) => commands::devices::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}
