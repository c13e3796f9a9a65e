//! Which rows of a step are attended together.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use oxllama_backend::{PAGE_TOKENS, StepBatch};

/// Tokens of a tile of keys; `TILE` in `attention.cuh`.
pub(super) const TILE_TOKENS: usize = 64;

/// `MOST_PIECES` in `attention.cuh`.
pub(super) const MOST_PIECES: usize = 64;

/// Query heads of rows that a block of the splitting kernel takes; `HEADS_OF_WARP` in
/// `attention.cuh`.
pub(super) const SPLIT_HEADS: usize = 16;

/// Query heads of rows that a block of the walking kernel takes, at most; `Walk::HEADS` in
/// `walk.cuh`.
pub(super) const BLOCK_HEADS: usize = 128;

/// Query heads of rows that a block of the walking kernel takes where heads have up to
/// `head_dim` dimensions.
pub(super) fn block_heads(head_dim: usize) -> usize {
    if head_dim <= 128 {
        BLOCK_HEADS
    } else {
        BLOCK_HEADS / 2
    }
}

/// Rows of a run up to which its sequence is split among blocks. What a row gives depends on this past
/// [`MOST_PIECES`] tiles only.
const MOST_SPLIT_RUN: usize = 16;

/// Rows of one sequence whose positions follow each other, as the kernels take them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Tile {
    /// The first row.
    first_row: u32,
    /// How many; none: the tile stands for nothing.
    rows: u32,
    /// The first row's place among the partial results.
    partial_row: u32,
    /// Tokens of the sequence that earlier steps have stored: they may be read while this step
    /// is still storing its own.
    old_tokens: u32,
    /// The first row's.
    first_position: u32,
    sequence: u32,
    /// The sequence's first page.
    first_page: u32,
    /// The page of `first_position`.
    home_page: u32,
}

/// The tiles of a step: first those whose sequences are split among blocks, then the others.
#[derive(Debug)]
pub(crate) struct Tiles {
    /// `[rows]`, filled up with tiles of no rows.
    tiles: Vec<Tile>,
    /// By sequence: the first of the step's positions.
    first_positions: Vec<u32>,
    /// Query heads that share a kv head.
    group: usize,
    /// Query heads of rows in a tile that is walked through.
    block_heads: usize,
    split: usize,
    split_rows: usize,
    walked: usize,
    is_one_row_each: bool,
}

impl Tiles {
    /// Room for steps of up to `rows` rows of `sequences` sequences, where `group` query heads
    /// of up to `head_dim` dimensions share a kv head.
    pub(crate) fn new(rows: usize, sequences: usize, group: usize, head_dim: usize) -> Self {
        Self {
            tiles: Vec::with_capacity(rows),
            first_positions: Vec::with_capacity(sequences),
            group,
            block_heads: block_heads(head_dim),
            split: 0,
            split_rows: 0,
            walked: 0,
            is_one_row_each: false,
        }
    }

    /// Cuts the rows of a step.
    pub(crate) fn cut(&mut self, batch: &StepBatch<'_>) {
        let (positions, row_sequences) = (batch.positions, batch.row_sequences);
        let rows = positions.len();
        self.is_one_row_each = true;
        self.tiles.clear();
        self.first_positions.clear();
        for (&position, &sequence) in positions.iter().zip(row_sequences) {
            let sequence = sequence as usize;
            if sequence >= self.first_positions.len() {
                self.first_positions.resize(sequence + 1, u32::MAX);
            }
            let first = &mut self.first_positions[sequence];
            self.is_one_row_each &= *first == u32::MAX;
            *first = position.min(*first);
        }
        for is_split in [true, false] {
            let mut start = 0;
            while start < rows {
                let end = run_end(positions, row_sequences, start);
                if (end - start <= MOST_SPLIT_RUN) == is_split {
                    self.cut_run(start..end, batch, is_split);
                }
                start = end;
            }
            if is_split {
                self.split = self.tiles.len();
            }
        }
        self.walked = self.tiles.len() - self.split;
        if self.walked == 0 {
            self.split = rows;
        }
        self.split_rows = if self.walked == 0 {
            rows
        } else {
            let split = &self.tiles[..self.split];
            split.iter().map(|tile| tile.rows as usize).sum()
        };
        self.tiles.resize(rows, Tile::default());
    }

    fn cut_run(&mut self, run: Range<usize>, batch: &StepBatch<'_>, is_split: bool) {
        let first_position = batch.positions[run.start] as usize;
        let sequence = batch.row_sequences[run.start];
        let old_tokens = self.first_positions[sequence as usize];
        let page = |position: usize| {
            let index = sequence as usize * batch.pages_per_sequence + position / PAGE_TOKENS;
            batch.page_tables[index]
        };
        let heads = if is_split {
            SPLIT_HEADS
        } else {
            self.block_heads
        };
        let rows_of_tile = heads / self.group.clamp(1, heads);
        let mut row = run.start;
        while row < run.end {
            let position = first_position + row - run.start;
            let mut rows = rows_of_tile.min(run.end - row);
            if is_split {
                // Rows that the same rule cuts into pieces.
                rows = rows.min(piece_tokens(position + 1) * MOST_PIECES - position);
            }
            let partial_row = self
                .tiles
                .last()
                .map_or(0, |last| last.partial_row + last.rows);
            self.tiles.push(Tile {
                first_row: row as u32,
                rows: rows as u32,
                partial_row,
                old_tokens,
                first_position: position as u32,
                sequence,
                first_page: page(0),
                home_page: page(position),
            });
            row += rows;
        }
    }

    /// `[rows]`: the split ones, then the others, then nothing.
    pub(crate) fn all(&self) -> &[Tile] {
        &self.tiles
    }

    /// Tiles to split. Where all are, there is one for each row of the step (some of no rows),
    /// so that a launch depends on the number of rows alone.
    pub(super) fn split(&self) -> usize {
        self.split
    }

    /// Rows of the tiles to split, at most.
    pub(super) fn split_rows(&self) -> usize {
        self.split_rows
    }

    /// Tiles after those, whose blocks walk through their tokens.
    pub(super) fn walked(&self) -> usize {
        self.walked
    }

    /// Whether every sequence of the step has one row.
    pub(crate) fn is_one_row_each(&self) -> bool {
        self.is_one_row_each
    }

    /// Query heads of rows in a tile that is walked through.
    pub(super) fn block_heads(&self) -> usize {
        self.block_heads
    }

    /// Query heads that share a kv head, for which the rows were cut.
    pub(super) fn group(&self) -> usize {
        self.group
    }
}

/// Where the run that begins with row `start` ends.
fn run_end(positions: &[u32], row_sequences: &[u32], start: usize) -> usize {
    let follows = |row: &usize| {
        row_sequences[*row] == row_sequences[*row - 1]
            && u64::from(positions[*row]) == u64::from(positions[*row - 1]) + 1
    };
    (start + 1..positions.len())
        .find(|row| !follows(row))
        .unwrap_or(positions.len())
}

/// Tokens of a piece of a row that sees `tokens` and is not walked; `Span::piece_tiles` in `attention.cuh`.
fn piece_tokens(tokens: usize) -> usize {
    let mut piece = TILE_TOKENS;
    while piece * MOST_PIECES < tokens {
        piece *= 2;
    }
    piece
}

/// Most pieces of a tile of rows that is split, in sequences of up to `tokens` tokens. A window may begin and
/// end within a piece, and the rows of a tile see one token each that others do not.
pub(super) fn most_pieces(tokens: usize) -> usize {
    tokens.div_ceil(TILE_TOKENS).clamp(1, MOST_PIECES + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(rows: &[(u32, u32)], group: usize) -> Tiles {
        let sequences: Vec<u32> = rows.iter().map(|&(sequence, _)| sequence).collect();
        let positions: Vec<u32> = rows.iter().map(|&(_, position)| position).collect();
        // Page p of sequence s is number 100 s + p.
        let pages_per_sequence = 80;
        let page_tables: Vec<u32> = (0..8)
            .flat_map(|sequence| (0..pages_per_sequence).map(move |page| 100 * sequence + page))
            .collect();
        let mut tiles = Tiles::new(rows.len(), 4, group, 128);
        tiles.cut(&StepBatch {
            token_ids: &positions,
            positions: &positions,
            row_sequences: &sequences,
            page_tables: &page_tables,
            pages_per_sequence: pages_per_sequence as usize,
            logit_rows: &[],
            draws: &[],
            changes: &[],
        });
        tiles
    }

    fn run(sequence: u32, from: u32, rows: u32) -> impl Iterator<Item = (u32, u32)> {
        (from..from + rows).map(move |position| (sequence, position))
    }

    fn extents(tiles: &[Tile]) -> Vec<(u32, u32, u32)> {
        tiles
            .iter()
            .map(|tile| (tile.first_row, tile.rows, tile.partial_row))
            .collect()
    }

    #[test]
    fn rows_of_many_sequences_are_tiles_of_their_own() {
        let tiles = cut(&[(0, 7), (1, 7), (2, 8), (1, 9)], 4);
        assert_eq!(
            extents(tiles.all()),
            [(0, 1, 0), (1, 1, 1), (2, 1, 2), (3, 1, 3)]
        );
        assert_eq!(
            (tiles.split(), tiles.split_rows(), tiles.walked()),
            (4, 4, 0)
        );
    }

    #[test]
    fn short_runs_share_tiles_and_leave_the_launch_as_it_is() {
        let rows: Vec<_> = run(0, 10, 5).chain(run(1, 0, 3)).collect();
        let tiles = cut(&rows, 4);
        let mut expected = vec![(0, 4, 0), (4, 1, 4), (5, 3, 5)];
        expected.resize(8, (0, 0, 0));
        assert_eq!(extents(tiles.all()), expected);
        assert_eq!(
            (tiles.split(), tiles.split_rows(), tiles.walked()),
            (8, 8, 0)
        );
    }

    #[test]
    fn what_a_step_stores_is_not_old_for_any_of_its_rows() {
        // Sequence 0 has two runs, since another row is between them.
        let rows: Vec<_> = run(0, 70, 2)
            .chain([(2, 9)])
            .chain(run(0, 72, 20))
            .collect();
        let tiles = cut(&rows, 8);
        let old: Vec<_> = tiles.all()[..4]
            .iter()
            .map(|tile| (tile.first_row, tile.old_tokens))
            .collect();
        assert_eq!(old, [(0, 70), (2, 9), (3, 70), (19, 70)]);
    }

    #[test]
    fn tiles_name_their_place() {
        let rows: Vec<_> = run(3, 510, 5).collect();
        let tiles = cut(&rows, 4);
        let places: Vec<_> = tiles.all()[..2]
            .iter()
            .map(|tile| {
                let pages = (tile.first_page, tile.home_page);
                (tile.first_position, tile.sequence, pages)
            })
            .collect();
        assert_eq!(places, [(510, 3, (300, 301)), (514, 3, (300, 302))]);
    }

    #[test]
    fn steps_of_one_row_a_sequence_are_told_from_others() {
        assert!(cut(&[(2, 9), (0, 0)], 4).is_one_row_each());
        assert!(!cut(&[(2, 9), (0, 0), (2, 10)], 4).is_one_row_each());
        assert!(!cut(&run(0, 0, 17).collect::<Vec<_>>(), 4).is_one_row_each());
    }

    #[test]
    fn long_runs_come_after_the_split_ones() {
        let rows: Vec<_> = run(0, 100, 60).chain([(1, 5), (2, 6)]).collect();
        let tiles = cut(&rows, 3);
        assert_eq!(
            (tiles.split(), tiles.split_rows(), tiles.walked()),
            (2, 2, 2)
        );
        // 42 rows of 3 query heads are 126.
        assert_eq!(
            extents(&tiles.all()[..4]),
            [(60, 1, 0), (61, 1, 1), (0, 42, 2), (42, 18, 44)]
        );
    }

    #[test]
    fn large_groups_have_one_row_a_tile() {
        let rows: Vec<_> = run(0, 0, 20).collect();
        let tiles = cut(&rows, 71);
        assert_eq!(tiles.walked(), 20);
        assert!(tiles.all().iter().all(|tile| tile.rows == 1));
    }

    #[test]
    fn no_split_tile_has_rows_of_different_pieces() {
        let rows: Vec<_> = run(0, 4_090, 12).collect();
        let tiles = cut(&rows, 1);
        // Positions 4090..4096 see up to 4096 tokens.
        assert_eq!(extents(&tiles.all()[..2]), [(0, 6, 0), (6, 6, 6)]);
        let rows: Vec<_> = run(0, 4_090, 120).collect();
        let tiles = cut(&rows, 1);
        assert_eq!(extents(&tiles.all()[..1]), [(0, 120, 0)]);
    }

    #[test]
    fn every_row_is_in_one_tile() {
        for group in [1, 2, 3, 7, 8, 16, 71] {
            let mut rows: Vec<(u32, u32)> = Vec::new();
            for (sequence, length) in [1, 3, 16, 17, 64, 65, 200, 1].into_iter().enumerate() {
                rows.extend(run(sequence as u32, 16_300 + 17 * length, length));
            }
            let tiles = cut(&rows, group);
            let mut seen = vec![0; rows.len()];
            for (index, tile) in tiles.all().iter().enumerate() {
                let first = rows
                    .get(tile.first_row as usize)
                    .copied()
                    .unwrap_or_default();
                for row in 0..tile.rows {
                    let at = (tile.first_row + row) as usize;
                    assert_eq!(rows[at], (first.0, first.1 + row));
                    seen[at] += 1;
                    let tokens = |position: u32| piece_tokens(position as usize + 1);
                    let is_walked = index >= tiles.split();
                    assert!(is_walked || tokens(rows[at].1) == tokens(first.1));
                }
            }
            assert!(
                seen.iter().all(|&count| count == 1),
                "group {group}: {seen:?}"
            );
            let split: u32 = tiles.all()[..tiles.split()]
                .iter()
                .map(|tile| tile.rows)
                .sum();
            assert_eq!(split as usize, tiles.split_rows());
        }
    }

    #[test]
    fn pieces_grow_with_what_a_row_sees() {
        for (tokens, piece) in [
            (1, 64),
            (4_096, 64),
            (4_097, 128),
            (8_192, 128),
            (8_193, 256),
            (131_072, 2_048),
        ] {
            assert_eq!(piece_tokens(tokens), piece, "{tokens} tokens");
        }
        assert_eq!(most_pieces(256), 4);
        assert_eq!(most_pieces(1 << 20), 66);
    }

    #[test]
    fn no_window_touches_more_pieces_than_there_is_room_for() {
        for window in [1, 63, 64, 1_000, 4_095, 4_096, 5_000, 16_384, 20_000] {
            let piece = piece_tokens(window);
            for position in (window - 1..window + 3 * piece).step_by(7) {
                // A tile of rows that the window has left behind the first token.
                let (first, last) = (position + 1 - window, position + SPLIT_HEADS - 1);
                let pieces = last / piece - first / piece + 1;
                assert!(
                    pieces <= most_pieces(1 << 20),
                    "window {window} at {position}"
                );
            }
        }
    }
}
