//! The distribution that the stages reshape and cut.

use std::ops::ControlFlow;

use super::numbers::{self, BLOCK};
use super::row::{Candidate, Part, Row};

/// How many tokens are ranked at first where nothing says how many are needed.
pub(super) const FIRST_RANKS: usize = 64;

/// The tokens that may still be drawn, the most likely first.
///
/// They are ranked only as far as a stage asks: a vocabulary has a hundred thousand tokens, and
/// nearly always some dozens decide. What is not ranked yet counts all the same.
#[derive(Debug)]
pub(super) struct Candidates<'a> {
    row: Row<'a>,
    /// The most likely ones, in order; never empty.
    ranked: &'a mut Vec<Candidate>,
    /// The least likely token that was ranked, kept or not.
    frontier: Candidate,
    /// Tokens beyond the frontier belong to the candidates.
    is_open: bool,
    curve: Curve,
}

/// How a logit becomes the logarithm of a weight: `scale * d`, or `-scale * d * d` where logits
/// are smoothed, with d the distance to `center`. Every temperature comes down to that.
#[derive(Debug, Clone, Copy)]
struct Curve {
    center: f32,
    is_squared: bool,
    scale: f32,
}

impl Curve {
    fn at(&self, logit: f32) -> f64 {
        let distance = f64::from(logit) - f64::from(self.center);
        let scale = f64::from(self.scale);
        if self.is_squared {
            -scale * distance * distance
        } else {
            scale * distance
        }
    }
}

/// How far log weights lie from the largest, which is 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spread {
    /// How many candidates there are.
    pub(super) count: usize,
    /// Their standard deviation.
    pub(super) deviation: f64,
}

impl<'a> Candidates<'a> {
    /// All tokens of `row` that can be drawn, of which `first_ranks` are ranked at once; `None`
    /// if there are none.
    pub(super) fn new(
        mut row: Row<'a>,
        ranked: &'a mut Vec<Candidate>,
        first_ranks: usize,
    ) -> Option<Self> {
        ranked.clear();
        row.rank(None, first_ranks.max(1), ranked);
        let (first, last) = (*ranked.first()?, *ranked.last()?);
        Some(Self {
            row,
            is_open: ranked.len() == first_ranks.max(1),
            ranked,
            frontier: last,
            curve: Curve {
                center: first.logit,
                is_squared: false,
                scale: 1.0,
            },
        })
    }

    /// The most likely one.
    pub(super) fn best(&self) -> Candidate {
        self.ranked[0]
    }

    /// The one at `rank`, from 0; `None` past the end.
    pub(super) fn get(&mut self, rank: usize) -> Option<Candidate> {
        if rank >= self.ranked.len() && self.is_open {
            // Each pass over the row should be worth it.
            let ranked = self.ranked.len();
            let more = (rank + 1 - ranked).max(3 * ranked).max(FIRST_RANKS);
            self.row.rank(Some(self.frontier), more, self.ranked);
            self.is_open = self.ranked.len() == ranked + more;
            if let Some(last) = self.ranked[ranked..].last() {
                self.frontier = *last;
            }
        }
        self.ranked.get(rank).copied()
    }

    /// Ranks all there are.
    pub(super) fn rank_all(&mut self) {
        while self.is_open {
            self.get(self.ranked.len());
        }
    }

    /// The logarithm of a candidate's weight; the best one's is 0.
    pub(super) fn log_weight(&self, candidate: Candidate) -> f64 {
        self.curve.at(candidate.logit) - self.curve.at(self.best().logit)
    }

    /// A candidate's weight; the best one's is 1.
    pub(super) fn weight(&self, candidate: Candidate) -> f64 {
        self.log_weight(candidate).exp()
    }

    /// Keeps the `count` most likely ones, at least one.
    pub(super) fn keep(&mut self, count: usize) {
        let count = count.max(1);
        if self.get(count - 1).is_some() {
            self.ranked.truncate(count);
            self.is_open = false;
        }
    }

    /// Keeps the most likely ones as long as `holds` does, at least one.
    pub(super) fn keep_while(&mut self, mut holds: impl FnMut(&Self, Candidate) -> bool) {
        let mut rank = 1;
        while let Some(candidate) = self.get(rank) {
            if !holds(self, candidate) {
                self.keep(rank);
                return;
            }
            rank += 1;
        }
    }

    /// Keeps those at ranks `first..end`, which must have been asked for.
    pub(super) fn keep_range(&mut self, first: usize, end: usize) {
        self.keep(end);
        self.ranked.drain(..first);
    }

    /// Drops those before `rank` that are not `spared`. The one at `rank` stays.
    pub(super) fn drop_before(&mut self, rank: usize, spared: impl Fn(u32) -> bool) {
        let mut index = 0;
        self.ranked.retain(|candidate| {
            let keeps = index >= rank || spared(candidate.token_id);
            index += 1;
            keeps
        });
    }

    /// Divides log weights by `temperature`, which is above 0.
    pub(super) fn heat(&mut self, temperature: f32) {
        self.curve.scale /= temperature;
    }

    /// Replaces log weights by `factor` times their negative square. Once at most.
    pub(super) fn smooth(&mut self, factor: f32) {
        let scale = self.curve.scale;
        self.curve = Curve {
            center: self.best().logit,
            is_squared: true,
            scale: scale * scale * factor,
        };
    }

    /// The sum of all weights.
    pub(super) fn total(&self) -> f64 {
        let mut total: f64 = self.ranked.iter().map(|ranked| self.weight(*ranked)).sum();
        self.try_each_open_part(|log_weights, _| {
            total += numbers::mass(log_weights);
            ControlFlow::Continue(())
        });
        total
    }

    /// The entropy in nats, given [`Self::total`].
    pub(super) fn entropy(&self, total: f64) -> f64 {
        let mut weighted = 0.0;
        for candidate in &*self.ranked {
            let log_weight = self.log_weight(*candidate);
            let weight = log_weight.exp();
            if weight > 0.0 {
                weighted += weight * log_weight;
            }
        }
        self.try_each_open_part(|log_weights, _| {
            weighted += numbers::weighted_sum(log_weights);
            ControlFlow::Continue(())
        });
        total.ln() - weighted / total
    }

    /// How many candidates there are, and how far they lie apart.
    pub(super) fn spread(&self) -> Spread {
        let (mut count, mut sum, mut squares) = (0usize, 0.0, 0.0);
        let mut add = |log_weight: f64| {
            count += 1;
            sum += log_weight;
            squares += log_weight * log_weight;
        };
        for candidate in &*self.ranked {
            add(self.log_weight(*candidate));
        }
        self.try_each_open_part(|log_weights, _| {
            for log_weight in log_weights {
                if *log_weight > f32::NEG_INFINITY {
                    add(f64::from(*log_weight));
                }
            }
            ControlFlow::Continue(())
        });
        let mean = sum / count as f64;
        let variance = squares / count as f64 - mean * mean;
        Spread {
            count,
            deviation: variance.max(0.0).sqrt(),
        }
    }

    /// The candidate at which the summed weights pass `target`, the most likely ones first and
    /// those that are not ranked after them in the order of their ids; and its weight.
    pub(super) fn at_mass(&self, target: f64) -> (Candidate, f64) {
        let mut reached = 0.0;
        // Rounding may leave the target at the very end; what has no weight is not drawn for
        // that.
        let mut chosen = (self.best(), 1.0);
        for candidate in &*self.ranked {
            let weight = self.weight(*candidate);
            if weight > 0.0 {
                chosen = (*candidate, weight);
                reached += weight;
            }
            if target < reached {
                return chosen;
            }
        }
        self.try_each_open_part(|log_weights, part| {
            let mass = numbers::mass(log_weights);
            if target >= reached + mass {
                reached += mass;
                return ControlFlow::Continue(());
            }
            for (place, log_weight) in log_weights.iter().enumerate() {
                let weight = f64::from(numbers::exp(*log_weight));
                if weight > 0.0 {
                    chosen = (part.candidate(place), weight);
                    reached += weight;
                }
                if target < reached {
                    break;
                }
            }
            ControlFlow::Break(())
        });
        chosen
    }

    /// Calls `visit` with the log weights of what is not ranked, and the tokens, until it breaks
    /// off.
    fn try_each_open_part(
        &self,
        mut visit: impl FnMut(&[f32; BLOCK], &Part<'_>) -> ControlFlow<()>,
    ) {
        if !self.is_open {
            return;
        }
        let Curve {
            center,
            scale,
            is_squared,
        } = self.curve;
        let best = self.curve.at(self.best().logit) as f32;
        self.row.try_each_block_below(self.frontier, |part| {
            let log_weights = if is_squared {
                part.logits
                    .map(|logit| -scale * (logit - center) * (logit - center) - best)
            } else {
                part.logits.map(|logit| scale * (logit - center) - best)
            };
            visit(&log_weights, &part)
        });
    }
}
