//! A model that draws at random from what a constraint allows, and comes to an end.

use oxllama_engine::{Constraint, ConstraintSpec, TokenMask};

use crate::Model;

/// After this many bytes the model looks for the shortest way out.
const FREE_BYTES: usize = 100;
/// An answer that is not complete by then will not end.
const MOST_TOKENS: usize = 3_000;

/// A small random number generator (Steele, Lea and Flood's SplitMix64, OOPSLA 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub(crate) fn choose<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// The ids that a mask allows.
pub(crate) fn allowed(mask: &TokenMask) -> Vec<u32> {
    (0..mask.vocab_size() as u32)
        .filter(|&id| mask.is_allowed(id))
        .collect()
}

/// Tokens that lead towards the end of an answer, a closing quote first.
const CLOSING: [&str; 15] = [
    "\"", "}", "]", "\"}", "\"]", ":", ",", "0", "@", ".", "a", "e", "!", "z", "=",
];

/// Draws the next token.
fn draw(model: &Model, mask: &TokenMask, answer: &[u8], random: &mut Random) -> u32 {
    let written = answer.len();
    let (stops, mut text): (Vec<u32>, Vec<u32>) = allowed(mask)
        .into_iter()
        .partition(|id| model.tokenizer.eos_ids().contains(id));
    if !stops.is_empty() && (written > FREE_BYTES || random.once_in(4) || text.is_empty()) {
        return random.choose(&stops);
    }
    if answer.last().is_some_and(u8::is_ascii_digit) && text.len() > 2 {
        // A number with a large exponent is JSON, but more than a validator can hold.
        text.retain(|&id| !matches!(model.index.token_bytes(id)[0], b'e' | b'E'));
    }
    if written > FREE_BYTES && !random.once_in(4) || random.once_in(3) {
        let closing: Vec<u32> = model
            .ids_of(&CLOSING)
            .filter(|id| text.binary_search(id).is_ok())
            .collect();
        match closing.first() {
            Some(&quote) if model.index.token_bytes(quote) == b"\"" => return quote,
            Some(_) => return random.choose(&closing),
            None => {}
        }
    }
    let is_space = |&&id: &&u32| model.index.token_bytes(id).trim_ascii().is_empty();
    let visible: Vec<u32> = text.iter().filter(|id| !is_space(id)).copied().collect();
    if visible.is_empty() || random.once_in(20) {
        random.choose(&text)
    } else {
        random.choose(&visible)
    }
}

/// Writes an answer under a constraint, token by token, until a stop token or until nothing more
/// may follow. Returns its bytes.
pub(crate) fn write_bytes(model: &Model, mut constraint: Constraint, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut mask = TokenMask::all(model.vocab_size);
    let mut answer = Vec::new();
    for _ in 0..MOST_TOKENS {
        if constraint.is_complete() {
            assert!(constraint.may_end());
            return answer;
        }
        constraint.mask(&mut mask).unwrap();
        let eos_ids = model.tokenizer.eos_ids();
        assert!(
            eos_ids
                .iter()
                .all(|&id| mask.is_allowed(id) == constraint.may_end()),
            "stop tokens are allowed exactly where the answer may end"
        );
        let id = draw(model, &mask, &answer, &mut random);
        constraint.accept(id).unwrap();
        if eos_ids.contains(&id) {
            assert!(constraint.is_complete());
            return answer;
        }
        answer.extend_from_slice(model.index.token_bytes(id));
    }
    panic!("{:?} goes on and on", String::from_utf8_lossy(&answer));
}

/// Compiles a constraint and writes an answer under it.
pub(crate) fn write(model: &Model, spec: &ConstraintSpec, seed: u64) -> String {
    let constraint = model.compiler.compile(spec);
    let constraint = constraint.unwrap_or_else(|error| panic!("{error}\n{spec:?}"));
    String::from_utf8(write_bytes(model, constraint, seed)).unwrap()
}
