//! Banned strings over streamed text.

use std::ops::Range;
use std::sync::Arc;

use crate::automaton::{Automaton, check_strings};
use crate::error::TextError;

/// Watches a text for banned strings without regard to case.
///
/// Text and strings are compared character by character after [`char::to_lowercase`]; the two
/// small sigmas, which differ by their place in a word alone, are the same letter. All offsets are
/// in bytes of the text as it was pushed, and lie between characters. The result does not depend
/// on how the text is cut into pieces, and the work for a byte does not grow with the number of
/// banned strings. The whole text is kept, so that it can be cut back to any length.
#[derive(Clone)]
pub struct BannedMatcher {
    automaton: Arc<Automaton>,
    state: u32,
    /// The whole text in lower case.
    lowered: Vec<u8>,
    /// Length of the text as it was pushed.
    text_bytes: usize,
    /// The characters that are longer or shorter in lower case, in order.
    resized: Vec<Resized>,
    found: Option<Found>,
}

/// A character whose lower case has another length in UTF-8.
#[derive(Clone)]
struct Resized {
    /// Its place in the text.
    original: Range<usize>,
    /// Its place in the lowered text.
    lowered: Range<usize>,
}

/// A banned string in the text.
#[derive(Clone, Copy)]
struct Found {
    /// Where it begins, as offset into the text.
    begin: usize,
    /// Where it ends, as offset into the lowered text.
    lowered_end: usize,
}

impl BannedMatcher {
    /// A matcher for these banned strings; none at all is allowed.
    ///
    /// # Errors
    /// If a banned string is empty or has more than 4,096 bytes, or if there are more than 1,024
    /// or they have more than 1 MiB together.
    pub fn new<S: AsRef<str>>(banned_strings: &[S]) -> Result<Self, TextError> {
        check_strings("banned", banned_strings)?;
        let lowered: Vec<String> = banned_strings
            .iter()
            .map(|string| string.as_ref().chars().flat_map(lower_case).collect())
            .collect();
        Ok(Self {
            automaton: Arc::new(Automaton::new(&lowered)),
            state: 0,
            lowered: Vec::new(),
            text_bytes: 0,
            resized: Vec::new(),
            found: None,
        })
    }

    /// Takes the next piece of text. Returns where the banned string begins that was complete
    /// first (among those complete at the same byte, the longest), in this piece or an earlier
    /// one. It is returned until [`Self::truncate`] cuts it off.
    pub fn push(&mut self, piece: &str) -> Option<usize> {
        let pushed_from = self.lowered.len();
        for character in piece.chars() {
            let lowered_start = self.lowered.len();
            for small in lower_case(character) {
                let mut utf8 = [0; 4];
                self.lowered
                    .extend_from_slice(small.encode_utf8(&mut utf8).as_bytes());
            }
            let text_end = self.text_bytes + character.len_utf8();
            if self.lowered.len() - lowered_start != character.len_utf8() {
                self.resized.push(Resized {
                    original: self.text_bytes..text_end,
                    lowered: lowered_start..self.lowered.len(),
                });
            }
            self.text_bytes = text_end;
        }
        if self.found.is_none() {
            self.search(pushed_from);
        }
        self.found.map(|found| found.begin)
    }

    /// The text before this offset cannot become part of a banned string any more: it may be
    /// shown.
    pub fn releasable(&self) -> usize {
        match self.found {
            Some(found) => found.begin,
            None => {
                let pending = self.automaton.depth(self.state);
                self.text_offset(self.lowered.len() - pending)
            }
        }
    }

    /// Forgets the text from offset `len_bytes` on, as if it had not been pushed. Inside a
    /// character, the character is forgotten too; past the end nothing happens.
    pub fn truncate(&mut self, len_bytes: usize) {
        if len_bytes >= self.text_bytes {
            return;
        }
        let mut lowered_end = self.lowered_offset(len_bytes);
        while self.lowered[lowered_end] & 0b1100_0000 == 0b1000_0000 {
            lowered_end -= 1;
        }
        self.text_bytes = self.text_offset(lowered_end);
        self.lowered.truncate(lowered_end);
        let kept = self
            .resized
            .partition_point(|resized| resized.lowered.end <= lowered_end);
        self.resized.truncate(kept);
        if self
            .found
            .is_some_and(|found| found.lowered_end <= lowered_end)
        {
            return;
        }
        // What was found, if anything, was the first: nothing is found in what remains.
        self.found = None;
        self.state = 0;
        self.search(lowered_end.saturating_sub(self.automaton.longest()));
    }

    /// Continues the search with the lowered text from offset `from` on, up to the first match.
    fn search(&mut self, from: usize) {
        for (offset, &byte) in self.lowered.iter().enumerate().skip(from) {
            self.state = self.automaton.step(self.state, byte);
            if let Some(banned) = self.automaton.matched(self.state) {
                let lowered_end = offset + 1;
                self.found = Some(Found {
                    begin: self.text_offset(lowered_end - banned.bytes as usize),
                    lowered_end,
                });
                return;
            }
        }
    }

    /// The place in the text of an offset into the lowered text.
    fn text_offset(&self, lowered: usize) -> usize {
        let later = self
            .resized
            .partition_point(|resized| resized.lowered.start <= lowered);
        let before = later.checked_sub(1).map(|last| &self.resized[last]);
        translate(lowered, before.map(|last| (&last.lowered, &last.original)))
    }

    /// The place in the lowered text of an offset into the text.
    fn lowered_offset(&self, original: usize) -> usize {
        let later = self
            .resized
            .partition_point(|resized| resized.original.start <= original);
        let before = later.checked_sub(1).map(|last| &self.resized[last]);
        translate(original, before.map(|last| (&last.original, &last.lowered)))
    }
}

/// Translates an offset from one text to the other. `before` is the last character of another
/// length that begins at or before the offset, as it lies in both texts; an offset inside it
/// becomes its start.
fn translate(offset: usize, before: Option<(&Range<usize>, &Range<usize>)>) -> usize {
    match before {
        None => offset,
        Some((from, to)) if offset < from.end => to.start,
        Some((from, to)) => to.end + (offset - from.end),
    }
}

/// A character in lower case.
fn lower_case(character: char) -> impl Iterator<Item = char> {
    let one_sigma = |small| if small == 'ς' { 'σ' } else { small };
    character.to_lowercase().map(one_sigma)
}
