//! What one forward step works on, and what it may need at most.

use oxllama_memory::DeviceId;

use crate::{DeviceError, Draw, DrawKinds, LogitChange};

/// How rotary pairs are formed from a head's dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Pair `i` is `(x[i], x[i + rotary_dim / 2])` (GPT-NeoX, Llama in Hugging Face's layout).
    Halves,
    /// Pair `i` is `(x[2 i], x[2 i + 1])` (GPT-J, Cohere).
    Interleaved,
}

/// One rotary embedding: every scaling variant reduces to frequencies and a factor.
///
/// The angle of pair `i` at position `p` is the f32 product `p as f32 * inverse_frequencies[i]`;
/// cosine and sine of it are multiplied by `attention_factor`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians a position, `[rotary_dim / 2]`.
    pub inverse_frequencies: Vec<f32>,
    /// Multiplies cosine and sine (YaRN, longrope); 1 otherwise.
    pub attention_factor: f32,
    /// Which dimensions form a pair. Dimensions past `rotary_dim` pass through.
    pub style: RopeStyle,
}

impl Rope {
    /// Dimensions of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inverse_frequencies.len()
    }
}

/// The rows of one forward step: flat host arrays, valid for the call that takes them.
#[derive(Debug, Clone, Copy)]
pub struct StepBatch<'a> {
    /// `[rows]`: the token of each row.
    pub token_ids: &'a [u32],
    /// `[rows]`: its position in its sequence. The row's key and value go to this position,
    /// and it attends to positions `0..=position`. Rows of one sequence come in ascending order.
    pub positions: &'a [u32],
    /// `[rows]`: index of its sequence in `page_tables`.
    pub row_sequences: &'a [u32],
    /// `[sequences, pages_per_sequence]`: the page that holds positions
    /// `i * PAGE_TOKENS ..` of each sequence. Entries past a sequence's length are ignored.
    pub page_tables: &'a [u32],
    /// Row length of `page_tables`.
    pub pages_per_sequence: usize,
    /// Rows whose logits are wanted, in the order in which they are wanted; may be empty.
    pub logit_rows: &'a [u32],
    /// Draws from the last so many of `logit_rows`, in their order.
    pub draws: &'a [Draw],
    /// The changes that draws name.
    pub changes: &'a [LogitChange],
}

/// What, besides the step's inputs, makes one sequence of operations differ from another: two
/// sequences of the same workspace with equal keys enqueue the same operations on the same
/// buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceKey {
    /// Rows of the step.
    pub rows: usize,
    /// Rows of the step whose logits are wanted.
    pub logit_rows: usize,
    /// Kinds of the step's draws.
    pub draws: DrawKinds,
    /// Changes whenever a buffer that the sequence works on has been replaced.
    pub generation: u64,
}

impl StepBatch<'_> {
    /// Rows in this step.
    pub fn rows(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences in this step.
    pub fn sequences(&self) -> usize {
        self.page_tables.len() / self.pages_per_sequence.max(1)
    }

    /// The cache slot (`page * PAGE_TOKENS + offset`) of `position` in `sequence`.
    pub fn slot(&self, sequence: usize, position: usize) -> usize {
        let table = sequence * self.pages_per_sequence;
        let page = self.page_tables[table + position / crate::PAGE_TOKENS] as usize;
        page * crate::PAGE_TOKENS + position % crate::PAGE_TOKENS
    }
}

/// The largest step that a workspace must serve, and the model's extents that size scratch.
/// A workspace serves caches of every format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkspaceShape {
    /// Most rows in a step.
    pub rows: usize,
    /// Most sequences in a step.
    pub sequences: usize,
    /// Most pages of one sequence.
    pub pages_per_sequence: usize,
    /// Widest input of any linear.
    pub max_in_features: usize,
    /// Widest output of any linear, the head included.
    pub max_out_features: usize,
    /// Columns of the logits that tokens are drawn from, one row of each sequence at most; 0:
    /// none are, and a step's draws are another device's.
    pub draw_width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Widest rotated part of a head over all of the model's ropes.
    pub rotary_dim: usize,
    /// How many ropes a step prepares.
    pub ropes: usize,
}

impl WorkspaceShape {
    /// Whether a workspace of this shape on `device` can serve a step.
    ///
    /// # Errors
    /// The first extent that is exceeded, with both numbers.
    ///
    /// # Panics
    /// If a row has no position or sequence, or names a sequence that has no page table: a
    /// caller's mistake.
    pub fn check(
        &self,
        device: &DeviceId,
        batch: &StepBatch<'_>,
        ropes: &[Rope],
    ) -> Result<(), DeviceError> {
        let end = |indices: &[u32]| indices.iter().max().map_or(0, |&last| last as usize + 1);
        let (rows, pages) = (batch.rows(), batch.pages_per_sequence);
        let rotary_dim = ropes.iter().map(Rope::rotary_dim).max().unwrap_or(0);
        let limits = [
            ("rows", rows, self.rows),
            ("positions", batch.positions.len(), rows),
            ("row sequences", batch.row_sequences.len(), rows),
            ("rows with logits", batch.logit_rows.len(), rows),
            (
                "draws",
                batch.draws.len(),
                batch.logit_rows.len().min(self.sequences),
            ),
            ("as the last row with logits", end(batch.logit_rows), rows),
            ("sequences", batch.sequences(), self.sequences),
            ("pages per sequence", pages, self.pages_per_sequence),
            (
                "pages of one sequence in use",
                end(batch.positions).div_ceil(crate::PAGE_TOKENS),
                pages,
            ),
            ("ropes", ropes.len(), self.ropes),
            ("rotated dimensions", rotary_dim, self.rotary_dim),
        ];
        for (what, found, limit) in limits {
            if found > limit {
                return Err(DeviceError::StepTooLarge {
                    device: device.clone(),
                    what,
                    found,
                    limit,
                });
            }
        }
        assert!(
            batch.positions.len() == rows && batch.row_sequences.len() == rows,
            "every row has a position and a sequence"
        );
        assert!(
            end(batch.row_sequences) <= batch.sequences(),
            "rows name sequences that have page tables"
        );
        Ok(())
    }
}
