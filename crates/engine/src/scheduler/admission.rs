//! Which waiting jobs start.

use super::{Scheduler, Step, Task, insert};

/// Blocked jobs that are looked past for one that fits.
const LOOK_AHEAD: usize = 8;

/// A job waits for a prompt that is being computed if that will save it this many tokens.
const WORTH_WAITING_TOKENS: usize = 64;

/// Whether a waiting job can start now.
enum Fit {
    Now,
    /// Sequences or pages are missing.
    NoRoom,
    /// A running job is computing what it could share.
    SoonShared,
}

impl Scheduler {
    /// Starts waiting jobs in order as long as they fit. One that does not may be overtaken
    /// as often as it allows; one of higher priority takes the room of a lower one.
    pub(super) fn admit(&mut self, step: &mut Step) {
        let mut blocked: Vec<usize> = Vec::new();
        let mut index = 0;
        while index < self.waiting.len() && blocked.len() < LOOK_AHEAD {
            let exhausted = |&blocked: &usize| {
                let task = &self.waiting[blocked];
                task.skips >= task.max_skips
            };
            if blocked.iter().any(exhausted) {
                return;
            }
            match self.fit(&self.waiting[index]) {
                Fit::Now => {
                    let task = self.waiting.remove(index);
                    for &blocked in &blocked {
                        self.waiting[blocked].skips += 1;
                    }
                    self.start(task, step);
                }
                Fit::NoRoom => {
                    let priority = self.waiting[index].priority;
                    let is_lower = |task: &Task| task.priority < priority;
                    if self.running.last().is_some_and(is_lower) {
                        // It waits behind this one: places up to `index` stay as they are.
                        let id = self.preempt(self.running.len() - 1);
                        step.preempted.push(id);
                    } else {
                        blocked.push(index);
                        index += 1;
                    }
                }
                Fit::SoonShared => {
                    blocked.push(index);
                    index += 1;
                }
            }
        }
    }

    fn fit(&self, task: &Task) -> Fit {
        let running = self.running_sequences();
        if running + task.sequences.len() > self.settings.max_sequences {
            return Fit::NoRoom;
        }
        let cost = |sequence: &super::Sequence| {
            self.pages
                .cost(&sequence.chain, sequence.token_ids.len() + 1)
        };
        let needed: usize = task.sequences.iter().map(cost).sum();
        let promised = self.running.iter().flat_map(|task| &task.sequences);
        let promised: usize = promised.map(super::Sequence::missing_pages).sum();
        // A page for each running sequence, so that the next to grow does not preempt this one.
        if needed + promised + running > self.pages.available() {
            // Alone, nothing can be in the way: it was checked when it came.
            return if running == 0 { Fit::Now } else { Fit::NoRoom };
        }
        if task.skips < task.max_skips && self.is_soon_shared(task) {
            return Fit::SoonShared;
        }
        Fit::Now
    }

    /// Whether a running prefill will soon have computed what `task` begins with.
    fn is_soon_shared(&self, task: &Task) -> bool {
        let wanted = &task.sequences[0];
        let known = self.pages.known(&wanted.chain) * oxllama_backend::PAGE_TOKENS;
        let running = self.running.iter().flat_map(|task| &task.sequences);
        running
            .filter(|other| other.pending() > 1 && other.root == wanted.root)
            .any(|other| {
                let pairs = other.token_ids.iter().zip(wanted.shareable());
                let shared = pairs.take_while(|(a, b)| a == b).count();
                shared >= known + WORTH_WAITING_TOKENS && shared > other.pages.tokens()
            })
    }

    fn start(&mut self, mut task: Task, step: &mut Step) {
        let mut cached = 0;
        for sequence in &mut task.sequences {
            let chain = std::mem::take(&mut sequence.chain);
            let shareable = &sequence.token_ids[..sequence.token_ids.len() - 1];
            let copy = self
                .pages
                .find_prefix(&mut sequence.pages, &chain, shareable);
            step.copies.extend(copy);
            cached += sequence.pages.tokens();
        }
        step.admitted.push((task.id, cached));
        insert(&mut self.running, task);
    }
}
