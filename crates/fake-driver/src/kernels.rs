//! What kernels do, if they are to do anything: they are emulated, at once, in the order of launches.

use std::collections::HashMap;
use std::ffi::c_void;

use oxllama_emulator::{Kernel, Launch, Order};

use crate::streams::LaunchConfig;

/// A kernel with what it was launched with.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    kernel: Kernel,
    launch: Launch,
    args: Vec<u8>,
}

impl Run {
    /// # Safety
    /// The arguments name memory of the machine that is still there, and the machine is locked.
    unsafe fn run(&self) -> Result<(), String> {
        // SAFETY: the caller's promise: under the machine's lock no other kernel runs.
        unsafe { self.kernel.run(self.launch, &self.args) }
    }
}

/// Kernels and launches by handle.
#[derive(Debug, Default)]
pub(crate) struct Kernels {
    /// How threads take turns; `None`: kernels do nothing.
    pub(crate) order: Option<Order>,
    functions: HashMap<usize, Kernel>,
    /// Of streams that record, of graphs, and of what can be replayed.
    recorded: HashMap<usize, Vec<Run>>,
}

impl Kernels {
    /// Takes note of a function.
    pub(crate) fn add(&mut self, function: usize, kernel: Kernel) {
        self.functions.insert(function, kernel);
    }

    /// Blocks of a function's clusters.
    pub(crate) fn ctas(&self, function: usize) -> usize {
        self.functions.get(&function).map_or(1, Kernel::ctas)
    }

    /// Runs a kernel, or takes note of it where the stream records.
    ///
    /// # Safety
    /// `parameters` points to the pointer of the kernel's one argument, which names memory of the
    /// machine, and the machine is locked.
    pub(crate) unsafe fn launch(
        &mut self,
        function: usize,
        config: &LaunchConfig,
        parameters: *const *const c_void,
        recording: Option<usize>,
    ) -> Result<(), String> {
        let Some(order) = self.order else {
            return Ok(());
        };
        let launch = Launch {
            grid: config.grid,
            block: config.block,
            shared_bytes: config.shared_bytes as usize,
            order,
        };
        let kernel = *self
            .functions
            .get(&function)
            .ok_or("a kernel that nobody has asked for")?;
        // SAFETY: the caller's promise; the structure is the kernel's.
        let args = unsafe {
            std::slice::from_raw_parts((*parameters).cast::<u8>(), kernel.args_bytes()).to_vec()
        };
        let run = Run {
            kernel,
            launch,
            args,
        };
        match recording {
            Some(stream) => {
                self.recorded.entry(stream).or_default().push(run);
                Ok(())
            }
            // SAFETY: the caller's promise.
            None => unsafe { run.run() },
        }
    }

    /// Hands what a stream has recorded to a graph.
    pub(crate) fn end_recording(&mut self, stream: usize, graph: usize) {
        if let Some(runs) = self.recorded.remove(&stream) {
            self.recorded.insert(graph, runs);
        }
    }

    /// Makes a graph's launches those of what can be replayed.
    pub(crate) fn instantiate(&mut self, graph: usize, executable: usize) {
        if let Some(runs) = self.recorded.get(&graph).cloned() {
            self.recorded.insert(executable, runs);
        }
    }

    /// # Safety
    /// What was launched then is still there, and the machine is locked.
    pub(crate) unsafe fn replay(&self, executable: usize) -> Result<(), String> {
        let runs = self.recorded.get(&executable);
        // SAFETY: the caller's promise.
        runs.into_iter()
            .flatten()
            .try_for_each(|run| unsafe { run.run() })
    }

    /// Forgets a handle.
    pub(crate) fn remove(&mut self, handle: usize) {
        self.functions.remove(&handle);
        self.recorded.remove(&handle);
    }
}
