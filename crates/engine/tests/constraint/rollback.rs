//! Taking tokens back.

use std::sync::LazyLock;

use oxllama_engine::{Constraint, ConstraintError, ConstraintSpec, TokenMask};
use proptest::prelude::*;
use serde_json::json;

use crate::Model;
use crate::writer::{Random, allowed};

fn specs() -> Vec<ConstraintSpec> {
    vec![
        ConstraintSpec::Json,
        ConstraintSpec::JsonSchema(json!({
            "type": "object",
            "properties": {
                "name": { "type": "string", "maxLength": 6 },
                "ids": { "type": "array", "items": { "type": "integer", "minimum": 3 } },
                "colour": { "enum": ["red", "green"] }
            },
            "required": ["colour"], "additionalProperties": false
        })),
        ConstraintSpec::Regex("(hello|help)( [a-z]+){1,3}|[0-9]{2,}".to_owned()),
        ConstraintSpec::Lark("start: \"(\" start* \")\" | WORD\nWORD: /[a-z]{1,4}/".to_owned()),
        ConstraintSpec::Choice(vec![
            "on".to_owned(),
            "once upon".to_owned(),
            "日本".to_owned(),
        ]),
    ]
}

/// What can be seen of a constraint at one place.
#[derive(Debug, PartialEq)]
struct Seen {
    mask: TokenMask,
    may_end: bool,
    complete: bool,
}

fn look(constraint: &mut Constraint, vocab_size: usize) -> Seen {
    let mut mask = TokenMask::none(vocab_size);
    constraint.mask(&mut mask).unwrap();
    Seen {
        mask,
        may_end: constraint.may_end(),
        complete: constraint.is_complete(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Steps forth and back: after a rollback everything is as it was before.
    #[test]
    fn a_rollback_restores_what_was_allowed(
        spec in prop::sample::select(specs()),
        moves in prop::collection::vec((0usize..6, 0usize..6), 1..12),
        seed in any::<u64>(),
        looks in any::<bool>(),
    ) {
        static MODEL: LazyLock<Model> = LazyLock::new(Model::byte_level);
        let model = &*MODEL;
        let mut constraint = model.compiler.compile(&spec).unwrap();
        let mut random = Random(seed);
        let mut seen = vec![look(&mut constraint, model.vocab_size)];
        let mut ids = Vec::new();
        for (forth, back) in moves {
            for _ in 0..forth {
                let choices = allowed(&seen.last().unwrap().mask);
                if choices.is_empty() {
                    break;
                }
                let id = random.choose(&choices);
                constraint.accept(id).unwrap();
                ids.push(id);
                seen.push(look(&mut constraint, model.vocab_size));
            }
            let back = back.min(ids.len());
            constraint.rollback(back).unwrap();
            ids.truncate(ids.len() - back);
            seen.truncate(ids.len() + 1);
            if looks {
                prop_assert_eq!(
                    &look(&mut constraint, model.vocab_size),
                    seen.last().unwrap()
                );
            }
        }
        // The way there makes no difference.
        let mut direct = model.compiler.compile(&spec).unwrap();
        for &id in &ids {
            direct.accept(id).unwrap();
        }
        let here = look(&mut constraint, model.vocab_size);
        prop_assert_eq!(&look(&mut direct, model.vocab_size), &here);
        prop_assert_eq!(&look(&mut constraint.clone(), model.vocab_size), &here);
    }
}

#[test]
fn a_stop_token_is_taken_back_like_any_other() {
    let model = Model::byte_level();
    let spec = ConstraintSpec::Choice(vec!["hello".to_owned()]);
    let mut constraint = model.compiler.compile(&spec).unwrap();
    let hello = model.tokenizer.token_id("hello").unwrap();
    let [stop, other_stop] = *model.tokenizer.eos_ids() else {
        panic!("two stop tokens");
    };
    let not_allowed = |token_id| Err(ConstraintError::TokenNotAllowed { token_id });
    assert_eq!(constraint.accept(stop), not_allowed(stop));
    constraint.accept(hello).unwrap();
    assert_eq!(constraint.accept(hello), not_allowed(hello));
    for stop in [stop, other_stop] {
        constraint.accept(stop).unwrap();
        assert!(constraint.is_complete());
        assert_eq!(constraint.accept(stop), not_allowed(stop));
        constraint.rollback(1).unwrap();
        assert!(constraint.is_complete() && constraint.may_end());
    }
    constraint.accept(stop).unwrap();
    constraint.rollback(2).unwrap();
    assert!(!constraint.is_complete() && !constraint.may_end());
    constraint.accept(hello).unwrap();
    assert_eq!(
        constraint.rollback(2),
        Err(ConstraintError::RollbackTooFar {
            tokens: 2,
            accepted: 1
        })
    );
}

#[test]
fn a_refused_token_changes_nothing() {
    let model = Model::byte_level();
    let mut constraint = model.compiler.compile(&ConstraintSpec::Json).unwrap();
    let before = look(&mut constraint, model.vocab_size);
    for token_id in (0..model.vocab_size as u32 + 2).filter(|&id| !before.mask.is_allowed(id)) {
        assert_eq!(
            constraint.accept(token_id),
            Err(ConstraintError::TokenNotAllowed { token_id })
        );
    }
    assert_eq!(look(&mut constraint, model.vocab_size), before);
}

#[test]
fn a_dead_end_is_reported_and_can_be_left() {
    // This vocabulary has no digits.
    let model = Model::tiny("unigram", &[2]);
    let spec = ConstraintSpec::Regex("hello(a|1)[0-9]?b|cat".to_owned());
    let mut constraint = model.compiler.compile(&spec).unwrap();
    let id = |text: &str| model.tokenizer.token_id(text).unwrap();
    let mut mask = TokenMask::none(model.vocab_size);
    for text in ["he", "llo"] {
        constraint.accept(id(text)).unwrap();
    }
    constraint.mask(&mut mask).unwrap();
    assert_eq!(allowed(&mask), [id("a")]);

    let spec = ConstraintSpec::Regex("h(e1|ab)".to_owned());
    let mut constraint = model.compiler.compile(&spec).unwrap();
    constraint.accept(id("he")).unwrap();
    assert_eq!(
        constraint.mask(&mut mask),
        Err(ConstraintError::NoTokenAllowed { tokens: 1 })
    );
    assert!(!constraint.is_complete());
    constraint.rollback(1).unwrap();
    constraint.accept(id("h")).unwrap();
    constraint.accept(id("a")).unwrap();
    constraint.mask(&mut mask).unwrap();
    assert_eq!(allowed(&mask), [id("b")]);
}

#[test]
fn constraints_move_between_threads() {
    fn assert_send<T: Send>(_: &T) {}
    fn assert_sync<T: Sync>(_: &T) {}
    let model = Model::byte_level();
    assert_sync(&model.compiler);
    let mut constraint = model.compiler.compile(&ConstraintSpec::Json).unwrap();
    assert_send(&constraint);
    let vocab_size = model.vocab_size;
    let here = look(&mut constraint.clone(), vocab_size);
    let there = std::thread::spawn(move || look(&mut constraint, vocab_size));
    assert_eq!(there.join().unwrap(), here);
}
