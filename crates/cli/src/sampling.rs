//! The sampling options of the command line, over the model's defaults.

use anyhow::Result;
use clap::Args;
use oxllama_engine::SamplingSettings;
use oxllama_text::StopMatcher;
use serde_json::{Map, Value};

/// How tokens are drawn. Defaults: generation_config.json's, else ExLlamaV2's.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Always take the most likely token, without penalties
    #[arg(long, conflicts_with_all = ["DistributionArgs", "PenaltyArgs"])]
    pub(crate) greedy: bool,

    #[command(flatten)]
    distribution: DistributionArgs,

    #[command(flatten)]
    penalties: PenaltyArgs,

    /// The same seed gives the same text [default: a new one each time]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,

    /// End where this text would appear (may be repeated)
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

/// What shapes and cuts the distribution.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling", allow_negative_numbers = true)]
struct DistributionArgs {
    /// Divides the logits; 0 is greedy [default: the model's, else 0.8]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,

    /// Keep the K most likely tokens, 0 for all [default: the model's, else 50]
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,

    /// Keep the most likely tokens up to this probability [default: the model's, else 0.8]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,

    /// Drop tokens less likely than this share of the best [default: the model's, else 0]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,

    /// Drop tokens less likely than A times the square of the best's probability
    #[arg(long, value_name = "A")]
    top_a: Option<f32>,

    /// Keep the tokens of typical surprise, up to this probability
    #[arg(long, value_name = "P")]
    typical: Option<f32>,

    /// Cut the tail where the sorted probabilities flatten out, at this share of curvature
    #[arg(long, value_name = "Z")]
    tfs: Option<f32>,

    /// Keep logits within this many standard deviations of the best
    #[arg(long, value_name = "N")]
    top_n_sigma: Option<f32>,

    /// Favour unlikely tokens (above 0) or likely ones (below 0) in the draw
    #[arg(long, value_name = "S")]
    skew: Option<f32>,

    /// Bend logits by the square of their distance to the best, times this
    #[arg(long, value_name = "F")]
    smoothing_factor: Option<f32>,

    /// Dynamic temperature: that of a sure model
    #[arg(long, value_name = "T")]
    min_temp: Option<f32>,

    /// Dynamic temperature: that of a clueless model; above --min-temp it is on
    #[arg(long, value_name = "T")]
    max_temp: Option<f32>,

    /// Dynamic temperature: bends the way between the two [default: 1]
    #[arg(long, value_name = "E")]
    temp_exponent: Option<f32>,

    /// Apply the temperature after the cuts
    #[arg(long)]
    temperature_last: bool,

    /// Cut so that the mean surprise tends to --mirostat-tau
    #[arg(long)]
    mirostat: bool,

    /// The surprise in bits that mirostat aims for [default: 1.5]
    #[arg(long, value_name = "BITS", requires = "mirostat")]
    mirostat_tau: Option<f32>,

    /// How fast mirostat follows [default: 0.1]
    #[arg(long, value_name = "RATE", requires = "mirostat")]
    mirostat_eta: Option<f32>,

    /// How often to drop the likeliest choices and keep the least likely of them
    #[arg(long, value_name = "P")]
    xtc_probability: Option<f32>,

    /// The probability that makes a token a choice for XTC [default: 0.1]
    #[arg(long, value_name = "P")]
    xtc_threshold: Option<f32>,

    /// The order of the stages; those left out do not act [default: temperature, top_n_sigma,
    /// top_k, top_p, top_a, min_p, tfs, typical, mirostat, dynamic_temperature, xtc]
    #[arg(long, value_name = "LIST", conflicts_with = "temperature_last")]
    sampler_order: Option<String>,
}

/// What changes single logits.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling", allow_negative_numbers = true)]
struct PenaltyArgs {
    /// Weaken tokens that occurred; 1 is off [default: the model's, else 1.025]
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,

    /// Penalties look at this many of the newest tokens, -1 for all [default: -1]
    #[arg(long, value_name = "N")]
    repetition_range: Option<i64>,

    /// Penalties fall off over this many tokens before the range [default: 0]
    #[arg(long, value_name = "N")]
    repetition_decay: Option<u32>,

    /// Weaken a token for each time that it occurred
    #[arg(long, value_name = "F")]
    frequency_penalty: Option<f32>,

    /// Weaken a token that occurred
    #[arg(long, value_name = "F")]
    presence_penalty: Option<f32>,

    /// Add to a token's logit, e.g. 1234=-100 (may be repeated)
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,

    /// Weaken tokens that would continue a repetition; 0.8 is usual
    #[arg(long, value_name = "M")]
    dry_multiplier: Option<f32>,

    /// DRY: growth of the penalty with each token of repetition [default: 1.75]
    #[arg(long, value_name = "B")]
    dry_base: Option<f32>,

    /// DRY: the shortest repetition that counts, in tokens [default: 2]
    #[arg(long, value_name = "N")]
    dry_allowed_length: Option<u32>,

    /// DRY: look at this many of the newest tokens, 0 for all [default: 0]
    #[arg(long, value_name = "N")]
    dry_range: Option<u32>,

    /// DRY: the longest repetition that is looked for, in tokens [default: 20]
    #[arg(long, value_name = "N")]
    dry_max_ngram: Option<u32>,
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    text.split_once('=')
        .and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse().ok()?)))
        .ok_or_else(|| "expected a token id and a number, such as 1234=-100".to_owned())
}

/// The settings asked for: options, else generation_config.json, else ExLlamaV2's defaults.
pub(crate) fn settings(
    args: &SamplingArgs,
    generation_config: Option<&Value>,
) -> Result<SamplingSettings> {
    if args.greedy {
        return Ok(SamplingSettings::greedy());
    }
    let mut settings = SamplingSettings::from_generation_config(generation_config);
    for (name, number) in numbers(&args.distribution, &args.penalties) {
        if let Some(number) = number {
            settings.set_number(name, number)?;
        }
    }
    for (name, value) in others(&args.distribution, &args.penalties) {
        settings.set(name, &value)?;
    }
    settings.check()?;
    Ok(settings)
}

/// The real numbers by their names in the settings.
fn numbers(
    distribution: &DistributionArgs,
    penalties: &PenaltyArgs,
) -> [(&'static str, Option<f32>); 21] {
    [
        ("temperature", distribution.temperature),
        ("top_p", distribution.top_p),
        ("min_p", distribution.min_p),
        ("top_a", distribution.top_a),
        ("typical", distribution.typical),
        ("tfs", distribution.tfs),
        ("top_n_sigma", distribution.top_n_sigma),
        ("skew", distribution.skew),
        ("smoothing_factor", distribution.smoothing_factor),
        ("min_temp", distribution.min_temp),
        ("max_temp", distribution.max_temp),
        ("temp_exponent", distribution.temp_exponent),
        ("mirostat_tau", distribution.mirostat_tau),
        ("mirostat_eta", distribution.mirostat_eta),
        ("xtc_probability", distribution.xtc_probability),
        ("xtc_threshold", distribution.xtc_threshold),
        ("repetition_penalty", penalties.repetition_penalty),
        ("frequency_penalty", penalties.frequency_penalty),
        ("presence_penalty", penalties.presence_penalty),
        ("dry_multiplier", penalties.dry_multiplier),
        ("dry_base", penalties.dry_base),
    ]
}

/// The rest by their names in the settings; what was not given is null.
fn others(distribution: &DistributionArgs, penalties: &PenaltyArgs) -> [(&'static str, Value); 10] {
    let flag = |is_set: bool| {
        if is_set {
            Value::Bool(true)
        } else {
            Value::Null
        }
    };
    let bias: Map<String, Value> = penalties
        .logit_bias
        .iter()
        .map(|(id, bias)| (id.to_string(), Value::from(*bias)))
        .collect();
    let bias = if bias.is_empty() {
        Value::Null
    } else {
        Value::Object(bias)
    };
    [
        ("top_k", Value::from(distribution.top_k)),
        ("temperature_last", flag(distribution.temperature_last)),
        ("mirostat", flag(distribution.mirostat)),
        (
            "sampler_order",
            Value::from(distribution.sampler_order.clone()),
        ),
        ("repetition_range", Value::from(penalties.repetition_range)),
        ("repetition_decay", Value::from(penalties.repetition_decay)),
        ("logit_bias", bias),
        (
            "dry_allowed_length",
            Value::from(penalties.dry_allowed_length),
        ),
        ("dry_range", Value::from(penalties.dry_range)),
        ("dry_max_ngram", Value::from(penalties.dry_max_ngram)),
    ]
}

/// Refuses options that no model's defaults could make right, before a model is loaded for them.
pub(crate) fn check(args: &SamplingArgs) -> Result<()> {
    settings(args, None)?;
    StopMatcher::new(&args.stop)?;
    Ok(())
}

/// The seed asked for, or one that differs from run to run.
pub(crate) fn seed(args: &SamplingArgs) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    args.seed
        .unwrap_or_else(|| RandomState::new().hash_one(std::process::id()))
}
