//! Regular expressions, choices and Lark grammars.

use oxllama_engine::{ConstraintSpec, TokenMask};
use regex::Regex;

use crate::Model;
use crate::writer::{allowed, write};

const REGEXES: [&str; 50] = [
    "yes|no",
    "[a-z]+",
    "[a-z]{3}",
    "[A-Z][a-z]*( [A-Z][a-z]*)*",
    "[0-9]{1,3}(,[0-9]{3})*",
    "-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?",
    "\\d{4}-\\d{2}-\\d{2}",
    "(19|20)\\d\\d",
    "(0[0-9]|1[0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?",
    "#[0-9a-fA-F]{6}",
    "[\\w.]{1,8}@[\\w.]{1,8}\\.(com|org|net)",
    "https?://[a-z]+(\\.[a-z]+)+(/[a-z0-9]*)*",
    "([01]?[0-9]{1,2}\\.){3}[01]?[0-9]{1,2}",
    "(a|b)*abb",
    "(ab|ba){2,5}",
    "a?b?c?d",
    "x{0,4}y",
    "(foo|foobar|foobarbaz)!",
    "[^\\n]{1,20}\\n",
    "[^a-z]{2,6}",
    ".{0,12}",
    "(?i)hello world",
    "(?s).{3}",
    "\\s{1,3}\\S",
    "[éèê]+",
    "[α-ω]{2,4}",
    "日本語?",
    "🦀{1,3}",
    "\\p{Lu}\\p{Ll}+",
    "\\w+\\W",
    "[[:alpha:]]{4}",
    "[a-f&&[^c]]{3}",
    "\\(\\d+\\)",
    "\\[x\\]\\{y\\}",
    "a/b\\\\c",
    "\"[^\"]*\"",
    "'(\\\\.|[^'\\\\])*'",
    "<b>[a-z ]*</b>",
    "(\\d+, )*\\d+",
    "([a-z]+=[a-z]+)(&[a-z]+=[a-z]+)*",
    "v\\d+\\.\\d+\\.\\d+(-(alpha|beta))?",
    "[A-Z]{2}\\d{2}( \\d{4}){4}",
    "(M{0,3})(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{1,3})",
    "(one|two|three)( and (one|two|three))?",
    "\\x41\\u{42}\\t",
    "([0-9a-f]{2}:){5}[0-9a-f]{2}",
    "(\\+49|0)[1-9][0-9]{4,8}",
    "((a|b)(c|d)){2}|e",
    "[+*/-]?[0-9]([+*/-][0-9])*",
    "Answer: (A|B|C|D)\\.",
];

fn check_regexes(model: &Model) {
    for (seed, pattern) in (0..).zip(REGEXES) {
        let text = write(model, &ConstraintSpec::Regex(pattern.to_owned()), seed);
        let regex = Regex::new(&format!("^(?:{pattern})$")).unwrap();
        assert!(regex.is_match(&text), "{pattern} wrote {text:?}");
    }
}

#[test]
fn texts_of_50_regexes_match() {
    check_regexes(&Model::byte_level());
    check_regexes(&Model::tiny("sentencepiece", &[2]));
}

#[test]
fn texts_of_a_real_vocabulary_match() {
    if let Some(model) = Model::smollm2() {
        check_regexes(&model);
    }
}

#[test]
fn choices_are_written_as_they_are() {
    let model = Model::byte_level();
    let choices = [
        "yes",
        "yes and no",
        " no ",
        "",
        "quoted \"text\" \\ / ' \u{8}\u{7f}",
        "lines\r\n\tand <tags> {braces} [x] /slashes/ #hash //",
        "日本語 🦀",
        "<|im_end|>",
    ]
    .map(str::to_owned)
    .to_vec();
    for choice in &choices {
        let alone = ConstraintSpec::Choice(vec![choice.clone()]);
        assert_eq!(&write(&model, &alone, 0), choice);
    }
    let all = ConstraintSpec::Choice(choices.clone());
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let text = write(&model, &all, seed);
        assert!(choices.contains(&text), "{text:?}");
        seen.insert(text);
    }
    assert!(seen.len() > 4, "only {seen:?}");
}

#[test]
fn many_choices() {
    let model = Model::byte_level();
    let choices: Vec<String> = (0..2_000)
        .map(|number: u64| format!("{:x} the {number}", number.wrapping_mul(0x9e37_79b9)))
        .collect();
    let spec = ConstraintSpec::Choice(choices.clone());
    for seed in 0..5 {
        let text = write(&model, &spec, seed);
        assert!(choices.contains(&text), "{text:?}");
    }
}

#[test]
fn a_choice_that_begins_another_may_end_or_go_on() {
    let model = Model::byte_level();
    let spec = ConstraintSpec::Choice(vec!["on".to_owned(), "once".to_owned()]);
    let mut constraint = model.compiler.compile(&spec).unwrap();
    assert!(!constraint.may_end() && !constraint.is_complete());
    for text in ["o", "n"] {
        constraint
            .accept(model.tokenizer.token_id(text).unwrap())
            .unwrap();
    }
    assert!(constraint.may_end() && !constraint.is_complete());
    let mut mask = TokenMask::none(model.vocab_size);
    constraint.mask(&mut mask).unwrap();
    let texts: Vec<Option<String>> = allowed(&mask)
        .into_iter()
        .map(|id| model.tokenizer.token_text(id))
        .collect();
    let expected = ["<|im_end|>", "c", "ce", "<|end of é|>"];
    assert_eq!(texts, expected.map(|text| Some(text.to_owned())));
    constraint
        .accept(model.tokenizer.token_id("ce").unwrap())
        .unwrap();
    assert!(constraint.may_end() && constraint.is_complete());
    constraint.mask(&mut mask).unwrap();
    assert_eq!(allowed(&mask), model.tokenizer.eos_ids());
}

#[test]
fn lark_grammars_are_obeyed() {
    let arithmetic = r#"
start: expression
expression: term (("+" | "-") term)*
term: factor (("*" | "/") factor)*
factor: NUMBER | "(" expression ")"
NUMBER: /[0-9]{1,3}/
%ignore / /
"#;
    let model = Model::byte_level();
    let spec = ConstraintSpec::Lark(arithmetic.to_owned());
    let inner = Regex::new(r"\([0-9]+([+*/-][0-9]+)*\)").unwrap();
    let flat = Regex::new(r"^[0-9]+([+*/-][0-9]+)*$").unwrap();
    for seed in 0..30 {
        let text = write(&model, &spec, seed);
        let mut rest = text.replace(' ', "");
        // The grammar read backwards: what is inside brackets is a number, then the rest is.
        while inner.is_match(&rest) {
            rest = inner.replace_all(&rest, "1").into_owned();
        }
        assert!(flat.is_match(&rest), "{text}");
    }
    let spec = ConstraintSpec::Lark("start: \"a\" start \"b\" | \"c\"".to_owned());
    for seed in 0..10 {
        let text = write(&model, &spec, seed);
        let (before, after) = text.split_once('c').unwrap();
        assert!(before.bytes().all(|byte| byte == b'a') && after == "b".repeat(before.len()));
    }
}

#[test]
fn a_grammar_may_name_special_tokens_but_not_stop_tokens() {
    let model = Model::tiny("byte_level", &[1]);
    let lark = |grammar: &str| {
        model
            .compiler
            .compile(&ConstraintSpec::Lark(grammar.to_owned()))
    };
    let mut constraint = lark("start: \"a\" <|bos|> \"b\"").unwrap();
    for text in ["a", "<|bos|>", "b"] {
        constraint
            .accept(model.tokenizer.token_id(text).unwrap())
            .unwrap();
    }
    assert!(constraint.is_complete());
    assert!(lark("start: \"a\" <|im_end|> \"b\"").is_err());
}

#[test]
fn forced_text_is_spelled_as_the_tokenizer_spells_it() {
    for (name, text) in [
        ("byte_level", "hello"),
        ("byte_level", " upon the mat"),
        ("sentencepiece", "hello"),
        ("sentencepiece", " hello"),
        ("sentencepiece", "\n hello"),
    ] {
        let model = Model::tiny(name, &[2]);
        let spec = ConstraintSpec::Choice(vec![text.to_owned()]);
        let mut constraint = model.compiler.compile(&spec).unwrap();
        let mut mask = TokenMask::none(model.vocab_size);
        let mut ids = Vec::new();
        while !constraint.is_complete() {
            constraint.mask(&mut mask).unwrap();
            let allowed = allowed(&mask);
            assert_eq!(allowed.len(), 1, "{name} {text:?} after {ids:?}");
            constraint.accept(allowed[0]).unwrap();
            ids.push(allowed[0]);
        }
        assert_eq!(ids, model.tokenizer.encode_continuation(text).unwrap());
    }
}
