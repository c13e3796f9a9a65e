//! What NVML tells of the machine: one other process, which holds what `others` says.

use std::ffi::{CStr, c_char, c_int};

use crate::driver::pci_bus;
use crate::state::{give, give_text, lock};

type Code = c_int;

const SUCCESS: Code = 0;
const INVALID_ARGUMENT: Code = 2;
const INSUFFICIENT_SIZE: Code = 7;
const DRIVER_NOT_LOADED: Code = 9;

/// The process that holds what others hold.
const OTHER_PROCESS: u32 = 4242;

fn code(result: Result<(), u32>) -> Code {
    match result {
        Ok(()) => SUCCESS,
        Err(_) => INVALID_ARGUMENT,
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> Code {
    if lock().has_management {
        SUCCESS
    } else {
        DRIVER_NOT_LOADED
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlShutdown() -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetDriverVersion(text: *mut c_char, length: u32) -> Code {
    // SAFETY: the caller's buffer.
    code(unsafe { give_text(text.cast(), length as usize, "580.00.1") })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetProcessName(id: u32, text: *mut c_char, length: u32) -> Code {
    if id != OTHER_PROCESS {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's buffer.
    code(unsafe { give_text(text.cast(), length as usize, "/opt/games/greedy --all") })
}

/// A handle is the device's number and one.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByPciBusId_v2(
    bus: *const c_char,
    device: *mut usize,
) -> Code {
    // SAFETY: the caller's string.
    let bus = unsafe { CStr::from_ptr(bus) }.to_string_lossy();
    let found = (0..lock().devices).find(|&device| pci_bus(device) == bus);
    match found {
        // SAFETY: the caller's pointer.
        Some(found) => code(unsafe { give(device, found + 1) }),
        None => INVALID_ARGUMENT,
    }
}

/// `nvmlMemory_v2_t`
#[repr(C)]
struct Memory {
    version: u32,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: usize, memory: *mut Memory) -> Code {
    let state = lock();
    let free = state.free_bytes(device - 1) as u64;
    let total = state.memory_bytes as u64;
    let found = Memory {
        version: 2,
        total,
        reserved: 0,
        free,
        used: total - free,
    };
    // SAFETY: the caller's pointer.
    code(unsafe { give(memory, found) })
}

/// `nvmlProcessInfo_t`
#[repr(C)]
struct Process {
    id: u32,
    bytes: u64,
    instance: u32,
    compute_instance: u32,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    _device: usize,
    count: *mut u32,
    processes: *mut Process,
) -> Code {
    let bytes = lock().others_bytes as u64;
    let found = u32::from(bytes > 0);
    // SAFETY: the caller's pointer.
    let room = unsafe { count.replace(found) };
    if room < found || processes.is_null() {
        return if found == 0 {
            SUCCESS
        } else {
            INSUFFICIENT_SIZE
        };
    }
    if found > 0 {
        let process = Process {
            id: OTHER_PROCESS,
            bytes,
            instance: u32::MAX,
            compute_instance: u32::MAX,
        };
        // SAFETY: the caller has room for one.
        unsafe { processes.write(process) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTemperature(
    _device: usize,
    _sensor: u32,
    degrees: *mut u32,
) -> Code {
    // SAFETY: the caller's pointer.
    code(unsafe { give(degrees, 41) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPowerUsage(_device: usize, milliwatts: *mut u32) -> Code {
    // SAFETY: the caller's pointer.
    code(unsafe { give(milliwatts, 73_500) })
}
