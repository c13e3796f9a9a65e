use clap::Parser;
use oxllama_format::SyntheticShape;

use super::*;
use crate::args::{Cli, Command};

fn parse(options: &[&str]) -> BenchArgs {
    let words = ["oxllama", "bench", "--synthetic", "tinyllama-1b:4.0"];
    match Cli::parse_from(words.iter().chain(options)).command {
        Command::Bench(args) => args,
        other => panic!("{other:?}"),
    }
}

/// Sequences, first token and tokens of each decode case.
fn decodes(cases: &Cases) -> Vec<(usize, usize, usize)> {
    let decodes = cases.decodes.iter();
    decodes
        .map(|case| (case.sequences, case.first, case.tokens))
        .collect()
}

#[test]
fn a_gpu_is_measured_at_more_sizes_than_a_cpu() {
    let args = parse(&[]);
    let cases = Cases::new(&args, &ON_CPU).unwrap();
    assert_eq!(cases.prefills, [512]);
    assert_eq!(decodes(&cases), [(1, 8, 128)]);
    let cases = Cases::new(&args, &ON_GPU).unwrap();
    assert_eq!(cases.prefills, [512, 2048]);
    let together = [2, 4, 8, 16, 32].map(|sequences| (sequences, 8, 64));
    assert_eq!(decodes(&cases), [&[(1, 8, 128)], &together[..]].concat());
    let (placement, size) = cases.plan_for(&args.placement);
    assert_eq!(
        (size.chunk_tokens, size.batch, size.logit_rows),
        (2048, 32, 32)
    );
    // A page for each of 32 sequences is more than the longest prompt takes.
    assert_eq!(
        (placement.context, placement.cache_tokens),
        (Some(2048), Some(32 * 256))
    );
}

#[test]
fn options_replace_the_defaults() {
    let args = parse(&[
        "--batch",
        "4,2,4",
        "--prefill",
        "700,20",
        "--decode",
        "300",
        "--depth",
        "4096,1000",
    ]);
    let cases = Cases::new(&args, &ON_GPU).unwrap();
    assert_eq!(cases.prefills, [20, 700]);
    assert_eq!(
        decodes(&cases),
        [
            (1, 8, 300),
            (2, 8, 300),
            (4, 8, 300),
            (1, 699, 300),
            (1, 3795, 300)
        ]
    );
    let (placement, size) = cases.plan_for(&args.placement);
    assert_eq!((size.chunk_tokens, size.batch), (700, 4));
    assert_eq!(
        (placement.context, placement.cache_tokens),
        (Some(4096), Some(4096))
    );
    let args = parse(&["--prefill", "30000", "--context", "40000"]);
    let (placement, size) = Cases::new(&args, &ON_CPU)
        .unwrap()
        .plan_for(&args.placement);
    assert_eq!(size.chunk_tokens, 2048);
    assert_eq!(
        (placement.context, placement.cache_tokens),
        (Some(40_000), Some(40_000))
    );
}

#[test]
fn a_depth_needs_room_for_what_is_measured() {
    let error = |options: &[&str]| match Cases::new(&parse(options), &ON_CPU) {
        Ok(_) => panic!("{options:?} must be refused"),
        Err(error) => error.to_string(),
    };
    assert!(error(&["--depth", "129"]).contains("at least 130"));
    assert!(error(&["--depth", "0", "--decode", "1"]).contains("at least 3"));
    let cases = Cases::new(&parse(&["--depth", "130"]), &ON_CPU).unwrap();
    assert_eq!(decodes(&cases), [(1, 8, 128), (1, 1, 128)]);
    assert_eq!(cases.decodes[1].context_tokens(), 130);
}

/// 256 sequences are more than a recorded step has rows, and more rows than most chunks of a
/// prompt: planned and run for real, in a model of a few kilobytes.
#[test]
fn many_sequences_decode_together_after_a_short_prompt() {
    const SEQUENCES: usize = 256;
    let args = parse(&[
        "--device",
        "cpu",
        "--threads",
        "1",
        "--batch",
        "256",
        "--decode",
        "2",
        "--prefill",
        "300",
        "--depth",
        "400",
    ]);
    let cases = Cases::new(&args, &ON_CPU).unwrap();
    assert_eq!(decodes(&cases), [(1, 8, 2), (SEQUENCES, 8, 2), (1, 397, 2)]);
    let (placement, size) = cases.plan_for(&args.placement);
    assert_eq!((size.batch, size.logit_rows), (256, 256));
    // A page for each sequence, and for one sequence the longest context.
    assert_eq!(
        (placement.context, placement.cache_tokens),
        (Some(400), Some(256 * 256))
    );
    let shape = SyntheticShape {
        hidden_size: 64,
        intermediate_size: 64,
        layers: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 32,
        vocab_size: 288,
        ..args.synthetic.clone().unwrap()
    };
    let host = Host::new(&placement).unwrap();
    let opened =
        session::open_source(ModelSource::synthetic(&shape).unwrap(), Some(&placement)).unwrap();
    let plan = session::plan(&opened, &host, &placement, size).unwrap();
    let mut runner = session::load(&opened, &host, &plan).unwrap();
    for &case in &cases.decodes {
        assert!(measure::decode(runner.as_mut(), case).unwrap() > 0.0);
    }
}
