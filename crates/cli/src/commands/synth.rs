//! `oxllama synth`

use std::process::ExitCode;

use anyhow::Result;
use oxllama_format::{ModelSource, write_model};
use oxllama_memory::Bytes;

use crate::args::SynthArgs;
use crate::output;

pub(crate) fn run(args: &SynthArgs) -> Result<ExitCode> {
    let source = ModelSource::synthetic(&args.shape)?;
    let bar = output::byte_bar("writing random weights", 0);
    let written = write_model(&source, &args.out_dir, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let written = written?;
    output::line(format_args!(
        "{}: {} tensors ({}), {} in {} file(s)",
        written.directory.display(),
        written.tensors,
        args.shape,
        Bytes(written.tensor_bytes),
        written.shards
    ))?;
    Ok(ExitCode::SUCCESS)
}
