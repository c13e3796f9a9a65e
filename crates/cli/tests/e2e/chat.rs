//! `oxllama chat` through a pipe: every line of input is a message or a command.

use crate::common::{Output, Oxllama};
use crate::support::{edit_json, tiny, tiny_directory};

/// A conversation on the tiny Llama, greedy and short.
fn chat(input: &str, arguments: &[&str]) -> Output {
    Oxllama::new()
        .arg("chat")
        .arg(tiny("llama"))
        .args(["--greedy", "-n", "6"])
        .args(arguments)
        .stdin(input)
        .run()
}

#[test]
fn messages_are_answered_until_the_input_ends() {
    let output = chat("hello\nagain\n", &[]).succeeded();
    assert_eq!(output.stdout.lines().count(), 2, "{output:?}");
    let answers: Vec<&str> = output.stdout.lines().collect();
    assert!(
        answers.iter().all(|answer| !answer.is_empty()),
        "{output:?}"
    );
    assert!(output.stderr.contains("/help lists the commands"));
    assert_eq!(output.stderr.matches("prompt tokens in").count(), 2);
    // The second message comes with the first and its answer before it.
    let alone = chat("again\n", &[]).succeeded();
    assert_eq!(alone.stdout.lines().count(), 1);
    assert!(prompt_tokens(&output)[1] > prompt_tokens(&alone)[0]);
}

/// The lengths of the prompts, from the line of figures after each answer.
fn prompt_tokens(output: &Output) -> Vec<usize> {
    let lengths = output.stderr.split('[').skip(1);
    let numbers = lengths.filter_map(|rest| rest.split_once(" prompt tokens")?.0.parse().ok());
    numbers.collect()
}

#[test]
fn reset_forgets_the_conversation() {
    let output = chat("hello\n/reset\nhello\n", &[]).succeeded();
    let answers: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[0], answers[1]);
    let lengths = prompt_tokens(&output);
    assert_eq!(lengths[0], lengths[1]);
}

#[test]
fn undo_takes_back_one_exchange() {
    let output = chat("hello\nmore\n/undo\nmore\n", &[]).succeeded();
    let answers: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[1], answers[2]);
}

#[test]
fn retry_answers_the_same_message() {
    let output = chat("/retry\nhello\n/retry\n", &[]).succeeded();
    assert!(output.stderr.contains("no message to answer"), "{output:?}");
    let lengths = prompt_tokens(&output);
    assert_eq!(lengths.len(), 2);
    assert_eq!(lengths[0], lengths[1]);
}

#[test]
fn a_system_message_stands_before_the_conversation() {
    let output = chat("/system\n/system be kind\n/system\nhello\n", &[]).succeeded();
    assert!(output.stderr.contains("(none)"), "{output:?}");
    assert!(output.stderr.contains("be kind"), "{output:?}");
    let from_option = chat("hello\n", &["--system", "be kind"]).succeeded();
    assert_eq!(output.stdout, from_option.stdout);
    assert_eq!(prompt_tokens(&output), prompt_tokens(&from_option));
}

#[test]
fn commands_are_not_messages() {
    let output = chat(
        "/nonsense now\n/help\n/stats off\nhello\n/exit\nnever\n",
        &[],
    )
    .succeeded();
    let expected = [
        "/nonsense now is not a command",
        "Control-C stops an answer",
    ];
    for text in expected {
        assert!(output.stderr.contains(text), "{output:?}");
    }
    assert_eq!(output.stdout.lines().count(), 1, "{output:?}");
    assert!(prompt_tokens(&output).is_empty());
}

#[test]
fn a_backslash_continues_a_message_on_the_next_line() {
    let output = chat("one\\\ntwo\n", &[]).succeeded();
    assert_eq!(prompt_tokens(&output).len(), 1);
    // Also when the input ends there.
    let cut_short = chat("one\\", &[]).succeeded();
    assert_eq!(prompt_tokens(&cut_short).len(), 1, "{cut_short:?}");
}

#[test]
fn empty_input_is_no_message() {
    let output = chat("\n   \n", &[]).succeeded();
    assert_eq!(output.stdout, "");
    assert_eq!(chat("", &[]).succeeded().stdout, "");
}

#[test]
fn a_message_too_long_for_the_context_is_refused_and_the_chat_goes_on() {
    let long = "hello world ".repeat(60);
    let output = chat(&format!("{long}\nhi\n"), &["--context", "64"]).succeeded();
    assert!(output.stderr.contains("the prompt has"), "{output:?}");
    assert_eq!(prompt_tokens(&output).len(), 1);
}

#[test]
fn a_conversation_that_outgrows_the_context_loses_its_oldest_messages() {
    let input = "hello world, hello world\n".repeat(6);
    let output = chat(&input, &["--context", "96"]).succeeded();
    assert_eq!(prompt_tokens(&output).len(), 6, "{output:?}");
    assert!(
        output.stderr.contains("oldest messages dropped"),
        "{output:?}"
    );
    assert!(prompt_tokens(&output).iter().all(|&length| length < 96));
}

#[test]
fn a_template_that_raises_is_reported_and_the_chat_goes_on() {
    let (_folder, directory) = tiny_directory("llama");
    edit_json(&directory.join("tokenizer_config.json"), |config| {
        config["chat_template"] = "{% if messages[0].content == 'bad' %}\
             {{ raise_exception('not that word') }}{% endif %}{{ messages[0].content }}"
            .into();
    });
    let output = Oxllama::new()
        .arg("chat")
        .arg(&directory)
        .args(["--greedy", "-n", "4"])
        .stdin("bad\ngood\n")
        .run()
        .succeeded();
    assert!(output.stderr.contains("not that word"), "{output:?}");
    assert_eq!(prompt_tokens(&output).len(), 1);
}

#[test]
fn input_that_is_not_utf8_is_refused() {
    Oxllama::new()
        .arg("chat")
        .arg(tiny("llama"))
        .stdin_bytes(b"a\xff\xfe\nhi\n")
        .run()
        .failed_with(&["cannot read the next message", "UTF-8"]);
}
