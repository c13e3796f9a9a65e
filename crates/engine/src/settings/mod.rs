//! Sampling settings: one table of names, defaults and limits for every front end.

mod stage;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

pub use stage::Stage;

/// Below this temperature sampling is greedy, as in ExLlamaV2.
pub(crate) const GREEDY_TEMPERATURE: f32 = 0.01;

/// How the next token is drawn. Settings, defaults and the order in which they act are
/// ExLlamaV2's; `top_n_sigma` and `sampler_order` are additions.
///
/// First each logit is changed: repetition, frequency and presence penalties, logit bias, DRY.
/// Then the stages in [`sampler_order`](Self::sampler_order) reshape and cut the distribution.
/// At last a token is drawn from what is left.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SamplingSettings {
    /// Divides positive and multiplies negative logits of tokens that occurred; 1 is off.
    pub repetition_penalty: f32,
    /// Penalties look at this many of the newest tokens; `None` looks at all.
    pub repetition_range: Option<u32>,
    /// Over this many tokens before the range, penalties fall off linearly.
    pub repetition_decay: u32,
    /// Subtracted from a token's logit for each time that it occurred; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit if it occurred; 0 is off.
    pub presence_penalty: f32,

    /// Divides the logits; under 0.01 the most likely token is taken.
    pub temperature: f32,
    /// Temperature acts after all cuts instead of before them.
    pub temperature_last: bool,
    /// Replaces each logit by the negative square of its distance to the best one, times this;
    /// 0 is off.
    pub smoothing_factor: f32,
    /// The dynamic temperature of a distribution without entropy.
    pub min_temp: f32,
    /// The dynamic temperature of an even distribution; 0 (with a `min_temp` of 0) is off.
    pub max_temp: f32,
    /// Bends the way of the dynamic temperature from one to the other.
    pub temp_exponent: f32,

    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens that has this probability; 1 keeps all
    /// (and so does 0, as in ExLlamaV2).
    pub top_p: f32,
    /// Drop tokens less likely than this times the square of the best one's probability; 0
    /// keeps all.
    pub top_a: f32,
    /// Drop tokens less likely than this fraction of the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Tail-free sampling: keep the most likely tokens up to this share of the summed curvature
    /// of the sorted probabilities; 0 and 1 are off.
    pub tfs: f32,
    /// Locally typical sampling: keep the tokens whose surprise is nearest to the entropy, up to
    /// this probability; 0 and 1 are off.
    pub typical: f32,
    /// Keep tokens whose logit is at most this many standard deviations below the best one; 0
    /// keeps all.
    pub top_n_sigma: f32,
    /// Bends the draw: positive values favour unlikely tokens, negative ones likely tokens; 0 is
    /// off.
    pub skew: f32,

    /// Mirostat (version 2): cut so that the mean surprise tends to `mirostat_tau`.
    pub mirostat: bool,
    /// The surprise in bits that mirostat aims for.
    pub mirostat_tau: f32,
    /// How fast mirostat's limit follows what was drawn.
    pub mirostat_eta: f32,
    /// Mirostat's first limit in bits; 0 begins with twice `mirostat_tau`.
    pub mirostat_mu: f32,

    /// Added to the logits of these tokens, -100 to 100; negative infinity forbids a token.
    pub logit_bias: BTreeMap<u32, f32>,

    /// DRY: the longest repetition that goes unpunished is one token shorter than this.
    pub dry_allowed_length: u32,
    /// DRY: the penalty grows by this factor for each token of repetition more.
    pub dry_base: f32,
    /// DRY: the penalty of a repetition of `dry_allowed_length`; 0 is off.
    pub dry_multiplier: f32,
    /// DRY: no repetition reaches across these tokens. `None`: special tokens and those with
    /// punctuation, brackets, quotes, newlines or tabs.
    pub dry_sequence_breakers: Option<Vec<u32>>,
    /// DRY: look at this many of the newest tokens; 0 looks at all.
    pub dry_range: u32,
    /// DRY: the longest repetition that is looked for, with the token that would continue it.
    pub dry_max_ngram: u32,

    /// XTC: how often all but the least likely of the tokens above `xtc_threshold` are
    /// dropped; 0 is off.
    pub xtc_probability: f32,
    /// XTC: the probability from which a token counts; above 0.5 nothing can be dropped.
    pub xtc_threshold: f32,
    /// XTC: tokens that are never dropped nor counted. `None`: special tokens and those with a
    /// newline.
    pub xtc_ignore_tokens: Option<Vec<u32>>,

    /// The stages in the order in which they act; one that is left out does not act.
    pub sampler_order: Vec<Stage>,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.025,
            repetition_range: None,
            repetition_decay: 0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            temperature: 0.8,
            temperature_last: false,
            smoothing_factor: 0.0,
            min_temp: 0.0,
            max_temp: 0.0,
            temp_exponent: 1.0,
            top_k: 50,
            top_p: 0.8,
            top_a: 0.0,
            min_p: 0.0,
            tfs: 0.0,
            typical: 0.0,
            top_n_sigma: 0.0,
            skew: 0.0,
            mirostat: false,
            mirostat_tau: 1.5,
            mirostat_eta: 0.1,
            mirostat_mu: 0.0,
            logit_bias: BTreeMap::new(),
            dry_allowed_length: 2,
            dry_base: 1.75,
            dry_multiplier: 0.0,
            dry_sequence_breakers: None,
            dry_range: 0,
            dry_max_ngram: 20,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            xtc_ignore_tokens: None,
            sampler_order: Stage::DEFAULT_ORDER.to_vec(),
        }
    }
}

/// A setting that cannot be followed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SettingsError {
    /// A value outside its range, of another type, or in contradiction to another setting.
    #[error("{name} is {found}, expected {expected}")]
    Invalid {
        /// The setting.
        name: &'static str,
        /// Its value.
        found: String,
        /// The range or type, in words.
        expected: String,
    },

    /// No setting has this name.
    #[error("unknown sampling setting `{name}`; {}", table::suggestion(near))]
    Unknown {
        /// The name found.
        name: String,
        /// The names most like it.
        near: Vec<&'static str>,
    },
}

impl SettingsError {
    /// The setting's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Invalid { name, .. } => name,
            Self::Unknown { name, .. } => name,
        }
    }

    fn invalid(name: &'static str, found: impl ToString, expected: impl ToString) -> Self {
        Self::Invalid {
            name,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

impl SamplingSettings {
    /// Always the most likely token, with no penalties.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 1,
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..Self::default()
        }
    }

    /// The defaults, with what a model's `generation_config.json` says in their place.
    ///
    /// Values of another type are ignored, as the file is advice; a value out of range
    /// is found by [`Self::check`].
    pub fn from_generation_config(config: Option<&Value>) -> Self {
        let Some(config) = config else {
            return Self::default();
        };
        let mut settings = Self::default();
        let mut names = &[
            "repetition_penalty",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "typical_p",
        ][..];
        if config.get("do_sample") == Some(&Value::Bool(false)) {
            settings = Self::greedy();
            names = &names[..1];
        }
        for name in names {
            if let Some(value) = config.get(name) {
                // Only a wrong type fails here.
                let _ = settings.set(name, value);
            }
        }
        settings
    }

    /// Sets one setting by its name: those of [`Self::names`], which are the fields' names and
    /// include OpenAI's (`temperature`, `top_p`, `frequency_penalty`, `presence_penalty`,
    /// `logit_bias`), or ExLlamaV2's where it differs (`token_repetition_penalty`).
    ///
    /// `null` leaves a setting as it is. A `repetition_range` of -1 looks at all tokens;
    /// `logit_bias` is an object of token id to bias; `sampler_order` a list of stage names, or
    /// one string of them with commas. Ranges are left to [`Self::check`].
    ///
    /// # Errors
    /// An unknown name, or a value of the wrong type.
    pub fn set(&mut self, name: &str, value: &Value) -> Result<(), SettingsError> {
        table::set(self, name, value)
    }

    /// As [`Self::set`], for a number that JSON cannot express, such as NaN.
    ///
    /// # Errors
    /// An unknown name, or a setting that is not a real number.
    pub fn set_number(&mut self, name: &str, value: f32) -> Result<(), SettingsError> {
        table::set_number(self, name, value)
    }

    /// The names of all settings.
    pub fn names() -> impl Iterator<Item = &'static str> {
        table::names()
    }

    /// Whether the most likely token is always taken (penalties, bias and masks still count).
    pub fn is_greedy(&self) -> bool {
        let one_is_kept = self.top_k == 1
            && self
                .sampler_order
                .iter()
                .take_while(|stage| !stage.may_drop_the_best())
                .any(|stage| *stage == Stage::TopK);
        self.temperature < GREEDY_TEMPERATURE || one_is_kept
    }

    /// Checks every setting's range, and that no two contradict each other.
    ///
    /// # Errors
    /// The first setting that is out of range, not a number, or in contradiction.
    pub fn check(&self) -> Result<(), SettingsError> {
        table::check_ranges(self)?;
        if let Some((id, bias)) = self
            .logit_bias
            .iter()
            .find(|(_, bias)| !bias_is_valid(**bias))
        {
            return Err(SettingsError::invalid(
                "logit_bias",
                format_args!("{bias} for token {id}"),
                "-100 to 100",
            ));
        }
        let has_dynamic_temperature = self.min_temp != 0.0 || self.max_temp != 0.0;
        if has_dynamic_temperature && self.min_temp >= self.max_temp {
            return Err(SettingsError::invalid(
                "max_temp",
                self.max_temp,
                format_args!(
                    "more than min_temp, which is {} (both 0 are off)",
                    self.min_temp
                ),
            ));
        }
        if self.dry_multiplier > 0.0 && self.dry_allowed_length >= self.dry_max_ngram {
            return Err(SettingsError::invalid(
                "dry_allowed_length",
                self.dry_allowed_length,
                format_args!("less than dry_max_ngram, which is {}", self.dry_max_ngram),
            ));
        }
        self.check_order()
    }

    fn check_order(&self) -> Result<(), SettingsError> {
        for (index, stage) in self.sampler_order.iter().enumerate() {
            if self.sampler_order[..index].contains(stage) {
                return Err(SettingsError::invalid(
                    "sampler_order",
                    format_args!("a list that has {} twice", stage.name()),
                    "each stage once at most",
                ));
            }
        }
        if self.temperature_last && self.sampler_order != Stage::DEFAULT_ORDER {
            return Err(SettingsError::invalid(
                "temperature_last",
                "true",
                "false where sampler_order is given: put `temperature` last in it instead",
            ));
        }
        Ok(())
    }

    /// Checks that the token ids among the settings are below `vocab_size`.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check_vocabulary(&self, vocab_size: usize) -> Result<(), SettingsError> {
        let lists = [
            ("dry_sequence_breakers", &self.dry_sequence_breakers),
            ("xtc_ignore_tokens", &self.xtc_ignore_tokens),
        ];
        let listed = lists
            .into_iter()
            .flat_map(|(name, ids)| ids.iter().flatten().map(move |id| (name, *id)));
        let biased = self.logit_bias.keys().map(|id| ("logit_bias", *id));
        match biased
            .chain(listed)
            .find(|(_, id)| *id as usize >= vocab_size)
        {
            Some((name, id)) => Err(SettingsError::invalid(
                name,
                format_args!("a setting for token {id}"),
                format_args!("token ids below {vocab_size}, the model's vocabulary"),
            )),
            None => Ok(()),
        }
    }
}

fn bias_is_valid(bias: f32) -> bool {
    (-100.0..=100.0).contains(&bias) || bias == f32::NEG_INFINITY
}
