//! Dynamic shared memory of a block.

use std::ptr::NonNull;

/// The most that a block may have.
const MOST_BYTES: usize = 256 << 10;

/// What no kernel may rely on: not a number as fp16 and as f32, and far from any address.
const UNSET: u8 = 0xff;

/// What kernels align their arrays to.
const ALIGNMENT: usize = 128;

/// Memory up to a page that cannot be touched.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    start: NonNull<u8>,
    page_bytes: usize,
}

impl SharedMemory {
    pub(crate) fn new() -> Result<Self, String> {
        // SAFETY: asks for a constant.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let bytes = MOST_BYTES + page_bytes;
        // SAFETY: new memory wherever there is room, and its last page closed.
        let start = unsafe {
            let start = libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0);
            if start == libc::MAP_FAILED
                || libc::mprotect(start.byte_add(MOST_BYTES), page_bytes, libc::PROT_NONE) != 0
            {
                return Err("no shared memory".to_owned());
            }
            start.cast::<u8>()
        };
        let start = NonNull::new(start).ok_or("no shared memory")?;
        Ok(Self { start, page_bytes })
    }

    /// Memory of a block that begins: as near to its end as arrays can be aligned.
    pub(crate) fn begin(&mut self, bytes: usize) -> Result<NonNull<u8>, String> {
        let padded = bytes.next_multiple_of(ALIGNMENT);
        if padded > MOST_BYTES {
            return Err(format!("{bytes} bytes of shared memory"));
        }
        // SAFETY: within what was mapped.
        unsafe {
            let start = self.start.add(MOST_BYTES - padded);
            start.write_bytes(UNSET, padded);
            Ok(start)
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` and used by nobody else.
        unsafe { libc::munmap(self.start.as_ptr().cast(), MOST_BYTES + self.page_bytes) };
    }
}
