//! Recorded sequences of launches, which the driver starts as one.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUgraph, CUgraphExec};
use oxllama_backend::{DeviceError, SequenceKey};

use crate::context::Context;
use crate::stream::Stream;

/// Most recordings of one workspace: all numbers of rows of a decode step, with and without
/// a few guesses.
const MOST_RECORDINGS: usize = 128;

/// The recordings of one workspace.
#[derive(Debug, Default)]
pub(crate) struct Recordings {
    by_key: HashMap<SequenceKey, State>,
}

/// What has become of a sequence.
#[derive(Debug)]
enum State {
    RunOnce,
    Recorded(Recording),
    NoRoom,
}

/// What there is for a key.
pub(crate) enum Found<'a> {
    /// The sequence has not run yet.
    Nothing,
    /// It has run without being recorded.
    RunOnce,
    /// It has been recorded.
    Recording(&'a Recording),
    /// There was no room for its recording.
    NoRoom,
}

impl Recordings {
    pub(crate) fn find(&self, key: &SequenceKey) -> Found<'_> {
        match self.by_key.get(key) {
            None => Found::Nothing,
            Some(State::RunOnce) => Found::RunOnce,
            Some(State::Recorded(recording)) => Found::Recording(recording),
            Some(State::NoRoom) => Found::NoRoom,
        }
    }

    /// Takes note that the sequence of `key` has run. Recordings of buffers that have been
    /// replaced since are dropped, and all of them when there are too many.
    pub(crate) fn note(&mut self, key: SequenceKey) {
        self.by_key
            .retain(|known, _| known.generation == key.generation);
        if self.by_key.len() >= MOST_RECORDINGS {
            self.by_key.clear();
        }
        self.by_key.insert(key, State::RunOnce);
    }

    /// Takes the recording of `key`, or note that there is no room for it.
    pub(crate) fn keep(&mut self, key: SequenceKey, recording: Option<Recording>) {
        let state = recording.map_or(State::NoRoom, State::Recorded);
        self.by_key.insert(key, state);
    }
}

/// A stream whose launches are being recorded rather than run.
pub(crate) struct Recorder<'a> {
    context: &'a Arc<Context>,
    stream: &'a Stream,
}

impl<'a> Recorder<'a> {
    pub(crate) fn start(
        context: &'a Arc<Context>,
        stream: &'a Stream,
    ) -> Result<Self, DeviceError> {
        context.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and nothing else is recording on it: a workspace, and so
        // the step that uses it, is borrowed alone.
        let code = unsafe { sys::cuStreamBeginCapture_v2(stream.handle(), mode) };
        context.check(code, || "recording a step".to_owned())?;
        Ok(Self { context, stream })
    }

    /// Ends the recording, whatever became of what was to be recorded.
    pub(crate) fn finish(self) -> Result<Recording, DeviceError> {
        if let Err(error @ DeviceError::Lost { .. }) = self.context.bind() {
            return Err(error);
        }
        let mut graph: CUgraph = std::ptr::null_mut();
        // SAFETY: `start` began a recording on this stream.
        let code = unsafe { sys::cuStreamEndCapture(self.stream.handle(), &raw mut graph) };
        self.context
            .check(code, || "ending the recording of a step".to_owned())?;
        let mut executable: CUgraphExec = std::ptr::null_mut();
        // SAFETY: the graph was made just now; the function only writes the handle.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0) };
        let prepared = self
            .context
            .check(code, || "preparing the recording of a step".to_owned());
        self.context.give_back(|| {
            // SAFETY: the executable graph is a copy; a graph is destroyed once.
            unsafe { sys::cuGraphDestroy(graph) }
        });
        prepared?;
        Ok(Recording {
            context: Arc::clone(self.context),
            executable,
        })
    }
}

/// A sequence of launches that can be replayed.
#[derive(Debug)]
pub(crate) struct Recording {
    context: Arc<Context>,
    executable: CUgraphExec,
}

// SAFETY: a handle whose functions may be called from any thread, one at a time: its workspace
// is borrowed alone.
unsafe impl Send for Recording {}

impl Recording {
    pub(crate) fn replay(&self, stream: &Stream) -> Result<(), DeviceError> {
        self.context.bind()?;
        // SAFETY: both handles are alive. What the recorded kernels work on lives as long as the
        // model whose workspace keeps the recording; replaced buffers change the key.
        let code = unsafe { sys::cuGraphLaunch(self.executable, stream.handle()) };
        self.context
            .check(code, || "starting a recorded step".to_owned())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.context.give_back(|| {
            // SAFETY: made in `finish`; destroyed once. The driver waits for a replay under way.
            unsafe { sys::cuGraphExecDestroy(self.executable) }
        });
    }
}
