//! What the engine drives: one loaded model, one step at a time.

use oxllama_backend::{Draw, DrawLimits, LogitChange, PAGE_TOKENS, StepBatch};
use oxllama_format::AdapterSource;

use crate::{AdapterId, CacheRequest, ModelError, ModelSpec};

/// One loaded model, ready to step. Object-safe; implemented by
/// [`Decoder`](crate::Decoder) for every kind of device.
///
/// The contents of the cache's pages live inside; which page belongs to which sequence is
/// the caller's knowledge and arrives with every step.
pub trait Runner: Send {
    /// What the model is.
    fn spec(&self) -> &ModelSpec;

    /// The largest steps that were planned for.
    fn limits(&self) -> &RunnerLimits;

    /// Starts one step: copies pages, writes every row's keys and values to its page and makes
    /// what [`Self::output`] returns. Allocates nothing.
    ///
    /// Devices that run by themselves are not waited for, unless they are a few steps behind.
    /// Steps take place in the order in which they are submitted: for all that follow, this one
    /// has been.
    ///
    /// # Errors
    /// The step breaks a limit or its arrays disagree (nothing has run then), or a device
    /// failed, in this step or in one before that has given no output yet: the pages that these
    /// copied to and those of their rows are unspecified then; others are intact.
    fn submit(&mut self, step: &StepPlan) -> Result<(), ModelError>;

    /// What the last step that has [`StepPlan::logit_rows`] draws, and the logits of all other
    /// rows of those; steps without any may have been submitted since, and are not waited for.
    /// To be asked for once; valid until the next call.
    ///
    /// # Errors
    /// A device failed; as [`Self::submit`].
    fn output(&mut self) -> Result<StepOutput<'_>, ModelError>;

    /// Submits a step and returns its output: nothing, without waiting, of one that wants nothing.
    ///
    /// # Errors
    /// Those of [`Self::submit`] and of [`Self::output`].
    fn run(&mut self, step: &StepPlan) -> Result<StepOutput<'_>, ModelError> {
        self.submit(step)?;
        if step.logit_rows.is_empty() {
            return Ok(StepOutput::default());
        }
        self.output()
    }

    /// Gives the cache another size or format, while no sequence needs what is in it: its
    /// contents are lost unless nothing changes. A sequence's context stays as planned, or
    /// shrinks to the size of the whole cache. Returns the limits from here on.
    ///
    /// A transaction: what the cache grows by is reserved on every device before anything is
    /// touched, and what it shrinks by goes back to the ledger at the end.
    ///
    /// # Errors
    /// The request makes no sense, or memory is short ([`ModelError::Shortfall`]): nothing has
    /// changed then, contents included. The system refuses memory that the ledger had
    /// ([`ModelError::Device`]): the old cache has been made anew, without its contents, or, if
    /// the system refuses that as well, the cache has no pages until it is reshaped again.
    fn reshape_cache(&mut self, request: CacheRequest) -> Result<&RunnerLimits, ModelError>;

    /// Loads a LoRA adapter, whose effect is multiplied by `scale`, beside the model: its
    /// weights and, with the first one, the buffers that adapters share are reserved in the
    /// ledger for the model's devices. Steps name it by its id
    /// ([`StepPlan::sequence_adapters`]).
    ///
    /// # Errors
    /// The adapter is for another model or changes parts that cannot be changed, `scale` is
    /// not finite, memory is short, or a weight is malformed. The ledger is then as it was.
    fn load_adapter(&mut self, source: &AdapterSource, scale: f32)
    -> Result<AdapterId, ModelError>;

    /// Frees an adapter. What sequences have in the cache stays as it is.
    ///
    /// # Errors
    /// It is not loaded.
    fn unload_adapter(&mut self, id: AdapterId) -> Result<(), ModelError>;
}

/// What a step gives.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepOutput<'a> {
    /// f32 `[logit_rows - draws, vocab_size]` with padding removed: the logits of the rows that
    /// nothing is drawn from.
    pub logits: &'a [f32],
    /// `[draws]`: the tokens drawn; where none can be drawn,
    /// [`NOT_FINITE`](oxllama_backend::NOT_FINITE) or [`NOTHING_LEFT`](oxllama_backend::NOTHING_LEFT).
    pub drawn: &'a [u32],
}

/// The largest steps that a loaded model was planned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunnerLimits {
    /// Rows of a step.
    pub max_rows: usize,
    /// Sequences of a step.
    pub max_sequences: usize,
    /// Rows of a step whose logits are asked for.
    pub max_logit_rows: usize,
    /// Pages of the cache, each of [`PAGE_TOKENS`] tokens.
    pub pages: usize,
    /// Pages of one sequence.
    pub pages_per_sequence: usize,
    /// Tokens of one sequence; positions are below it.
    pub context_tokens: usize,
    /// What is drawn where the model runs, for one row of each sequence at most; `None`: nothing.
    pub draws: Option<DrawLimits>,
    /// Devices, one after the other on a row's way, that work at the same time: each on another
    /// step, if so many are submitted before the first one's output is asked for.
    pub stages: usize,
}

/// A step of no rows takes about as long as each further of so many takes together: measured on a
/// GPU, where prompts of 512 and of 2,048 tokens differ by 4 in their rows and by 2.5 in their
/// seconds, for models of 1B to 34B alike.
const ROWS_OF_A_STEP: usize = 512;

/// Rows are multiplied in tiles of as many.
const CHUNK_ALIGNMENT: usize = 128;

/// Tokens of a step in which `prompt_tokens` new tokens in all come through a model on `stages`
/// devices soonest; [`usize::MAX`]: in as few steps as possible.
///
/// One device gains nothing from more steps. On several, n chunks of c tokens take
/// (n + stages - 1) · (overhead + c) of a device's time, for the first one has to reach the last
/// device: least where c² = prompt · overhead / (stages - 1).
pub fn chunk_tokens(prompt_tokens: usize, stages: usize) -> usize {
    let (Some(others @ 1..), 1..) = (stages.checked_sub(1), prompt_tokens) else {
        return usize::MAX;
    };
    let best = (prompt_tokens * ROWS_OF_A_STEP / others).isqrt().max(1);
    let chunks = ((prompt_tokens + best / 2) / best).max(1);
    let chunk = prompt_tokens.div_ceil(chunks);
    chunk.next_multiple_of(CHUNK_ALIGNMENT)
}

/// A page of the cache to be copied to another, in every layer, keys and values alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageCopy {
    /// The page read.
    pub from: u32,
    /// The page overwritten, all of it.
    pub to: u32,
}

/// The rows of one step: flat arrays, owned and reused (`clear`, then push).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// Pages copied one after the other before any row is written, so that rows of this step
    /// can already continue what was copied. A step may consist of copies alone.
    pub page_copies: Vec<PageCopy>,
    /// `[rows]`: the token of each row.
    pub token_ids: Vec<u32>,
    /// `[rows]`: its position in its sequence; rows of one sequence ascend.
    pub positions: Vec<u32>,
    /// `[rows]`: index of its sequence in `page_tables`.
    pub row_sequences: Vec<u32>,
    /// `[sequences, pages_per_sequence]`: page ids; entries past a sequence's length are ignored.
    pub page_tables: Vec<u32>,
    /// Row length of `page_tables`.
    pub pages_per_sequence: usize,
    /// Rows whose logits are wanted, in the order in which they are wanted; may be empty.
    pub logit_rows: Vec<u32>,
    /// How tokens are drawn from the last so many of `logit_rows`, whose logits are not returned;
    /// only within [`RunnerLimits::draws`].
    pub draws: Vec<Draw>,
    /// The changes that `draws` name.
    pub changes: Vec<LogitChange>,
    /// `[sequences]`: the [`AdapterId`] of each sequence's adapter, or
    /// [`NO_ADAPTER`](crate::NO_ADAPTER); empty: none has one.
    pub sequence_adapters: Vec<u32>,
}

impl StepPlan {
    /// Empties every array, keeping their memory.
    pub fn clear(&mut self) {
        self.page_copies.clear();
        self.token_ids.clear();
        self.positions.clear();
        self.row_sequences.clear();
        self.page_tables.clear();
        self.pages_per_sequence = 0;
        self.logit_rows.clear();
        self.draws.clear();
        self.changes.clear();
        self.sequence_adapters.clear();
    }

    /// Adds one more sequence: `token_ids` at the positions from `first` on, of which the last
    /// `logit_rows` have their logits wanted. `pages` are the pages of positions from 0 on, up
    /// to the last token's; [`Self::pages_per_sequence`] is set before, to no fewer.
    pub fn push_sequence(
        &mut self,
        token_ids: impl IntoIterator<Item = u32>,
        first: usize,
        pages: impl IntoIterator<Item = u32>,
        logit_rows: usize,
    ) {
        let sequences = self.page_tables.len() / self.pages_per_sequence;
        self.page_tables.extend(pages);
        self.page_tables
            .resize((sequences + 1) * self.pages_per_sequence, 0);
        let start = self.token_ids.len();
        self.token_ids.extend(token_ids);
        let end = self.token_ids.len();
        let positions = first as u32..(first + end - start) as u32;
        self.positions.extend(positions);
        self.row_sequences.resize(end, sequences as u32);
        self.logit_rows
            .extend((end - logit_rows) as u32..end as u32);
    }

    /// The step's inputs as devices take them.
    pub fn batch(&self) -> StepBatch<'_> {
        StepBatch {
            token_ids: &self.token_ids,
            positions: &self.positions,
            row_sequences: &self.row_sequences,
            page_tables: &self.page_tables,
            pages_per_sequence: self.pages_per_sequence,
            logit_rows: &self.logit_rows,
            draws: &self.draws,
            changes: &self.changes,
        }
    }

    /// Whether a model of `vocab_size` tokens with these limits can run the step.
    ///
    /// # Errors
    /// The first rule broken, with the value found and the bound.
    pub fn check(&self, limits: &RunnerLimits, vocab_size: usize) -> Result<(), ModelError> {
        self.check_copies(limits)?;
        self.check_extents(limits)?;
        for (row, &token_id) in self.token_ids.iter().enumerate() {
            if token_id as usize >= vocab_size {
                return Err(ModelError::TokenOutOfRange {
                    row,
                    token_id,
                    vocab_size,
                });
            }
        }
        for row in 0..self.token_ids.len() {
            self.check_place(row, limits)?;
        }
        self.check_draws(limits, vocab_size)?;
        let rows = self.token_ids.len();
        match self.logit_rows.iter().find(|&&row| row as usize >= rows) {
            Some(&row) => Err(step_error(
                "as a logit row",
                row as usize,
                below(rows, "rows"),
            )),
            None => Ok(()),
        }
    }

    /// Both ends of every copy.
    fn check_copies(&self, limits: &RunnerLimits) -> Result<(), ModelError> {
        for (index, &PageCopy { from, to }) in self.page_copies.iter().enumerate() {
            if let Some(page) = [from, to]
                .into_iter()
                .find(|&page| page as usize >= limits.pages)
            {
                return Err(ModelError::PageCopy {
                    index,
                    page,
                    expected: format!("one below the {} pages of the cache", limits.pages),
                });
            }
            if from == to {
                return Err(ModelError::PageCopy {
                    index,
                    page: from,
                    expected: "another page to copy to".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Array lengths against each other and against `limits`.
    fn check_extents(&self, limits: &RunnerLimits) -> Result<(), ModelError> {
        let rows = self.token_ids.len();
        let copies_alone = rows == 0 && !self.page_copies.is_empty();
        if rows > limits.max_rows || (rows == 0 && !copies_alone) {
            return Err(step_error("rows", rows, from_one(limits.max_rows)));
        }
        for (what, found) in [
            ("positions", self.positions.len()),
            ("row sequences", self.row_sequences.len()),
        ] {
            if found != rows {
                return Err(step_error(
                    what,
                    found,
                    format!("one for each of {rows} rows"),
                ));
            }
        }
        if copies_alone {
            // Logit rows are held against the step's rows, of which there are none.
            return Ok(());
        }
        let width = self.pages_per_sequence;
        if width == 0 || width > limits.pages_per_sequence {
            return Err(step_error(
                "pages per sequence",
                width,
                from_one(limits.pages_per_sequence),
            ));
        }
        if !self.page_tables.len().is_multiple_of(width) {
            return Err(step_error(
                "page table entries",
                self.page_tables.len(),
                format!("a multiple of the {width} pages per sequence"),
            ));
        }
        let sequences = self.page_tables.len() / width;
        if sequences == 0 || sequences > limits.max_sequences {
            return Err(step_error(
                "sequences",
                sequences,
                from_one(limits.max_sequences),
            ));
        }
        let adapters = self.sequence_adapters.len();
        if adapters != 0 && adapters != sequences {
            return Err(step_error(
                "sequence adapters",
                adapters,
                format!("none, or one for each of {sequences} sequences"),
            ));
        }
        if self.logit_rows.len() > limits.max_logit_rows {
            return Err(step_error(
                "logit rows",
                self.logit_rows.len(),
                format!("at most {}", limits.max_logit_rows),
            ));
        }
        Ok(())
    }

    /// Draws against the rows that they are from, and against `limits`.
    fn check_draws(&self, limits: &RunnerLimits, vocab_size: usize) -> Result<(), ModelError> {
        let Some(first) = self.draws.first() else {
            return Ok(());
        };
        let most = limits.draws.map_or(0, |_| limits.max_sequences);
        let limits = limits.draws.unwrap_or(DrawLimits {
            top_k: first.top_k,
            changes: 0,
        });
        let most = most.min(self.logit_rows.len());
        if self.draws.len() > most {
            let expected = format!("at most {most}");
            return Err(step_error("draws", self.draws.len(), expected));
        }
        let most_changes = limits.changes.saturating_mul(self.draws.len());
        if self.changes.len() > most_changes {
            let expected = format!("at most {most_changes}");
            return Err(step_error("changes", self.changes.len(), expected));
        }
        for draw in &self.draws {
            let end = draw.first_change as usize + draw.change_count as usize;
            for (what, found, limit) in [
                (
                    "tokens for a draw's top-k",
                    draw.top_k,
                    limits.top_k as usize,
                ),
                ("changes of a draw", draw.change_count, limits.changes),
                ("tokens to draw from", draw.vocab_size, vocab_size),
            ] {
                if found as usize > limit {
                    let expected = format!("at most {limit}");
                    return Err(step_error(what, found as usize, expected));
                }
            }
            if end > self.changes.len() {
                let expected = format!("one of the {} of the step", self.changes.len());
                return Err(step_error("as the end of a draw's changes", end, expected));
            }
        }
        Ok(())
    }

    /// One row's sequence, position and pages. Pages are looked at once for each run of rows
    /// of one sequence, at its last row, whose position is the run's highest.
    fn check_place(&self, row: usize, limits: &RunnerLimits) -> Result<(), ModelError> {
        let sequences = self.page_tables.len() / self.pages_per_sequence;
        let sequence = self.row_sequences[row] as usize;
        if sequence >= sequences {
            return Err(step_error(
                "as a row's sequence",
                sequence,
                below(sequences, "sequences"),
            ));
        }
        let position = self.positions[row];
        let in_table = self.pages_per_sequence * PAGE_TOKENS;
        let (limit, reason) = if limits.context_tokens <= in_table {
            (limits.context_tokens, "the planned context")
        } else {
            (in_table, "the tokens of its sequence's pages")
        };
        if position as usize >= limit {
            return Err(ModelError::PositionOutOfRange {
                row,
                position,
                limit,
                reason,
            });
        }
        if self.row_sequences.get(row + 1) == Some(&self.row_sequences[row]) {
            if self.positions[row + 1] <= position {
                return Err(step_error(
                    "as the position after a row of the same sequence",
                    self.positions[row + 1] as usize,
                    format!("one above {position}"),
                ));
            }
            return Ok(());
        }
        let table = &self.page_tables[sequence * self.pages_per_sequence..];
        let used = position as usize / PAGE_TOKENS + 1;
        match table[..used]
            .iter()
            .position(|&page| page as usize >= limits.pages)
        {
            Some(place) => Err(ModelError::PageOutOfRange {
                sequence,
                place,
                page: table[place],
                pages: limits.pages,
            }),
            None => Ok(()),
        }
    }
}

fn step_error(what: &'static str, found: usize, expected: String) -> ModelError {
    ModelError::Step {
        what,
        found,
        expected,
    }
}

fn from_one(limit: usize) -> String {
    format!("1 to {limit}")
}

fn below(limit: usize, what: &str) -> String {
    format!("one below the {limit} {what} of the step")
}

#[cfg(test)]
mod tests;
