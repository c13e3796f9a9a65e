//! A block's threads, in turns.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

use crate::memory::SharedMemory;
use crate::{Launch, Order};

/// Threads of a warp.
const LANES: usize = 32;

/// Bytes of a thread's stack: kernels keep little there.
const STACK_BYTES: usize = 128 << 10;

/// `emulated::BLOCK`; everything else is a meeting of a warp.
const BLOCK: i32 = 0;

type Kernel = unsafe extern "C" fn(*const c_void);
type Thread = Coroutine<(), i32, (), DefaultStack>;

thread_local! {
    /// Of the coroutine that runs.
    static YIELDER: Cell<*const Yielder<(), i32>> = const { Cell::new(ptr::null()) };
}

unsafe extern "C" {
    fn oxl_emulated_begin(grid: *const u32, extent: *const u32, block: *const u32, shared: *mut u8);
    safe fn oxl_emulated_enter(thread: i32);
}

/// Called by a kernel's thread where it waits for others.
#[unsafe(no_mangle)]
extern "C" fn oxl_emulated_meet(meeting: i32) {
    let yielder = YIELDER.get();
    // SAFETY: kernels run in coroutines alone, and the yielder is that of the one that runs.
    unsafe { (*yielder).suspend(meeting) };
    YIELDER.set(yielder);
}

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    CanRun,
    /// Waits for others at the meeting of this number.
    Waits(i32),
    Ended,
}

/// What the blocks of all launches are run with.
#[derive(Default)]
pub(crate) struct Threads {
    stacks: Vec<DefaultStack>,
    shared: Option<SharedMemory>,
}

impl Threads {
    /// Runs a kernel's blocks in order.
    ///
    /// # Safety
    /// As `Kernel::run` of the crate, which has looked at the launch; `args` are aligned.
    pub(crate) unsafe fn run(
        &mut self,
        kernel: Kernel,
        launch: Launch,
        args: *const c_void,
    ) -> Result<(), String> {
        let [width, height, depth] = launch.grid;
        for z in 0..depth {
            for y in 0..height {
                for x in 0..width {
                    let block = [x, y, z];
                    self.begin(launch, block)?;
                    let mut threads = self.start(kernel, args, launch.threads())?;
                    let result = run_block(&mut threads, launch.order);
                    for thread in threads {
                        self.stacks.push(finished_stack(thread));
                    }
                    result.map_err(|what| format!("{what}, block {block:?} of {launch:?}"))?;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, launch: Launch, block: [u32; 3]) -> Result<(), String> {
        let shared = match &mut self.shared {
            Some(shared) => shared,
            none => none.insert(SharedMemory::new()?),
        };
        let start = shared.begin(launch.shared_bytes)?;
        let (grid, extent) = (launch.grid, launch.block);
        // SAFETY: three numbers each; the memory is the block's until the next one begins.
        unsafe {
            oxl_emulated_begin(
                grid.as_ptr(),
                extent.as_ptr(),
                block.as_ptr(),
                start.as_ptr(),
            );
        };
        Ok(())
    }

    /// Coroutines of a block, none of which has run.
    fn start(
        &mut self,
        kernel: Kernel,
        args: *const c_void,
        count: usize,
    ) -> Result<Vec<Thread>, String> {
        (0..count)
            .map(|_| {
                let stack = match self.stacks.pop() {
                    Some(stack) => stack,
                    None => DefaultStack::new(STACK_BYTES).map_err(|error| error.to_string())?,
                };
                Ok(Coroutine::with_stack(stack, move |yielder, ()| {
                    YIELDER.set(yielder);
                    // SAFETY: the promise of `run`.
                    unsafe { kernel(args) };
                }))
            })
            .collect()
    }
}

/// A thread's stack, wherever the thread has stopped.
fn finished_stack(mut thread: Thread) -> DefaultStack {
    if !thread.done() {
        // SAFETY: what a kernel keeps on its stack needs no end: plain numbers.
        unsafe { thread.force_reset() };
    }
    thread.into_stack()
}

/// Lets a block's threads go on until all have ended.
fn run_block(threads: &mut [Thread], order: Order) -> Result<(), String> {
    let mut states = vec![State::CanRun; threads.len()];
    loop {
        for warp in in_order(threads.len().div_ceil(LANES), order) {
            let first = warp * LANES;
            let lanes = first..threads.len().min(first + LANES);
            run_warp(&mut threads[lanes.clone()], &mut states[lanes], warp, order)?;
        }
        // Every thread has ended or waits for the block.
        let mut is_done = true;
        for state in &mut states {
            if *state != State::Ended {
                *state = State::CanRun;
                is_done = false;
            }
        }
        if is_done {
            return Ok(());
        }
    }
}

/// Numbers below `count`, in order.
fn in_order(count: usize, order: Order) -> impl Iterator<Item = usize> {
    (0..count).map(move |number| match order {
        Order::Forward => number,
        Order::Backward => count - 1 - number,
    })
}

/// Lets a warp's threads go on until each has ended or waits for the block.
fn run_warp(
    threads: &mut [Thread],
    states: &mut [State],
    warp: usize,
    order: Order,
) -> Result<(), String> {
    loop {
        for lane in in_order(threads.len(), order) {
            let state = &mut states[lane];
            if *state == State::CanRun {
                oxl_emulated_enter((warp * LANES + lane) as i32);
                *state = match threads[lane].resume(()) {
                    CoroutineResult::Yield(meeting) => State::Waits(meeting),
                    CoroutineResult::Return(()) => State::Ended,
                };
            }
        }
        let mut waiting = states.iter().filter(|state| **state != State::Ended);
        let Some(&first) = waiting.next() else {
            return Ok(());
        };
        if waiting.any(|&state| state != first) {
            return Err(format!("warp {warp} came apart: {states:?}"));
        }
        if first == State::Waits(BLOCK) {
            return Ok(());
        }
        for state in &mut *states {
            if *state != State::Ended {
                *state = State::CanRun;
            }
        }
    }
}
