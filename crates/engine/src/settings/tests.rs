//! Names, ranges, defaults.

use serde_json::json;

use super::*;

#[test]
fn defaults_are_exllamav2s() {
    let settings = SamplingSettings::from_generation_config(None);
    assert_eq!(settings, SamplingSettings::default());
    let defaults = serde_json::to_value(&settings).unwrap();
    // Its `Settings` class, name by name; here all tokens are null and mu begins at 0.
    let expected = json!({
        "repetition_penalty": 1.025, "repetition_range": null, "repetition_decay": 0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0,
        "temperature": 0.8, "temperature_last": false, "smoothing_factor": 0.0,
        "min_temp": 0.0, "max_temp": 0.0, "temp_exponent": 1.0,
        "top_k": 50, "top_p": 0.8, "top_a": 0.0, "min_p": 0.0, "tfs": 0.0, "typical": 0.0,
        "top_n_sigma": 0.0, "skew": 0.0,
        "mirostat": false, "mirostat_tau": 1.5, "mirostat_eta": 0.1, "mirostat_mu": 0.0,
        "logit_bias": {},
        "dry_allowed_length": 2, "dry_base": 1.75, "dry_multiplier": 0.0,
        "dry_sequence_breakers": null, "dry_range": 0, "dry_max_ngram": 20,
        "xtc_probability": 0.0, "xtc_threshold": 0.1, "xtc_ignore_tokens": null,
        "sampler_order": [
            "temperature", "top_n_sigma", "top_k", "top_p", "top_a", "min_p", "tfs", "typical",
            "mirostat", "dynamic_temperature", "xtc"
        ],
    });
    let (defaults, expected) = (defaults.as_object().unwrap(), expected.as_object().unwrap());
    assert!(defaults.keys().eq(expected.keys()));
    for (name, expected) in expected {
        match (expected.as_f64(), defaults[name].as_f64()) {
            (Some(expected), Some(found)) => assert_eq!(found as f32, expected as f32, "{name}"),
            _ => assert_eq!(&defaults[name], expected, "{name}"),
        }
    }
}

#[test]
fn every_setting_can_be_set_by_its_name() {
    let fields = serde_json::to_value(SamplingSettings::default()).unwrap();
    assert!(SamplingSettings::names().eq(fields.as_object().unwrap().keys()));
    for name in SamplingSettings::names() {
        let value = match name {
            "temperature_last" | "mirostat" => json!(true),
            "logit_bias" => json!({"7": -100, "8": 2.5}),
            "dry_sequence_breakers" | "xtc_ignore_tokens" => json!([3, 4]),
            "sampler_order" => json!(["top_k", "temperature"]),
            name if fields[name].is_f64() => json!(0.625),
            _ => json!(3),
        };
        let mut settings = SamplingSettings::default();
        settings.set(name, &value).unwrap();
        let after = serde_json::to_value(&settings).unwrap();
        for other in SamplingSettings::names() {
            let is_changed = after[other] != fields[other];
            assert_eq!(is_changed, other == name, "{name} changed {other}");
        }
        settings.set(name, &Value::Null).unwrap();
        assert_eq!(serde_json::to_value(&settings).unwrap(), after);
        for wrong in [
            json!("wrong"),
            json!({"x": 1}),
            json!([-1]),
            json!({"1": "x"}),
        ] {
            let error = settings.set(name, &wrong).unwrap_err();
            assert_eq!(error.name(), name);
            assert!(error.to_string().contains("expected"), "{error}");
        }
    }
}

#[test]
fn other_programs_names_are_known() {
    let mut settings = SamplingSettings::default();
    settings
        .set("token_repetition_penalty", &json!(1.5))
        .unwrap();
    settings.set("typical_p", &json!(0.5)).unwrap();
    settings.set("repetition_range", &json!(-1)).unwrap();
    settings.set("top_k", &json!(u64::MAX)).unwrap();
    settings
        .set("sampler_order", &json!("min_p, temperature"))
        .unwrap();
    assert_eq!(settings.repetition_penalty, 1.5);
    assert_eq!(settings.typical, 0.5);
    assert_eq!(settings.repetition_range, None);
    assert_eq!(settings.top_k, u32::MAX);
    assert_eq!(settings.sampler_order, [Stage::MinP, Stage::Temperature]);
}

#[test]
fn unknown_names_are_answered_with_near_ones() {
    let mut settings = SamplingSettings::default();
    let mut message = |name: &str| {
        let error = settings.set(name, &json!(1)).unwrap_err();
        error.to_string()
    };
    assert_eq!(
        message("temprature"),
        "unknown sampling setting `temprature`; is temperature meant?"
    );
    assert!(message("repetition").contains("or repetition_penalty meant?"));
    assert!(message("Top-P").contains("top_p"));
    let all = message("wibble");
    assert!(SamplingSettings::names().all(|name| all.contains(name)));
    let long = message(&"x".repeat(1 << 20));
    assert!(long.len() < 1000, "{}", long.len());
}

#[test]
fn generation_config_wins_over_defaults() {
    let config = json!({
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "typical_p": 0.95, "eos_token_id": [1, 2],
        "min_p": null, "repetition_penalty": "much"
    });
    let settings = SamplingSettings::from_generation_config(Some(&config));
    let expected = SamplingSettings {
        temperature: 0.6,
        top_p: 0.9,
        top_k: 20,
        typical: 0.95,
        ..SamplingSettings::default()
    };
    assert_eq!(settings, expected);
    let config = json!({"do_sample": false, "temperature": 0.6, "repetition_penalty": 1.1});
    let settings = SamplingSettings::from_generation_config(Some(&config));
    assert!(settings.is_greedy());
    assert_eq!(settings.repetition_penalty, 1.1);
}

#[track_caller]
fn check_refused(change: impl FnOnce(&mut SamplingSettings), message: &str) {
    let mut settings = SamplingSettings::default();
    change(&mut settings);
    let found = settings.check().unwrap_err().to_string();
    assert!(
        found.contains(message),
        "found: {found}\nexpected: {message}"
    );
}

#[test]
fn numbers_out_of_range_are_named() {
    for name in SamplingSettings::names() {
        let mut settings = SamplingSettings::default();
        if settings.set_number(name, f32::NAN).is_ok() {
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -101.0, 101.0] {
                settings.set_number(name, wrong).unwrap();
                let error = settings.check().unwrap_err().to_string();
                let expected = format!("{name} is {wrong}, expected ");
                assert!(error.starts_with(&expected), "{error}");
            }
        }
    }
    check_refused(
        |s| s.temperature = -1.0,
        "temperature is -1, expected 0 to 100",
    );
    check_refused(|s| s.top_p = 1.5, "top_p is 1.5, expected 0 to 1");
    check_refused(
        |s| s.repetition_penalty = 0.0,
        "repetition_penalty is 0, expected above 0",
    );
    check_refused(
        |s| s.dry_allowed_length = 0,
        "dry_allowed_length is 0, expected a whole",
    );
    check_refused(|s| s.dry_max_ngram = 1, "dry_max_ngram is 1, expected");
    check_refused(
        |s| s.xtc_threshold = 0.0,
        "xtc_threshold is 0, expected above 0",
    );
    SamplingSettings::default().check().unwrap();
    SamplingSettings::greedy().check().unwrap();
}

#[test]
fn contradictions_are_named() {
    check_refused(
        |s| s.min_temp = 0.5,
        "max_temp is 0, expected more than min_temp",
    );
    let same = |s: &mut SamplingSettings| (s.min_temp, s.max_temp) = (0.5, 0.5);
    check_refused(
        same,
        "max_temp is 0.5, expected more than min_temp, which is 0.5",
    );
    let dry = |s: &mut SamplingSettings| (s.dry_multiplier, s.dry_allowed_length) = (0.8, 20);
    check_refused(
        dry,
        "dry_allowed_length is 20, expected less than dry_max_ngram",
    );
    let twice = |s: &mut SamplingSettings| s.sampler_order.push(Stage::MinP);
    check_refused(twice, "sampler_order is a list that has min_p twice");
    let last = |s: &mut SamplingSettings| {
        s.temperature_last = true;
        s.sampler_order.pop();
    };
    check_refused(last, "temperature_last is true, expected false");
    for bias in [f32::NAN, f32::INFINITY, 100.5, -101.0] {
        let biased = |s: &mut SamplingSettings| s.logit_bias = [(5, 0.0), (9, bias)].into();
        check_refused(
            biased,
            &format!("logit_bias is {bias} for token 9, expected -100 to 100"),
        );
    }
}

#[test]
fn token_ids_must_be_in_the_vocabulary() {
    let biased = SamplingSettings {
        logit_bias: [(99, f32::NEG_INFINITY), (100, 1.0)].into(),
        ..SamplingSettings::default()
    };
    biased.check().unwrap();
    biased.check_vocabulary(101).unwrap();
    let error = biased.check_vocabulary(100).unwrap_err();
    let expected = "logit_bias is a setting for token 100, expected token ids below 100, \
                    the model's vocabulary";
    assert_eq!(error.to_string(), expected);
    for name in ["dry_sequence_breakers", "xtc_ignore_tokens"] {
        let mut settings = SamplingSettings::default();
        settings.set(name, &json!([0, 3])).unwrap();
        settings.check_vocabulary(4).unwrap();
        assert_eq!(settings.check_vocabulary(3).unwrap_err().name(), name);
    }
}

#[test]
fn greedy_is_a_low_temperature_or_a_choice_of_one() {
    let mut settings = SamplingSettings {
        temperature: 0.009,
        ..SamplingSettings::default()
    };
    assert!(settings.is_greedy());
    settings.temperature = 0.01;
    assert!(!settings.is_greedy());
    settings.top_k = 1;
    assert!(settings.is_greedy());
    settings.sampler_order = vec![Stage::Typical, Stage::TopK];
    assert!(!settings.is_greedy());
    settings.sampler_order = vec![Stage::MinP];
    assert!(!settings.is_greedy());
}
