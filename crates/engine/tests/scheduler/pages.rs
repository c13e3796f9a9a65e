//! The page table by itself.

use oxllama_backend::PAGE_TOKENS;
use oxllama_engine::{PageHash, PageTable, SequencePages};
use proptest::prelude::*;

fn root() -> PageHash {
    PageHash::root(&[])
}

/// Fills a sequence with `token_ids`, as if a model had computed what the table did not have.
fn filled(table: &mut PageTable, token_ids: &[u32]) -> (SequencePages, usize) {
    let mut sequence = SequencePages::new(root());
    let chain = root().chain(token_ids);
    table.find_prefix(&mut sequence, &chain, token_ids);
    let cached = sequence.tokens();
    assert!(table.grow(&mut sequence, token_ids.len()));
    table.commit(&mut sequence, token_ids);
    (sequence, cached)
}

fn tokens(start: u32, length: usize) -> Vec<u32> {
    (start..start + length as u32).collect()
}

#[test]
fn prefixes_are_shared_and_parts_copied() {
    let mut table = PageTable::new(10);
    let (mut first, cached) = filled(&mut table, &tokens(0, 600));
    assert_eq!(cached, 0);
    let mut other = tokens(0, 580);
    other.extend([7, 7, 7]);
    let (mut second, cached) = filled(&mut table, &other);
    assert_eq!(cached, 580);
    assert_eq!(first.table()[..2], second.table()[..2]);
    assert_ne!(first.table()[2], second.table()[2]);
    assert_eq!(table.held(), 4);
    table.audit([&first, &second].into_iter()).unwrap();
    table.release(&mut first);
    table.release(&mut second);
    assert_eq!(table.available(), 10);
    // Nobody holds it, and still it is there.
    let (mut third, cached) = filled(&mut table, &tokens(0, 600));
    assert_eq!(cached, 600);
    table.release(&mut third);
    let counters = table.counters();
    assert_eq!(counters.shared_tokens, 4 * PAGE_TOKENS as u64);
    assert_eq!(counters.copied_tokens, 68 + 88);
    table.clear();
    let (_, cached) = filled(&mut table, &tokens(0, 600));
    assert_eq!(cached, 0);
}

#[test]
fn other_roots_share_nothing() {
    let mut table = PageTable::new(10);
    filled(&mut table, &tokens(0, 300));
    let adapter = PageHash::root(b"an adapter");
    let mut sequence = SequencePages::new(adapter);
    let chain = adapter.chain(&tokens(0, 300));
    assert_eq!(
        table.find_prefix(&mut sequence, &chain, &tokens(0, 300)),
        None
    );
    assert_eq!(sequence.tokens(), 0);
}

#[test]
fn chains_are_given_up_from_their_ends() {
    let mut table = PageTable::new(4);
    let (mut old, _) = filled(&mut table, &tokens(0, 3 * PAGE_TOKENS));
    table.release(&mut old);
    let (mut new, _) = filled(&mut table, &tokens(5_000, 2 * PAGE_TOKENS));
    assert_eq!(table.counters().evicted_pages, 1);
    assert_eq!(table.known(&root().chain(&tokens(0, 3 * PAGE_TOKENS))), 2);
    table.release(&mut new);
}

#[test]
fn what_was_computed_twice_is_merged() {
    let mut table = PageTable::new(4);
    let ids = tokens(0, PAGE_TOKENS);
    let mut sequences = [SequencePages::new(root()), SequencePages::new(root())];
    for sequence in &mut sequences {
        assert!(table.grow(sequence, PAGE_TOKENS));
    }
    assert_eq!(table.held(), 2);
    for sequence in &mut sequences {
        table.commit(sequence, &ids);
    }
    assert_eq!(table.held(), 1);
    assert_eq!(sequences[0].table(), sequences[1].table());
    assert_eq!(table.counters().merged_pages, 1);
    table.audit(sequences.iter()).unwrap();
}

#[test]
fn growing_takes_all_or_nothing() {
    let mut table = PageTable::new(3);
    let mut sequence = SequencePages::new(root());
    assert!(table.grow(&mut sequence, 2 * PAGE_TOKENS));
    assert!(!table.grow(&mut sequence, 4 * PAGE_TOKENS));
    assert_eq!((sequence.table().len(), table.available()), (2, 1));
}

proptest! {
    #[test]
    fn no_page_is_lost_or_shared_wrongly(
        pages in 2usize..20,
        actions in prop::collection::vec((0usize..4, 0usize..6, 0usize..900, 0u32..3), 1..60),
    ) {
        let mut table = PageTable::new(pages);
        let mut sequences: Vec<(SequencePages, Vec<u32>)> =
            (0..4).map(|_| (SequencePages::new(root()), Vec::new())).collect();
        for (index, action, length, family) in actions {
            let (sequence, ids) = &mut sequences[index];
            match action {
                0 => {
                    table.release(sequence);
                    ids.clear();
                }
                1 => {
                    let kept = length.min(ids.len());
                    let copy = table.truncate(sequence, ids, kept);
                    prop_assert!(sequence.tokens() <= kept);
                    prop_assert!(copy.is_none_or(|copy| copy.from != copy.to));
                    ids.truncate(sequence.tokens());
                }
                2 if ids.is_empty() => {
                    let wanted: Vec<u32> = (0..length as u32).map(|i| family + i % 3).collect();
                    let chain = root().chain(&wanted);
                    table.find_prefix(sequence, &chain, &wanted);
                    ids.extend_from_slice(&wanted[..sequence.tokens()]);
                }
                _ => {
                    let mut longer = ids.clone();
                    longer.extend((0..length as u32).map(|i| family + i % 3));
                    if table.grow(sequence, longer.len()) {
                        table.commit(sequence, &longer);
                        *ids = longer;
                    }
                }
            }
            let audit = table.audit(sequences.iter().map(|(sequence, _)| sequence));
            prop_assert!(audit.is_ok(), "{:?}", audit);
            for (sequence, ids) in &sequences {
                prop_assert_eq!(sequence.tokens(), ids.len());
            }
        }
        for (sequence, _) in &mut sequences {
            table.release(sequence);
        }
        prop_assert_eq!(table.available(), pages);
    }
}
