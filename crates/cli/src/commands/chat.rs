//! `oxllama chat`

use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{Context, Result};
use oxllama_engine::{Completion, Engine, FinishReason, Job};
use oxllama_text::Message;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::args::ChatArgs;
use crate::interrupt::{self, Interrupt};
use crate::jobs::{Prompts, Wishes, failure, follow, summary};
use crate::output;
use crate::serving::Serving;

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
    let wishes = Wishes::new(&args.sampling, &args.answer, args.max_tokens)?;
    let serving = Serving::start(&args.model, &args.engine, 1)?;
    let prompts = Prompts::new(
        serving.engine.tokenizer(),
        &serving.opened.source,
        true,
        None,
    )?;
    output::note(format_args!(
        "{}, context {} tokens, loaded in {:.2} s. /help lists the commands.",
        serving.plan.memory.model, serving.plan.memory.context_tokens, serving.load_s
    ));
    let mut chat = Chat {
        engine: &serving.engine,
        prompts,
        job: wishes.template(&serving)?,
        context_tokens: serving.plan.memory.context_tokens as usize,
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
    engine: &'a Engine,
    prompts: Prompts<'a>,
    /// Each answer's, but for its prompt.
    job: Job,
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
        self.job.seed = self.job.seed.wrapping_add(1);
        self.answer()
    }

    /// Answers the last message. A refused or failed answer is reported and taken back, so
    /// that the conversation can go on.
    fn answer(&mut self) -> Result<()> {
        match self.generate() {
            Ok(completion) => {
                self.messages
                    .push(Message::new("assistant", completion.text.as_str()));
                if self.shows_stats {
                    output::note(statistics(&completion));
                }
            }
            Err(error) if output::is_broken_pipe(&error) => return Err(error),
            Err(error) => self.report(&error),
        }
        Ok(())
    }

    fn report(&mut self, error: &anyhow::Error) {
        self.messages.pop();
        output::error(error);
    }

    fn generate(&mut self) -> Result<Completion> {
        let prompt_ids = self.prompt_ids()?;
        let job = Job {
            prompt_ids,
            ..self.job.clone()
        };
        self.interrupt.clear();
        let stream = self.engine.submit(job)?;
        // Dropping the stream cancels the answer.
        let completion = follow(stream, self.interrupt, output::text, |_stream| None)?;
        output::line("")?;
        failure(&completion)?;
        Ok(completion)
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
        let messages = system.into_iter().chain(self.messages.iter().cloned());
        self.prompts.messages(messages.collect())
    }
}

/// The line after an answer.
fn statistics(completion: &Completion) -> String {
    match completion.finish_reason {
        FinishReason::Cancelled => {
            format!("[stopped after {} tokens]", completion.token_ids.len())
        }
        _ => summary(completion),
    }
}
