//! The machine: its GPUs, what is alive on them, and the faults to come.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use oxllama_emulator::Order;

use crate::control::VARIABLE;
use crate::kernels::Kernels;
use crate::memory::Block;

/// A driver's answer.
pub(crate) type Code = u32;

pub(crate) const SUCCESS: Code = 0;
pub(crate) const INVALID_VALUE: Code = 1;
pub(crate) const OUT_OF_MEMORY: Code = 2;
pub(crate) const NO_DEVICE: Code = 100;
pub(crate) const INVALID_DEVICE: Code = 101;
pub(crate) const INVALID_CONTEXT: Code = 201;
pub(crate) const NOT_FOUND: Code = 500;
pub(crate) const LAUNCH_FAILED: Code = 719;
pub(crate) const INVALID_HANDLE: Code = 400;
pub(crate) const CAPTURE_UNSUPPORTED: Code = 900;

/// Of every GPU.
pub(crate) const MULTIPROCESSORS: i32 = 16;

thread_local! {
    /// The handle of the calling thread's context.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// A primary context.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) handle: usize,
    pub(crate) retained: usize,
    /// What everything is answered with after a fault that stays.
    pub(crate) broken: Option<Code>,
}

/// What handles stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Stream {
        /// Launches of the recording under way.
        recording: Option<usize>,
    },
    Event,
    Module,
    Function {
        module: usize,
        most_shared_bytes: u32,
        /// Whether compute capability 9.0 alone has it.
        is_hoppers: bool,
    },
    Graph {
        launches: usize,
    },
    Executable {
        launches: usize,
    },
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Object {
    pub(crate) device: usize,
    pub(crate) kind: Kind,
}

#[derive(Debug, Clone)]
struct Fault {
    /// `None`: any.
    function: Option<String>,
    after: u64,
    code: Code,
    breaks: Breaks,
}

/// What a fault leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Breaks {
    Nothing,
    ThisDevice,
    /// The one of two that the call is not made on.
    OtherDevice,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) devices: usize,
    pub(crate) memory_bytes: usize,
    pub(crate) others_bytes: usize,
    pub(crate) capability: (i32, i32),
    /// What device code is made for, if not for that.
    pub(crate) images: Option<(i32, i32)>,
    pub(crate) driver_version: i32,
    pub(crate) init_code: Code,
    pub(crate) has_management: bool,
    pub(crate) contexts: Vec<Context>,
    /// By address.
    pub(crate) memory: BTreeMap<usize, Block>,
    pub(crate) pinned: BTreeMap<usize, Block>,
    pub(crate) objects: HashMap<usize, Object>,
    next_handle: usize,
    fault: Option<Fault>,
    /// Calls since the fault was set.
    calls: u64,
    has_fired: bool,
    calls_after_loss: Vec<String>,
    pub(crate) kernels: Kernels,
    pub(crate) launches: u64,
    /// Of kernels that compute capability 9.0 alone has.
    pub(crate) hopper_launches: u64,
    /// What is enqueued besides kernels, and what is waited for, since that was asked for.
    trace: Option<Vec<String>>,
    /// Objects that were alive when the last holder of a healthy context let go of it.
    leaked: usize,
    misuse: Vec<String>,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

/// The machine; the first call makes it as the environment says.
pub(crate) struct Locked(MutexGuard<'static, Option<State>>);

impl std::ops::Deref for Locked {
    type Target = State;

    fn deref(&self) -> &State {
        self.0
            .as_ref()
            .unwrap_or_else(|| unreachable!("made in `lock`"))
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut State {
        self.0
            .as_mut()
            .unwrap_or_else(|| unreachable!("made in `lock`"))
    }
}

pub(crate) fn lock() -> Locked {
    let mut guard = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    guard.get_or_insert_with(|| {
        let mut state = State::new();
        state.set(&std::env::var(VARIABLE).unwrap_or_default());
        state
    });
    Locked(guard)
}

impl State {
    fn new() -> Self {
        Self {
            devices: 1,
            memory_bytes: 1 << 30,
            others_bytes: 0,
            capability: (9, 0),
            images: None,
            driver_version: 13_000,
            init_code: SUCCESS,
            has_management: true,
            contexts: Vec::new(),
            memory: BTreeMap::new(),
            pinned: BTreeMap::new(),
            objects: HashMap::new(),
            next_handle: 0x1000,
            fault: None,
            calls: 0,
            has_fired: false,
            calls_after_loss: Vec::new(),
            kernels: Kernels::default(),
            launches: 0,
            hopper_launches: 0,
            trace: None,
            leaked: 0,
            misuse: Vec::new(),
        }
    }

    /// Obeys the words of the crate's table; a word that is not in it is misuse.
    pub(crate) fn set(&mut self, words: &str) {
        for word in words.split_whitespace() {
            if word == "reset" {
                // Handles of the machine before stay unknown.
                let next_handle = self.next_handle;
                *self = Self::new();
                self.next_handle = next_handle;
            } else if self.set_word(word).is_none() {
                self.misuse.push(format!("unknown setting {word}"));
            }
        }
    }

    fn set_word(&mut self, word: &str) -> Option<()> {
        let (key, value) = word.split_once('=')?;
        match key {
            "devices" => self.devices = value.parse().ok()?,
            "memory" => self.memory_bytes = value.parse().ok()?,
            "others" => self.others_bytes = value.parse().ok()?,
            "driver" => self.driver_version = value.parse().ok()?,
            "init" => self.init_code = value.parse().ok()?,
            "kernels" => {
                self.kernels.order = match value {
                    "on" => Some(Order::Forward),
                    "backward" => Some(Order::Backward),
                    "off" => None,
                    _ => return None,
                };
            }
            "nvml" => self.has_management = value != "off",
            "trace" => self.trace = (value == "on").then(Vec::new),
            "capability" => self.capability = parse_capability(value)?,
            "images" => self.images = Some(parse_capability(value)?),
            "fault" => {
                (self.calls, self.has_fired) = (0, false);
                self.fault = match value {
                    "none" => None,
                    value => Some(Fault::parse(value)?),
                };
            }
            _ => return None,
        }
        Some(())
    }

    /// Lines of `key value`.
    pub(crate) fn report(&self) -> String {
        let count = |kind: fn(&Kind) -> bool| {
            let objects = self.objects.values();
            objects.filter(|object| kind(&object.kind)).count()
        };
        let bytes: usize = self.memory.values().map(Block::len).sum();
        let retained: usize = self.contexts.iter().map(|context| context.retained).sum();
        let mut text = String::new();
        for (key, value) in [
            ("allocations", self.memory.len()),
            ("allocated_bytes", bytes),
            ("pinned", self.pinned.len()),
            ("streams", count(|kind| matches!(kind, Kind::Stream { .. }))),
            ("events", count(|kind| *kind == Kind::Event)),
            ("modules", count(|kind| *kind == Kind::Module)),
            ("graphs", count(|kind| matches!(kind, Kind::Graph { .. }))),
            (
                "executables",
                count(|kind| matches!(kind, Kind::Executable { .. })),
            ),
            ("executable_launches", self.executable_launches()),
            ("contexts", retained),
            ("leaked", self.leaked),
            ("has_fired", usize::from(self.has_fired)),
            ("launches", self.launches as usize),
            ("hopper_launches", self.hopper_launches as usize),
        ] {
            let _ = writeln!(text, "{key} {value}");
        }
        for name in &self.calls_after_loss {
            let _ = writeln!(text, "call_after_loss {name}");
        }
        for misuse in &self.misuse {
            let _ = writeln!(text, "misuse {misuse}");
        }
        for call in self.trace.iter().flatten() {
            let _ = writeln!(text, "trace {call}");
        }
        text
    }

    /// Launches of everything that can be replayed.
    fn executable_launches(&self) -> usize {
        let objects = self.objects.values();
        let launches = objects.map(|object| match object.kind {
            Kind::Executable { launches } => launches,
            _ => 0,
        });
        launches.sum()
    }

    pub(crate) fn new_handle(&mut self) -> usize {
        self.next_handle += 16;
        self.next_handle
    }

    pub(crate) fn insert(&mut self, device: usize, kind: Kind) -> usize {
        let handle = self.new_handle();
        self.objects.insert(handle, Object { device, kind });
        handle
    }

    /// Takes note of a call and of what it is about.
    pub(crate) fn note(&mut self, call: &str, stream: usize, event: usize) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{call} {stream:#x} {event:#x}"));
        }
    }

    /// Takes note of what a caller may not do.
    pub(crate) fn refuse(&mut self, code: Code, what: String) -> Code {
        self.misuse.push(what);
        code
    }

    /// The calling thread's device.
    pub(crate) fn current(&mut self) -> Result<usize, Code> {
        let handle = CURRENT.get();
        let found = self
            .contexts
            .iter()
            .position(|context| context.handle == handle);
        found.ok_or(INVALID_CONTEXT)
    }

    pub(crate) fn device_of(&self, context: usize) -> Option<usize> {
        let mut contexts = self.contexts.iter();
        contexts.position(|other| other.handle == context && other.retained > 0)
    }

    pub(crate) fn select(&mut self, context: usize) -> Result<(), Code> {
        if self.device_of(context).is_none() {
            return Err(self.refuse(INVALID_CONTEXT, format!("context {context:#x} is dead")));
        }
        CURRENT.set(context);
        Ok(())
    }

    /// A live object of the current device.
    pub(crate) fn object(
        &mut self,
        handle: usize,
        is_kind: fn(&Kind) -> bool,
    ) -> Result<&mut Object, Code> {
        let device = self.current()?;
        let found = self.objects.get(&handle).copied();
        if !found.is_some_and(|object| is_kind(&object.kind) && object.device == device) {
            let what = format!("{handle:#x} on device {device} is {found:?}");
            return Err(self.refuse(INVALID_HANDLE, what));
        }
        Ok(self
            .objects
            .get_mut(&handle)
            .unwrap_or_else(|| unreachable!("found above")))
    }

    /// Removes a live object, of whichever device.
    pub(crate) fn remove(&mut self, handle: usize, is_kind: fn(&Kind) -> bool) -> Result<(), Code> {
        let found = self.objects.get(&handle).copied();
        if !found.is_some_and(|object| is_kind(&object.kind)) {
            let what = format!("destroying {handle:#x}, which is {found:?}");
            return Err(self.refuse(INVALID_HANDLE, what));
        }
        self.objects.remove(&handle);
        self.kernels.remove(handle);
        Ok(())
    }

    /// Lets go of a device's context; what is still alive on it goes with the last holder.
    pub(crate) fn release(&mut self, device: usize) -> Result<(), Code> {
        let Some(context) = self.contexts.get_mut(device).filter(|c| c.retained > 0) else {
            return Err(self.refuse(INVALID_CONTEXT, format!("device {device} is not retained")));
        };
        context.retained -= 1;
        if context.retained > 0 {
            return Ok(());
        }
        let is_broken = context.broken.is_some();
        let before = self.memory.len() + self.pinned.len() + self.objects.len();
        self.memory.retain(|_, block| block.device() != device);
        self.pinned.retain(|_, block| block.device() != device);
        self.objects.retain(|_, object| object.device != device);
        let after = self.memory.len() + self.pinned.len() + self.objects.len();
        if !is_broken {
            self.leaked += before - after;
        }
        Ok(())
    }
}

fn parse_capability(text: &str) -> Option<(i32, i32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

impl Fault {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let function = parts.next()?;
        Some(Self {
            function: (function != "any").then(|| function.to_owned()),
            after: parts.next()?.parse().ok()?,
            code: parts.next()?.parse().ok()?,
            breaks: match parts.next() {
                None => Breaks::Nothing,
                Some("sticky") => Breaks::ThisDevice,
                Some("other") => Breaks::OtherDevice,
                Some(_) => return None,
            },
        })
    }
}

/// How a call fares when its device is lost, or the fault hits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// It is not done.
    Plain,
    /// It is done all the same, as far as it gives something back.
    Destroys,
    /// It needs no context, and works on a lost device.
    Describes,
    /// It is done in any case.
    Releases,
}

/// Runs one entry point. The fault that hits it breaks the context of `device`, by default the
/// calling thread's.
pub(crate) fn call_on(
    name: &str,
    call: Call,
    device: Option<usize>,
    body: impl FnOnce(&mut State) -> Result<(), Code>,
) -> Code {
    let mut state = lock();
    let state = &mut *state;
    let device = device.or_else(|| state.current().ok());
    let fault = state.fault.clone();
    let hit = fault.filter(|fault| {
        let is_function = fault
            .function
            .as_deref()
            .is_none_or(|function| function == name);
        state.calls += u64::from(is_function);
        is_function && !state.has_fired && state.calls == fault.after + 1
    });
    if let Some(fault) = hit {
        state.has_fired = true;
        let broken = match fault.breaks {
            Breaks::Nothing => None,
            Breaks::ThisDevice => device,
            Breaks::OtherDevice => device.map(|device| 1 - device.min(1)),
        };
        if let Some(context) = broken.and_then(|device| state.contexts.get_mut(device)) {
            context.broken = Some(fault.code);
        }
        let is_done = match call {
            Call::Plain | Call::Describes => false,
            Call::Destroys => broken.is_none(),
            Call::Releases => true,
        };
        if is_done {
            let _ = body(state);
        }
        return fault.code;
    }
    let context = device.and_then(|device| state.contexts.get(device));
    if matches!(call, Call::Plain | Call::Destroys)
        && let Some(code) = context.and_then(|context| context.broken)
    {
        state.calls_after_loss.push(name.to_owned());
        return code;
    }
    match body(state) {
        Ok(()) => SUCCESS,
        Err(code) => code,
    }
}

/// [`call_on`] the calling thread's device.
pub(crate) fn call(
    name: &str,
    call: Call,
    body: impl FnOnce(&mut State) -> Result<(), Code>,
) -> Code {
    call_on(name, call, None, body)
}

/// Writes a result through a caller's pointer.
///
/// # Safety
/// The pointer is null or valid for a write.
pub(crate) unsafe fn give<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes a string that ends with a zero.
///
/// # Safety
/// `to` is valid for `length` bytes.
pub(crate) unsafe fn give_text(to: *mut u8, length: usize, text: &str) -> Result<(), Code> {
    if to.is_null() || text.len() >= length {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the text and its zero fit into what the caller promises.
    unsafe {
        to.copy_from_nonoverlapping(text.as_ptr(), text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}
