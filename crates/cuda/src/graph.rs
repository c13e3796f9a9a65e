//! Recorded sequences of launches, which the driver starts as one.
//!
//! The driver keeps a recording in the device's memory, a piece for each launch, and does not say
//! how large it is. It is counted by what a launch takes at most ([`NODE_BYTES`]): a workspace
//! keeps no more recordings than its room in the ledger holds, and forgets the one that was not
//! used for the longest time for a new one.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::sys::{self, CUgraph, CUgraphExec};
use oxllama_backend::{DeviceError, SequenceKey, WorkspaceShape};
use oxllama_memory::{Bytes, Reservation};

use crate::context::Context;
use crate::stream::Stream;

/// Bytes of the device's memory that a recorded launch takes at most. NVIDIA's engineers speak of
/// some 10 KB; `recorded steps keep within their room` of the GPU's tests measures it.
const NODE_BYTES: usize = 16 << 10;

/// The same of drivers before [`LEAN_DRIVER`].
const OLD_NODE_BYTES: usize = 68 << 10;

/// The first driver (CUDA 12.4) whose recordings are small.
const LEAN_DRIVER: i32 = 12_040;

/// Launches of a decode step for each layer, in most models, up to as many rows as are multiplied
/// in one launch.
const NODES_OF_LAYER: usize = 12;

/// Launches for embedding, logits and draws.
const OTHER_NODES: usize = 16;

/// Recordings that a workspace is planned for: of each number of sequences as they come and go,
/// and [`MORE_RECORDINGS`] with guesses, or of tokens drawn in other ways. What comes on top
/// takes the place of what is not used.
const MOST_RECORDINGS: usize = 32;
const MORE_RECORDINGS: usize = 7;

/// Sequences that are remembered without a recording.
const MOST_KNOWN: usize = 512;

/// What is recorded on a device, by all that use it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordedSteps {
    /// Recordings that are kept.
    pub recordings: usize,
    /// Their launches.
    pub launches: usize,
    /// Launches of as many recordings as have been kept at once.
    pub most_launches: usize,
}

/// [`RecordedSteps`] as they change.
#[derive(Debug, Default)]
pub(crate) struct RecordedCounts {
    recordings: AtomicUsize,
    launches: AtomicUsize,
    most_launches: AtomicUsize,
}

impl RecordedCounts {
    pub(crate) fn read(&self) -> RecordedSteps {
        RecordedSteps {
            recordings: self.recordings.load(Ordering::Relaxed),
            launches: self.launches.load(Ordering::Relaxed),
            most_launches: self.most_launches.load(Ordering::Relaxed),
        }
    }

    fn add(&self, launches: usize) {
        self.recordings.fetch_add(1, Ordering::Relaxed);
        let sum = launches + self.launches.fetch_add(launches, Ordering::Relaxed);
        self.most_launches.fetch_max(sum, Ordering::Relaxed);
    }

    fn remove(&self, launches: usize) {
        self.recordings.fetch_sub(1, Ordering::Relaxed);
        self.launches.fetch_sub(launches, Ordering::Relaxed);
    }
}

/// Bytes of a recorded launch with a driver of this version.
pub(crate) fn node_bytes(driver_version: i32) -> usize {
    if driver_version < LEAN_DRIVER {
        OLD_NODE_BYTES
    } else {
        NODE_BYTES
    }
}

/// Bytes of the recordings that a workspace for steps up to `shape` through `layers` layers is
/// planned for.
pub(crate) fn planned_bytes(shape: &WorkspaceShape, layers: usize, node_bytes: usize) -> Bytes {
    let recordings = (shape.sequences + MORE_RECORDINGS).min(MOST_RECORDINGS);
    let launches = layers * NODES_OF_LAYER + OTHER_NODES;
    Bytes::from_usize(recordings * launches * node_bytes)
}

/// The recordings of one workspace. `R` is a [`Recording`].
#[derive(Debug)]
pub(crate) struct Recordings<R = Recording> {
    room: Option<Reservation>,
    /// Bytes of a launch.
    node_bytes: usize,
    by_key: HashMap<RecordingKey, Known<R>>,
    /// Launches of all recordings.
    launches: usize,
    /// Sequences that have run.
    now: u64,
}

/// What is known of a sequence.
#[derive(Debug)]
struct Known<R> {
    state: State<R>,
    last_used: u64,
}

/// What has become of a sequence.
#[derive(Debug)]
enum State<R> {
    RunOnce,
    Recorded { recording: R, launches: usize },
    NoRoom,
}

/// What a recording is found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RecordingKey {
    pub(crate) sequence: SequenceKey,
    /// Whether every sequence has one row in the step: attention is launched otherwise elsewhere.
    pub(crate) is_one_row_each: bool,
}

/// What there is for a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found<'a, R = Recording> {
    /// The sequence has not run yet.
    Nothing,
    /// It has run without being recorded.
    RunOnce,
    /// It has been recorded.
    Recording(&'a R),
    /// There is no room for its recording.
    NoRoom,
}

impl<R> Recordings<R> {
    /// None, and no room for any.
    pub(crate) fn new(node_bytes: usize) -> Self {
        Self {
            room: None,
            node_bytes,
            by_key: HashMap::new(),
            launches: 0,
            now: 0,
        }
    }

    /// Keeps recordings within `room` from here on.
    pub(crate) fn set_room(&mut self, room: Reservation) {
        self.by_key.clear();
        self.launches = 0;
        self.room = Some(room);
    }

    /// Launches that there is room for.
    fn most_launches(&self) -> usize {
        let bytes = self.room.as_ref().map_or(Bytes::ZERO, Reservation::bytes);
        usize::try_from(bytes.get()).map_or(usize::MAX, |bytes| bytes / self.node_bytes)
    }

    /// What there is for the sequence of `key`, which is about to run.
    pub(crate) fn find(&mut self, key: &RecordingKey) -> Found<'_, R> {
        if self.most_launches() == 0 {
            return Found::NoRoom;
        }
        self.now += 1;
        let Some(known) = self.by_key.get_mut(key) else {
            return Found::Nothing;
        };
        known.last_used = self.now;
        match &known.state {
            State::RunOnce => Found::RunOnce,
            State::Recorded { recording, .. } => Found::Recording(recording),
            State::NoRoom => Found::NoRoom,
        }
    }

    /// Takes note that the sequence of `key` has run. Recordings of buffers that have been
    /// replaced since are dropped.
    pub(crate) fn note(&mut self, key: RecordingKey) {
        let is_full = self.by_key.len() >= MOST_KNOWN;
        self.by_key.retain(|other, known| {
            let is_recorded = matches!(known.state, State::Recorded { .. });
            other.sequence.generation == key.sequence.generation && (is_recorded || !is_full)
        });
        self.count();
        self.set(key, State::RunOnce);
    }

    /// Drops recordings, the one that was not used for the longest time first, until one of
    /// `launches` launches has room. False: it has none.
    pub(crate) fn make_room(&mut self, launches: usize) -> bool {
        let most = self.most_launches();
        if launches > most {
            return false;
        }
        while self.launches + launches > most {
            let recorded = self
                .by_key
                .iter()
                .filter(|(_, known)| matches!(known.state, State::Recorded { .. }));
            let oldest = recorded.min_by_key(|(_, known)| known.last_used);
            let Some(oldest) = oldest.map(|(&key, _)| key) else {
                return false;
            };
            self.by_key.remove(&oldest);
            self.count();
        }
        true
    }

    /// Keeps the recording of `key`, for which [`Self::make_room`] has made room.
    pub(crate) fn keep(&mut self, key: RecordingKey, recording: R, launches: usize) {
        let state = State::Recorded {
            recording,
            launches,
        };
        self.set(key, state);
        self.count();
    }

    /// Takes note that there is no room for the recording of `key`.
    pub(crate) fn give_up(&mut self, key: RecordingKey) {
        self.set(key, State::NoRoom);
    }

    fn set(&mut self, key: RecordingKey, state: State<R>) {
        let last_used = self.now;
        self.by_key.insert(key, Known { state, last_used });
    }

    fn count(&mut self) {
        let launches = self.by_key.values().map(|known| match known.state {
            State::Recorded { launches, .. } => launches,
            State::RunOnce | State::NoRoom => 0,
        });
        self.launches = launches.sum();
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
    pub(crate) fn finish(self) -> Result<Recorded, DeviceError> {
        if let Err(error @ DeviceError::Lost { .. }) = self.context.bind() {
            return Err(error);
        }
        let mut graph: CUgraph = std::ptr::null_mut();
        // SAFETY: `start` began a recording on this stream.
        let code = unsafe { sys::cuStreamEndCapture(self.stream.handle(), &raw mut graph) };
        self.context
            .check(code, || "ending the recording of a step".to_owned())?;
        Ok(Recorded {
            context: Arc::clone(self.context),
            graph,
        })
    }
}

/// What was recorded, in the host's memory.
#[derive(Debug)]
pub(crate) struct Recorded {
    context: Arc<Context>,
    graph: CUgraph,
}

impl Recorded {
    /// Launches of the sequence, and copies.
    pub(crate) fn launches(&self) -> Result<usize, DeviceError> {
        self.context.bind()?;
        let mut count = 0;
        // SAFETY: the graph is alive; without an array the function only writes the count.
        let code =
            unsafe { sys::cuGraphGetNodes(self.graph, std::ptr::null_mut(), &raw mut count) };
        self.context
            .check(code, || "counting the launches of a step".to_owned())?;
        Ok(count)
    }

    /// Makes it ready to be replayed.
    pub(crate) fn prepare(self, launches: usize) -> Result<Recording, DeviceError> {
        self.context.bind()?;
        let mut executable: CUgraphExec = std::ptr::null_mut();
        // SAFETY: the graph is alive; the function only writes the handle.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, self.graph, 0) };
        self.context
            .check(code, || "preparing the recording of a step".to_owned())?;
        self.context.recorded.add(launches);
        Ok(Recording {
            context: Arc::clone(&self.context),
            executable,
            launches,
        })
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.context.give_back(|| {
            // SAFETY: made in `finish`; destroyed once. What was prepared of it is a copy.
            unsafe { sys::cuGraphDestroy(self.graph) }
        });
    }
}

/// A sequence of launches that can be replayed.
#[derive(Debug)]
pub(crate) struct Recording {
    context: Arc<Context>,
    executable: CUgraphExec,
    launches: usize,
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
        self.context.recorded.remove(self.launches);
        self.context.give_back(|| {
            // SAFETY: made in `prepare`; destroyed once. The driver waits for a replay under way.
            unsafe { sys::cuGraphExecDestroy(self.executable) }
        });
    }
}

#[cfg(test)]
mod tests {
    use oxllama_backend::DrawKinds;
    use oxllama_memory::{DeviceId, DeviceInfo, Inventory, Ledger, Purpose};

    use super::*;

    const NODE: usize = 1000;

    fn key(rows: usize, generation: u64) -> RecordingKey {
        RecordingKey {
            sequence: SequenceKey {
                rows,
                logit_rows: rows,
                draws: DrawKinds::None,
                generation,
            },
            is_one_row_each: true,
        }
    }

    /// Recordings that are only numbers, with room for so many launches.
    fn recordings(launches: usize) -> (Recordings<u32>, Ledger) {
        let info = DeviceInfo::new(DeviceId::cuda(0), "a GPU", Bytes::from_mib(1));
        let ledger = Ledger::new(&Inventory::of_one(info));
        let bytes = Bytes::from_usize(launches * NODE);
        let room = ledger.reserve(&DeviceId::cuda(0), "m", Purpose::Recordings, bytes);
        let mut recordings = Recordings::new(NODE);
        recordings.set_room(room.unwrap());
        (recordings, ledger)
    }

    /// Runs a sequence of so many launches; says whether it was replayed.
    fn run(recordings: &mut Recordings<u32>, key: RecordingKey, launches: usize) -> bool {
        let (has_run, is_refused) = match recordings.find(&key) {
            Found::Recording(_) => return true,
            found => (found == Found::RunOnce, found == Found::NoRoom),
        };
        if has_run && recordings.make_room(launches) {
            recordings.keep(key, 7, launches);
        } else if has_run {
            recordings.give_up(key);
        } else if !is_refused {
            recordings.note(key);
        }
        assert!(recordings.launches <= recordings.most_launches());
        false
    }

    #[test]
    fn a_sequence_runs_is_recorded_and_is_replayed() {
        let (mut recordings, ledger) = recordings(10);
        let found: Vec<bool> = (0..4)
            .map(|_| run(&mut recordings, key(1, 0), 10))
            .collect();
        assert_eq!(found, [false, false, true, true]);
        let used = || ledger.usage(&DeviceId::cuda(0)).unwrap().used;
        assert_eq!(used(), Bytes(10 * NODE as u64));
        drop(recordings);
        assert_eq!(used(), Bytes::ZERO);
    }

    #[test]
    fn what_was_not_used_for_the_longest_time_makes_room() {
        let (mut recordings, _ledger) = recordings(30);
        for rows in [1, 1, 2, 2, 3, 3, 1] {
            run(&mut recordings, key(rows, 0), 10);
        }
        // 2 goes for 4, then 3 and 1 for one that is as large as two.
        for _ in 0..2 {
            assert!(!run(&mut recordings, key(4, 0), 10));
        }
        for (rows, is_kept) in [(2, false), (3, true), (1, true), (4, true)] {
            let found = matches!(recordings.find(&key(rows, 0)), Found::Recording(_));
            assert_eq!(found, is_kept, "{rows}");
        }
        for _ in 0..2 {
            assert!(!run(&mut recordings, key(5, 0), 20));
        }
        for (rows, is_kept) in [(3, false), (1, false), (4, true), (5, true)] {
            assert_eq!(run(&mut recordings, key(rows, 0), 10), is_kept, "{rows}");
        }
    }

    #[test]
    fn a_sequence_larger_than_the_room_is_never_recorded() {
        let (mut recordings, _ledger) = recordings(30);
        for _ in 0..3 {
            run(&mut recordings, key(1, 0), 30);
        }
        for _ in 0..4 {
            assert!(!run(&mut recordings, key(2, 0), 31));
        }
        assert_eq!(recordings.find(&key(2, 0)), Found::NoRoom);
        assert!(run(&mut recordings, key(1, 0), 30), "it stays");
        let mut none: Recordings<u32> = Recordings::new(NODE);
        assert_eq!(none.find(&key(1, 0)), Found::NoRoom);
    }

    #[test]
    fn recordings_of_replaced_buffers_go_and_what_ran_once_is_forgotten_in_time() {
        let (mut recordings, _ledger) = recordings(30);
        for rows in 1..=3 {
            run(&mut recordings, key(rows, 0), 10);
            run(&mut recordings, key(rows, 0), 10);
        }
        run(&mut recordings, key(1, 1), 10);
        assert_eq!((recordings.by_key.len(), recordings.launches), (1, 0));
        run(&mut recordings, key(1, 1), 10);
        for rows in 2..2 * MOST_KNOWN {
            run(&mut recordings, key(rows, 1), 10);
            assert!(recordings.by_key.len() <= MOST_KNOWN);
        }
        assert!(run(&mut recordings, key(1, 1), 10), "it stays");
    }

    #[test]
    fn more_layers_and_sequences_are_planned_more_room_up_to_a_bound() {
        let shape = |sequences| WorkspaceShape {
            rows: 512,
            sequences,
            pages_per_sequence: 1,
            max_in_features: 64,
            max_out_features: 64,
            draw_width: 64,
            heads: 1,
            kv_heads: 1,
            head_dim: 64,
            rotary_dim: 64,
            ropes: 1,
        };
        let planned =
            |sequences, layers| planned_bytes(&shape(sequences), layers, node_bytes(13_000));
        // Llama 2 7B alone, and with many sequences.
        assert_eq!(planned(1, 32), Bytes(8 * 400 * (16 << 10)));
        assert_eq!(planned(25, 32), Bytes::from_mib(200));
        assert_eq!(planned(1000, 32), planned(25, 32));
        assert!(planned(2, 32) > planned(1, 32) && planned(2, 33) > planned(2, 32));
        assert!(node_bytes(12_020) > 4 * node_bytes(12_040));
    }
}
