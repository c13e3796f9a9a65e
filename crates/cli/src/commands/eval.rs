//! `oxllama eval`

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use oxllama_engine::evaluate;
use oxllama_model::Runner;
use oxllama_text::EncodeOptions;

use crate::args::{CacheKind, EvalArgs, PlacementArgs};
use crate::output;
use crate::session::{self, Host, Opened, StepSize};

/// Logits of this many rows are held at a time, on the device and as two copies on the host.
const CHUNK_TOKENS: u64 = 64;

pub(crate) fn run(args: &EvalArgs) -> Result<ExitCode> {
    let text = fs::read_to_string(&args.text)
        .with_context(|| format!("cannot read {} as UTF-8 text", args.text.display()))?;
    let placement = &args.model.placement;
    let host = Host::new(placement)?;
    let context = args.model.placement.context.unwrap_or(args.length as u64);
    let placement = &PlacementArgs {
        context: Some(context),
        ..placement.clone()
    };
    let size = StepSize {
        batch: 1,
        chunk_tokens: CHUNK_TOKENS,
        logit_rows: CHUNK_TOKENS,
    };
    let load = |model: &str, cache: CacheKind| -> Result<(Opened, Box<dyn Runner>)> {
        let placement = &PlacementArgs {
            cache,
            ..placement.clone()
        };
        let opened = session::open(model, Some(placement))?;
        let plan = session::plan(&opened, &host, placement, size)?;
        let runner = session::load(&opened, &host, &plan)?;
        Ok((opened, runner))
    };
    let (opened, mut runner) = load(&args.model.model, placement.cache)?;
    let reference = args.reference.as_deref();
    // Whatever the cache under test: the reference is the model at its best.
    let mut reference = reference
        .map(|reference| load(reference, CacheKind::Fp16))
        .transpose()?;
    let tokenizer = session::tokenizer(&opened.source)?;
    let token_ids = tokenizer.encode(&text, EncodeOptions::PLAIN)?;

    let bar = ProgressBar::new(args.rows as u64);
    let result = evaluate(
        runner.as_mut(),
        reference
            .as_mut()
            .map(|(_, runner)| runner.as_mut() as &mut dyn Runner),
        &token_ids,
        args.rows,
        args.length,
        &mut |row, perplexity| {
            bar.set_position(row as u64);
            bar.set_message(format!("perplexity {perplexity:.4}"));
        },
    );
    bar.finish_and_clear();
    let result = result?;
    if args.json {
        output::json(&result)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(format_args!(
        "perplexity {:.4} over {} rows of {} tokens",
        result.perplexity, result.rows, result.length
    ))?;
    if let Some(comparison) = result.comparison {
        output::line(format_args!(
            "KL from the reference {:.5} nats, top-1 agreement {:.2}%, the reference's own \
             perplexity {:.4}",
            comparison.kl,
            100.0 * comparison.top1,
            comparison.reference_perplexity
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
