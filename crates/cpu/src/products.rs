//! One parallel region: prepare the input rows, then multiply them by one or more matrices.

use oxllama_backend::Activation;

use crate::Isa;
use crate::float::float_rows;
use crate::integer::{Finish, IntegerRows, many_rows, one_row};
use crate::linear::{CpuLinear, Weights};
use crate::pool::Team;
use crate::quantise::quantise;
use crate::rowwise::{RowNorm, gate, norm_row};
use crate::step::{ROW_BLOCK, StepScratch, row_of};

/// Most matrices of a region.
pub(crate) const MOST_TARGETS: usize = 8;

/// What is done to a row before it is multiplied.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Input {
    /// Nothing.
    Plain,
    /// Normalised.
    Norm(RowNorm),
    /// `activation(x) · up`, `up` being f32 `[rows, in_features]`.
    Gated {
        activation: Activation,
        up: *const f32,
    },
}

/// A matrix and where its product goes, f32 `[rows, out_features]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) linear: &'a CpuLinear,
    pub(crate) out: *mut f32,
}

/// The whole region.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Products<'a> {
    pub(crate) isa: Isa,
    pub(crate) input: Input,
    /// f32 `[rows, in_features]`
    pub(crate) x: *const f32,
    /// f32 `[rows, in_features]`: receives prepared rows when there are several.
    pub(crate) prepared: *mut f32,
    pub(crate) rows: usize,
    pub(crate) in_features: usize,
    pub(crate) targets: &'a [Target<'a>],
    /// `Some(s)`: `out += s · y`.
    pub(crate) add: Option<f32>,
    pub(crate) scratch: StepScratch,
}

// SAFETY: the pointers are to buffers that the operation's caller has borrowed for it, inputs
// shared and outputs exclusively; a region's threads write disjoint rows and tiles.
unsafe impl Sync for Products<'_> {}

/// How rows were last quantised: not at all, or in the order of a permutation.
#[derive(Clone, Copy, PartialEq)]
enum Order<'a> {
    Nothing,
    Rows(Option<&'a [u32]>),
}

impl<'a> Products<'a> {
    /// One thread's part.
    ///
    /// # Safety
    /// All pointers have the extents stated, and every thread of the team calls this once.
    pub(crate) unsafe fn run(&self, team: &Team<'_>) {
        // SAFETY: the caller's contract.
        unsafe {
            if self.rows == 1 {
                self.run_one(team);
            } else {
                self.run_many(team);
            }
        }
    }

    /// A single row: every thread prepares it for itself, which costs less than to wait.
    ///
    /// # Safety
    /// As [`Self::run`]'s.
    unsafe fn run_one(&self, team: &Team<'_>) {
        // SAFETY: own scratch; tiles are disjoint.
        unsafe {
            let x = self.prepare(0, self.scratch.own_f32(team.thread));
            let row = self.scratch.own_row(team.thread, self.in_features);
            let mut order = Order::Nothing;
            for (index, target) in self.targets.iter().enumerate() {
                let tiles = self.share(team, index);
                let (start, end, finish) = (tiles.start, tiles.end, self.finish(target));
                match target.linear.weights() {
                    Weights::Integer {
                        weights,
                        permutation,
                    } => {
                        if order != Order::Rows(permutation) {
                            self.quantise_row(x, permutation, &row, 0);
                            order = Order::Rows(permutation);
                        }
                        one_row(self.isa, &weights, row, 0, start, end, finish);
                    }
                    Weights::Float(weights) => {
                        float_rows(self.isa, &weights, x, 1, start, end, finish);
                    }
                }
            }
        }
    }

    /// Several rows: threads share out their preparation, meet, and share out the tiles.
    ///
    /// # Safety
    /// As [`Self::run`]'s.
    unsafe fn run_many(&self, team: &Team<'_>) {
        let rows = self.scratch.shared_rows(self.in_features, self.rows);
        let share = team.share(self.rows);
        let prepared = |row: usize| match self.input {
            Input::Plain => self.x.wrapping_add(row * self.in_features),
            _ => self
                .prepared
                .wrapping_add(row * self.in_features)
                .cast_const(),
        };
        let mut order = self.first_order();
        // SAFETY: rows and tiles are disjoint between threads, and barriers separate writing
        // shared rows from reading them.
        unsafe {
            for row in share.clone() {
                let to = self.prepared.wrapping_add(row * self.in_features);
                let x = self.prepare(row, to);
                if let Order::Rows(permutation) = order {
                    self.quantise_row(x, permutation, &rows, row);
                }
            }
            team.barrier();
            for (index, target) in self.targets.iter().enumerate() {
                let tiles = self.share(team, index);
                match target.linear.weights() {
                    Weights::Integer {
                        weights,
                        permutation,
                    } => {
                        if order != Order::Rows(permutation) {
                            team.barrier();
                            for row in share.clone() {
                                self.quantise_row(prepared(row), permutation, &rows, row);
                            }
                            order = Order::Rows(permutation);
                            team.barrier();
                        }
                        for first in (0..self.rows).step_by(ROW_BLOCK) {
                            let block = block_of(&rows, first);
                            let mut finish = self.finish(target);
                            finish.out = finish.out.wrapping_add(first * finish.width);
                            let scratch = self.scratch.integer(team.thread);
                            let (start, end) = (tiles.start, tiles.end);
                            many_rows(self.isa, &weights, block, start, end, finish, scratch);
                        }
                    }
                    Weights::Float(weights) => {
                        let finish = self.finish(target);
                        let (start, end) = (tiles.start, tiles.end);
                        float_rows(
                            self.isa,
                            &weights,
                            prepared(0),
                            self.rows,
                            start,
                            end,
                            finish,
                        );
                    }
                }
            }
        }
    }

    /// The order that the first quantised matrix wants its rows in.
    fn first_order(&self) -> Order<'a> {
        for target in self.targets {
            if let Weights::Integer { permutation, .. } = target.linear.weights() {
                return Order::Rows(permutation);
            }
        }
        Order::Nothing
    }

    /// Row `row` after [`Input`], in place or at `to`.
    ///
    /// # Safety
    /// The row exists; `to` has room for one.
    unsafe fn prepare(&self, row: usize, to: *mut f32) -> *const f32 {
        let at = row * self.in_features;
        // SAFETY: the caller's contract.
        unsafe {
            let x = self.x.add(at);
            match self.input {
                Input::Plain => return x,
                Input::Norm(norm) => norm_row(self.isa, norm, x, to),
                Input::Gated { activation, up } => {
                    gate(self.isa, activation, x, up.add(at), to, self.in_features);
                }
            }
        }
        to
    }

    /// # Safety
    /// `x` is a prepared row, `row` one of `rows`.
    unsafe fn quantise_row(
        &self,
        x: *const f32,
        permutation: Option<&[u32]>,
        rows: &IntegerRows,
        row: usize,
    ) {
        let order = permutation.map_or(std::ptr::null(), <[u32]>::as_ptr);
        // SAFETY: the permutation was checked when the matrix was read.
        unsafe { quantise(self.isa, x, order, self.in_features, row_of(rows, row)) };
    }

    fn finish(&self, target: &Target<'_>) -> Finish {
        Finish {
            out: target.out,
            width: target.linear.out_features,
            bias: target.linear.bias(),
            add: self.add,
        }
    }

    /// This thread's tiles of target `index`: all targets' bytes, laid end to end, are cut into
    /// equal contiguous parts at tile boundaries.
    fn share(&self, team: &Team<'_>, index: usize) -> std::ops::Range<usize> {
        let bytes = |target: &Target<'_>| target.linear.tiles() * target.linear.tile_bytes();
        let total: usize = self.targets.iter().map(bytes).sum();
        let before: usize = self.targets[..index].iter().map(bytes).sum();
        let linear = self.targets[index].linear;
        let tile = |thread: usize| {
            let start = (total * thread / team.threads).saturating_sub(before);
            start
                .div_ceil(linear.tile_bytes().max(1))
                .min(linear.tiles())
        };
        tile(team.thread)..tile(team.thread + 1)
    }
}

/// Up to [`ROW_BLOCK`] rows from `first` on.
fn block_of(rows: &IntegerRows, first: usize) -> IntegerRows {
    let start = row_of(rows, first);
    IntegerRows {
        values: start.values,
        sums: start.sums,
        scales: start.scale,
        in_features: rows.in_features,
        rows: (rows.rows - first).min(ROW_BLOCK),
    }
}
