//! Finding any of a list of strings in streamed bytes.

use std::collections::VecDeque;
use std::ops::Range;

use crate::error::TextError;

/// A list may have this many strings.
const STRINGS_LIMIT: usize = 1_024;

/// A string may have this many bytes.
const STRING_BYTES_LIMIT: usize = 4_096;

/// A list may have this many bytes in all; the automaton takes up to 28 times as many.
const LIST_BYTES_LIMIT: usize = 1 << 20;

/// Refuses a list that is too long to be searched for, and one with an empty string. `list` names
/// it in the error: `stop` or `banned`.
pub(crate) fn check_strings<S: AsRef<str>>(
    list: &'static str,
    strings: &[S],
) -> Result<(), TextError> {
    if strings.len() > STRINGS_LIMIT {
        return Err(TextError::TooManyStrings {
            list,
            found: strings.len(),
            limit: STRINGS_LIMIT,
        });
    }
    let mut list_bytes = 0;
    for (index, string) in strings.iter().enumerate() {
        let bytes = string.as_ref().len();
        if bytes == 0 {
            return Err(TextError::EmptyString { list, index });
        }
        if bytes > STRING_BYTES_LIMIT {
            return Err(TextError::StringTooLong {
                list,
                index,
                bytes,
                limit: STRING_BYTES_LIMIT,
            });
        }
        list_bytes += bytes;
    }
    if list_bytes > LIST_BYTES_LIMIT {
        return Err(TextError::StringsTooLong {
            list,
            bytes: list_bytes,
            limit: LIST_BYTES_LIMIT,
        });
    }
    Ok(())
}

/// A string that ends at some place of the text.
#[derive(Clone, Copy)]
pub(crate) struct Match {
    /// Its position in the list.
    pub(crate) index: u32,
    /// Its length.
    pub(crate) bytes: u32,
}

/// One state of the automaton: the longest suffix of the text that begins a string of the list.
struct Node {
    /// The suffix's last byte.
    byte: u8,
    /// Number of nodes that are one byte longer; they stand side by side, in order of `byte`.
    children: u16,
    first_child: u32,
    /// The node of the longest proper suffix that also begins a string.
    fallback: u32,
    /// Length of the suffix.
    depth: u32,
    /// The longest string that ends here, the first in the list of equal ones.
    matched: Option<Match>,
}

/// Aho and Corasick's automaton (Communications of the ACM 18:6, 1975) over bytes.
pub(crate) struct Automaton {
    /// Breadth first; the root is node 0.
    nodes: Vec<Node>,
}

impl Automaton {
    /// The automaton of these strings, none of which may be empty.
    pub(crate) fn new(strings: &[impl AsRef<[u8]>]) -> Self {
        let string = |position: u32| strings[position as usize].as_ref();
        let mut sorted: Vec<u32> = (0..strings.len() as u32).collect();
        sorted.sort_by_key(|&position| string(position));
        let mut automaton = Self {
            nodes: vec![Node::new(0, 0, 0)],
        };
        // Nodes to complete, with the sorted strings that begin with their suffix. Those of
        // shorter suffixes, fallbacks among them, come first.
        let mut queue: VecDeque<(u32, Range<usize>)> = VecDeque::from([(0, 0..sorted.len())]);
        while let Some((node, range)) = queue.pop_front() {
            let Node {
                fallback, depth, ..
            } = automaton.nodes[node as usize];
            let ending =
                sorted[range.clone()].partition_point(|&at| string(at).len() == depth as usize);
            automaton.nodes[node as usize].matched = match ending {
                0 => automaton.nodes[fallback as usize].matched,
                _ => Some(Match {
                    index: sorted[range.start],
                    bytes: depth,
                }),
            };
            let first_child = automaton.nodes.len() as u32;
            let mut start = range.start + ending;
            while start < range.end {
                let byte = string(sorted[start])[depth as usize];
                let same = sorted[start..range.end]
                    .partition_point(|&at| string(at)[depth as usize] == byte);
                let child_fallback = match node {
                    0 => 0,
                    _ => automaton.step(fallback, byte),
                };
                queue.push_back((automaton.nodes.len() as u32, start..start + same));
                let child = Node::new(byte, child_fallback, depth + 1);
                automaton.nodes.push(child);
                start += same;
            }
            let children = automaton.nodes.len() as u32 - first_child;
            let completed = &mut automaton.nodes[node as usize];
            completed.first_child = first_child;
            completed.children = children as u16;
        }
        automaton
    }

    /// The state after one more byte. The start of a text is state 0. The work is constant when
    /// averaged over a text.
    pub(crate) fn step(&self, mut state: u32, byte: u8) -> u32 {
        loop {
            let node = &self.nodes[state as usize];
            let first = node.first_child as usize;
            let children = &self.nodes[first..first + node.children as usize];
            match children.binary_search_by_key(&byte, |child| child.byte) {
                Ok(place) => return node.first_child + place as u32,
                Err(_) if state == 0 => return 0,
                Err(_) => state = node.fallback,
            }
        }
    }

    /// How many bytes at the end of the text could become a string of the list.
    pub(crate) fn depth(&self, state: u32) -> usize {
        self.nodes[state as usize].depth as usize
    }

    /// The longest string that ends here.
    pub(crate) fn matched(&self, state: u32) -> Option<Match> {
        self.nodes[state as usize].matched
    }

    /// Length of the longest string: the state does not depend on bytes further back.
    pub(crate) fn longest(&self) -> usize {
        self.nodes.last().map_or(0, |node| node.depth as usize)
    }
}

impl Node {
    fn new(byte: u8, fallback: u32, depth: u32) -> Self {
        Self {
            byte,
            children: 0,
            first_child: 0,
            fallback,
            depth,
            matched: None,
        }
    }
}
