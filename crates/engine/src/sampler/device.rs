//! Draws that a device can make by itself, as it is told to.

use oxllama_backend::{Draw, DrawLimits, LogitChange};

use super::Sampler;
use super::random::{Stream, uniform};
use crate::{SamplingSettings, Stage};

/// Temperature and cuts, where they come in the order in which devices know them.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shape {
    cut_scale: f32,
    draw_scale: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
}

impl Shape {
    const GREEDY: Self = Self {
        cut_scale: 0.0,
        draw_scale: 0.0,
        top_k: 0,
        top_p: 0.0,
        min_p: 0.0,
    };

    /// `None` where a stage acts that devices do not know, or in another order: temperature first
    /// or last, top-k, top-p, min-p.
    fn of(settings: &SamplingSettings) -> Option<Self> {
        if settings.is_greedy() {
            return Some(Self::GREEDY);
        }
        let mut shape = Self {
            cut_scale: 1.0,
            draw_scale: 1.0,
            ..Self::GREEDY
        };
        let cuts_by = |share: f32| share > 0.0 && share < 1.0;
        // The last of the cuts so far, and whether a temperature acted after one.
        let (mut last_cut, mut is_closed) = (0, false);
        for stage in &settings.sampler_order {
            let cut = match stage {
                Stage::Temperature if settings.smoothing_factor > 0.0 => return None,
                Stage::Temperature if !settings.temperature_last => 0,
                Stage::DynamicTemperature if settings.max_temp > settings.min_temp => return None,
                Stage::DynamicTemperature if settings.temperature_last => 0,
                Stage::TopK if settings.top_k > 0 => 1,
                Stage::TopP if cuts_by(settings.top_p) => 2,
                Stage::MinP if settings.min_p > 0.0 => 3,
                Stage::TopNSigma if settings.top_n_sigma > 0.0 => return None,
                Stage::TopA if settings.top_a > 0.0 => return None,
                Stage::Tfs if cuts_by(settings.tfs) => return None,
                Stage::Typical if cuts_by(settings.typical) => return None,
                Stage::Xtc if settings.xtc_probability > 0.0 => return None,
                _ => continue,
            };
            match cut {
                0 if last_cut == 0 => {
                    shape.cut_scale /= settings.temperature;
                    shape.draw_scale /= settings.temperature;
                    continue;
                }
                0 => {
                    shape.draw_scale /= settings.temperature;
                    is_closed = true;
                    continue;
                }
                _ if is_closed || cut <= last_cut => return None,
                1 => shape.top_k = settings.top_k,
                2 => shape.top_p = settings.top_p,
                _ => shape.min_p = settings.min_p,
            }
            last_cut = cut;
        }
        Some(shape)
    }
}

impl Sampler {
    /// Token number `step` as a draw that a device with `limits` can make, whose changes are added
    /// to `changes`; `None` if it cannot be asked for that: [`Self::sample`] draws then.
    ///
    /// Which of the two it is depends on the settings and the history alone. Both draw the same
    /// token but for borders that a sum's last bits decide; of greedy draws they do always.
    pub fn device_draw(
        &mut self,
        limits: &DrawLimits,
        step: u64,
        changes: &mut Vec<LogitChange>,
    ) -> Option<Draw> {
        let settings = &self.settings;
        if settings.dry_multiplier > 0.0 || settings.mirostat || settings.skew != 0.0 {
            return None;
        }
        let shape = Shape::of(settings).filter(|shape| shape.top_k <= limits.top_k)?;
        self.penalties.collect(&self.history);
        let first = changes.len();
        // In the order in which `sample` changes them, which its draws pass them in.
        for (&token_id, &bias) in &settings.logit_bias {
            let (strongest, total) = self.penalties.shares(token_id);
            changes.push(LogitChange {
                token_id,
                strongest,
                total,
                bias,
            });
        }
        for occurrence in self.penalties.occurrences() {
            if settings.logit_bias.contains_key(&occurrence.token_id) {
                continue;
            }
            let (strongest, total) = occurrence.shares();
            changes.push(LogitChange {
                token_id: occurrence.token_id,
                strongest,
                total,
                bias: 0.0,
            });
        }
        let count = changes.len() - first;
        if count > limits.changes {
            changes.truncate(first);
            return None;
        }
        Some(Draw {
            random: uniform(self.seed, Stream::Draw, step),
            cut_scale: shape.cut_scale,
            draw_scale: shape.draw_scale,
            top_k: shape.top_k,
            top_p: shape.top_p,
            min_p: shape.min_p,
            repetition_penalty: settings.repetition_penalty,
            frequency_penalty: settings.frequency_penalty,
            presence_penalty: settings.presence_penalty,
            vocab_size: self.vocab_size as u32,
            first_change: first as u32,
            change_count: count as u32,
        })
    }
}
