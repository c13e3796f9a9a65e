//! The sampling options of the command line, over the model's defaults.

use anyhow::Result;
use clap::Args;
use oxllama_engine::SamplingSettings;
use oxllama_text::StopMatcher;
use serde_json::Value;

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
    settings
        .logit_bias
        .extend(args.penalties.logit_bias.iter().copied());
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
fn others(distribution: &DistributionArgs, penalties: &PenaltyArgs) -> [(&'static str, Value); 9] {
    let flag = |is_set: bool| {
        if is_set {
            Value::Bool(true)
        } else {
            Value::Null
        }
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

#[cfg(test)]
mod tests {
    use clap::{Parser, error::ErrorKind};
    use oxllama_engine::Stage;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn parse(arguments: &[&str]) -> SamplingArgs {
        let line = Line::try_parse_from([&["oxllama"], arguments].concat());
        line.unwrap_or_else(|error| panic!("{error}")).sampling
    }

    #[test]
    fn every_option_reaches_its_setting() {
        let numbers = [
            ("--temperature", "temperature"),
            ("--top-p", "top_p"),
            ("--min-p", "min_p"),
            ("--top-a", "top_a"),
            ("--typical", "typical"),
            ("--tfs", "tfs"),
            ("--top-n-sigma", "top_n_sigma"),
            ("--skew", "skew"),
            ("--smoothing-factor", "smoothing_factor"),
            ("--max-temp", "max_temp"),
            ("--temp-exponent", "temp_exponent"),
            ("--xtc-probability", "xtc_probability"),
            ("--xtc-threshold", "xtc_threshold"),
            ("--repetition-penalty", "repetition_penalty"),
            ("--frequency-penalty", "frequency_penalty"),
            ("--presence-penalty", "presence_penalty"),
            ("--dry-multiplier", "dry_multiplier"),
        ];
        for (option, name) in numbers {
            let mut expected = SamplingSettings::default();
            expected.set_number(name, 0.625).unwrap();
            let found = settings(&parse(&[option, "0.625"]), None).unwrap();
            assert_eq!(found, expected, "{option}");
        }
        let line = "--min-temp 0.5 --max-temp 2 --dry-base 2.5 --dry-allowed-length 3 \
                    --dry-range 500 --dry-max-ngram 9 --mirostat --mirostat-tau 4 \
                    --mirostat-eta 0.5 --repetition-range 64 --repetition-decay 32 --top-k 7 \
                    --temperature-last --logit-bias 5=-100 --logit-bias 6=1.5";
        let found = settings(&parse(&line.split_whitespace().collect::<Vec<_>>()), None).unwrap();
        let expected = SamplingSettings {
            min_temp: 0.5,
            max_temp: 2.0,
            dry_base: 2.5,
            dry_allowed_length: 3,
            dry_range: 500,
            dry_max_ngram: 9,
            mirostat: true,
            mirostat_tau: 4.0,
            mirostat_eta: 0.5,
            repetition_range: Some(64),
            repetition_decay: 32,
            top_k: 7,
            temperature_last: true,
            logit_bias: [(5, -100.0), (6, 1.5)].into(),
            ..SamplingSettings::default()
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn negative_values_and_lists_are_read() {
        let args = parse(&[
            "--repetition-range",
            "-1",
            "--skew",
            "-0.5",
            "--sampler-order",
            "min_p, temperature",
        ]);
        let found = settings(&args, None).unwrap();
        assert_eq!(found.repetition_range, None);
        assert_eq!(found.skew, -0.5);
        assert_eq!(found.sampler_order, [Stage::MinP, Stage::Temperature]);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let refused = |arguments: &[&str]| {
            let line = Line::try_parse_from([&["oxllama"], arguments].concat());
            line.unwrap_err().kind()
        };
        let conflict = ErrorKind::ArgumentConflict;
        assert_eq!(refused(&["--greedy", "--top-k", "3"]), conflict);
        assert_eq!(refused(&["--greedy", "--mirostat"]), conflict);
        assert_eq!(refused(&["--frequency-penalty", "1", "--greedy"]), conflict);
        let order = ["--temperature-last", "--sampler-order", "min_p"];
        assert_eq!(refused(&order), conflict);
        let alone = ["--mirostat-tau", "3"];
        assert_eq!(refused(&alone), ErrorKind::MissingRequiredArgument);
        for bias in ["5", "x=1", "5=x", "5.5=1"] {
            assert_eq!(
                refused(&["--logit-bias", bias]),
                ErrorKind::ValueValidation,
                "{bias}"
            );
        }
        let message = |arguments: &[&str]| check(&parse(arguments)).unwrap_err().to_string();
        assert!(message(&["--temperature", "NaN"]).starts_with("temperature is NaN, expected"));
        assert!(message(&["--sampler-order", "min_q"]).contains("expected a list of temperature"));
        assert!(message(&["--logit-bias", "5=NaN"]).contains("logit_bias is NaN for token 5"));
    }

    #[test]
    fn greedy_and_seed_alone_change_nothing_else() {
        let greedy = settings(&parse(&["--greedy", "--seed", "1", "--stop", "x"]), None).unwrap();
        assert_eq!(greedy, SamplingSettings::greedy());
        assert_eq!(
            settings(&parse(&[]), None).unwrap(),
            SamplingSettings::default()
        );
    }
}
