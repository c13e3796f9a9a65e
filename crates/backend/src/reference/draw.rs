//! Draws as [`Draw`] defines them, with every sum in `f64`.

use crate::{Draw, FIRST_RANKS, LogitChange, NOT_FINITE, NOTHING_LEFT, StepBatch, WorkspaceShape};

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token_id: u32,
    logit: f32,
    /// Where it stands among those that are not passed by rank.
    place: u32,
}

/// The draws of the current step, and what they gave.
#[derive(Debug)]
pub(super) struct StepDraws {
    draws: Vec<Draw>,
    changes: Vec<LogitChange>,
    candidates: Vec<Candidate>,
    pub(super) drawn: Vec<u32>,
}

impl StepDraws {
    pub(super) fn new(shape: &WorkspaceShape) -> Self {
        let most = if shape.draw_width > 0 {
            shape.sequences
        } else {
            0
        };
        Self {
            draws: Vec::with_capacity(most),
            changes: Vec::new(),
            candidates: Vec::with_capacity(shape.draw_width),
            drawn: Vec::with_capacity(most),
        }
    }

    pub(super) fn begin(&mut self, batch: &StepBatch<'_>) {
        self.draws.clear();
        self.draws.extend_from_slice(batch.draws);
        self.changes.clear();
        self.changes.extend_from_slice(batch.changes);
        if !batch.logit_rows.is_empty() {
            self.drawn.clear();
        }
    }

    /// Draws from the last rows of `logits`, f32 `[_, width]`.
    pub(super) fn run(&mut self, logits: &[f32], width: usize) {
        let rows = logits.len() / width;
        let first = rows - self.draws.len();
        self.drawn.clear();
        for (row, draw) in (first..).zip(&self.draws) {
            let logits = &logits[row * width..][..width];
            let changes = &self.changes[draw.first_change as usize..][..draw.change_count as usize];
            let drawn = draw_among(logits, draw, changes, &mut self.candidates);
            self.drawn.push(drawn);
        }
    }
}

/// Draws from a row of logits, f32 `[at least draw.vocab_size]`, of which the draw's own `changes`
/// are changed: the definition of [`Draw`].
pub fn draw(logits: &[f32], draw: &Draw, changes: &[LogitChange]) -> u32 {
    draw_among(logits, draw, changes, &mut Vec::new())
}

fn draw_among(
    logits: &[f32],
    draw: &Draw,
    changes: &[LogitChange],
    candidates: &mut Vec<Candidate>,
) -> u32 {
    let logits = &logits[..draw.vocab_size as usize];
    if logits
        .iter()
        .any(|logit| logit.is_nan() || *logit == f32::INFINITY)
    {
        return NOT_FINITE;
    }
    rank(logits, draw, changes, candidates);
    let Some(best) = candidates.first().copied() else {
        return NOTHING_LEFT;
    };
    if draw.is_greedy() {
        return best.token_id;
    }
    let weight = |candidate: &Candidate, scale: f32| {
        (f64::from(scale) * (f64::from(candidate.logit) - f64::from(best.logit))).exp()
    };
    if draw.has_cuts() {
        cut(candidates, draw, |candidate| {
            weight(candidate, draw.cut_scale)
        });
    } else if candidates.len() > FIRST_RANKS {
        candidates[FIRST_RANKS..].sort_unstable_by_key(|candidate| candidate.place);
    }
    let weights = candidates
        .iter()
        .map(|candidate| weight(candidate, draw.draw_scale));
    let target = draw.random * weights.clone().sum::<f64>();
    let mut reached = 0.0;
    let mut drawn = best;
    for (candidate, weight) in candidates.iter().zip(weights) {
        // Rounding may leave the target at the very end; what has no weight is not drawn for that.
        if weight > 0.0 {
            drawn = *candidate;
            reached += weight;
        }
        if target < reached {
            break;
        }
    }
    drawn.token_id
}

/// All tokens that can be drawn, the most likely first.
fn rank(logits: &[f32], draw: &Draw, changes: &[LogitChange], candidates: &mut Vec<Candidate>) {
    candidates.clear();
    candidates.extend((0..).zip(logits).map(|(token_id, &logit)| Candidate {
        token_id,
        logit,
        place: token_id,
    }));
    for (place, change) in (draw.vocab_size..).zip(changes) {
        if let Some(candidate) = candidates.get_mut(change.token_id as usize) {
            candidate.logit = change.apply(draw, candidate.logit);
            candidate.place = place;
        }
    }
    candidates.retain(|candidate| candidate.logit > f32::NEG_INFINITY);
    candidates.sort_unstable_by(|a, b| {
        // Adding 0 takes -0 for 0, as comparisons do.
        let falling = (b.logit + 0.0).total_cmp(&(a.logit + 0.0));
        falling.then(a.token_id.cmp(&b.token_id))
    });
}

/// Top-k, then top-p, then min-p.
fn cut(candidates: &mut Vec<Candidate>, draw: &Draw, weight: impl Fn(&Candidate) -> f64) {
    if draw.top_k > 0 {
        candidates.truncate(draw.top_k as usize);
    }
    if draw.cuts_by_share() {
        let total: f64 = candidates.iter().map(&weight).sum();
        let wanted = total * f64::from(draw.top_p);
        let mut reached = 0.0;
        let goes_on = |candidate: &&Candidate| {
            let goes_on = reached < wanted;
            reached += weight(candidate);
            goes_on
        };
        let kept = candidates.iter().take_while(goes_on).count();
        candidates.truncate(kept.max(1));
    }
    if draw.min_p > 0.0 {
        let least = f64::from(draw.min_p);
        let stays = |candidate: &&Candidate| weight(candidate) >= least;
        let kept = candidates.iter().take_while(stays).count();
        candidates.truncate(kept.max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(logits: &[f32], settings: Draw, changes: &[LogitChange]) -> u32 {
        draw(logits, &settings, changes)
    }

    fn random(random: f64) -> Draw {
        Draw {
            random,
            cut_scale: 1.0,
            draw_scale: 1.0,
            ..Draw::greedy(4)
        }
    }

    #[test]
    fn the_first_of_the_best_is_greedy() {
        assert_eq!(drawn(&[-0.0, 0.0, -1.0, 9.0], Draw::greedy(3), &[]), 0);
        let all = [f32::NEG_INFINITY; 4];
        assert_eq!(drawn(&all, Draw::greedy(4), &[]), NOTHING_LEFT);
        for fault in [f32::NAN, f32::INFINITY] {
            assert_eq!(drawn(&[0.0, fault, 1.0], Draw::greedy(3), &[]), NOT_FINITE);
            assert_eq!(drawn(&[0.0, 1.0, fault], Draw::greedy(2), &[]), 1);
        }
    }

    #[test]
    fn shares_are_passed_from_the_best_on() {
        // Weights 1/8, 1/2, 1/4, 1/8 of all.
        let logits = [0.125_f32, 0.5, 0.25, 0.125].map(f32::ln);
        for (at, expected) in [(0.0, 1), (0.49, 1), (0.51, 2), (0.76, 0), (0.99, 3)] {
            assert_eq!(drawn(&logits, random(at), &[]), expected, "{at}");
        }
        let top_p = |top_p| Draw {
            top_p,
            ..random(0.999)
        };
        assert_eq!(drawn(&logits, top_p(0.4), &[]), 1);
        assert_eq!(drawn(&logits, top_p(0.6), &[]), 2);
        assert_eq!(drawn(&logits, top_p(0.8), &[]), 0);
        let min_p = Draw {
            min_p: 0.3,
            ..random(0.999)
        };
        assert_eq!(drawn(&logits, min_p, &[]), 2);
        let top_k = Draw {
            top_k: 3,
            ..random(0.999)
        };
        assert_eq!(drawn(&logits, top_k, &[]), 0);
    }

    #[test]
    fn changes_penalise_what_occurred_and_bias_the_rest() {
        let settings = Draw {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..Draw::greedy(4)
        };
        let change = |strongest, total, bias| LogitChange {
            token_id: 0,
            strongest,
            total,
            bias,
        };
        let full = change(1.0, 3.0, 0.0);
        assert_eq!(full.apply(&settings, 4.0), 4.0 / 2.0 - 0.5 - 0.75);
        assert_eq!(full.apply(&settings, -4.0), -4.0 * 2.0 - 0.5 - 0.75);
        let half = change(0.5, 0.5, 1.0);
        assert_eq!(half.apply(&settings, 3.0), 3.0 / 1.5 - 0.25 - 0.125 + 1.0);
        assert_eq!(change(0.0, 0.0, 1.0).apply(&settings, 3.0), 4.0);
        let forbidden = change(0.0, 0.0, f32::NEG_INFINITY);
        assert_eq!(drawn(&[3.0, 1.0, 2.0, 0.0], settings, &[forbidden]), 2);
    }

    #[test]
    fn beyond_the_first_ranks_the_order_is_that_of_ids() {
        // All alike but one; the changed one comes last.
        let logits = [0.0_f32; 200];
        let changes = [LogitChange {
            token_id: 70,
            strongest: 1.0,
            total: 1.0,
            bias: -1e-6,
        }];
        let at = |rank: u32| Draw {
            vocab_size: 200,
            ..random((f64::from(rank) + 0.5) / 200.0)
        };
        assert_eq!(drawn(&logits, at(69), &changes), 69);
        assert_eq!(drawn(&logits, at(70), &changes), 71);
        assert_eq!(drawn(&logits, at(199), &changes), 70);
    }
}
