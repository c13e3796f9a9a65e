//! `oxllama import`

use std::process::ExitCode;

use anyhow::{Result, bail};
use oxllama_format::import;
use oxllama_memory::Bytes;

use crate::args::ImportArgs;
use crate::output;

pub(crate) fn run(args: &ImportArgs) -> Result<ExitCode> {
    if args.file.is_dir() {
        bail!(
            "{} is a directory: expected a .gguf file (a Hugging Face directory needs no import)",
            args.file.display()
        );
    }
    let bar = output::byte_bar("converting to fp16", 0);
    let summary = import::import_gguf(&args.file, &args.out_dir, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let summary = summary?;
    output::line(format_args!(
        "{}: {} tensors ({} model), {} in {} file(s)",
        summary.directory.display(),
        summary.tensors,
        summary.model_type,
        Bytes(summary.tensor_bytes),
        summary.shards
    ))?;
    Ok(ExitCode::SUCCESS)
}
