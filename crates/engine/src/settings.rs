//! Sampling settings: one table of names, defaults and limits for every front end.

use serde::Serialize;
use serde_json::Value;

/// Below this temperature sampling is greedy, as in ExLlamaV2.
const GREEDY_TEMPERATURE: f32 = 0.01;

/// How the next token is drawn. Defaults are ExLlamaV2's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SamplingSettings {
    /// Divides the logits; under 0.01 the most likely token is taken.
    pub temperature: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens that has this probability; 1 keeps all
    /// (and so does 0, as in ExLlamaV2).
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred; 1 is off.
    pub repetition_penalty: f32,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 50,
            top_p: 0.8,
            min_p: 0.0,
            repetition_penalty: 1.025,
        }
    }
}

/// A setting outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {found}, expected {expected}")]
pub struct SettingsError {
    /// The setting.
    pub name: &'static str,
    /// Its value.
    pub found: f32,
    /// The range, in words.
    pub expected: &'static str,
}

impl SamplingSettings {
    /// Always the most likely token, with no penalties.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 1,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }

    /// The defaults, with what a model's `generation_config.json` says in their place.
    ///
    /// Values of another type are ignored, as the file is advice; a value out of range
    /// is found by [`Self::check`].
    pub fn from_generation_config(config: Option<&Value>) -> Self {
        let mut settings = Self::default();
        let Some(config) = config else {
            return settings;
        };
        if config.get("do_sample") == Some(&Value::Bool(false)) {
            return Self::greedy();
        }
        let number = |name: &str| config.get(name).and_then(Value::as_f64).map(|x| x as f32);
        settings.temperature = number("temperature").unwrap_or(settings.temperature);
        settings.top_p = number("top_p").unwrap_or(settings.top_p);
        settings.min_p = number("min_p").unwrap_or(settings.min_p);
        settings.repetition_penalty =
            number("repetition_penalty").unwrap_or(settings.repetition_penalty);
        if let Some(top_k) = config.get("top_k").and_then(Value::as_u64) {
            settings.top_k = u32::try_from(top_k).unwrap_or(u32::MAX);
        }
        settings
    }

    /// Whether the most likely token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_TEMPERATURE || self.top_k == 1
    }

    /// Checks every setting's range.
    ///
    /// # Errors
    /// The first setting that is out of range or not a number.
    pub fn check(&self) -> Result<(), SettingsError> {
        let unit = 0.0..=1.0;
        let checks = [
            (
                "temperature",
                self.temperature,
                (0.0..=100.0).contains(&self.temperature),
                "0 to 100",
            ),
            ("top_p", self.top_p, unit.contains(&self.top_p), "0 to 1"),
            ("min_p", self.min_p, unit.contains(&self.min_p), "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && self.repetition_penalty <= 100.0,
                "above 0, at most 100 (1 is off)",
            ),
        ];
        match checks.into_iter().find(|(_, _, in_range, _)| !in_range) {
            Some((name, found, _, expected)) => Err(SettingsError {
                name,
                found,
                expected,
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
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
            assert_eq!(settings.check().unwrap_err().name, name);
        }
        SamplingSettings::default().check().unwrap();
        SamplingSettings::greedy().check().unwrap();
    }
}
