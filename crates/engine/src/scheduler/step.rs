//! What a step consists of.

use oxllama_backend::PAGE_TOKENS;
use oxllama_model::{PageCopy, StepPlan};

use super::{JobId, Scheduler};

/// Consecutive tokens of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepPart {
    /// The job.
    pub job: JobId,
    /// Which of its sequences.
    pub sequence: usize,
    /// Position of the first token.
    pub first: usize,
    /// Tokens of the sequence that are run.
    pub tokens: usize,
    /// Drafted tokens that are run after them.
    pub drafts: usize,
    /// Whether logits are wanted: of the last token and of every draft.
    pub wants_logits: bool,
}

impl StepPart {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.tokens + self.drafts
    }

    /// Pages, from the sequence's first on, up to that of the last row.
    fn pages_used(&self) -> usize {
        (self.first + self.rows()).div_ceil(PAGE_TOKENS)
    }

    /// Rows whose logits are wanted.
    pub fn logit_rows(&self) -> usize {
        if self.wants_logits {
            1 + self.drafts
        } else {
            0
        }
    }
}

/// The next step: reused from one to the next.
#[derive(Debug, Default)]
pub struct Step {
    /// Sequences with tokens to run; a job's sequences stand together.
    pub parts: Vec<StepPart>,
    /// Page copies to run before.
    pub copies: Vec<PageCopy>,
    /// Jobs that start with this step, with the prompt tokens that the cache had.
    pub admitted: Vec<(JobId, usize)>,
    /// Jobs that lost their pages.
    pub preempted: Vec<JobId>,
    /// Copies that came up since the last step.
    pub(super) carried_copies: Vec<PageCopy>,
}

impl Step {
    /// Nothing to run.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.copies.is_empty()
    }

    pub(super) fn begin(&mut self) {
        self.parts.clear();
        self.copies.clear();
        self.copies.append(&mut self.carried_copies);
        self.admitted.clear();
        self.preempted.clear();
    }
}

impl Scheduler {
    /// Writes `step` as the flat arrays that a model runs.
    pub fn fill(&self, step: &Step, plan: &mut StepPlan) {
        plan.clear();
        plan.page_copies.extend_from_slice(&step.copies);
        let width = step.parts.iter().map(StepPart::pages_used).max();
        plan.pages_per_sequence = width.unwrap_or(0);
        for part in &step.parts {
            let Some(task) = self.task(part.job) else {
                continue;
            };
            let sequence = &task.sequences[part.sequence];
            let tokens = &sequence.token_ids[part.first..part.first + part.tokens];
            let tokens = tokens.iter().chain(&task.drafts[..part.drafts]);
            let pages = &sequence.pages.table()[..part.pages_used()];
            plan.push_sequence(
                tokens.copied(),
                part.first,
                pages.iter().map(|page| page.0),
                part.logit_rows(),
            );
        }
    }
}
