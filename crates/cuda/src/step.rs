//! The inputs of a step on the device, and all scratch that operations need.

use cudarc::driver::sys;
use oxllama_backend::{
    DeviceError, Rope, RopeStyle, SequenceKey, StepBatch, StepOps, WorkspaceShape,
};
use oxllama_memory::{Bytes, Reservation};

use crate::attention::{AttentionScratch, Tile, scratch_bytes};
use crate::buffer::CudaBuffer;
use crate::device::CudaDevice;
use crate::draw::{self, DrawScratch};
use crate::graph::{self, Found, Recorded, Recorder, RecordingKey, Recordings};
use crate::launch::Launch;
use crate::linear::{Handover, LinearScratch};
use crate::stream::{Event, PinnedBuffer, Stream};

/// Parts of one allocation start at multiples of this: what every load of a kernel is aligned to.
pub(crate) const ALIGNMENT: usize = 256;

/// `bytes` up to the next multiple of [`ALIGNMENT`].
pub(crate) fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Most ropes of a model; `MOST_ROPES` in `step.cu`.
const MOST_ROPES: usize = 4;

/// Copies of a step's inputs that may be under way at once, if nothing else is said.
const STAGING_COPIES: usize = 2;

/// How one rope of the current step pairs up dimensions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RopeLayout {
    pub(crate) style: RopeStyle,
    /// Rotated pairs of a head.
    pub(crate) pairs: usize,
}

/// Where each input lies in the workspace's memory, in bytes from its start.
#[derive(Debug, Clone, Copy)]
struct Offsets {
    packed: usize,
    token_ids: usize,
    positions: usize,
    row_sequences: usize,
    logit_rows: usize,
    page_tables: usize,
    tiles: usize,
    frequencies: usize,
    angles: usize,
    attention: usize,
    draws: usize,
    end: usize,
}

impl Offsets {
    fn of(shape: &WorkspaceShape) -> Self {
        const WORD: usize = size_of::<u32>();
        let rows = shape.rows;
        let tables = shape.sequences * shape.pages_per_sequence;
        let tiles = rows * size_of::<Tile>() / WORD;
        let pairs = shape.rotary_dim / 2;
        let mut end = 0;
        let mut place = |words: usize| {
            let start = end;
            end += aligned(words * WORD);
            start
        };
        Self {
            packed: place(draw::most_words(shape) + 4 * rows + tables + tiles),
            token_ids: place(rows),
            positions: place(rows),
            row_sequences: place(rows),
            logit_rows: place(rows),
            page_tables: place(tables),
            tiles: place(tiles),
            frequencies: place(shape.ropes * pairs),
            angles: place(shape.ropes * rows * 2 * pairs),
            attention: place(scratch_bytes(shape).div_ceil(WORD)),
            draws: place(draw::scratch_bytes(shape) / WORD),
            end,
        }
    }
}

/// The inputs of the current step, on the device.
#[derive(Debug)]
pub(crate) struct StepInputs {
    pub(crate) shape: WorkspaceShape,
    offsets: Offsets,
    memory: CudaBuffer,
    /// Where copies of steps' inputs start, in turns, with the place in the stream after each.
    staging: Vec<(PinnedBuffer, Event)>,
    next_staging: usize,
    /// Ropes whose frequencies are on the device.
    known_ropes: Vec<Rope>,
    /// Ropes of the current step.
    pub(crate) ropes: Vec<RopeLayout>,
    /// Rows of the current step.
    pub(crate) rows: usize,
    /// Whether the current step is one of few rows a sequence, whose operations do not depend
    /// on which sequences they are.
    is_decode: bool,
}

impl StepInputs {
    /// Where the inputs lie as they were copied: the settings of the step's draws first.
    pub(crate) fn packed(&self) -> sys::CUdeviceptr {
        self.memory.at(self.offsets.packed)
    }

    /// u32 `[rows]`
    pub(crate) fn token_ids(&self) -> sys::CUdeviceptr {
        self.memory.at(self.offsets.token_ids)
    }

    /// u32 `[rows]`
    pub(crate) fn positions(&self) -> sys::CUdeviceptr {
        self.memory.at(self.offsets.positions)
    }

    /// u32 `[rows]`
    pub(crate) fn row_sequences(&self) -> sys::CUdeviceptr {
        self.memory.at(self.offsets.row_sequences)
    }

    /// u32 `[logit_rows]`
    pub(crate) fn logit_row_indices(&self) -> sys::CUdeviceptr {
        self.memory.at(self.offsets.logit_rows)
    }

    /// u32 `[sequences, shape.pages_per_sequence]`
    pub(crate) fn page_tables(&self) -> sys::CUdeviceptr {
        self.memory.at(self.offsets.page_tables)
    }

    /// [`Tile`] `[rows]`
    pub(crate) fn tiles(&self) -> sys::CUdeviceptr {
        self.memory.at(self.offsets.tiles)
    }

    /// f32 `[shape.rows, 2, shape.rotary_dim / 2]` of one rope: cosines, then sines.
    pub(crate) fn angles(&self, rope: usize) -> sys::CUdeviceptr {
        let pairs = self.shape.rotary_dim / 2;
        let words = rope * self.shape.rows * 2 * pairs;
        self.memory
            .at(self.offsets.angles + words * size_of::<f32>())
    }

    fn frequencies(&self, rope: usize) -> sys::CUdeviceptr {
        let words = rope * (self.shape.rotary_dim / 2);
        self.memory
            .at(self.offsets.frequencies + words * size_of::<f32>())
    }
}

/// When what a step gives can be read.
#[derive(Debug)]
pub(crate) struct StepResults {
    /// Whether steps have begun since the last one with logit rows.
    pub(crate) are_behind: bool,
    /// The place in the stream after that step, if so.
    pub(crate) finished: Event,
}

impl StepResults {
    /// Takes note of a step before anything of it is enqueued.
    fn begin(&mut self, batch: &StepBatch<'_>, stream: &Stream) -> Result<(), DeviceError> {
        let wants_none = batch.logit_rows.is_empty();
        if wants_none && !self.are_behind {
            self.finished.record(stream)?;
        }
        self.are_behind = wants_none;
        Ok(())
    }
}

/// Most rows of a sequence in a step of [`is_decode`]: a token and the guesses that follow it.
const MOST_DECODE_RUN: usize = 16;

/// Most rows of a step of [`is_decode`].
const MOST_DECODE_ROWS: usize = 64;

/// Whether a step has few rows, and few of each sequence.
fn is_decode(batch: &StepBatch<'_>) -> bool {
    let runs = batch.row_sequences.chunk_by(|a, b| a == b);
    batch.rows() <= MOST_DECODE_ROWS && runs.into_iter().all(|run| run.len() <= MOST_DECODE_RUN)
}

/// The step's inputs on the device and all scratch.
#[derive(Debug)]
pub struct CudaWorkspace {
    pub(crate) inputs: StepInputs,
    /// In the inputs' memory.
    pub(crate) attention: AttentionScratch,
    /// In the inputs' memory.
    pub(crate) draws: DrawScratch,
    /// At the end of the inputs' memory.
    pub(crate) linear: LinearScratch,
    pub(crate) handover: Handover,
    pub(crate) results: StepResults,
    recordings: Recordings,
}

/// `StepRope` of `step.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct StepRope {
    inverse_frequencies: sys::CUdeviceptr,
    attention_factor: f32,
    pairs: i32,
}

/// `BeginStepArgs` of `step.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct BeginStepArgs {
    packed: sys::CUdeviceptr,
    token_ids: sys::CUdeviceptr,
    positions: sys::CUdeviceptr,
    row_sequences: sys::CUdeviceptr,
    logit_rows: sys::CUdeviceptr,
    page_tables: sys::CUdeviceptr,
    tiles: sys::CUdeviceptr,
    angles: sys::CUdeviceptr,
    ropes: [StepRope; MOST_ROPES],
    rows: i32,
    logit_row_count: i32,
    sequences: i32,
    pages: i32,
    table_stride: i32,
    rope_count: i32,
    angle_rows: i32,
    angle_pairs: i32,
}

impl StepOps for CudaDevice {
    type Workspace = CudaWorkspace;

    fn workspace_bytes(&self, shape: &WorkspaceShape) -> Bytes {
        let linear = LinearScratch::bytes(shape, self.many_rows());
        Bytes::from_usize(Offsets::of(shape).end + linear)
    }

    fn create_workspace(
        &self,
        shape: &WorkspaceShape,
        reservation: Reservation,
    ) -> Result<CudaWorkspace, DeviceError> {
        let needed = self.workspace_bytes(shape);
        self.check_reservation(|| "a workspace".to_owned(), needed, &reservation)?;
        let offsets = Offsets::of(shape);
        let mut memory = CudaBuffer::allocate(self.context(), reservation)?;
        memory.clear(self.stream())?;
        let inputs = StepInputs {
            shape: *shape,
            offsets,
            memory,
            staging: Vec::new(),
            next_staging: 0,
            known_ropes: Vec::with_capacity(shape.ropes),
            ropes: Vec::with_capacity(shape.ropes),
            rows: 0,
            is_decode: false,
        };
        let linear = inputs.memory.at(offsets.end);
        let linear = LinearScratch::new(shape, self.many_rows(), linear);
        let attention = AttentionScratch::new(shape, inputs.memory.at(offsets.attention));
        let draws = inputs.memory.at(offsets.draws);
        let draws = DrawScratch::new(self.context(), shape, draws)?;
        let mut workspace = CudaWorkspace {
            inputs,
            attention,
            draws,
            linear,
            handover: Handover::default(),
            results: StepResults {
                are_behind: false,
                finished: Event::new(self.context())?,
            },
            recordings: Recordings::new(self.node_bytes()),
        };
        self.allow_steps(STAGING_COPIES, &mut workspace)?;
        Ok(workspace)
    }

    fn runs_by_itself(&self) -> bool {
        true
    }

    fn check_enqueued(&self) -> Result<(), DeviceError> {
        self.check_rows_that_left()
    }

    fn allow_steps(&self, steps: usize, workspace: &mut CudaWorkspace) -> Result<(), DeviceError> {
        let StepInputs {
            staging, offsets, ..
        } = &mut workspace.inputs;
        while staging.len() < steps {
            let memory = PinnedBuffer::new(self.context(), offsets.token_ids - offsets.packed)?;
            staging.push((memory, Event::new(self.context())?));
        }
        Ok(())
    }

    fn recording_bytes(&self, shape: &WorkspaceShape, layers: usize) -> Bytes {
        graph::planned_bytes(shape, layers, self.node_bytes())
    }

    fn record_within(
        &self,
        room: Reservation,
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        if room.device() != self.context().id() {
            return Err(DeviceError::WrongDevice {
                device: self.context().id().clone(),
                reserved_on: room.device().clone(),
            });
        }
        workspace.recordings.set_room(room);
        Ok(())
    }

    fn begin_step(
        &self,
        batch: &StepBatch<'_>,
        ropes: &[Rope],
        workspace: &mut CudaWorkspace,
    ) -> Result<(), DeviceError> {
        let inputs = &mut workspace.inputs;
        let shape = WorkspaceShape {
            ropes: inputs.shape.ropes.min(MOST_ROPES),
            ..inputs.shape
        };
        shape.check(self.context().id(), batch, ropes)?;
        workspace.results.begin(batch, self.stream())?;
        self.know_ropes(ropes, inputs)?;
        inputs.rows = batch.rows();
        inputs.is_decode = is_decode(batch);
        let tiles = &mut workspace.attention.tiles;
        tiles.cut(batch);
        workspace.draws.begin(batch);
        let batch = &if workspace.draws.is_empty() || batch.draws.is_empty() {
            StepBatch {
                draws: &[],
                changes: &[],
                ..*batch
            }
        } else {
            *batch
        };
        self.copy_inputs(batch, tiles.all(), inputs)?;
        let mut step_ropes = [StepRope::default(); MOST_ROPES];
        for (index, rope) in ropes.iter().enumerate() {
            step_ropes[index] = StepRope {
                inverse_frequencies: inputs.frequencies(index),
                attention_factor: rope.attention_factor,
                pairs: rope.inverse_frequencies.len() as i32,
            };
        }
        let args = BeginStepArgs {
            packed: inputs
                .memory
                .at(inputs.offsets.packed + size_of::<u32>() * draw::settings_words(batch)),
            token_ids: inputs.token_ids(),
            positions: inputs.positions(),
            row_sequences: inputs.row_sequences(),
            logit_rows: inputs.logit_row_indices(),
            page_tables: inputs.page_tables(),
            tiles: inputs.tiles(),
            angles: inputs.angles(0),
            ropes: step_ropes,
            rows: batch.rows() as i32,
            logit_row_count: batch.logit_rows.len() as i32,
            sequences: batch.sequences() as i32,
            pages: batch.pages_per_sequence as i32,
            table_stride: inputs.shape.pages_per_sequence as i32,
            rope_count: ropes.len() as i32,
            angle_rows: inputs.shape.rows as i32,
            angle_pairs: (inputs.shape.rotary_dim / 2) as i32,
        };
        let blocks = batch.rows().max(batch.sequences());
        // SAFETY: the structure is the kernel's; `WorkspaceShape::check` has held the step to the extents
        // that the workspace was made for.
        unsafe { self.launch(self.kernels().begin_step, Launch::linear(blocks, 64), &args) }
    }

    fn sequence<E: From<DeviceError>>(
        &self,
        key: Option<SequenceKey>,
        workspace: &mut CudaWorkspace,
        mut enqueue: impl FnMut(&mut CudaWorkspace) -> Result<(), E>,
    ) -> Result<(), E> {
        let is_recorded = workspace.inputs.is_decode && self.records_steps();
        let Some(sequence) = key.filter(|_| is_recorded) else {
            return enqueue(workspace);
        };
        let key = RecordingKey {
            sequence,
            is_one_row_each: workspace.attention.tiles.is_one_row_each(),
        };
        match workspace.recordings.find(&key) {
            Found::Recording(recording) => Ok(recording.replay(self.stream())?),
            // A first run loads what the driver loads lazily, which a recording may not.
            Found::Nothing => {
                enqueue(workspace)?;
                workspace.recordings.note(key);
                Ok(())
            }
            Found::RunOnce => {
                let recorder = Recorder::start(self.context(), self.stream())?;
                let enqueued = enqueue(workspace);
                let recorded = recorder.finish();
                enqueued?;
                match recorded.and_then(|recorded| self.keep_recorded(key, recorded, workspace)) {
                    Ok(true) => Ok(()),
                    // There is no room for the recording: the step can do without, now and
                    // from here on.
                    Ok(false) | Err(DeviceError::OutOfMemory { .. }) => {
                        workspace.recordings.give_up(key);
                        enqueue(workspace)
                    }
                    Err(error) => Err(error.into()),
                }
            }
            Found::NoRoom => enqueue(workspace),
        }
    }
}

impl CudaDevice {
    /// Replays what was recorded for `key` and keeps it. False, and nothing has run, where there
    /// is no room for it.
    fn keep_recorded(
        &self,
        key: RecordingKey,
        recorded: Recorded,
        workspace: &mut CudaWorkspace,
    ) -> Result<bool, DeviceError> {
        let launches = recorded.launches()?;
        let has_room = workspace.recordings.make_room(launches);
        if has_room {
            let recording = recorded.prepare(launches)?;
            recording.replay(self.stream())?;
            workspace.recordings.keep(key, recording, launches);
        }
        Ok(has_room)
    }

    /// Puts the frequencies of `ropes` on the device where they are not there yet: on a
    /// model's first step.
    fn know_ropes(&self, ropes: &[Rope], inputs: &mut StepInputs) -> Result<(), DeviceError> {
        if inputs.known_ropes == ropes {
            return Ok(());
        }
        inputs.known_ropes.clear();
        inputs.ropes.clear();
        for (index, rope) in ropes.iter().enumerate() {
            let frequencies: &[u8] = bytemuck::cast_slice(&rope.inverse_frequencies);
            if !frequencies.is_empty() {
                self.context().bind()?;
                // SAFETY: the workspace has room for the frequencies of every rope that
                // `WorkspaceShape::check` lets pass; the wait below keeps the source alive.
                let code = unsafe {
                    sys::cuMemcpyHtoDAsync_v2(
                        inputs.frequencies(index),
                        frequencies.as_ptr().cast(),
                        frequencies.len(),
                        self.stream().handle(),
                    )
                };
                self.context()
                    .check(code, || "copying the ropes' frequencies".to_owned())?;
            }
            inputs.ropes.push(RopeLayout {
                style: rope.style,
                pairs: rope.inverse_frequencies.len(),
            });
        }
        self.stream().synchronize()?;
        inputs.known_ropes.extend_from_slice(ropes);
        Ok(())
    }

    /// One copy of all arrays, packed, from page-locked memory.
    fn copy_inputs(
        &self,
        batch: &StepBatch<'_>,
        tiles: &[Tile],
        inputs: &mut StepInputs,
    ) -> Result<(), DeviceError> {
        let packed = inputs.memory.at(inputs.offsets.packed);
        let copies = inputs.staging.len();
        let (memory, copied) = &mut inputs.staging[inputs.next_staging];
        inputs.next_staging = (inputs.next_staging + 1) % copies;
        // The copy that was made from here as many steps ago: so far is the host ahead at most.
        copied.synchronize()?;
        let mut words = draw::settings_words(batch);
        for array in [
            batch.token_ids,
            batch.positions,
            batch.row_sequences,
            batch.logit_rows,
            batch.page_tables,
            bytemuck::cast_slice(tiles),
            bytemuck::cast_slice(batch.changes),
        ] {
            memory.as_mut_slice::<u32>()[words..][..array.len()].copy_from_slice(array);
            words += array.len();
        }
        let changes_at = words - bytemuck::cast_slice::<_, u32>(batch.changes).len();
        draw::write_settings(batch, changes_at, memory.as_mut_slice());
        let bytes: &[u8] = bytemuck::cast_slice(&memory.as_slice::<u32>()[..words]);
        self.context().bind()?;
        // SAFETY: the destination holds the packed arrays of the largest step; the staging
        // memory is written again only after the event below.
        let code = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                packed,
                bytes.as_ptr().cast(),
                bytes.len(),
                self.stream().handle(),
            )
        };
        self.context()
            .check(code, || "copying a step's inputs".to_owned())?;
        copied.record(self.stream())
    }
}
