//! Many requests at a time, and what is heard of them.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::Scope;
use std::time::Duration;

use anyhow::{Context, Result};
use oxllama_engine::{Completion, Engine, Event, JobStream};

use super::Request;
use super::answer::failure;
use crate::interrupt::Interrupt;

/// How often to look whether the user has interrupted.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What is heard of requests while they run.
pub(crate) enum News {
    /// So many more tokens.
    Tokens(usize),
    /// A request has ended. `place` is its place among the requests.
    Ended {
        place: usize,
        prompt_ids: Vec<u32>,
        /// One for each choice; cancelled ones are as far as they came.
        completions: Result<Vec<Completion>>,
    },
}

/// Runs requests on an engine, a bounded number at a time.
pub(crate) struct Together<'a> {
    pub(crate) engine: &'a Engine,
    /// Answers that are submitted and not ended, but for the choices of the last request.
    pub(crate) in_flight: usize,
    pub(crate) interrupt: Interrupt,
}

impl Together<'_> {
    /// Runs `requests` to their end, or until the user interrupts: then the engine is shut down
    /// and what runs ends as cancelled. A request that is an error ends at once.
    ///
    /// # Errors
    /// The first of `on_news`; the engine is shut down then too.
    pub(crate) fn run(
        &self,
        requests: impl Iterator<Item = Result<Request>>,
        on_news: impl FnMut(News) -> Result<()>,
    ) -> Result<()> {
        std::thread::scope(|scope| {
            let result = self.run_in(scope, requests, on_news);
            if result.is_err() {
                // Or the scope would wait for answers that nobody wants.
                self.engine.shutdown();
            }
            result
        })
    }

    fn run_in<'scope>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        requests: impl Iterator<Item = Result<Request>>,
        mut on_news: impl FnMut(News) -> Result<()>,
    ) -> Result<()> {
        let (sender, receiver) = mpsc::channel();
        let mut requests = requests.enumerate();
        let mut in_flight = 0;
        let mut is_stopped = false;
        loop {
            // However long the requests take to be read: the same ones share their steps each time.
            let held = self.engine.hold();
            while in_flight < self.in_flight && !is_stopped {
                let Some((place, request)) = requests.next() else {
                    break;
                };
                let started = request.and_then(|request| self.start(request));
                match started {
                    Ok((streams, prompt_ids)) => {
                        in_flight += streams.len();
                        let sender = sender.clone();
                        std::thread::Builder::new()
                            .spawn_scoped(scope, move || {
                                listen(place, prompt_ids, streams, &sender);
                            })
                            .context("cannot start a thread to wait for an answer")?;
                    }
                    Err(error) => on_news(News::Ended {
                        place,
                        prompt_ids: Vec::new(),
                        completions: Err(error),
                    })?,
                }
            }
            drop(held);
            if in_flight == 0 {
                return Ok(());
            }
            if let Some((ended, news)) = wait(&receiver) {
                in_flight -= ended;
                on_news(news)?;
            }
            if self.interrupt.is_set() && !is_stopped {
                is_stopped = true;
                self.engine.shutdown();
            }
        }
    }

    fn start(&self, request: Request) -> Result<(Vec<JobStream>, Vec<u32>)> {
        let prompt_ids = request.job.prompt_ids.clone();
        let streams = self.engine.submit_choices(request.job, request.choices)?;
        Ok((streams, prompt_ids))
    }
}

/// The next news, with the number of answers that ended with it.
fn wait(receiver: &Receiver<(usize, News)>) -> Option<(usize, News)> {
    // Who holds the receiver holds a sender too, so it is time alone that can be up.
    receiver.recv_timeout(LOOK_EVERY).ok()
}

/// Waits for all choices of one request.
fn listen(
    place: usize,
    prompt_ids: Vec<u32>,
    streams: Vec<JobStream>,
    sender: &Sender<(usize, News)>,
) {
    let choices = streams.len();
    let completions: Vec<Completion> = streams
        .into_iter()
        .map(|stream| {
            stream.wait_with(|event| {
                if let Event::Token { ids, .. } = event {
                    // A receiver that is gone has seen an error, and ends the engine.
                    let _ = sender.send((0, News::Tokens(ids.len())));
                }
            })
        })
        .collect();
    let failed = completions.iter().try_for_each(failure);
    let completions = failed.map(|()| completions);
    let news = News::Ended {
        place,
        prompt_ids,
        completions,
    };
    let _ = sender.send((choices, news));
}
