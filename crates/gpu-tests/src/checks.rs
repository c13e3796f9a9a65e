//! Counting and printing what held.

use std::time::Instant;

use anyhow::Result;
use oxllama_cuda::CudaDevice;
use oxllama_memory::{DeviceInfo, Inventory, Ledger};

/// The checks of one run, on one device.
pub(crate) struct Checks<'a> {
    pub(crate) device: &'a CudaDevice,
    filters: Vec<String>,
    passed: usize,
    failed: Vec<String>,
    start: Instant,
}

impl<'a> Checks<'a> {
    pub(crate) fn new(device: &'a CudaDevice, filters: Vec<String>) -> Self {
        Self {
            device,
            filters,
            passed: 0,
            failed: Vec::new(),
            start: Instant::now(),
        }
    }

    /// Whether checks whose names start with `name` are asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        let matches = |filter: &String| name.contains(filter.as_str());
        self.filters.is_empty() || self.filters.iter().any(matches)
    }

    /// Runs one check unless the filters leave it out; `check` returns what it measured, or
    /// fails.
    pub(crate) fn check(&mut self, name: &str, check: impl FnOnce() -> Result<String>) {
        if self.wants(name) {
            let start = Instant::now();
            let result = check();
            self.note(name, start, result.map_err(|error| format!("{error:#}")));
        }
    }

    /// Takes note of a check that was begun at `start`, in the form of a row of run.sh's table.
    pub(crate) fn note(&mut self, name: &str, start: Instant, result: Result<String, String>) {
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(measured) => {
                self.passed += 1;
                print(&format!("PASS    {seconds:7.1} s  {name}  {measured}"));
            }
            Err(error) => {
                // One line: the table is made of lines.
                let error = error.replace('\n', " ");
                print(&format!("FAIL    {seconds:7.1} s  {name}  {error}"));
                self.failed.push(name.to_owned());
            }
        }
    }

    /// Says why a check that is asked for cannot be made here.
    pub(crate) fn skip(&self, name: &str, reason: &str) {
        if self.wants(name) {
            print(&format!("SKIPPED {:7.1} s  {name}  {reason}", 0.0));
        }
    }

    /// Prints the sum; returns how many failed.
    pub(crate) fn finish(self) -> usize {
        let Self {
            passed,
            failed,
            start,
            ..
        } = self;
        let seconds = start.elapsed().as_secs_f64();
        print(&format!(
            "{passed} passed, {} failed in {seconds:.1} s",
            failed.len()
        ));
        for name in &failed {
            print(&format!("  failed: {name}"));
        }
        failed.len()
    }

    /// The device with everything that is free on it, and empty books.
    pub(crate) fn books(&self) -> Result<(Inventory, Ledger)> {
        let info = self.device.info();
        let mut device = DeviceInfo::new(info.id.clone(), info.name.clone(), info.memory);
        device.available = self.device.free_memory()?;
        let inventory = Inventory::new(vec![device])?;
        let ledger = Ledger::new(&inventory);
        Ok((inventory, ledger))
    }
}

#[expect(clippy::print_stdout, reason = "a command-line tool talks to its user")]
pub(crate) fn print(line: &str) {
    println!("{line}");
}
