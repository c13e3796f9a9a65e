//! The driver itself, its devices and their contexts.

use std::ffi::{c_char, c_int};

use crate::state::{
    Call, Code, Context, INVALID_DEVICE, MULTIPROCESSORS, NO_DEVICE, SUCCESS, State, call, call_on,
    give, give_text,
};

/// A function that needs no context.
fn describe(name: &str, body: impl FnOnce(&mut State) -> Result<(), Code>) -> Code {
    call(name, Call::Describes, body)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuInit(_flags: u32) -> Code {
    describe("cuInit", |state| match (state.init_code, state.devices) {
        (SUCCESS, 0) => Err(NO_DEVICE),
        (SUCCESS, _) => Ok(()),
        (code, _) => Err(code),
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    // SAFETY: the caller's pointer.
    describe("cuDriverGetVersion", |state| unsafe {
        give(version, state.driver_version)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(code: Code, text: *mut *const c_char) -> Code {
    let words = match code {
        1 => c"invalid argument",
        2 => c"out of memory",
        100 => c"no CUDA-capable device is detected",
        700 => c"an illegal memory access was encountered",
        719 => c"unspecified launch failure",
        803 => c"system has unsupported display driver / cuda driver combination",
        _ => c"a fault of the fake driver",
    };
    // SAFETY: the caller's pointer.
    match unsafe { give(text, words.as_ptr()) } {
        Ok(()) => 0,
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
    // SAFETY: the caller's pointer.
    describe("cuDeviceGetCount", |state| unsafe {
        give(count, state.devices as c_int)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    describe("cuDeviceGet", |state| {
        if ordinal < 0 || ordinal as usize >= state.devices {
            return Err(INVALID_DEVICE);
        }
        // SAFETY: the caller's pointer.
        unsafe { give(device, ordinal) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: u32,
    _device: c_int,
) -> Code {
    describe("cuDeviceGetAttribute", |state| {
        let found = match attribute {
            16 => MULTIPROCESSORS,
            // Second-level cache.
            38 => 4 << 20,
            75 => state.capability.0,
            76 => state.capability.1,
            // Shared memory of a block.
            97 => 227 << 10,
            _ => 0,
        };
        // SAFETY: the caller's pointer.
        unsafe { give(value, found) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) -> Code {
    let text = format!("Fake GPU {device}");
    // SAFETY: the caller's buffer.
    describe("cuDeviceGetName", |_| unsafe {
        give_text(name.cast(), length as usize, &text)
    })
}

/// `domain:bus:device.function` of a device.
pub(crate) fn pci_bus(device: usize) -> String {
    format!("00000000:{:02X}:00.0", device + 1)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetPCIBusId(text: *mut c_char, length: c_int, device: c_int) -> Code {
    let bus = pci_bus(device.unsigned_abs() as usize);
    // SAFETY: the caller's buffer.
    describe("cuDeviceGetPCIBusId", |_| unsafe {
        give_text(text.cast(), length as usize, &bus)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Code {
    // SAFETY: the caller's pointer.
    describe("cuDeviceTotalMem_v2", |state| unsafe {
        give(bytes, state.memory_bytes)
    })
}

/// A device that was lost stays so as long as the process lives.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Code {
    let device = device.unsigned_abs() as usize;
    call_on(
        "cuDevicePrimaryCtxRetain",
        Call::Plain,
        Some(device),
        |state| {
            if device >= state.devices {
                return Err(INVALID_DEVICE);
            }
            while state.contexts.len() <= device {
                let handle = state.new_handle();
                state.contexts.push(Context {
                    handle,
                    retained: 0,
                    broken: None,
                });
            }
            state.contexts[device].retained += 1;
            // SAFETY: the caller's pointer.
            unsafe { give(context, state.contexts[device].handle) }
        },
    )
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Code {
    let device = device.unsigned_abs() as usize;
    call("cuDevicePrimaryCtxRelease_v2", Call::Releases, |state| {
        state.release(device)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSetCurrent(context: usize) -> Code {
    let device = crate::state::lock().device_of(context);
    call_on("cuCtxSetCurrent", Call::Describes, device, |state| {
        state.select(context)
    })
}

/// Which devices reach each other is nothing that anything here depends on.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxEnablePeerAccess(peer: usize, _flags: u32) -> Code {
    call("cuCtxEnablePeerAccess", Call::Plain, |state| {
        match state
            .device_of(peer)
            .map(|device| state.contexts[device].broken)
        {
            Some(None) => Ok(()),
            Some(Some(code)) => Err(code),
            None => Err(state.refuse(INVALID_DEVICE, "reaching no device".to_owned())),
        }
    })
}
