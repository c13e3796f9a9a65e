//! Which cache pages belong to whom.

use oxllama_backend::PAGE_TOKENS;

use crate::EngineError;

/// A page of the cache: an index into every layer's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// The free pages of a cache.
#[derive(Debug)]
pub struct PagePool {
    /// Taken from the end.
    free: Vec<PageId>,
    pages: usize,
}

impl PagePool {
    /// A pool with pages `0..pages`, all free.
    pub fn new(pages: usize) -> Self {
        let count = u32::try_from(pages).unwrap_or(u32::MAX);
        Self {
            free: (0..count).rev().map(PageId).collect(),
            pages: count as usize,
        }
    }

    /// Pages nobody holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Takes pages until `sequence` can hold `tokens`. Takes all that it needs, or none.
    ///
    /// # Errors
    /// The pool has too few free pages.
    pub fn grow(&mut self, sequence: &mut SequencePages, tokens: usize) -> Result<(), EngineError> {
        let missing = tokens
            .div_ceil(PAGE_TOKENS)
            .saturating_sub(sequence.pages.len());
        if missing > self.free.len() {
            return Err(EngineError::OutOfPages { pages: self.pages });
        }
        let first_taken = self.free.len() - missing;
        sequence.pages.extend(self.free.drain(first_taken..).rev());
        Ok(())
    }

    /// Takes back the pages past the first `tokens` tokens of `sequence`.
    pub fn shrink(&mut self, sequence: &mut SequencePages, tokens: usize) {
        let kept = tokens.div_ceil(PAGE_TOKENS).min(sequence.pages.len());
        self.free.extend(sequence.pages.drain(kept..).rev());
    }
}

/// The pages of one sequence, in order of position.
#[derive(Debug, Default)]
pub struct SequencePages {
    pages: Vec<PageId>,
}

impl SequencePages {
    /// The page table: entry `i` holds positions `i * PAGE_TOKENS ..`.
    pub fn table(&self) -> &[PageId] {
        &self.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    proptest! {
        #[test]
        fn pages_are_never_lost_nor_shared(
            pages in 0usize..40,
            requests in prop::collection::vec((0usize..5, 0usize..4_000), 0..60),
        ) {
            let mut pool = PagePool::new(pages);
            let mut sequences: Vec<SequencePages> = (0..5).map(|_| Default::default()).collect();
            for (index, tokens) in requests {
                let before = sequences[index].table().to_vec();
                if tokens < before.len() * PAGE_TOKENS {
                    pool.shrink(&mut sequences[index], tokens);
                    prop_assert_eq!(
                        sequences[index].table(),
                        &before[..tokens.div_ceil(PAGE_TOKENS)]
                    );
                } else {
                    let needed = tokens.div_ceil(PAGE_TOKENS) - before.len();
                    let fits = needed <= pool.free_pages();
                    prop_assert_eq!(pool.grow(&mut sequences[index], tokens).is_ok(), fits);
                    prop_assert_eq!(&sequences[index].table()[..before.len()], &before[..]);
                    if !fits {
                        prop_assert_eq!(sequences[index].table().len(), before.len());
                    }
                }
                let held: Vec<PageId> =
                    sequences.iter().flat_map(|s| s.table().iter().copied()).collect();
                let distinct: HashSet<PageId> = held.iter().copied().collect();
                prop_assert_eq!(distinct.len(), held.len());
                prop_assert_eq!(held.len() + pool.free_pages(), pages);
            }
        }
    }
}
