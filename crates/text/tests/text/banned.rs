//! Banned strings against a naive search.

use oxllama_text::{BannedMatcher, TextError};
use proptest::prelude::*;

/// Lower case, character by character, with one small sigma.
fn lower(text: &str) -> String {
    text.chars()
        .flat_map(char::to_lowercase)
        .map(|small| if small == 'ς' { 'σ' } else { small })
        .collect()
}

/// For each byte of the lowered text the offset of the character that it comes from.
fn origins(text: &str) -> Vec<usize> {
    text.char_indices()
        .flat_map(|(offset, character)| vec![offset; lower(&character.to_string()).len()])
        .collect()
}

/// Where the banned string begins that ends first, the longest of those.
fn naive(text: &str, banned: &[String]) -> Option<usize> {
    let lowered = lower(text);
    (1..=lowered.len())
        .filter(|&end| lowered.is_char_boundary(end))
        .find_map(|end| {
            let ending = banned.iter().map(|string| lower(string));
            ending
                .filter(|string| lowered[..end].ends_with(string))
                .map(|string| origins(text)[end - string.len()])
                .min()
        })
}

/// Where the longest suffix begins that could become a banned string.
fn naive_releasable(text: &str, banned: &[String]) -> usize {
    let lowered = lower(text);
    (0..lowered.len())
        .filter(|&start| lowered.is_char_boundary(start))
        .find(|&start| {
            banned
                .iter()
                .any(|string| lower(string).starts_with(&lowered[start..]))
        })
        .map_or(text.len(), |start| origins(text)[start])
}

fn check(matcher: &BannedMatcher, found: Option<usize>, text: &str, banned: &[String]) {
    assert_eq!(found, naive(text, banned), "in {text:?} of {banned:?}");
    let releasable = found.unwrap_or_else(|| naive_releasable(text, banned));
    assert_eq!(matcher.releasable(), releasable, "{text:?} of {banned:?}");
}

/// Text of `least` to `most` letters, chosen for what happens to them in lower case.
fn letters(least: usize, most: usize) -> impl Strategy<Value = String> {
    prop::string::string_regex(&format!(
        "[aAbBsSßẞσΣςiIİ\u{307}ı\u{212a}Kké]{{{least},{most}}}"
    ))
    .expect("a valid expression")
}

proptest! {
    #[test]
    fn finds_what_a_naive_search_finds(
        pieces in prop::collection::vec(letters(0, 4), 0..12),
        banned in prop::collection::vec(letters(1, 4), 0..6),
    ) {
        let mut matcher = BannedMatcher::new(&banned).expect("valid");
        let mut text = String::new();
        for piece in &pieces {
            text.push_str(piece);
            let found = matcher.push(piece);
            check(&matcher, found, &text, &banned);
        }
    }

    #[test]
    fn truncated_text_is_as_if_it_had_never_been(
        pieces in prop::collection::vec((letters(0, 6), 0usize..20), 1..12),
        banned in prop::collection::vec(letters(2, 6), 0..4),
    ) {
        let mut matcher = BannedMatcher::new(&banned).expect("valid");
        let mut text = String::new();
        for (piece, cut) in &pieces {
            text.push_str(piece);
            matcher.push(piece);
            let mut len_bytes = text.len().saturating_sub(*cut);
            matcher.truncate(len_bytes);
            while !text.is_char_boundary(len_bytes) {
                len_bytes -= 1;
            }
            text.truncate(len_bytes);
            let found = matcher.push("");
            check(&matcher, found, &text, &banned);
        }
    }
}

fn matcher(banned: &[&str]) -> BannedMatcher {
    BannedMatcher::new(banned).expect("valid")
}

#[test]
fn case_does_not_matter_and_offsets_are_those_of_the_text() {
    // Capital dotted I is one byte longer in lower case, the Kelvin sign two bytes shorter.
    assert_eq!(matcher(&["stop"]).push("İİ\u{212a} sToP"), Some(8));
    assert_eq!(matcher(&["İk"]).push("xi\u{307}\u{212a}"), Some(1));
    assert_eq!(matcher(&["\u{307}k"]).push("xİk"), Some(1));
    assert_eq!(matcher(&["straße"]).push("Die STRAẞE"), Some(4));
    assert_eq!(matcher(&["strasse"]).push("Straße"), None);
    // By its place in the word the last one is another letter.
    assert_eq!(matcher(&["ΟΔΟΣ"]).push("η οδος"), Some(3));
    assert_eq!(matcher(&["οδος"]).push("Η ΟΔΟΣ"), Some(3));
}

#[test]
fn text_is_held_back_while_it_could_become_a_banned_string() {
    let mut matcher = matcher(&["As an AI", "language model"]);
    assert_eq!(matcher.push("Well, "), None);
    assert_eq!(matcher.releasable(), 6);
    assert_eq!(matcher.push("as AN"), None);
    assert_eq!(matcher.releasable(), 6);
    assert_eq!(matcher.push(" a"), None);
    assert_eq!(matcher.releasable(), 6);
    assert_eq!(matcher.push("ir"), Some(6));
    // Found until it is cut off, whatever comes.
    assert_eq!(matcher.push(" language model"), Some(6));
    matcher.truncate(14);
    assert_eq!(matcher.push(""), Some(6));
    matcher.truncate(6);
    assert_eq!(matcher.releasable(), 6);
    assert_eq!(matcher.push("I am a Language"), None);
    assert_eq!(matcher.releasable(), 13);
    assert_eq!(matcher.push(" MODEL"), Some(13));
}

#[test]
fn nothing_banned_holds_nothing_back() {
    let mut matcher = matcher(&[]);
    assert_eq!(matcher.push("anything"), None);
    assert_eq!(matcher.releasable(), 8);
    matcher.truncate(3);
    assert_eq!(matcher.releasable(), 3);
}

#[test]
fn lists_that_make_no_sense_are_refused() {
    let list = "banned";
    let refused = |banned: &[String]| BannedMatcher::new(banned).err();
    assert_eq!(
        refused(&[String::new()]),
        Some(TextError::EmptyString { list, index: 0 })
    );
    assert_eq!(
        refused(&vec!["a".to_owned(); 1_025]),
        Some(TextError::TooManyStrings {
            list,
            found: 1_025,
            limit: 1_024
        })
    );
    assert_eq!(
        refused(&["é".repeat(2_049)]),
        Some(TextError::StringTooLong {
            list,
            index: 0,
            bytes: 4_098,
            limit: 4_096
        })
    );
}
