use clap::Parser;

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
