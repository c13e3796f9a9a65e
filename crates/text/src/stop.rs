//! Stop strings over streamed text.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::error::TextError;

/// All stop strings together may have this many bytes.
const BYTES_LIMIT: usize = 16 << 20;

/// One state of the automaton: the longest suffix of the text that begins a stop string.
#[derive(Default)]
struct Node {
    /// Next byte and the node it leads to, by byte.
    children: Vec<(u8, u32)>,
    /// The node of the longest proper suffix that also begins a stop string.
    fallback: u32,
    /// Length in bytes of the suffix: what has to be held back.
    depth: u32,
    /// The longest stop string that ends here, as position in the list given.
    matched: Option<u32>,
    /// Its length in bytes.
    matched_bytes: u32,
}

/// Aho and Corasick's automaton (Communications of the ACM 18:6, 1975) over bytes.
struct Automaton {
    nodes: Vec<Node>,
}

impl Automaton {
    fn new<S: AsRef<str>>(stop_strings: &[S]) -> Result<Self, TextError> {
        let bytes: usize = stop_strings.iter().map(|stop| stop.as_ref().len()).sum();
        if bytes > BYTES_LIMIT {
            return Err(TextError::StopStringsTooLong {
                bytes,
                limit: BYTES_LIMIT,
            });
        }
        let mut automaton = Self {
            nodes: vec![Node::default()],
        };
        for (index, stop) in stop_strings.iter().enumerate() {
            if stop.as_ref().is_empty() {
                return Err(TextError::EmptyStopString { index });
            }
            automaton.insert(stop.as_ref().as_bytes(), index as u32);
        }
        automaton.link();
        Ok(automaton)
    }

    fn insert(&mut self, stop: &[u8], index: u32) {
        let mut node = 0;
        for (depth, &byte) in (1u32..).zip(stop) {
            node = match self.child(node, byte) {
                Ok(child) => child,
                Err(place) => {
                    let child = self.nodes.len() as u32;
                    self.nodes.push(Node {
                        depth,
                        ..Node::default()
                    });
                    self.nodes[node as usize]
                        .children
                        .insert(place, (byte, child));
                    child
                }
            };
        }
        let last = &mut self.nodes[node as usize];
        // The first of two equal stop strings counts.
        if last.matched.is_none() {
            last.matched = Some(index);
            last.matched_bytes = last.depth;
        }
    }

    /// The child for a byte, or where it would have to be inserted.
    fn child(&self, node: u32, byte: u8) -> Result<u32, usize> {
        let children = &self.nodes[node as usize].children;
        children
            .binary_search_by_key(&byte, |child| child.0)
            .map(|place| children[place].1)
    }

    /// Sets the fallbacks, breadth first, so that those of shorter suffixes are known.
    fn link(&mut self) {
        let mut queue: VecDeque<u32> = VecDeque::from([0]);
        while let Some(node) = queue.pop_front() {
            for place in 0..self.nodes[node as usize].children.len() {
                let (byte, child) = self.nodes[node as usize].children[place];
                let fallback = if node == 0 {
                    0
                } else {
                    self.step(self.nodes[node as usize].fallback, byte)
                };
                let (matched, matched_bytes) = {
                    let suffix = &self.nodes[fallback as usize];
                    (suffix.matched, suffix.matched_bytes)
                };
                let child_node = &mut self.nodes[child as usize];
                child_node.fallback = fallback;
                if child_node.matched.is_none() {
                    child_node.matched = matched;
                    child_node.matched_bytes = matched_bytes;
                }
                queue.push_back(child);
            }
        }
    }

    fn step(&self, mut node: u32, byte: u8) -> u32 {
        loop {
            match self.child(node, byte) {
                Ok(child) => return child,
                Err(_) if node == 0 => return 0,
                Err(_) => node = self.nodes[node as usize].fallback,
            }
        }
    }
}

/// What [`StopMatcher::push`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopStep {
    /// Text that is now certain to come before any stop string.
    pub text: String,
    /// The stop string that ended the text, as position in the list given. Nothing comes after.
    pub matched: Option<usize>,
}

/// Cuts streamed text at the first stop string.
///
/// The stop string that is complete first counts; among those complete at the same byte, the
/// longest. The text before it is passed on, the stop string itself and all after it are not.
/// What could still become a stop string is held back, never more. The result does not depend on
/// how the text is cut into pieces. The work for a byte does not grow with the number of stop
/// strings.
#[derive(Clone)]
pub struct StopMatcher {
    automaton: Arc<Automaton>,
    node: u32,
    /// Text not passed on: its length is the depth of `node`.
    held: String,
    matched: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings; none at all is allowed.
    ///
    /// # Errors
    /// If a stop string is empty, or all together have more than 16 MiB.
    pub fn new<S: AsRef<str>>(stop_strings: &[S]) -> Result<Self, TextError> {
        let automaton = Arc::new(Automaton::new(stop_strings)?);
        Ok(Self {
            automaton,
            node: 0,
            held: String::new(),
            matched: None,
        })
    }

    /// Takes the next piece of text. After a match everything is swallowed.
    pub fn push(&mut self, piece: &str) -> StopStep {
        if self.matched.is_some() {
            return StopStep {
                text: String::new(),
                matched: self.matched,
            };
        }
        let held_before = self.held.len();
        self.held.push_str(piece);
        let automaton = Arc::clone(&self.automaton);
        for (offset, byte) in piece.bytes().enumerate() {
            self.node = automaton.step(self.node, byte);
            let node = &automaton.nodes[self.node as usize];
            if let Some(index) = node.matched {
                // A stop string is whole characters, so it starts at one.
                self.held
                    .truncate(held_before + offset + 1 - node.matched_bytes as usize);
                self.matched = Some(index as usize);
                return StopStep {
                    text: std::mem::take(&mut self.held),
                    matched: self.matched,
                };
            }
        }
        let keep = automaton.nodes[self.node as usize].depth as usize;
        let kept = self.held.split_off(self.held.len() - keep);
        StopStep {
            text: std::mem::replace(&mut self.held, kept),
            matched: None,
        }
    }

    /// Ends the text and returns what was held back (nothing after a match). The matcher then
    /// stands at the start of a new text.
    pub fn finish(&mut self) -> String {
        self.node = 0;
        self.matched = None;
        std::mem::take(&mut self.held)
    }
}
