//! The threads of a block, or of a cluster's blocks, in turns.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

use crate::memory::SharedMemory;
use crate::{Launch, Order};

/// Threads of a warp.
const LANES: usize = 32;

/// Threads of a cluster's blocks, at most; `emulated::MOST_CLUSTER_THREADS`.
const MOST_CLUSTER_THREADS: usize = 4096;

/// Bytes of a thread's stack: kernels keep little there.
const STACK_BYTES: usize = 128 << 10;

/// `emulated::Meeting` of more than a warp; everything else is a warp's.
const BLOCK: i32 = 0;
const POLL: i32 = 6;
const CLUSTER: i32 = 7;
const TWO_WARPS: i32 = 256;

type Kernel = unsafe extern "C" fn(*const c_void);
type Thread = Coroutine<(), i32, (), DefaultStack>;

thread_local! {
    /// Of the coroutine that runs.
    static YIELDER: Cell<*const Yielder<(), i32>> = const { Cell::new(ptr::null()) };
}

unsafe extern "C" {
    fn oxl_emulated_begin(
        grid: *const u32,
        extent: *const u32,
        block: *const u32,
        shared: *const *mut u8,
        ctas: i32,
        at_once: bool,
    );
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
    /// Of each block of a cluster.
    shared: Vec<SharedMemory>,
}

impl Threads {
    /// Runs a kernel's blocks in order, or those of a cluster together, by a kernel each.
    ///
    /// # Safety
    /// As `Kernel::run` of the crate, which has looked at the launch; `args` are aligned.
    pub(crate) unsafe fn run(
        &mut self,
        kernels: &[Kernel],
        launch: Launch,
        args: *const c_void,
    ) -> Result<(), String> {
        let [width, height, depth] = launch.grid;
        let ctas = kernels.len() as u32;
        let block_threads = launch.threads();
        let are_whole = width.is_multiple_of(ctas) && block_threads.is_multiple_of(LANES);
        let are_few = block_threads * kernels.len() <= MOST_CLUSTER_THREADS;
        if ctas > 1 && !(are_whole && are_few) {
            return Err(format!("clusters of {ctas} blocks as {launch:?}"));
        }
        for z in 0..depth {
            for y in 0..height {
                for x in (0..width).step_by(kernels.len()) {
                    let block = [x, y, z];
                    self.begin(launch, block, kernels.len())?;
                    let mut threads = Vec::new();
                    for &kernel in kernels {
                        threads.extend(self.start(kernel, args, block_threads)?);
                    }
                    let result = run_cluster(&mut threads, block_threads, launch.order);
                    for thread in threads {
                        self.stacks.push(finished_stack(thread));
                    }
                    result.map_err(|what| format!("{what}, block {block:?} of {launch:?}"))?;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, launch: Launch, block: [u32; 3], ctas: usize) -> Result<(), String> {
        while self.shared.len() < ctas {
            self.shared.push(SharedMemory::new()?);
        }
        let mut starts = Vec::new();
        for shared in &mut self.shared[..ctas] {
            starts.push(shared.begin(launch.shared_bytes)?.as_ptr());
        }
        let (grid, extent) = (launch.grid, launch.block);
        // SAFETY: three numbers each, and as many addresses as blocks; the memory is theirs until the next ones begin.
        unsafe {
            oxl_emulated_begin(
                grid.as_ptr(),
                extent.as_ptr(),
                block.as_ptr(),
                starts.as_ptr(),
                ctas as i32,
                launch.order == Order::Backward,
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

/// Lets a cluster's threads go on until all have ended.
fn run_cluster(threads: &mut [Thread], block_threads: usize, order: Order) -> Result<(), String> {
    let mut states = vec![State::CanRun; threads.len()];
    // Rounds in which all that went on was asking whether others have.
    let mut idle_rounds = 0;
    loop {
        let mut goes_on = false;
        for warp in in_order(threads.len().div_ceil(LANES), order) {
            let first = warp * LANES;
            let lanes = first..threads.len().min(first + LANES);
            goes_on |= run_warp(&mut threads[lanes.clone()], &mut states[lanes], warp, order)?;
        }
        if states.iter().all(|&state| state == State::Ended) {
            return Ok(());
        }
        goes_on |= release(&mut states, block_threads);
        idle_rounds = if goes_on { 0 } else { idle_rounds + 1 };
        if idle_rounds > 2 {
            return Err(format!("all wait for each other: {states:?}"));
        }
    }
}

/// Lets those go on who have met all that they wait for; tells whether there are any but those who ask again.
fn release(states: &mut [State], block_threads: usize) -> bool {
    let has_met = |states: &[State], meeting: i32| {
        let mut others = states.iter().filter(|state| **state != State::Ended);
        others.all(|&state| state == State::Waits(meeting))
    };
    let mut goes_on = false;
    let mut let_go = |states: &mut [State], meeting: i32| {
        for state in states
            .iter_mut()
            .filter(|state| **state == State::Waits(meeting))
        {
            *state = State::CanRun;
            goes_on |= meeting != POLL;
        }
    };
    if has_met(states, CLUSTER) {
        let_go(states, CLUSTER);
    }
    for block in states.chunks_mut(block_threads) {
        if has_met(block, BLOCK) {
            let_go(block, BLOCK);
        }
        for pair in TWO_WARPS..TWO_WARPS + 16 {
            let count = block.iter().filter(|state| **state == State::Waits(pair));
            if count.count() == 2 * LANES {
                let_go(block, pair);
            }
        }
    }
    let_go(states, POLL);
    goes_on
}

/// Numbers below `count`, in order.
fn in_order(count: usize, order: Order) -> impl Iterator<Item = usize> {
    (0..count).map(move |number| match order {
        Order::Forward => number,
        Order::Backward => count - 1 - number,
    })
}

/// Lets a warp's threads go on until each has ended or waits for more than the warp. Tells whether one did anything but ask
/// again.
fn run_warp(
    threads: &mut [Thread],
    states: &mut [State],
    warp: usize,
    order: Order,
) -> Result<bool, String> {
    let mut goes_on = false;
    loop {
        for lane in in_order(threads.len(), order) {
            let state = &mut states[lane];
            if *state == State::CanRun {
                oxl_emulated_enter((warp * LANES + lane) as i32);
                *state = match threads[lane].resume(()) {
                    CoroutineResult::Yield(meeting) => State::Waits(meeting),
                    CoroutineResult::Return(()) => State::Ended,
                };
                goes_on |= *state != State::Waits(POLL);
            }
        }
        let mut waiting = states.iter().filter(|state| **state != State::Ended);
        let Some(&first) = waiting.next() else {
            return Ok(goes_on);
        };
        if waiting.any(|&state| state != first) {
            return Err(format!("warp {warp} came apart: {states:?}"));
        }
        if let State::Waits(BLOCK | POLL | CLUSTER | TWO_WARPS..) = first {
            return Ok(goes_on);
        }
        for state in &mut *states {
            if *state != State::Ended {
                *state = State::CanRun;
            }
        }
    }
}
