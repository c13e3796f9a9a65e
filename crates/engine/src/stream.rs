//! The events of one job, on their way from the engine's thread to whoever asked.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use crate::job::{Completion, Event};
use crate::{EngineError, FinishReason, Timings, Usage};

/// The events of a job, in order; ends after [`Event::Finished`].
///
/// Read it as an iterator, which blocks, or as a [`futures_core::Stream`] on any runtime. A
/// reader may be as slow as it likes: events wait without bound (there are no more than tokens)
/// and nobody waits for them. Dropping the stream cancels the job.
#[derive(Debug)]
pub struct JobStream {
    channel: Arc<Channel>,
}

/// The engine's end.
#[derive(Debug)]
pub(crate) struct EventSender {
    channel: Arc<Channel>,
}

/// Someone to be told that a stream was dropped.
pub(crate) trait Wake: Send + Sync {
    fn wake(&self);
}

struct Channel {
    state: Mutex<State>,
    arrived: Condvar,
    cancelled: AtomicBool,
    engine: Weak<dyn Wake>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Channel").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    events: VecDeque<Event>,
    /// Nothing more comes.
    closed: bool,
    waker: Option<Waker>,
}

/// A new stream and the end that feeds it. `engine` is woken when the stream is dropped.
pub(crate) fn channel(engine: Weak<dyn Wake>) -> (EventSender, JobStream) {
    let channel = Arc::new(Channel {
        state: Mutex::default(),
        arrived: Condvar::new(),
        cancelled: AtomicBool::new(false),
        engine,
    });
    let sender = EventSender {
        channel: Arc::clone(&channel),
    };
    (sender, JobStream { channel })
}

impl Channel {
    /// A panic while the lock was held leaves the queue as it was: every change is one call.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSender {
    /// Whether the stream was dropped.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.channel.cancelled.load(Ordering::Relaxed)
    }

    /// Adds an event. News of progress replaces unread news of the same kind.
    pub(crate) fn send(&self, event: Event) {
        let mut state = self.channel.lock();
        let is_news = |event: &Event| matches!(event, Event::Queued { .. } | Event::Prefill { .. });
        match state.events.back_mut() {
            Some(last)
                if is_news(last)
                    && std::mem::discriminant(last) == std::mem::discriminant(&event) =>
            {
                *last = event;
            }
            _ => {
                state.closed = matches!(event, Event::Finished { .. });
                state.events.push_back(event);
            }
        }
        let waker = state.waker.take();
        drop(state);
        self.channel.arrived.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for EventSender {
    /// Whatever went wrong, a stream ends.
    fn drop(&mut self) {
        if !self.channel.lock().closed {
            self.send(Event::Finished {
                reason: FinishReason::Error,
                usage: Usage::default(),
                timings: Timings::default(),
                error: Some(Arc::new(EngineError::Panicked)),
            });
        }
    }
}

impl JobStream {
    /// The next event if one waits.
    pub fn try_next(&mut self) -> Option<Event> {
        self.channel.lock().events.pop_front()
    }

    /// Reads to the end and puts everything together.
    pub fn wait(self) -> Completion {
        self.wait_with(|_| {})
    }

    /// As [`Self::wait`]; `on_event` sees every event first.
    pub fn wait_with(mut self, mut on_event: impl FnMut(&Event)) -> Completion {
        let mut collected = Collected::default();
        for event in &mut self {
            on_event(&event);
            collected.add(event);
        }
        collected.finish()
    }
}

impl Iterator for JobStream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let mut state = self.channel.lock();
        loop {
            if let Some(event) = state.events.pop_front() {
                return Some(event);
            }
            if state.closed {
                return None;
            }
            let waited = self.channel.arrived.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl futures_core::Stream for JobStream {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut state = self.channel.lock();
        match state.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if state.closed => Poll::Ready(None),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for JobStream {
    fn drop(&mut self) {
        self.channel.cancelled.store(true, Ordering::Relaxed);
        if let Some(engine) = self.channel.engine.upgrade() {
            engine.wake();
        }
    }
}

/// A completion as it grows from events.
#[derive(Debug, Default)]
pub struct Collected {
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<crate::TokenLogprob>,
    logits: Vec<Vec<f32>>,
    end: Option<Event>,
}

impl Collected {
    /// Takes the next event.
    pub fn add(&mut self, event: Event) {
        match event {
            Event::Token {
                text,
                ids,
                logprobs,
                logits,
            } => {
                self.text.push_str(&text);
                self.token_ids.extend(ids);
                self.logprobs.extend(logprobs);
                self.logits.extend(logits);
            }
            Event::Finished { .. } => self.end = Some(event),
            Event::Queued { .. } | Event::Started { .. } | Event::Prefill { .. } => {}
        }
    }

    /// The completion; of a job that has not ended, as if it were cancelled here.
    pub fn finish(self) -> Completion {
        let (finish_reason, usage, timings, error) = match self.end {
            Some(Event::Finished {
                reason,
                usage,
                timings,
                error,
            }) => (reason, usage, timings, error),
            _ => (
                FinishReason::Cancelled,
                Usage::default(),
                Timings::default(),
                None,
            ),
        };
        Completion {
            text: self.text,
            logprobs: (!self.logprobs.is_empty()).then_some(self.logprobs),
            logits: (!self.logits.is_empty()).then_some(self.logits),
            token_ids: self.token_ids,
            finish_reason,
            usage,
            timings,
            error,
        }
    }
}
