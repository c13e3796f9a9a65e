//! Encoding, special tokens and whole decoding.

use oxllama_text::{AddBos, EncodeOptions, TextError, Tokenizer};
use serde_json::{Value, json};

use crate::{TINY_TOKENIZERS, ids, json_fixture, shared, text, tiny, tiny_file};

const SPECIAL_WITHOUT_BOS: EncodeOptions = EncodeOptions {
    add_bos: AddBos::Never,
    parse_special: true,
};

/// Ids and texts that Hugging Face tokenizers gives (fixtures/make_fixtures.py).
#[test]
fn agrees_with_hugging_face() {
    let cases = json_fixture("tokenizer_cases.json");
    for name in TINY_TOKENIZERS {
        let tokenizer = tiny(name);
        for case in cases[name].as_array().expect("a list of cases") {
            let input = text(&case["text"]);
            let encoded = tokenizer
                .encode(input, SPECIAL_WITHOUT_BOS)
                .expect("encodes");
            assert_eq!(encoded, ids(&case["ids"]), "{name} {input:?}");
            assert_eq!(
                tokenizer.decode(&encoded, false),
                text(&case["decoded"]),
                "{name} {input:?}"
            );
            let added = ids(&case["ids_with_added"]);
            assert_eq!(
                tokenizer.decode(&added, true),
                text(&case["decoded_without_special"]),
                "{name} {input:?}"
            );
            // The post-processor's BOS, except where the text brings it along.
            let expected = if added.starts_with(&[encoded.first().copied().unwrap_or(u32::MAX)])
                && added != encoded
            {
                encoded
            } else {
                added
            };
            let prompt = tokenizer
                .encode(input, EncodeOptions::PROMPT)
                .expect("encodes");
            assert_eq!(prompt, expected, "{name} {input:?}");
        }
    }
}

#[test]
fn special_tokens_in_plain_text_stay_text() {
    for (name, special) in [
        ("byte_level", "<|im_end|>"),
        ("sentencepiece", "</s>"),
        ("unigram", "</s>"),
    ] {
        let tokenizer = tiny(name);
        let id = tokenizer.token_id(special).expect("in the vocabulary");
        assert!(tokenizer.is_special(id));
        let parsed = tokenizer
            .encode(special, SPECIAL_WITHOUT_BOS)
            .expect("encodes");
        assert_eq!(parsed, [id], "{name}");
        for input in [
            special.to_owned(),
            format!("a{special} b{special}{special}"),
        ] {
            let plain = tokenizer
                .encode(&input, EncodeOptions::PLAIN)
                .expect("encodes");
            assert!(
                !plain.iter().any(|&id| tokenizer.is_special(id)),
                "{name} {plain:?}"
            );
            assert_eq!(tokenizer.decode(&plain, true), input, "{name}");
        }
    }
}

#[test]
fn bos_is_never_doubled() {
    let tokenizer = tiny("byte_level");
    let bos = tokenizer.token_id("<|bos|>").expect("in the vocabulary");
    let hello = tokenizer
        .encode("hello", EncodeOptions::CHAT)
        .expect("encodes");
    let expected = [&[bos], hello.as_slice()].concat();
    for input in ["hello", "<|bos|>hello"] {
        assert_eq!(
            tokenizer
                .encode(input, EncodeOptions::PROMPT)
                .expect("encodes"),
            expected
        );
    }
    // Typed as plain text it is no BOS, so the real one goes in front.
    let options = EncodeOptions {
        add_bos: AddBos::Auto,
        parse_special: false,
    };
    let plain = tokenizer.encode("<|bos|>hello", options).expect("encodes");
    assert_eq!(plain.iter().filter(|&&id| id == bos).count(), 1);
    assert_eq!(plain[0], bos);
    assert!(plain.len() > expected.len());
    assert_eq!(
        tokenizer
            .encode("", EncodeOptions::PROMPT)
            .expect("encodes"),
        [bos]
    );
}

#[test]
fn tokenizer_config_overrides_the_post_processor() {
    let encode = |tokenizer_config: Value, options| {
        let file = tiny_file("byte_level");
        let tokenizer = Tokenizer::new(&file, Some(&tokenizer_config), &Value::Null, None)?;
        tokenizer.encode("hello", options).map(|ids| {
            ids.iter()
                .filter_map(|&id| tokenizer.token_text(id))
                .collect::<Vec<_>>()
                .join(" ")
        })
    };
    let always = EncodeOptions {
        add_bos: AddBos::Always,
        parse_special: true,
    };
    let auto = EncodeOptions::PROMPT;
    let bos = || json!({"bos_token": "<|bos|>", "eos_token": {"content": "<|im_end|>"}});
    let with = |field: &str, value: bool| {
        let mut config = bos();
        config[field] = value.into();
        config
    };
    let hello = encode(bos(), EncodeOptions::CHAT).expect("encodes");
    assert_eq!(encode(bos(), auto), Ok(format!("<|bos|> {hello}")));
    assert_eq!(
        encode(with("add_bos_token", true), auto),
        Ok(format!("<|bos|> {hello}"))
    );
    assert_eq!(
        encode(with("add_bos_token", false), auto),
        Ok(hello.clone())
    );
    assert_eq!(
        encode(with("add_bos_token", false), always),
        Ok(format!("<|bos|> {hello}"))
    );
    assert_eq!(
        encode(with("add_eos_token", true), auto),
        Ok(format!("<|bos|> {hello} <|im_end|>"))
    );
    assert_eq!(
        encode(with("add_eos_token", true), always),
        Ok(format!("<|bos|> {hello}"))
    );
    assert_eq!(
        encode(json!({"bos_token": null}), always),
        Err(TextError::NoBosToken)
    );
}

#[test]
fn bos_and_eos_come_from_all_files() {
    let file = tiny_file("byte_level");
    let config = json!({"bos_token_id": 0, "eos_token_id": [7, 3, -1], "vocab_size": 1000});
    let generation_config = json!({"eos_token_id": 5});
    let tokenizer_config = json!({"eos_token": {"content": "<|im_end|>", "lstrip": false}});
    let tokenizer = Tokenizer::new(
        &file,
        Some(&tokenizer_config),
        &config,
        Some(&generation_config),
    )
    .expect("valid");
    assert_eq!(tokenizer.eos_ids(), [1, 3, 5, 7]);
    assert_eq!(tokenizer.bos_id(), Some(0));
    assert_eq!(tokenizer.bos_token().as_deref(), Some("<|bos|>"));
    // A tokenizer_config.json that says there is none has the last word, as in transformers.
    let tokenizer_config = json!({"bos_token": null});
    let tokenizer = Tokenizer::new(&file, Some(&tokenizer_config), &config, None).expect("valid");
    assert_eq!(tokenizer.bos_id(), None);
    assert_eq!(tokenizer.eos_ids(), [3, 7]);
    let nested = json!({"text_config": {"eos_token_id": 4, "vocab_size": 1000}});
    let tokenizer = Tokenizer::new(&file, None, &nested, None).expect("valid");
    assert_eq!(tokenizer.eos_ids(), [4]);
}

#[test]
fn tokens_of_tokenizer_config_are_added() {
    let file = tiny_file("byte_level");
    let vocab_size = tiny("byte_level").vocab_size();
    let tokenizer_config = json!({
        "added_tokens_decoder": {
            (vocab_size + 3).to_string(): {"content": "<|new|>", "special": true},
        },
        "additional_special_tokens": ["the"],
    });
    let tokenizer =
        Tokenizer::new(&file, Some(&tokenizer_config), &Value::Null, None).expect("valid");
    let id = tokenizer.token_id("<|new|>").expect("added");
    assert_eq!(id as usize, vocab_size + 3);
    assert_eq!(tokenizer.vocab_size(), vocab_size + 4);
    assert!(tokenizer.is_special(id));
    assert_eq!(
        tokenizer.encode("<|new|>", EncodeOptions::CHAT),
        Ok(vec![id])
    );
    assert_eq!(tokenizer.decode(&[id], true), "");
}

#[test]
fn token_bytes_are_what_the_token_stands_for() {
    let tokenizer = tiny("sentencepiece");
    let bytes = |token: &str| tokenizer.token_bytes(tokenizer.token_id(token).expect("known"));
    assert_eq!(bytes("<0xE6>"), Some(vec![0xe6]));
    assert_eq!(bytes("▁the"), Some(b" the".to_vec()));
    assert_eq!(bytes("</s>"), Some(b"</s>".to_vec()));
    assert_eq!(tokenizer.token_bytes(1 << 30), None);
    let tokenizer = tiny("byte_level");
    let bytes = |token: &str| tokenizer.token_bytes(tokenizer.token_id(token).expect("known"));
    assert_eq!(bytes("Ġ"), Some(b" ".to_vec()));
    assert_eq!(
        bytes("<|end of é|>"),
        Some("<|end of é|>".as_bytes().to_vec())
    );
    // Every byte has its token, and no two share one.
    let mut seen: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32)
        .filter_map(|id| tokenizer.token_bytes(id))
        .filter(|bytes| bytes.len() == 1)
        .collect();
    seen.sort();
    assert_eq!(seen, (0..=255).map(|byte| vec![byte]).collect::<Vec<_>>());
}

#[test]
fn smollm2_prompts_encode_as_the_reference() {
    let folder = "models/smollm2-135m-exl2-4.0bpw";
    let (Some(file), Some(tokenizer_config), Some(config), Some(golden)) = (
        shared(&format!("{folder}/tokenizer.json")),
        shared(&format!("{folder}/tokenizer_config.json")),
        shared(&format!("{folder}/config.json")),
        shared("golden/smollm2-135m.json"),
    ) else {
        return;
    };
    let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).expect("JSON");
    let tokenizer = Tokenizer::new(
        &file,
        Some(&parse(&tokenizer_config)),
        &parse(&config),
        None,
    )
    .expect("valid");
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_ids()),
        (Some(1), [2].as_slice())
    );
    let golden = parse(&golden);
    let runs = ["original", "exl2_4.0bpw"];
    let mut prompts = 0;
    for run in runs
        .iter()
        .flat_map(|run| golden[*run].as_array().expect("a list of runs"))
    {
        let prompt = text(&run["prompt"]);
        let encoded = tokenizer
            .encode(prompt, EncodeOptions::PROMPT)
            .expect("encodes");
        assert_eq!(encoded, ids(&run["prompt_ids"]), "{prompt:?}");
        assert_eq!(tokenizer.decode(&encoded, false), prompt);
        let greedy_text = text(&run["greedy_text"]);
        let decoded = tokenizer.decode(&ids(&run["greedy_ids"]), false);
        let decoded_plain = tokenizer.decode(&ids(&run["greedy_ids"]), true);
        assert!(
            [decoded, decoded_plain].contains(&greedy_text.to_owned()),
            "{prompt:?}"
        );
        prompts += 1;
    }
    assert_eq!(prompts, 12);
}
