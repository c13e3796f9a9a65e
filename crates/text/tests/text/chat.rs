//! Chat templates against jinja2, and bounded.

use oxllama_text::{ChatOptions, ChatTemplate, Message, MessageContent, TextError};
use serde_json::{Value, json};

use crate::{fixture, json_fixture, shared, text};

/// What jinja2 renders (fixtures/make_fixtures.py).
#[test]
fn agrees_with_jinja2() {
    let cases = json_fixture("template_cases.json");
    let mut compared = 0;
    for case in cases.as_array().expect("a list of cases") {
        let file = text(&case["template"]);
        let label = format!(
            "{file}, {}, tools: {}",
            case["name"],
            !case["tools"].is_null()
        );
        let source = String::from_utf8(fixture(&format!("templates/{file}"))).expect("UTF-8");
        let template = ChatTemplate::from_source(&source).expect("valid");
        let messages: Vec<Message> =
            serde_json::from_value(case["messages"].clone()).expect("messages");
        let options = ChatOptions {
            add_generation_prompt: case["add_generation_prompt"] == true,
            bos_token: Some("<s>"),
            eos_token: Some("</s>"),
            tools: Some(case["tools"].clone()).filter(|tools| !tools.is_null()),
            unix_time_s: Some(1_721_952_000),
            ..ChatOptions::default()
        };
        let rendered = template.render(&messages, &options);
        if let Some(expected) = case["expected"].as_str() {
            assert_eq!(rendered.as_deref(), Ok(expected), "{label}");
        } else if let Some(message) = case["raises"].as_str() {
            let message = message.to_owned();
            assert_eq!(
                rendered,
                Err(TextError::ChatTemplateRaised { message }),
                "{label}"
            );
        } else {
            assert!(
                matches!(rendered, Err(TextError::ChatTemplateFailed { .. })),
                "{label}"
            );
        }
        compared += 1;
    }
    assert_eq!(compared, 84);
}

fn one() -> Vec<Message> {
    vec![Message::new("user", "hi")]
}

fn render(source: &str) -> Result<String, TextError> {
    ChatTemplate::from_source(source)?.render(&one(), &ChatOptions::default())
}

#[test]
fn smollm2_template() {
    let Some(config) = shared("models/smollm2-135m-exl2-4.0bpw/tokenizer_config.json") else {
        return;
    };
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    let template = ChatTemplate::from_config(&config).expect("valid");
    let options = ChatOptions {
        add_generation_prompt: true,
        ..ChatOptions::default()
    };
    assert_eq!(
        template.render(&one(), &options).as_deref(),
        Ok(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging \
            Face<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
    );
    let messages = [
        Message::new("system", "Be brief."),
        Message::new("user", "hi"),
    ];
    assert_eq!(
        template
            .render(&messages, &ChatOptions::default())
            .as_deref(),
        Ok("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")
    );
}

#[test]
fn named_templates() {
    let config = json!({"bos_token": {"content": "<s>"}, "chat_template": [
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
        {"name": "default", "template": "{{ bos_token }}plain{{ eos_token }}"},
    ]});
    let template = ChatTemplate::from_config(&config).expect("valid");
    let plain = ChatOptions::default();
    assert_eq!(template.render(&one(), &plain).as_deref(), Ok("<s>plain"));
    let given = ChatOptions {
        bos_token: Some("[B]"),
        ..ChatOptions::default()
    };
    assert_eq!(template.render(&one(), &given).as_deref(), Ok("[B]plain"));
    let tools = ChatOptions {
        tools: Some(json!([{}, {}])),
        ..ChatOptions::default()
    };
    assert_eq!(template.render(&one(), &tools).as_deref(), Ok("tools 2"));
}

#[test]
fn extra_variables_and_fields() {
    let template = ChatTemplate::from_source(
        "{% if not enable_thinking %}off {% endif %}{{ messages[0].name }}{{ messages[0].content }}",
    )
    .expect("valid");
    let mut message = Message::new("user", "");
    message.content = MessageContent::None;
    message.extra.insert("name".to_owned(), "Ada ".into());
    let mut options = ChatOptions::default();
    options
        .extra
        .insert("enable_thinking".to_owned(), false.into());
    assert_eq!(
        template.render(&[message], &options).as_deref(),
        Ok("off Ada None")
    );
}

#[test]
fn missing_and_malformed_templates() {
    let refused = |config: Value| ChatTemplate::from_config(&config).err();
    assert_eq!(refused(json!({})), Some(TextError::NoChatTemplate));
    assert_eq!(
        refused(json!({"chat_template": null})),
        Some(TextError::NoChatTemplate)
    );
    for shape in [
        json!(3),
        json!({"a": 1}),
        json!([]),
        json!([{"name": "rag", "template": ""}]),
    ] {
        let refused = refused(json!({"chat_template": shape}));
        assert!(
            matches!(refused, Some(TextError::ChatTemplateShape { .. })),
            "{refused:?}"
        );
    }
    for source in [
        "{% if %}",
        "{{ 'open",
        "{% for a in b %}",
        "{% endif %}",
        "{{ a | }}",
        "{%",
    ] {
        let refused = ChatTemplate::from_source(source).err();
        assert!(
            matches!(refused, Some(TextError::ChatTemplateSyntax { .. })),
            "{source}"
        );
    }
}

#[test]
fn raised_messages_reach_the_user() {
    let source = "{% macro m() %}{{ raise_exception('no ' + messages[0].role) }}{% endmacro %}\
                  {{ m() }}";
    assert_eq!(
        render(source),
        Err(TextError::ChatTemplateRaised {
            message: "no user".to_owned()
        })
    );
    for source in [
        "{{ a.b.c }}",
        "{{ nothing() }}",
        "{{ 1 / 0 }}",
        "{{ 1 | nothing }}",
    ] {
        let failed = render(source);
        assert!(
            matches!(failed, Err(TextError::ChatTemplateFailed { .. })),
            "{source} {failed:?}"
        );
    }
}

#[test]
fn endless_templates_end() {
    let endless = render(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}\
         {% endfor %}",
    );
    assert!(
        matches!(endless, Err(TextError::ChatTemplateEndless { .. })),
        "{endless:?}"
    );
    let recursive = render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
    assert!(
        matches!(
            recursive,
            Err(TextError::ChatTemplateFailed { .. } | TextError::ChatTemplateEndless { .. })
        ),
        "{recursive:?}"
    );
    let looping = render("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}");
    assert!(
        matches!(
            looping,
            Err(TextError::ChatTemplateFailed { .. } | TextError::ChatTemplateEndless { .. })
        ),
        "{looping:?}"
    );
}

#[test]
fn output_is_bounded() {
    let long = render("{% for a in range(9999) %}{{ 'x' * 1000 }}{% endfor %}");
    assert!(
        matches!(long, Err(TextError::ChatTemplateTooLong { .. })),
        "{long:?}"
    );
    // Long messages are no reason to refuse.
    let template = ChatTemplate::from_source("{{ messages[0].content }}").expect("valid");
    let content = "é".repeat(3 << 20);
    let rendered = template.render(&[Message::new("user", &*content)], &ChatOptions::default());
    assert!(rendered.is_ok_and(|text| text == content));
}

#[test]
fn deep_values_do_not_overflow_the_stack() {
    let deep = render(
        "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = [ns.x] %}\
         {% endfor %}done",
    );
    assert!(
        matches!(&deep, Ok(text) if text == "done")
            || matches!(deep, Err(TextError::ChatTemplateEndless { .. })),
        "{deep:?}"
    );
    let parentheses = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(matches!(
        render(&parentheses),
        Err(TextError::ChatTemplateSyntax { .. })
    ));
    let blocks = "{% if true %}".repeat(10_000);
    assert!(matches!(
        render(&blocks),
        Err(TextError::ChatTemplateSyntax { .. })
    ));
}

#[test]
fn oversized_templates_are_refused() {
    let long_text = "x".repeat(10_000);
    for source in [
        format!("{{# {long_text} #}}"),
        format!("{{{{ '{long_text}' }}}}"),
        format!("{{{{ \"\\\"{long_text}\" }}}}"),
        long_text.clone(),
    ] {
        assert!(render(&source).is_ok_and(|text| text.is_empty() || text.len() >= 10_000));
    }
    for source in [
        format!("{{{{ a{} }}}}", "~b".repeat(5_000)),
        format!("{{% if {}a %}}{{% endif %}}", "not ".repeat(5_000)),
        "x".repeat(100_000),
    ] {
        let refused = render(&source);
        assert!(
            matches!(&refused, Err(TextError::ChatTemplateSyntax { detail }) if detail.contains("at most")),
            "{refused:?}"
        );
    }
}

/// Whatever these give, they must not bring the process down.
#[test]
fn deep_expressions_do_not_overflow_the_stack() {
    for (before, link, after) in [
        ("{{ 1", "+1", " }}"),
        ("{{ a", ".b", " }}"),
        ("{{ a", "|e", " }}"),
        ("{{ a", "~b", " }}"),
        ("{{ a", "()", " }}"),
        ("{{ ", "not ", "a }}"),
        ("{{ ", "-", "1 }}"),
        ("{{ ", "[", "1 }}"),
        ("{% if a %}", "{% elif a %}", "{% endif %}"),
        ("{{ ", "1 if 1 else ", "1 }}"),
        ("{{ 1", "**1", " }}"),
    ] {
        let source = format!("{before}{}{after}", link.repeat(4_000 / link.len()));
        match render(&source) {
            Ok(text) => assert!(text.len() <= source.len(), "{link}"),
            Err(error) => assert!(!error.to_string().is_empty(), "{link}"),
        }
    }
}

#[test]
fn generation_marks_leave_the_text_alone() {
    assert_eq!(
        render("{% for m in messages %}\n  {%- generation -%}\n {{ m.role }} {% endgeneration %}\n!{% endfor %}")
            .as_deref(),
        Ok("user !")
    );
    // Not a mark: a variable of that name, and text that looks like one.
    assert_eq!(
        render("{% set generation = 2 %}{{ generation }}").as_deref(),
        Ok("2")
    );
}
