//! Readers that go away: `oxllama … | head -c 10` is no error.

use crate::common::Oxllama;
use crate::support::{shared, tiny};

fn oxllama(command: &[&str]) -> Oxllama {
    Oxllama::new().args(command).arg(tiny("llama"))
}

#[test]
fn a_reader_that_goes_away_ends_the_command_quietly() {
    let commands: [&[&str]; 6] = [
        &["generate", "--greedy", "-n", "400", "--prompt", "hello"],
        &["generate", "--greedy", "-n", "9", "--json", "--prompt", "a"],
        &["plan"],
        &["plan", "--json"],
        &["inspect"],
        &["inspect", "--json"],
    ];
    for command in commands {
        for bytes in [0, 10] {
            let output = oxllama(command).run_reading(bytes).succeeded();
            assert_eq!(output.stdout.len(), bytes, "{command:?}");
            // A command may be done before its reader goes away: then it said so.
            assert!(!output.stderr.contains("oxllama:"), "{output:?}");
            assert!(!output.stderr.contains("panicked"), "{output:?}");
        }
    }
}

#[test]
fn a_chat_ends_with_its_reader() {
    let output = oxllama(&["chat", "--greedy", "-n", "9"])
        .stdin("hello\nhello\nhello\n")
        .run_reading(0)
        .succeeded();
    assert!(!output.stderr.contains("oxllama:"), "{output:?}");
    assert!(!output.stderr.contains("panicked"), "{output:?}");
}

#[test]
fn notes_that_nobody_reads_are_dropped() {
    let arguments = ["generate", "--greedy", "-n", "9", "--prompt", "hello"];
    let expected = oxllama(&arguments).run().succeeded();
    let output = oxllama(&arguments).run_without_stderr().succeeded();
    assert_eq!(output.stdout, expected.stdout);
    // An error too: the exit code says it.
    let output = oxllama(&["generate", "--prompt", "hello", "--context", "1"]).run_without_stderr();
    assert_eq!(output.code, 1);
}

#[cfg(unix)]
#[test]
fn control_c_ends_an_answer_and_not_the_program() {
    let Some(model) = shared("models/smollm2-135m-exl2-4.0bpw") else {
        return;
    };
    // 97 tokens if nobody interrupts.
    let output = Oxllama::new()
        .arg("generate")
        .arg(model)
        .args(["--prompt", "Once upon a time,", "--greedy", "-n", "500"])
        .args(["--context", "1024"])
        .run_interrupted()
        .succeeded();
    assert!(output.stderr.contains("prompt tokens in"), "{output:?}");
}

#[test]
fn help_and_version_are_answered() {
    let help = Oxllama::new().arg("--help").run().succeeded().stdout;
    let commands = [
        "generate", "chat", "plan", "inspect", "import", "pull", "bench", "eval", "devices",
    ];
    for command in commands {
        assert!(help.contains(command), "{command}");
        let output = Oxllama::new().args([command, "--help"]).run().succeeded();
        assert!(output.stdout.contains("Usage: oxllama"), "{command}");
    }
    let version = Oxllama::new().arg("--version").run().succeeded().stdout;
    assert_eq!(version, format!("oxllama {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(Oxllama::new().run().code, 2);
}
