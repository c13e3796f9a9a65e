//! CUDA kernels where there is no GPU, for tests; no part of the product.
//!
//! The units of `crates/kernels` are compiled as C++ for the host, with a header in the place of
//! what CUDA's compiler knows by itself and of `ptx.cuh`. A kernel's blocks run one after the
//! other, a block's threads as coroutines that go on until they wait for others: for the warp, at
//! an operation that it does together, or for the block. Between two meetings threads go on one
//! after the other, in either [`Order`]: what threads tell each other without a meeting goes wrong
//! in one of them. Copies to shared memory are made as late as allowed, shared memory begins as
//! numbers that are none and ends at a page that cannot be touched, and threads of a warp that come
//! to different meetings are an error.
//!
//! A cluster's blocks run at the same time. Products of warp groups and copies by the copy engine are
//! made when they are waited for; what one block sends another arrives then or at once, by the [`Order`].
//!
//! Not here: the order in which tensor cores add.

mod block;
mod memory;

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};

use block::Threads;

/// Whose turn it is between two meetings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// From the first thread on.
    #[default]
    Forward,
    /// From the last thread on.
    Backward,
}

/// Extents of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block, 1,024 at most.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, 256 KiB at most.
    pub shared_bytes: usize,
    /// Whose turn it is.
    pub order: Order,
}

impl Launch {
    /// Threads of a block.
    fn threads(&self) -> usize {
        self.block.iter().product::<u32>() as usize
    }
}

/// `emulated::Entry` of `emulated.h`.
#[repr(C)]
struct Entry {
    name: *const c_char,
    run: unsafe extern "C" fn(*const c_void),
    args_bytes: usize,
    most_threads: usize,
    ctas: usize,
    run_second: Option<unsafe extern "C" fn(*const c_void)>,
    is_hoppers: bool,
}

unsafe extern "C" {
    /// Tables of entries, each ended by one without a name; ended by null.
    static oxl_entries: [*const Entry; 0];
}

/// A kernel that can be run here.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    run: unsafe extern "C" fn(*const c_void),
    /// Blocks of a cluster.
    ctas: usize,
    /// Of a cluster's second block, if it needs one of its own.
    run_second: Option<unsafe extern "C" fn(*const c_void)>,
    args_bytes: usize,
    most_threads: usize,
    is_hoppers: bool,
}

thread_local! {
    /// Made once for a thread of the host: stacks are kept for the next block.
    static THREADS: RefCell<Threads> = RefCell::new(Threads::default());
}

impl Kernel {
    /// The kernel of a name, if it is one that can be emulated.
    pub fn find(name: &CStr) -> Option<Self> {
        let mut table = (&raw const oxl_entries).cast::<*const Entry>();
        loop {
            // SAFETY: the tables' list ends with null, which the loop does not pass.
            let mut entry = unsafe { *table };
            if entry.is_null() {
                return None;
            }
            // SAFETY: a table ends with an entry without a name, which the loop does not pass; names
            // are constants that end with zero.
            unsafe {
                while !(*entry).name.is_null() {
                    let Entry {
                        name: found,
                        run,
                        args_bytes,
                        most_threads,
                        ctas,
                        run_second,
                        is_hoppers,
                    } = *entry;
                    if CStr::from_ptr(found) == name {
                        return Some(Self {
                            run,
                            ctas,
                            run_second,
                            args_bytes,
                            most_threads,
                            is_hoppers,
                        });
                    }
                    entry = entry.add(1);
                }
                table = table.add(1);
            }
        }
    }

    /// Whether it is made of Hopper's own instructions, so that other GPUs' code does not have it.
    pub fn is_hoppers(&self) -> bool {
        self.is_hoppers
    }

    /// Blocks of a cluster; 1 where there are none.
    pub fn ctas(&self) -> usize {
        self.ctas
    }

    /// Bytes of the structure that the kernel takes.
    pub fn args_bytes(&self) -> usize {
        self.args_bytes
    }

    /// Runs all blocks of a launch, and says what was wrong with one.
    ///
    /// One launch runs at a time: kernels' static shared memory is the process'.
    ///
    /// # Safety
    /// `args` are the kernel's, and what they point to is there and as large as the kernel expects.
    /// No other thread is in this function.
    pub unsafe fn run(&self, launch: Launch, args: &[u8]) -> Result<(), String> {
        assert_eq!(args.len(), self.args_bytes, "the kernel's structure");
        let (threads, most) = (launch.threads(), self.most_threads);
        if !(1..=most).contains(&threads) {
            return Err(format!(
                "blocks of {threads} threads, where {most} are allowed"
            ));
        }
        if self.ctas > 2 && self.run_second.is_some() {
            return Err("static shared memory in clusters of more than two blocks".to_owned());
        }
        let mut kernels = vec![self.run_second.unwrap_or(self.run); self.ctas];
        kernels[0] = self.run;
        // As a GPU has arguments: aligned to whatever they may hold.
        let mut words = vec![0_u128; args.len().div_ceil(size_of::<u128>())];
        // SAFETY: the words have room for as many bytes.
        unsafe {
            let to = words.as_mut_ptr().cast::<u8>();
            to.copy_from_nonoverlapping(args.as_ptr(), args.len());
        }
        THREADS.with_borrow_mut(|threads| {
            // SAFETY: the caller's promise.
            unsafe { threads.run(&kernels, launch, words.as_ptr().cast()) }
        })
    }
}
