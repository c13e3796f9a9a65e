//! An answer as it comes, read by async code. The engine needs no runtime: a few lines that poll
//! a future and sleep until they are woken are enough.
//!
//! `cargo run --release --example streaming -- MODEL_DIRECTORY`
#![allow(clippy::print_stdout, reason = "an example shows what it got")]

mod common;

use std::future::{Future, poll_fn};
use std::io::Write;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use futures_core::Stream;
use oxllama_engine::{Event, Job, JobStream};
use oxllama_text::EncodeOptions;

/// Wakes the thread that polls.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

async fn show(mut stream: JobStream) -> common::Result<()> {
    while let Some(event) = poll_fn(|context| Pin::new(&mut stream).poll_next(context)).await {
        match event {
            Event::Token { text, .. } => print!("{text}"),
            Event::Finished { reason, usage, .. } => println!("\n[{reason:?}; {usage:?}]"),
            Event::Queued { .. } | Event::Started { .. } | Event::Prefill { .. } => {
                println!("[{event:?}]");
            }
        }
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn main() -> common::Result<()> {
    let engine = common::engine(&common::path_argument(1, "a model directory")?, None)?;
    let prompt = "Once upon a time, a mouse";
    let prompt_ids = engine.tokenizer().encode(prompt, EncodeOptions::PROMPT)?;
    block_on(show(engine.submit(Job::new(prompt_ids, 60))?))
}
