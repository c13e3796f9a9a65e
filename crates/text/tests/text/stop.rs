//! Stop strings against a naive search.

use oxllama_text::{StopMatcher, TextError};
use proptest::prelude::*;

/// The stop string that ends first in the text, the longest of those that end there, and the text
/// before it.
fn naive(text: &str, stops: &[String]) -> (String, Option<usize>) {
    for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let ending = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| text[..end].ends_with(*stop));
        // The first of equals: max_by_key takes the last, so search backwards.
        if let Some((index, stop)) = ending.rev().max_by_key(|(_, stop)| stop.len()) {
            return (text[..end - stop.len()].to_owned(), Some(index));
        }
    }
    (text.to_owned(), None)
}

/// The longest suffix of the text that begins a stop string.
fn held_back(text: &str, stops: &[String]) -> usize {
    (0..=text.len())
        .filter(|&start| text.is_char_boundary(start))
        .find(|&start| stops.iter().any(|stop| stop.starts_with(&text[start..])))
        .map_or(0, |start| text.len() - start)
}

fn run(pieces: &[String], stops: &[String]) -> (String, Option<usize>) {
    let mut matcher = StopMatcher::new(stops).expect("no stop string is empty");
    let mut seen = String::new();
    let mut out = String::new();
    for piece in pieces {
        let step = matcher.push(piece);
        seen.push_str(piece);
        out.push_str(&step.text);
        if step.matched.is_some() {
            assert_eq!(
                matcher.push("after"),
                oxllama_text::StopStep {
                    text: String::new(),
                    matched: step.matched
                }
            );
            assert_eq!(matcher.finish(), "");
            return (out, step.matched);
        }
        assert_eq!(
            seen.len() - out.len(),
            held_back(&seen, stops),
            "held back of {seen:?}"
        );
    }
    out.push_str(&matcher.finish());
    (out, None)
}

proptest! {
    #[test]
    fn finds_what_a_naive_search_finds(
        pieces in prop::collection::vec("[abé🦀]{0,4}", 0..12),
        stops in prop::collection::vec("[abé🦀]{1,5}", 0..6),
    ) {
        prop_assert_eq!(run(&pieces, &stops), naive(&pieces.concat(), &stops));
    }

    #[test]
    fn finds_long_stop_strings(
        pieces in prop::collection::vec("[ab]{0,3}", 0..30),
        stops in prop::collection::vec("[ab]{4,12}", 1..4),
    ) {
        prop_assert_eq!(run(&pieces, &stops), naive(&pieces.concat(), &stops));
    }
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

#[test]
fn overlapping_stop_strings() {
    let run = |pieces: &[&str], stops: &[&str]| {
        let (text, matched) = run(&strings(pieces), &strings(stops));
        (text, matched.map(|index| stops[index].to_owned()))
    };
    // The inner one is complete first.
    assert_eq!(
        run(&["xab", "cd"], &["abcd", "bc"]),
        ("xa".into(), Some("bc".into()))
    );
    // Both end together: the longer counts, so that its start is not shown.
    assert_eq!(
        run(&["xab", "c"], &["bc", "abc"]),
        ("x".into(), Some("abc".into()))
    );
    assert_eq!(
        run(&["aa", "ab"], &["aab"]),
        ("a".into(), Some("aab".into()))
    );
    assert_eq!(
        run(&["\n", "\nUser", ":"], &["\nUser:"]),
        ("\n".into(), Some("\nUser:".into()))
    );
    assert_eq!(run(&["\nUse", "d"], &["\nUser:"]), ("\nUsed".into(), None));
    assert_eq!(run(&["é"], &["e", "🦀"]), ("é".into(), None));
}

#[test]
fn a_thousand_stop_strings() {
    let stops: Vec<String> = (0..1_024)
        .map(|number| format!("stop {number:05}!"))
        .collect();
    let mut matcher = StopMatcher::new(&stops).expect("valid");
    let step = matcher.push("stop 0099");
    assert_eq!((step.text.as_str(), step.matched), ("", None));
    let step = matcher.push("x stop 00998! more");
    assert_eq!(
        (step.text.as_str(), step.matched),
        ("stop 0099x ", Some(998))
    );
}

#[test]
fn lists_that_are_too_long_are_refused() {
    let many: Vec<String> = (0..10_000).map(|number| format!("stop {number}")).collect();
    let list = "stop";
    let refused = |stops: &[String]| StopMatcher::new(stops).err();
    assert_eq!(
        refused(&many),
        Some(TextError::TooManyStrings {
            list,
            found: 10_000,
            limit: 1_024
        })
    );
    assert_eq!(
        refused(&["a".to_owned(), "a".repeat(4_097)]),
        Some(TextError::StringTooLong {
            list,
            index: 1,
            bytes: 4_097,
            limit: 4_096
        })
    );
    let long: Vec<String> = (0..257).map(|_| "a".repeat(4_096)).collect();
    assert_eq!(
        refused(&long),
        Some(TextError::StringsTooLong {
            list,
            bytes: 257 * 4_096,
            limit: 1 << 20
        })
    );
    assert!(refused(&long[..256]).is_none());
}

#[test]
fn no_stop_strings_hold_nothing_back() {
    let mut matcher = StopMatcher::new::<&str>(&[]).expect("valid");
    assert_eq!(matcher.push("anything").text, "anything");
    assert_eq!(matcher.finish(), "");
}

#[test]
fn empty_stop_strings_are_refused() {
    let refused = StopMatcher::new(&["a", ""]).err();
    assert_eq!(
        refused,
        Some(TextError::EmptyString {
            list: "stop",
            index: 1
        })
    );
}
