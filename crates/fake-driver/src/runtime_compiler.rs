//! A runtime compiler whose code is the same for every source: the driver takes any.

use std::ffi::{c_char, c_int, c_void};

const CODE: &[u8] = b"code for the fake driver";
const ARCHITECTURES: [c_int; 4] = [80, 86, 89, 90];
const SUCCESS: c_int = 0;

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    // SAFETY: the caller's pointers.
    unsafe {
        major.write(13);
        minor.write(0);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetErrorString(_code: c_int) -> *const c_char {
    c"a fault of the fake compiler".as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetNumSupportedArchs(count: *mut c_int) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { count.write(ARCHITECTURES.len() as c_int) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetSupportedArchs(architectures: *mut c_int) -> c_int {
    // SAFETY: the caller has room for as many as it was told of.
    unsafe { architectures.copy_from(ARCHITECTURES.as_ptr(), ARCHITECTURES.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    _source: *const c_char,
    _name: *const c_char,
    _headers: c_int,
    _texts: *const *const c_char,
    _names: *const *const c_char,
) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { program.write(std::ptr::without_provenance_mut(1)) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCompileProgram(
    _program: *mut c_void,
    _options: c_int,
    _texts: *const *const c_char,
) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLogSize(_program: *mut c_void, bytes: *mut usize) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { bytes.write(1) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLog(_program: *mut c_void, text: *mut c_char) -> c_int {
    // SAFETY: the caller has room for as much as it was told.
    unsafe { text.write(0) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBINSize(_program: *mut c_void, bytes: *mut usize) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { bytes.write(CODE.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBIN(_program: *mut c_void, code: *mut c_char) -> c_int {
    // SAFETY: the caller has room for as much as it was told.
    unsafe { code.cast::<u8>().copy_from(CODE.as_ptr(), CODE.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { program.write(std::ptr::null_mut()) };
    SUCCESS
}
