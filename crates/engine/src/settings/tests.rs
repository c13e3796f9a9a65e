//! Names, ranges, defaults.

use super::*;
use serde_json::json;

#[test]
fn defaults_are_exllamav2s() {
    let settings = SamplingSettings::from_generation_config(None);
    assert_eq!(settings, SamplingSettings::default());
    assert_eq!(
        (
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.repetition_penalty
        ),
        (0.8, 50, 0.8, 1.025)
    );
}

#[test]
fn generation_config_wins_over_defaults() {
    let config = json!({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [1, 2]});
    let settings = SamplingSettings::from_generation_config(Some(&config));
    assert_eq!(
        (settings.temperature, settings.top_p, settings.top_k),
        (0.6, 0.9, 20)
    );
    assert_eq!(settings.repetition_penalty, 1.025);
    let config = json!({"do_sample": false, "temperature": 0.6});
    assert!(SamplingSettings::from_generation_config(Some(&config)).is_greedy());
}

#[test]
fn out_of_range_settings_are_named() {
    let cases = [
        (
            SamplingSettings {
                temperature: -1.0,
                ..Default::default()
            },
            "temperature",
        ),
        (
            SamplingSettings {
                temperature: f32::NAN,
                ..Default::default()
            },
            "temperature",
        ),
        (
            SamplingSettings {
                top_p: 1.5,
                ..Default::default()
            },
            "top_p",
        ),
        (
            SamplingSettings {
                min_p: -0.1,
                ..Default::default()
            },
            "min_p",
        ),
        (
            SamplingSettings {
                repetition_penalty: 0.0,
                ..Default::default()
            },
            "repetition_penalty",
        ),
    ];
    for (settings, name) in cases {
        assert_eq!(settings.check().unwrap_err().name(), name);
    }
    SamplingSettings::default().check().unwrap();
    SamplingSettings::greedy().check().unwrap();
}
