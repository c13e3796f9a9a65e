//! Memory of the devices, and of the host as devices reach it.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::ffi::c_void;

use crate::state::{
    CAPTURE_UNSUPPORTED, Call, Code, INVALID_VALUE, Kind, OUT_OF_MEMORY, Object, State, call, give,
};

/// What the driver aligns allocations to.
const ALIGNMENT: usize = 512;

/// One allocation.
#[derive(Debug)]
pub(crate) struct Block {
    address: *mut u8,
    layout: Layout,
    device: usize,
}

// SAFETY: owned memory, which is used under the machine's lock.
unsafe impl Send for Block {}

impl Block {
    fn new(bytes: usize, device: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT).ok()?;
        // SAFETY: the layout is not empty.
        let address = unsafe { alloc_zeroed(layout) };
        (!address.is_null()).then_some(Self {
            address,
            layout,
            device,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(crate) fn device(&self) -> usize {
        self.device
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.address, self.layout) };
    }
}

impl State {
    pub(crate) fn free_bytes(&self, device: usize) -> usize {
        let blocks = self.memory.values();
        let used: usize = blocks
            .filter(|block| block.device == device)
            .map(Block::len)
            .sum();
        self.memory_bytes.saturating_sub(used + self.others_bytes)
    }

    /// Whether `bytes` bytes from `address` lie in one allocation of `device`.
    fn check_range(&mut self, address: u64, bytes: usize, device: usize) -> Result<(), Code> {
        let address = address as usize;
        let found = self.memory.range(..=address).next_back();
        let is_inside = found.is_some_and(|(start, block)| {
            block.device == device && address + bytes <= start + block.len()
        });
        if is_inside {
            return Ok(());
        }
        let what = format!("{bytes} bytes at {address:#x} are no memory of device {device}");
        Err(self.refuse(INVALID_VALUE, what))
    }

    /// Fails while a stream of the machine records: then calls that may wait are forbidden.
    fn check_not_recording(&mut self, what: &str) -> Result<(), Code> {
        let is_recording = |object: &Object| {
            let kind = object.kind;
            matches!(kind, Kind::Stream { recording: Some(_) })
        };
        if self.objects.values().any(is_recording) {
            return Err(self.refuse(CAPTURE_UNSUPPORTED, format!("{what} while recording")));
        }
        Ok(())
    }
}

fn allocate(
    state: &mut State,
    bytes: usize,
    blocks: fn(&mut State) -> &mut BTreeMap<usize, Block>,
) -> Result<usize, Code> {
    let device = state.current()?;
    state.check_not_recording("allocating")?;
    if bytes == 0 {
        return Err(state.refuse(INVALID_VALUE, "allocating nothing".to_owned()));
    }
    let block = Block::new(bytes, device).ok_or(OUT_OF_MEMORY)?;
    let address = block.address.expose_provenance();
    blocks(state).insert(address, block);
    Ok(address)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Code {
    call("cuMemAlloc_v2", Call::Plain, |state| {
        let device = state.current()?;
        if bytes > state.free_bytes(device) {
            return Err(OUT_OF_MEMORY);
        }
        let found = allocate(state, bytes, |state| &mut state.memory)?;
        // SAFETY: the caller's pointer.
        unsafe { give(address, found as u64) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFree_v2(address: u64) -> Code {
    call("cuMemFree_v2", Call::Destroys, |state| {
        state.current()?;
        match state.memory.remove(&(address as usize)) {
            Some(_) => Ok(()),
            None => Err(state.refuse(INVALID_VALUE, format!("freeing {address:#x}"))),
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(memory: *mut *mut c_void, bytes: usize, _flags: u32) -> Code {
    call("cuMemHostAlloc", Call::Plain, |state| {
        let found = allocate(state, bytes, |state| &mut state.pinned)?;
        // SAFETY: the caller's pointer.
        unsafe { give(memory, std::ptr::with_exposed_provenance_mut(found)) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeHost(memory: *mut c_void) -> Code {
    call("cuMemFreeHost", Call::Destroys, |state| {
        state.current()?;
        match state.pinned.remove(&memory.addr()) {
            Some(_) => Ok(()),
            None => Err(state.refuse(INVALID_VALUE, format!("freeing {memory:?} of the host"))),
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    call("cuMemGetInfo_v2", Call::Plain, |state| {
        let device = state.current()?;
        // SAFETY: the caller's pointers.
        unsafe {
            give(free, state.free_bytes(device))?;
            give(total, state.memory_bytes)
        }
    })
}

/// The memory at an address that was checked, or the caller's own.
fn at(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    stream: usize,
) -> Code {
    call("cuMemcpyHtoDAsync_v2", Call::Plain, |state| {
        state.check_stream(stream)?;
        state.note("copy-in", stream, 0);
        let device = state.current()?;
        state.check_range(to, bytes, device)?;
        // SAFETY: checked, and the caller's memory.
        unsafe { at(to).copy_from(from.cast(), bytes) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    stream: usize,
) -> Code {
    call("cuMemcpyDtoHAsync_v2", Call::Plain, |state| {
        state.check_stream(stream)?;
        state.note("copy-out", stream, 0);
        let device = state.current()?;
        state.check_range(from, bytes, device)?;
        // SAFETY: checked, and the caller's memory.
        unsafe { to.cast::<u8>().copy_from(at(from), bytes) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> Code {
    call("cuMemcpyDtoDAsync_v2", Call::Plain, |state| {
        state.check_stream(stream)?;
        let device = state.current()?;
        state.check_range(from, bytes, device)?;
        state.check_range(to, bytes, device)?;
        // SAFETY: both are checked.
        unsafe { at(to).copy_from(at(from), bytes) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    to_context: usize,
    from: u64,
    from_context: usize,
    bytes: usize,
    stream: usize,
) -> Code {
    call("cuMemcpyPeerAsync", Call::Plain, |state| {
        state.check_stream(stream)?;
        state.note("copy-peer", stream, 0);
        let devices = [from_context, to_context].map(|context| state.device_of(context));
        let [Some(from_device), Some(to_device)] = devices else {
            return Err(state.refuse(INVALID_VALUE, "copying from or to no device".to_owned()));
        };
        for device in [from_device, to_device] {
            if let Some(code) = state.contexts[device].broken {
                return Err(code);
            }
        }
        state.check_range(from, bytes, from_device)?;
        state.check_range(to, bytes, to_device)?;
        // SAFETY: both are checked.
        unsafe { at(to).copy_from(at(from), bytes) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: usize) -> Code {
    call("cuMemsetD8Async", Call::Plain, |state| {
        state.check_stream(stream)?;
        let device = state.current()?;
        state.check_range(to, bytes, device)?;
        // SAFETY: checked.
        unsafe { at(to).write_bytes(value, bytes) };
        Ok(())
    })
}
