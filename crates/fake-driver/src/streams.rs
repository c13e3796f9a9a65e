//! Streams, events, recordings, device code and its launches.

use std::ffi::{CStr, c_char, c_void};

use oxllama_emulator::Kernel;

use crate::state::{
    CAPTURE_UNSUPPORTED, Call, Code, INVALID_HANDLE, INVALID_VALUE, Kind, LAUNCH_FAILED,
    MULTIPROCESSORS, NOT_FOUND, Object, State, call, give,
};

fn is_stream(kind: &Kind) -> bool {
    matches!(kind, Kind::Stream { .. })
}

fn is_event(kind: &Kind) -> bool {
    *kind == Kind::Event
}

fn is_module(kind: &Kind) -> bool {
    *kind == Kind::Module
}

fn is_function(kind: &Kind) -> bool {
    matches!(kind, Kind::Function { .. })
}

fn is_graph(kind: &Kind) -> bool {
    matches!(kind, Kind::Graph { .. })
}

fn is_executable(kind: &Kind) -> bool {
    matches!(kind, Kind::Executable { .. })
}

impl State {
    /// Whether `stream` is one of the current device.
    pub(crate) fn check_stream(&mut self, stream: usize) -> Result<(), Code> {
        self.object(stream, is_stream).map(|_| ())
    }

    fn check_idle(&mut self, stream: usize) -> Result<(), Code> {
        let kind = self.object(stream, is_stream)?.kind;
        if matches!(kind, Kind::Stream { recording: Some(_) }) {
            return Err(self.refuse(CAPTURE_UNSUPPORTED, "waiting while recording".to_owned()));
        }
        Ok(())
    }

    fn create(&mut self, kind: Kind, to: *mut usize) -> Result<(), Code> {
        let device = self.current()?;
        let handle = self.insert(device, kind);
        // SAFETY: the pointer of the entry point's caller.
        unsafe { give(to, handle) }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut usize, _flags: u32) -> Code {
    call("cuStreamCreate", Call::Plain, |state| {
        state.create(Kind::Stream { recording: None }, stream)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamDestroy_v2(stream: usize) -> Code {
    call("cuStreamDestroy_v2", Call::Destroys, |state| {
        state.remove(stream, is_stream)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamSynchronize(stream: usize) -> Code {
    call("cuStreamSynchronize", Call::Plain, |state| {
        state.note("stream-synchronize", stream, 0);
        state.check_idle(stream)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _flags: u32) -> Code {
    call("cuStreamWaitEvent", Call::Plain, |state| {
        state.check_stream(stream)?;
        state.note("wait", stream, event);
        // An event may be another device's.
        match state.objects.get(&event).copied() {
            Some(Object {
                device,
                kind: Kind::Event,
            }) => state.contexts[device].broken.map_or(Ok(()), Err),
            found => {
                let what = format!("waiting for {event:#x}, which is {found:?}");
                Err(state.refuse(INVALID_HANDLE, what))
            }
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut usize, _flags: u32) -> Code {
    call("cuEventCreate", Call::Plain, |state| {
        state.create(Kind::Event, event)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventDestroy_v2(event: usize) -> Code {
    call("cuEventDestroy_v2", Call::Destroys, |state| {
        state.remove(event, is_event)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventRecord(event: usize, stream: usize) -> Code {
    call("cuEventRecord", Call::Plain, |state| {
        state.check_stream(stream)?;
        state.note("record", stream, event);
        state.object(event, is_event).map(|_| ())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventSynchronize(event: usize) -> Code {
    call("cuEventSynchronize", Call::Plain, |state| {
        state.note("event-synchronize", 0, event);
        state.object(event, is_event).map(|_| ())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventQuery(event: usize) -> Code {
    call("cuEventQuery", Call::Plain, |state| {
        state.object(event, is_event).map(|_| ())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamBeginCapture_v2(stream: usize, _mode: u32) -> Code {
    call("cuStreamBeginCapture_v2", Call::Plain, |state| {
        state.check_idle(stream)?;
        state.object(stream, is_stream)?.kind = Kind::Stream { recording: Some(0) };
        Ok(())
    })
}

/// A recording ends in any case; where the call fails there is no graph.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: usize, graph: *mut usize) -> Code {
    let code = call("cuStreamEndCapture", Call::Destroys, |state| {
        let object = state.object(stream, is_stream)?;
        let Kind::Stream {
            recording: Some(launches),
        } = object.kind
        else {
            return Err(state.refuse(INVALID_VALUE, "ending no recording".to_owned()));
        };
        object.kind = Kind::Stream { recording: None };
        state.create(Kind::Graph { launches }, graph)?;
        // SAFETY: the handle was just written there.
        state.kernels.end_recording(stream, unsafe { *graph });
        Ok(())
    });
    if code != 0 && !graph.is_null() {
        // SAFETY: the caller's pointer.
        let made = unsafe { graph.replace(0) };
        crate::state::lock().objects.remove(&made);
    }
    code
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut usize,
    graph: usize,
    _flags: u64,
) -> Code {
    call("cuGraphInstantiateWithFlags", Call::Plain, |state| {
        let kind = state.object(graph, is_graph)?.kind;
        let Kind::Graph { launches } = kind else {
            return Err(INVALID_HANDLE);
        };
        state.create(Kind::Executable { launches }, executable)?;
        // SAFETY: the handle was just written there.
        state.kernels.instantiate(graph, unsafe { *executable });
        Ok(())
    })
}

/// Without room for the nodes themselves, writes how many there are.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphGetNodes(graph: usize, nodes: *mut usize, count: *mut usize) -> Code {
    call("cuGraphGetNodes", Call::Plain, |state| {
        let kind = state.object(graph, is_graph)?.kind;
        let Kind::Graph { launches } = kind else {
            return Err(INVALID_HANDLE);
        };
        if !nodes.is_null() {
            return Err(state.refuse(INVALID_VALUE, "asking for nodes".to_owned()));
        }
        // SAFETY: the caller's pointer.
        unsafe { give(count, launches) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphDestroy(graph: usize) -> Code {
    call("cuGraphDestroy", Call::Destroys, |state| {
        state.remove(graph, is_graph)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphExecDestroy(executable: usize) -> Code {
    call("cuGraphExecDestroy", Call::Destroys, |state| {
        state.remove(executable, is_executable)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphLaunch(executable: usize, stream: usize) -> Code {
    call("cuGraphLaunch", Call::Plain, |state| {
        state.check_stream(stream)?;
        state.object(executable, is_executable)?;
        // SAFETY: who replays a recording keeps what it works on; the machine is locked.
        let done = unsafe { state.kernels.replay(executable) };
        done.map_err(|what| state.refuse(LAUNCH_FAILED, what))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut usize, image: *const c_void) -> Code {
    call("cuModuleLoadData", Call::Plain, |state| {
        if image.is_null() {
            return Err(state.refuse(INVALID_VALUE, "loading nothing".to_owned()));
        }
        state.create(Kind::Module, module)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleUnload(module: usize) -> Code {
    call("cuModuleUnload", Call::Destroys, |state| {
        state.remove(module, is_module)?;
        state.objects.retain(|_, object| {
            !matches!(object.kind, Kind::Function { module: owner, .. } if owner == module)
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut usize,
    module: usize,
    name: *const c_char,
) -> Code {
    call("cuModuleGetFunction", Call::Plain, |state| {
        state.object(module, is_module)?;
        // SAFETY: the caller's string.
        let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) });
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            return Err(state.refuse(INVALID_VALUE, "a kernel without a name".to_owned()));
        };
        let kernel = Kernel::find(name).ok_or(NOT_FOUND)?;
        let is_hoppers = kernel.is_hoppers();
        // Images for other GPUs do not have them.
        if is_hoppers && state.images.unwrap_or(state.capability) != (9, 0) {
            return Err(NOT_FOUND);
        }
        let kind = Kind::Function {
            module,
            most_shared_bytes: 48 << 10,
            is_hoppers,
        };
        state.create(kind, function)?;
        // SAFETY: the handle was just written there.
        state.kernels.add(unsafe { *function }, kernel);
        Ok(())
    })
}

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
const SHARED_BYTES: u32 = 8;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncSetAttribute(function: usize, attribute: u32, value: i32) -> Code {
    call("cuFuncSetAttribute", Call::Plain, |state| {
        let object = state.object(function, is_function)?;
        if let Kind::Function {
            most_shared_bytes, ..
        } = &mut object.kind
            && attribute == SHARED_BYTES
        {
            *most_shared_bytes = (*most_shared_bytes).max(value.unsigned_abs());
        }
        Ok(())
    })
}

/// Of blocks of which a multiprocessor has one.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuOccupancyMaxActiveClusters(
    clusters: *mut i32,
    function: usize,
    _config: *const LaunchConfig,
) -> Code {
    call("cuOccupancyMaxActiveClusters", Call::Plain, |state| {
        state.object(function, is_function)?;
        let ctas = state.kernels.ctas(function);
        // SAFETY: the caller's pointer.
        unsafe { give(clusters, MULTIPROCESSORS / ctas as i32) }
    })
}

/// The beginning of `CUlaunchConfig`.
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
    stream: usize,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: usize,
    parameters: *const *const c_void,
    _extra: *const *const c_void,
) -> Code {
    call("cuLaunchKernelEx", Call::Plain, |state| {
        // SAFETY: the caller's structure.
        let config = unsafe { &*config };
        state.check_stream(config.stream)?;
        let kind = state.object(function, is_function)?.kind;
        let (most, is_hoppers) = match kind {
            Kind::Function {
                most_shared_bytes,
                is_hoppers,
                ..
            } => (most_shared_bytes, is_hoppers),
            _ => (0, false),
        };
        let threads: u32 = config.block.iter().product();
        let [_, height, depth] = config.grid;
        let fits = (1..=1024).contains(&threads)
            && !config.grid.contains(&0)
            && height.max(depth) <= u32::from(u16::MAX)
            && config.shared_bytes <= most
            && !parameters.is_null();
        if !fits {
            let (grid, block) = (config.grid, config.block);
            let shared = config.shared_bytes;
            let what = format!("{grid:?} blocks of {block:?} threads, {shared} of {most} bytes");
            return Err(state.refuse(INVALID_VALUE, what));
        }
        state.launches += 1;
        state.hopper_launches += u64::from(is_hoppers);
        let mut recording = None;
        if let Kind::Stream {
            recording: Some(launches),
        } = &mut state.object(config.stream, is_stream)?.kind
        {
            *launches += 1;
            recording = Some(config.stream);
        }
        let kernels = &mut state.kernels;
        // SAFETY: the caller's arguments; the machine is locked.
        let done = unsafe { kernels.launch(function, config, parameters, recording) };
        done.map_err(|what| state.refuse(LAUNCH_FAILED, what))
    })
}
