//! A pool of threads that wait for work by spinning, for regions of a few microseconds.
//!
//! A decode step has some two hundred parallel regions, and waking a sleeping thread costs more
//! than most of them take. So a worker that has finished looks for the next region for a short
//! while before it goes to sleep. Three rules keep that from harming anyone:
//! - a worker that waited in vain spins half as long the next time, and one that was rewarded
//!   twice as long, so an idle or oversubscribed machine soon sees no spinning at all;
//! - with more threads than the process may use cores nobody spins: waiting threads yield;
//! - threads are never pinned.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Longest idle spin, in pause instructions: some 20 to 100 µs, depending on the processor.
const MOST_SPINS: u32 = 2048;
/// Below this a spin is not worth starting.
const LEAST_SPINS: u32 = 16;
/// How long a thread inside a region spins for the others before it yields between looks.
const REGION_SPINS: u32 = 4096;

/// A region as the workers see it.
type Task = *const (dyn Fn(&Team<'_>) + Sync);

struct Shared {
    threads: usize,
    /// Whether waiting threads may spin at all.
    may_spin: bool,
    /// Counts regions; a worker runs one task per value.
    generation: AtomicUsize,
    /// The region's task: written before `generation` rises, read after.
    task: UnsafeCell<Option<Task>>,
    /// Workers that have not finished the region.
    running: AtomicUsize,
    /// A thread of the region panicked: the others stop waiting for it.
    panicked: AtomicBool,
    /// Threads that have reached the current barrier.
    arrived: AtomicUsize,
    /// Counts barriers.
    barriers: AtomicUsize,
    /// Workers that sleep or are about to.
    sleepers: AtomicUsize,
    stop: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `task` is the only field that is not Sync. It is written by the thread that holds the
// pool's submission lock while no worker runs, published by the release store to `generation`,
// and read only by workers that acquired that generation.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `task` is only followed while the submitter waits.
unsafe impl Send for Shared {}

/// A fixed number of threads, the caller being the first of them.
///
/// Shared by every device that runs on the same cores: regions of different callers take turns.
pub struct SpinPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    submission: Mutex<()>,
}

impl std::fmt::Debug for SpinPool {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("SpinPool")
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}

/// A region's view of the threads that run it.
pub struct Team<'a> {
    /// This thread's number, the caller's being 0.
    pub thread: usize,
    /// Threads of the region.
    pub threads: usize,
    shared: Option<&'a Shared>,
}

impl std::fmt::Debug for Team<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "thread {} of {}", self.thread, self.threads)
    }
}

impl Team<'_> {
    /// Waits until every thread of the region is here.
    ///
    /// # Panics
    /// If another thread of the region panicked, as it would never arrive.
    pub fn barrier(&self) {
        let Some(shared) = self.shared else { return };
        let barrier = shared.barriers.load(Ordering::Acquire);
        if shared.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            shared.arrived.store(0, Ordering::Relaxed);
            shared
                .barriers
                .store(barrier.wrapping_add(1), Ordering::Release);
            return;
        }
        shared.wait_until(|| {
            let passed = shared.barriers.load(Ordering::Acquire) != barrier;
            assert!(
                passed || !shared.panicked.load(Ordering::Acquire),
                "another thread of this parallel region panicked"
            );
            passed
        });
    }

    /// This thread's share of `0..items`: contiguous, a function of the counts alone.
    pub fn share(&self, items: usize) -> std::ops::Range<usize> {
        let start = |thread: usize| items * thread / self.threads;
        start(self.thread)..start(self.thread + 1)
    }
}

impl Shared {
    /// Waits for something that running threads will bring about.
    fn wait_until(&self, mut done: impl FnMut() -> bool) {
        if self.may_spin {
            for _ in 0..REGION_SPINS {
                if done() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        while !done() {
            std::thread::yield_now();
        }
    }

    /// A worker's life.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        let mut spins = if self.may_spin { MOST_SPINS } else { 0 };
        loop {
            if self.spin_for_region(seen, spins) {
                spins = (spins * 2).min(MOST_SPINS);
            } else {
                spins = if spins < 2 * LEAST_SPINS {
                    0
                } else {
                    spins / 2
                };
                self.sleep_until_region(seen);
                // After a sleep the next region is likely to follow soon; try again modestly.
                if self.may_spin {
                    spins = spins.max(LEAST_SPINS);
                }
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            seen = self.generation.load(Ordering::Acquire);
            // SAFETY: the generation was acquired, so the task was written before; the submitter
            // neither returns nor rewrites it before `running` reaches zero.
            let task = unsafe { (*self.task.get()).map(|task| &*task) };
            let team = Team {
                thread,
                threads: self.threads,
                shared: Some(self),
            };
            if let Some(task) = task
                && catch_unwind(AssertUnwindSafe(|| task(&team))).is_err()
            {
                self.panicked.store(true, Ordering::Release);
            }
            self.running.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn has_news(&self, seen: usize) -> bool {
        self.generation.load(Ordering::SeqCst) != seen || self.stop.load(Ordering::SeqCst)
    }

    fn spin_for_region(&self, seen: usize, spins: u32) -> bool {
        for _ in 0..spins {
            if self.has_news(seen) {
                return true;
            }
            std::hint::spin_loop();
        }
        self.has_news(seen)
    }

    fn sleep_until_region(&self, seen: usize) {
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // The submitter raises the generation before it looks for sleepers, and a sleeper counts
        // itself before it looks at the generation: one of the two sees the other.
        while !self.has_news(seen) {
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.sleep));
            self.wake.notify_all();
        }
    }
}

/// No data is guarded, so a poisoned lock is as good as any.
fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SpinPool {
    /// A pool of `threads` threads, the caller of [`Self::run`] included; at least one.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            threads,
            may_spin: threads <= Self::default_threads(),
            generation: AtomicUsize::new(0),
            task: UnsafeCell::new(None),
            running: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            arrived: AtomicUsize::new(0),
            barriers: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(threads - 1),
            submission: Mutex::new(()),
        };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("oxllama-cpu-{thread}"));
            pool.workers
                .push(builder.spawn(move || shared.work(thread))?);
        }
        Ok(pool)
    }

    /// The cores that this process may use, quotas and affinity considered.
    pub fn default_threads() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    /// Threads of a region.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Runs `task` once on every thread and returns when all have finished. Must not be called
    /// from within a task.
    ///
    /// # Panics
    /// If the task panicked on any thread, after the others have finished.
    pub fn run(&self, task: &(dyn Fn(&Team<'_>) + Sync)) {
        let shared = &*self.shared;
        let _submission = lock(&self.submission);
        if shared.threads == 1 {
            return task(&Team {
                thread: 0,
                threads: 1,
                shared: None,
            });
        }
        let erased = std::ptr::from_ref(task);
        // SAFETY: only the lifetime changes. Workers follow the pointer only until `running` is
        // zero, and this function waits for that on every path.
        let erased: Task = unsafe { std::mem::transmute(erased) };
        // SAFETY: the submission lock is held and no worker runs, so nobody reads.
        unsafe { *shared.task.get() = Some(erased) };
        shared.running.store(shared.threads - 1, Ordering::Relaxed);
        shared.arrived.store(0, Ordering::Relaxed);
        shared.generation.fetch_add(1, Ordering::SeqCst);
        shared.wake_sleepers();
        let team = Team {
            thread: 0,
            threads: shared.threads,
            shared: Some(shared),
        };
        let own = catch_unwind(AssertUnwindSafe(|| task(&team)));
        if own.is_err() {
            shared.panicked.store(true, Ordering::Release);
        }
        shared.wait_until(|| shared.running.load(Ordering::Acquire) == 0);
        let panicked = shared.panicked.swap(false, Ordering::AcqRel);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!panicked, "a worker thread of a parallel region panicked");
    }
}

impl Drop for SpinPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_sleepers();
        for worker in self.workers.drain(..) {
            // A worker catches its task's panics, so joining cannot fail in a way to report.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_once_per_region() {
        for threads in [1, 2, 3, 8] {
            let pool = SpinPool::new(threads).unwrap();
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..200 {
                pool.run(&|team| {
                    assert_eq!(team.threads, threads);
                    counts[team.thread].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(
                counts
                    .iter()
                    .all(|count| count.load(Ordering::Relaxed) == 200)
            );
        }
    }

    #[test]
    fn a_barrier_separates_phases() {
        let pool = SpinPool::new(4).unwrap();
        let written: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
        pool.run(&|team| {
            for phase in 1..50 {
                written[team.thread].store(phase, Ordering::Relaxed);
                team.barrier();
                assert!(written.iter().all(|w| w.load(Ordering::Relaxed) == phase));
                team.barrier();
            }
        });
    }

    #[test]
    fn shares_cover_everything_once() {
        for threads in 1..5 {
            for items in [0, 1, 2, 7, 64] {
                let team = |thread| Team {
                    thread,
                    threads,
                    shared: None,
                };
                let all: Vec<usize> = (0..threads).flat_map(|t| team(t).share(items)).collect();
                assert_eq!(all, (0..items).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = SpinPool::new(3).unwrap();
        for culprit in [0, 2] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|team| {
                    assert!(team.thread != culprit, "deliberate");
                    team.barrier();
                });
            }));
            assert!(result.is_err());
            let ran = AtomicUsize::new(0);
            pool.run(&|team| {
                team.barrier();
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), 3);
        }
    }
}
