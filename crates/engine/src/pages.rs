//! The page table: which cache page holds which tokens, and for whom.
//!
//! A page is full of [`PAGE_TOKENS`] tokens or still being filled. A full page is known by a
//! hash chained over everything before it, so that equal prefixes are found and shared. Pages
//! that nobody holds keep their contents until room is needed: then the least recently used
//! page that no other page continues is given up first, so chains are cut from their ends.
//!
//! Pure bookkeeping: contents move only by the [`PageCopy`]s that the caller runs.

use std::collections::{BTreeSet, HashMap};

use oxllama_backend::PAGE_TOKENS;
use oxllama_model::PageCopy;
use serde::Serialize;

/// A page of the cache: an index into every layer's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// What a page's keys and values depend on: its tokens and all tokens before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash([u8; 16]);

impl PageHash {
    /// Where chains begin whose keys and values depend on `salt` too: the model, an adapter.
    pub fn root(salt: &[u8]) -> Self {
        Self::of(blake3::hash(salt))
    }

    /// The chain of `token_ids` from here: one hash for each full page.
    pub fn chain(self, token_ids: &[u32]) -> Vec<Self> {
        let pages = token_ids.chunks_exact(PAGE_TOKENS);
        pages
            .scan(self, |hash, page| {
                *hash = hash.extended(page);
                Some(*hash)
            })
            .collect()
    }

    /// The chain that goes on with a full page of `token_ids`.
    fn extended(self, token_ids: &[u32]) -> Self {
        let mut bytes = [0u8; 16 + 4 * PAGE_TOKENS];
        bytes[..16].copy_from_slice(&self.0);
        let mut used = 16;
        for (to, token_id) in bytes[16..].chunks_exact_mut(4).zip(token_ids) {
            to.copy_from_slice(&token_id.to_le_bytes());
            used += 4;
        }
        Self::of(blake3::hash(&bytes[..used]))
    }

    fn of(hash: blake3::Hash) -> Self {
        let mut first = [0; 16];
        first.copy_from_slice(&hash.as_bytes()[..16]);
        Self(first)
    }
}

/// How often the prefix cache helped, since the table was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PrefixCounters {
    /// Prompt tokens that were looked up.
    pub looked_up_tokens: u64,
    /// Of those, tokens found in full pages, which were shared.
    pub shared_tokens: u64,
    /// Of those, tokens found in a page that agreed in part, which was copied.
    pub copied_tokens: u64,
    /// Full pages that turned out equal to a known one after they were computed.
    pub merged_pages: u64,
    /// Pages whose contents were given up for room.
    pub evicted_pages: u64,
}

#[derive(Debug)]
struct Page {
    /// Sequences that hold it.
    holders: u32,
    /// The chain before it.
    parent: PageHash,
    /// Set when it is full and known under this hash.
    hash: Option<PageHash>,
    /// The tokens whose keys and values it holds.
    token_ids: Vec<u32>,
    /// Pages with contents whose `parent` is this page's `hash`.
    children: u32,
    /// When it was last held, in the table's own count of changes.
    last_used: u64,
}

/// The pages of one sequence, in order of position. Belongs to the table that filled it, and
/// must be given back by [`PageTable::release`].
#[derive(Debug)]
pub struct SequencePages {
    pages: Vec<PageId>,
    /// Chain hashes: of the root, then of each full page.
    hashes: Vec<PageHash>,
    /// Tokens whose keys and values the pages hold.
    tokens: usize,
}

impl SequencePages {
    /// No pages yet, in the chains of `root`.
    pub fn new(root: PageHash) -> Self {
        Self {
            pages: Vec::new(),
            hashes: vec![root],
            tokens: 0,
        }
    }

    /// The page table: entry `i` holds positions `i * PAGE_TOKENS ..`.
    pub fn table(&self) -> &[PageId] {
        &self.pages
    }

    /// Tokens, from position 0, whose keys and values the pages hold.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    fn root(&self) -> PageHash {
        self.hashes[0]
    }
}

/// All pages of a cache.
#[derive(Debug)]
pub struct PageTable {
    pages: Vec<Page>,
    /// Pages without contents that nobody holds; taken from the end.
    free: Vec<PageId>,
    /// Full pages by their hash.
    by_hash: HashMap<PageHash, PageId>,
    /// Pages with contents by the chain that they continue.
    by_parent: HashMap<PageHash, Vec<PageId>>,
    /// Pages with contents that nobody holds and no page continues, least recently used first.
    leaves: BTreeSet<(u64, PageId)>,
    /// Pages with contents that nobody holds: the leaves and what lies above them.
    unheld: usize,
    changes: u64,
    counters: PrefixCounters,
}

impl PageTable {
    /// A table of pages `0..pages`, all free.
    pub fn new(pages: usize) -> Self {
        let count = u32::try_from(pages).unwrap_or(u32::MAX);
        let empty = || Page {
            holders: 0,
            parent: PageHash([0; 16]),
            hash: None,
            token_ids: Vec::new(),
            children: 0,
            last_used: 0,
        };
        Self {
            pages: (0..count).map(|_| empty()).collect(),
            free: (0..count).rev().map(PageId).collect(),
            by_hash: HashMap::new(),
            by_parent: HashMap::new(),
            leaves: BTreeSet::new(),
            unheld: 0,
            changes: 0,
            counters: PrefixCounters::default(),
        }
    }

    /// Pages of the pool.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that can be had: free ones and those that only keep contents for later.
    pub fn available(&self) -> usize {
        self.free.len() + self.unheld
    }

    /// Pages that sequences hold.
    pub fn held(&self) -> usize {
        self.pages.len() - self.available()
    }

    /// How often the cache helped.
    pub fn counters(&self) -> PrefixCounters {
        self.counters
    }

    /// Full pages that the table has of a `chain`.
    pub fn known(&self, chain: &[PageHash]) -> usize {
        let is_known = |hash: &&PageHash| self.by_hash.contains_key(*hash);
        chain.iter().take_while(is_known).count()
    }

    /// Pages that a sequence which begins with `chain` would take from [`Self::available`] now
    /// to hold `tokens` tokens: all that no other sequence holds.
    pub fn cost(&self, chain: &[PageHash], tokens: usize) -> usize {
        let is_held = |hash: &&PageHash| {
            let page = self.by_hash.get(*hash);
            page.is_some_and(|id| self.pages[id.0 as usize].holders > 0)
        };
        let held = chain.iter().take_while(is_held).count();
        tokens.div_ceil(PAGE_TOKENS).saturating_sub(held)
    }

    /// Fills an empty sequence with what the cache has of `token_ids`, of which `chain` are the
    /// full pages: those are shared, one page that agrees in part is copied. Returns the copy
    /// to run before the next step.
    pub fn find_prefix(
        &mut self,
        sequence: &mut SequencePages,
        chain: &[PageHash],
        token_ids: &[u32],
    ) -> Option<PageCopy> {
        self.counters.looked_up_tokens += token_ids.len() as u64;
        for &hash in chain {
            let Some(&id) = self.by_hash.get(&hash) else {
                break;
            };
            self.hold(id);
            sequence.pages.push(id);
            sequence.hashes.push(hash);
            sequence.tokens += PAGE_TOKENS;
        }
        let shared = sequence.tokens;
        let copy = self.copy_part(sequence, token_ids);
        self.counters.shared_tokens += shared as u64;
        self.counters.copied_tokens += (sequence.tokens - shared) as u64;
        copy
    }

    /// Continues a sequence that ends at a page's end with a copy of the page that agrees with
    /// most of the tokens that follow.
    fn copy_part(&mut self, sequence: &mut SequencePages, token_ids: &[u32]) -> Option<PageCopy> {
        let parent = *sequence.hashes.last()?;
        let wanted = &token_ids[sequence.tokens..];
        let agreed = |id: &PageId| {
            let found = &self.pages[id.0 as usize].token_ids;
            found.iter().zip(wanted).take_while(|(a, b)| a == b).count()
        };
        let candidates = self.by_parent.get(&parent)?;
        let (tokens, from) = candidates
            .iter()
            .map(|id| (agreed(id), *id))
            .max_by_key(|&(tokens, id)| (tokens, std::cmp::Reverse(id)))?;
        if tokens == 0 {
            return None;
        }
        // Held while a page is found, so that this one is not given up for the purpose.
        self.hold(from);
        let to = self.take();
        self.let_go(from);
        let to = to?;
        self.set_contents(to, parent, &wanted[..tokens]);
        sequence.pages.push(to);
        sequence.tokens += tokens;
        Some(PageCopy {
            from: from.0,
            to: to.0,
        })
    }

    /// Takes pages until `sequence` has room for `tokens`. Takes all that it needs, or none
    /// and returns false.
    pub fn grow(&mut self, sequence: &mut SequencePages, tokens: usize) -> bool {
        let missing = tokens
            .div_ceil(PAGE_TOKENS)
            .saturating_sub(sequence.pages.len());
        if missing > self.available() {
            return false;
        }
        for _ in 0..missing {
            sequence.pages.extend(self.take());
        }
        true
    }

    /// Notes that the keys and values of `token_ids`, the sequence's first tokens, are all in
    /// its pages now. Full pages become known; one that is known already is given back for the
    /// known one.
    pub fn commit(&mut self, sequence: &mut SequencePages, token_ids: &[u32]) {
        while sequence.tokens < token_ids.len() {
            let index = sequence.tokens / PAGE_TOKENS;
            let start = index * PAGE_TOKENS;
            let end = token_ids.len().min(start + PAGE_TOKENS);
            let parent = sequence.hashes[index];
            let id = sequence.pages[index];
            self.set_contents(id, parent, &token_ids[start..end]);
            sequence.tokens = end;
            if end - start == PAGE_TOKENS {
                let hash = parent.extended(&token_ids[start..end]);
                sequence.hashes.push(hash);
                match self.by_hash.get(&hash) {
                    Some(&known) => {
                        self.hold(known);
                        self.clear_contents(id);
                        self.let_go(id);
                        sequence.pages[index] = known;
                        self.counters.merged_pages += 1;
                    }
                    None => {
                        self.by_hash.insert(hash, id);
                        self.pages[id.0 as usize].hash = Some(hash);
                    }
                }
            }
        }
    }

    /// Forgets what `sequence` holds past its first `tokens` tokens of `token_ids`, so that
    /// other tokens may follow there. A page that others may know is left to them and what
    /// it shared is copied: the copy to run before the next step is returned. The sequence may
    /// hold fewer tokens than asked for afterwards.
    pub fn truncate(
        &mut self,
        sequence: &mut SequencePages,
        token_ids: &[u32],
        tokens: usize,
    ) -> Option<PageCopy> {
        let kept = tokens.min(sequence.tokens);
        let full = kept / PAGE_TOKENS;
        let part = kept % PAGE_TOKENS;
        let own_part = part > 0
            && sequence.pages.get(full).is_some_and(|id| {
                let page = &self.pages[id.0 as usize];
                page.hash.is_none() && page.holders == 1
            });
        let pages_kept = full + usize::from(own_part);
        while sequence.pages.len() > pages_kept {
            if let Some(id) = sequence.pages.pop() {
                self.let_go(id);
            }
        }
        sequence.hashes.truncate(full + 1);
        if own_part {
            let parent = sequence.hashes[full];
            let id = sequence.pages[full];
            self.set_contents(id, parent, &token_ids[full * PAGE_TOKENS..kept]);
            sequence.tokens = kept;
            return None;
        }
        sequence.tokens = full * PAGE_TOKENS;
        if part == 0 {
            return None;
        }
        self.copy_part(sequence, &token_ids[..kept])
    }

    /// Gives back all pages of `sequence`; their contents stay for others.
    pub fn release(&mut self, sequence: &mut SequencePages) {
        // The last page first: it is the first to be given up later.
        while let Some(id) = sequence.pages.pop() {
            self.let_go(id);
        }
        let root = sequence.root();
        *sequence = SequencePages::new(root);
    }

    /// As [`Self::release`], after a step that may have left anything in pages that only this
    /// sequence was filling: those contents are forgotten.
    pub fn discard(&mut self, sequence: &mut SequencePages) {
        for index in 0..sequence.pages.len() {
            let id = sequence.pages[index];
            if self.pages[id.0 as usize].hash.is_none() {
                self.clear_contents(id);
            }
        }
        self.release(sequence);
    }

    /// Forgets all contents that nobody holds.
    pub fn clear(&mut self) {
        while let Some(id) = self.evict() {
            self.free.push(id);
        }
    }

    /// Forgets the contents of pages that copies were to fill and did not.
    pub fn forget_copies(&mut self, copies: &[PageCopy]) {
        for copy in copies {
            let id = PageId(copy.to);
            let page = &self.pages[copy.to as usize];
            if page.hash.is_some() || page.token_ids.is_empty() {
                continue;
            }
            let last_used = page.last_used;
            let unheld = page.holders == 0;
            self.clear_contents(id);
            if unheld {
                self.leaves.remove(&(last_used, id));
                self.unheld -= 1;
                self.free.push(id);
            }
        }
    }

    /// Checks the books against `sequences`, which must be all that hold pages.
    ///
    /// # Errors
    /// The first rule that is broken, in words. Never happens; tests and simulations ask.
    pub fn audit<'s>(
        &self,
        sequences: impl Iterator<Item = &'s SequencePages>,
    ) -> Result<(), String> {
        let mut holders = vec![0u32; self.pages.len()];
        for sequence in sequences {
            for (index, id) in sequence.pages.iter().enumerate() {
                holders[id.0 as usize] += 1;
                let page = &self.pages[id.0 as usize];
                let valid = sequence.tokens.saturating_sub(index * PAGE_TOKENS);
                if page.token_ids.len() < valid.min(PAGE_TOKENS) {
                    return Err(format!("page {} holds too few tokens", id.0));
                }
                let hash = sequence.hashes.get(index + 1).copied();
                if page.hash != hash {
                    return Err(format!("page {} is known by another hash", id.0));
                }
                if page.hash.is_none() && holders[id.0 as usize] > 1 {
                    return Err(format!("page {} is shared before it is full", id.0));
                }
            }
        }
        let (mut free, mut unheld, mut leaves) = (0, 0, 0);
        for (index, page) in self.pages.iter().enumerate() {
            if page.holders != holders[index] {
                let found = page.holders;
                return Err(format!("page {index}: {found} holders, {}", holders[index]));
            }
            let children = match page.hash {
                Some(hash) => self.by_parent.get(&hash).map_or(0, Vec::len),
                None => 0,
            };
            if page.children as usize != children {
                return Err(format!(
                    "page {index}: {} children, {children}",
                    page.children
                ));
            }
            if page.holders == 0 && page.token_ids.is_empty() {
                free += 1;
            } else if page.holders == 0 {
                unheld += 1;
                leaves += usize::from(children == 0);
            }
        }
        if (free, unheld, leaves) != (self.free.len(), self.unheld, self.leaves.len()) {
            return Err(format!(
                "{free} free, {unheld} unheld, {leaves} leaves; the books say {}, {}, {}",
                self.free.len(),
                self.unheld,
                self.leaves.len()
            ));
        }
        Ok(())
    }

    /// A page without contents, held once.
    fn take(&mut self) -> Option<PageId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                self.counters.evicted_pages += 1;
                self.evict()?
            }
        };
        self.pages[id.0 as usize].holders = 1;
        Some(id)
    }

    /// Takes the contents of the leaf that was used least recently.
    fn evict(&mut self) -> Option<PageId> {
        let (_, id) = self.leaves.pop_first()?;
        self.unheld -= 1;
        self.clear_contents(id);
        Some(id)
    }

    fn hold(&mut self, id: PageId) {
        let page = &mut self.pages[id.0 as usize];
        if page.holders == 0 {
            self.unheld -= 1;
            self.leaves.remove(&(page.last_used, id));
        }
        page.holders += 1;
    }

    fn let_go(&mut self, id: PageId) {
        self.changes += 1;
        let page = &mut self.pages[id.0 as usize];
        page.holders -= 1;
        if page.holders > 0 {
            return;
        }
        if page.token_ids.is_empty() {
            self.free.push(id);
            return;
        }
        page.last_used = self.changes;
        self.unheld += 1;
        if page.children == 0 {
            self.leaves.insert((page.last_used, id));
        }
    }

    /// Sets the tokens of a page that is not full yet.
    fn set_contents(&mut self, id: PageId, parent: PageHash, token_ids: &[u32]) {
        let page = &mut self.pages[id.0 as usize];
        let was_empty = page.token_ids.is_empty();
        page.token_ids.clear();
        page.token_ids.extend_from_slice(token_ids);
        page.parent = parent;
        if was_empty && !token_ids.is_empty() {
            self.by_parent.entry(parent).or_default().push(id);
            if let Some(&above) = self.by_hash.get(&parent) {
                self.pages[above.0 as usize].children += 1;
            }
        }
    }

    /// Makes a page that is no leaf's ancestor forget its tokens.
    fn clear_contents(&mut self, id: PageId) {
        let page = &mut self.pages[id.0 as usize];
        if page.token_ids.is_empty() {
            return;
        }
        page.token_ids.clear();
        let parent = page.parent;
        if let Some(hash) = page.hash.take() {
            self.by_hash.remove(&hash);
        }
        if let Some(siblings) = self.by_parent.get_mut(&parent) {
            siblings.retain(|&other| other != id);
            if siblings.is_empty() {
                self.by_parent.remove(&parent);
            }
        }
        if let Some(&above) = self.by_hash.get(&parent) {
            let page = &mut self.pages[above.0 as usize];
            page.children -= 1;
            if page.children == 0 && page.holders == 0 {
                self.leaves.insert((page.last_used, above));
            }
        }
    }
}
