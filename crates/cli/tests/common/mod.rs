//! Driving the real `oxllama` binary in a home of its own.

#![allow(dead_code, reason = "each test binary uses a part of this")]

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use tempfile::TempDir;

/// Variables that would let the machine's own settings into a test, by prefix.
const CLEARED: [&str; 7] = [
    "HF_",
    "HUGGING",
    "OXLLAMA_",
    "XDG_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
];

/// A command to be run; its home and caches are a temporary directory.
pub(crate) struct Oxllama {
    home: Arc<TempDir>,
    command: Command,
    stdin: Vec<u8>,
}

/// What a command answered.
#[derive(Debug)]
pub(crate) struct Output {
    /// The exit code; -1 after a signal.
    pub(crate) code: i32,
    /// Standard output as text.
    pub(crate) stdout: String,
    /// Standard error as text.
    pub(crate) stderr: String,
}

impl Oxllama {
    /// A command in a new home.
    pub(crate) fn new() -> Self {
        Self::in_home(Arc::new(TempDir::new().expect("a temporary directory")))
    }

    /// Another command in the same home, without this one's arguments and variables.
    pub(crate) fn again(&self) -> Self {
        Self::in_home(Arc::clone(&self.home))
    }

    fn in_home(home: Arc<TempDir>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oxllama"));
        for (name, _) in std::env::vars_os() {
            let upper = name.to_string_lossy().to_uppercase();
            if CLEARED.iter().any(|prefix| upper.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.env("HOME", home.path()).current_dir(home.path());
        Self {
            home,
            command,
            stdin: Vec::new(),
        }
    }

    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub(crate) fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, arguments: I) -> Self {
        self.command.args(arguments);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// What the command reads from its standard input; nothing by default.
    pub(crate) fn stdin(mut self, text: &str) -> Self {
        self.stdin = text.into();
        self
    }

    /// The same for bytes that are no text.
    pub(crate) fn stdin_bytes(mut self, bytes: &[u8]) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// A path in the home.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.home.path().join(relative)
    }

    /// Runs the command to its end.
    pub(crate) fn run(&mut self) -> Output {
        let child = self.spawn();
        Output::new(child.wait_with_output().expect("the binary ends"))
    }

    /// The same, with a reader of standard output that goes away after `bytes` bytes.
    pub(crate) fn run_reading(&mut self, bytes: usize) -> Output {
        let mut child = self.spawn();
        let mut read = vec![0; bytes];
        let mut pipe = child.stdout.take().expect("a pipe");
        pipe.read_exact(&mut read).expect("that much output");
        drop(pipe);
        let mut output = Output::new(child.wait_with_output().expect("the binary ends"));
        output.stdout = String::from_utf8_lossy(&read).into_owned();
        output
    }

    /// The same, with nobody to read standard error.
    pub(crate) fn run_without_stderr(&mut self) -> Output {
        let mut child = self.spawn();
        drop(child.stderr.take());
        Output::new(child.wait_with_output().expect("the binary ends"))
    }

    /// The same, with Control-C pressed as soon as something is written.
    #[cfg(unix)]
    pub(crate) fn run_interrupted(&mut self) -> Output {
        let mut child = self.spawn();
        let mut first = [0];
        let pipe = child.stdout.as_mut().expect("a pipe");
        pipe.read_exact(&mut first).expect("some output");
        let process = child.id().to_string();
        let kill = Command::new("kill").args(["-INT", &process]).status();
        assert!(kill.expect("kill is there").success());
        Output::new(child.wait_with_output().expect("the binary ends"))
    }

    fn spawn(&mut self) -> Child {
        self.command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.command.spawn().expect("the binary starts");
        let mut pipe = child.stdin.take().expect("a pipe");
        // A command that reads no input may end before it is written.
        let _ = pipe.write_all(&self.stdin);
        child
    }
}

impl Output {
    fn new(output: std::process::Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The command succeeded.
    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// The command failed with exit code 1 and said each of `texts`.
    #[track_caller]
    pub(crate) fn failed_with(self, texts: &[&str]) -> Self {
        assert_eq!(self.code, 1, "{self:?}");
        for text in texts {
            assert!(
                self.stderr.contains(text),
                "expected {text:?} in {}",
                self.stderr
            );
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }
}
