//! What a step consists of.

use oxllama_model::{PageCopy, StepPlan};

use super::{JobId, Scheduler, Task};

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
        let width = step.parts.iter().map(|part| self.pages_used(part)).max();
        plan.pages_per_sequence = width.unwrap_or(0);
        for (index, part) in step.parts.iter().enumerate() {
            let Some(task) = self.task_of(part) else {
                continue;
            };
            let sequence = &task.sequences[part.sequence];
            let tokens = &sequence.token_ids[part.first..part.first + part.tokens];
            plan.token_ids.extend_from_slice(tokens);
            plan.token_ids
                .extend_from_slice(&task.drafts[..part.drafts]);
            let rows = part.rows();
            let positions = part.first as u32..(part.first + rows) as u32;
            plan.positions.extend(positions);
            plan.row_sequences
                .extend(std::iter::repeat_n(index as u32, rows));
            let end = plan.token_ids.len() as u32;
            plan.logit_rows.extend(end - part.logit_rows() as u32..end);
            let used = self.pages_used(part);
            let table = &sequence.pages.table()[..used];
            plan.page_tables.extend(table.iter().map(|page| page.0));
            let filler = plan.pages_per_sequence - used;
            plan.page_tables.extend(std::iter::repeat_n(0, filler));
        }
    }

    fn pages_used(&self, part: &StepPart) -> usize {
        (part.first + part.rows()).div_ceil(oxllama_backend::PAGE_TOKENS)
    }

    fn task_of(&self, part: &StepPart) -> Option<&Task> {
        self.running.iter().find(|task| task.id == part.job)
    }
}
