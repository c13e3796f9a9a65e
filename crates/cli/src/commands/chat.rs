//! `oxllama chat`

use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{Context, Result};
use oxllama_engine::{Completion, EngineError, Event, Generator, Job, SamplingSettings};
use oxllama_text::{ChatOptions, ChatTemplate, EncodeOptions, Message, Tokenizer};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::args::ChatArgs;
use crate::commands::generate::summary;
use crate::interrupt::{self, Interrupt};
use crate::session::{Session, StepSize};
use crate::{output, sampling};

const HELP: &str = "\
/help            this list
/system [TEXT]   show or set the system message; setting it starts over
/reset           forget the conversation
/retry           answer the last message again
/undo            take back the last exchange
/stats on|off    show or hide times after each answer
/exit            leave (also Control-D)
Control-C stops an answer. End a line with \\ to go on writing on the next.";

pub(crate) fn run(args: ChatArgs) -> Result<ExitCode> {
    sampling::check(&args.sampling)?;
    let mut session = Session::start(&args.model, StepSize::ONE_JOB)?;
    let source = &session.opened.source;
    let template = ChatTemplate::from_config(
        source
            .tokenizer_config()
            .unwrap_or(&serde_json::Value::Null),
    )?;
    let sampling_settings = sampling::settings(&args.sampling, source.generation_config())?;
    output::note(format_args!(
        "{}, context {} tokens, loaded in {:.2} s. /help lists the commands.",
        session.plan.memory.model, session.plan.memory.context_tokens, session.load_s
    ));
    let mut chat = Chat {
        generator: Generator::new(session.runner.as_mut(), &session.tokenizer),
        tokenizer: &session.tokenizer,
        template,
        settings: sampling_settings,
        seed: sampling::seed(&args.sampling),
        stop_strings: args.sampling.stop,
        max_new_tokens: args.max_tokens,
        context_tokens: session.plan.memory.context_tokens as usize,
        system: args.system,
        messages: Vec::new(),
        shows_stats: true,
        interrupt: interrupt::flag()?,
    };
    let mut editor = DefaultEditor::new().context("cannot read from this terminal")?;
    while let Some(line) = read_message(&mut editor)? {
        if chat.handle(&line)?.is_break() {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One message, perhaps of several lines; `None` at the end of input.
fn read_message(editor: &mut DefaultEditor) -> Result<Option<String>> {
    let mut message = String::new();
    loop {
        let prompt = if message.is_empty() { "> " } else { ". " };
        match editor.readline(prompt) {
            Ok(line) => match line.strip_suffix('\\') {
                Some(line) => {
                    message.push_str(line);
                    message.push('\n');
                    continue;
                }
                None => message.push_str(&line),
            },
            Err(ReadlineError::Interrupted) => message.clear(),
            Err(ReadlineError::Eof) if message.trim().is_empty() => return Ok(None),
            // What was begun is a message still; the end of input is met again after it.
            Err(ReadlineError::Eof) => {}
            Err(error) => {
                return Err(error).context("cannot read the next message: expected UTF-8 text");
            }
        }
        if !message.trim().is_empty() {
            // History is a convenience: a terminal without it still chats.
            let _ = editor.add_history_entry(message.as_str());
            return Ok(Some(message));
        }
    }
}

struct Chat<'a> {
    generator: Generator<'a>,
    tokenizer: &'a Tokenizer,
    template: ChatTemplate,
    settings: SamplingSettings,
    seed: u64,
    stop_strings: Vec<String>,
    max_new_tokens: usize,
    context_tokens: usize,
    system: Option<String>,
    /// User and assistant in turns.
    messages: Vec<Message>,
    shows_stats: bool,
    interrupt: Interrupt,
}

impl Chat<'_> {
    fn handle(&mut self, line: &str) -> Result<ControlFlow<()>> {
        let Some(command) = line.trim().strip_prefix('/') else {
            self.messages.push(Message::new("user", line));
            self.answer()?;
            return Ok(ControlFlow::Continue(()));
        };
        let (name, argument) = command
            .split_once(char::is_whitespace)
            .unwrap_or((command, ""));
        match (name, argument.trim()) {
            ("exit" | "quit" | "bye", _) => return Ok(ControlFlow::Break(())),
            ("help" | "?", _) => output::note(HELP),
            ("reset" | "clear", _) => self.messages.clear(),
            ("system", "") => output::note(self.system.as_deref().unwrap_or("(none)")),
            ("system", text) => {
                self.system = Some(text.to_owned());
                self.messages.clear();
            }
            ("retry", _) => self.retry()?,
            ("undo", _) => {
                self.take_back_answer();
                self.messages.pop();
            }
            ("stats", choice @ ("on" | "off")) => self.shows_stats = choice == "on",
            _ => output::note(format_args!(
                "/{command} is not a command; /help lists them"
            )),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn take_back_answer(&mut self) {
        self.messages.pop_if(|message| message.role == "assistant");
    }

    fn retry(&mut self) -> Result<()> {
        self.take_back_answer();
        if self.messages.is_empty() {
            output::note("there is no message to answer yet");
            return Ok(());
        }
        // Another draw, or a retry would repeat itself.
        self.seed = self.seed.wrapping_add(1);
        self.answer()
    }

    /// Answers the last message. A refused or failed answer is reported and taken back, so
    /// that the conversation can go on.
    fn answer(&mut self) -> Result<()> {
        match self.generate() {
            Ok((completion, None)) => {
                self.messages
                    .push(Message::new("assistant", completion.text.as_str()));
                if self.shows_stats {
                    output::note(summary(&completion));
                }
            }
            Ok((_, Some(error))) => self.report(&error.into()),
            Err(error) if output::is_broken_pipe(&error) => return Err(error),
            Err(error) => self.report(&error),
        }
        Ok(())
    }

    fn report(&mut self, error: &anyhow::Error) {
        self.messages.pop();
        output::error(error);
    }

    fn generate(&mut self) -> Result<(Completion, Option<EngineError>)> {
        let prompt_ids = self.prompt_ids()?;
        let job = Job {
            prompt_ids,
            max_new_tokens: self.max_new_tokens,
            sampling: self.settings.clone(),
            seed: self.seed,
            stop_token_ids: self.tokenizer.eos_ids().to_vec(),
            stop_strings: self.stop_strings.clone(),
            logprobs: None,
        };
        self.interrupt.clear();
        let interrupt = self.interrupt;
        let mut write_error = None;
        let result = self.generator.run(&job, &mut |event| {
            if let Event::Text(text) = event
                && let Err(error) = output::text(text)
            {
                write_error = Some(error);
                return ControlFlow::Break(());
            }
            if interrupt.is_set() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        output::line("")?;
        match write_error {
            Some(error) => Err(error),
            None => Ok(result),
        }
    }

    /// The conversation as tokens. When it outgrows the context, the oldest exchanges are
    /// dropped, with a note.
    fn prompt_ids(&mut self) -> Result<Vec<u32>> {
        // Room for an answer worth the name.
        let budget = self.context_tokens - self.context_tokens / 4;
        let mut dropped = 0;
        loop {
            let prompt_ids = self.render()?;
            if prompt_ids.len() <= budget || self.messages.len() <= 2 {
                if dropped > 0 {
                    output::note(format_args!(
                        "[the conversation outgrew the context: {dropped} oldest messages dropped]"
                    ));
                }
                return Ok(prompt_ids);
            }
            dropped += 2;
            self.messages.drain(..2);
        }
    }

    fn render(&self) -> Result<Vec<u32>> {
        let system = self
            .system
            .as_ref()
            .map(|system| Message::new("system", system));
        let messages: Vec<Message> = system
            .into_iter()
            .chain(self.messages.iter().cloned())
            .collect();
        let options = ChatOptions {
            add_generation_prompt: true,
            ..ChatOptions::default()
        };
        let rendered = self.template.render(&messages, &options)?;
        Ok(self.tokenizer.encode(&rendered, EncodeOptions::CHAT)?)
    }
}
