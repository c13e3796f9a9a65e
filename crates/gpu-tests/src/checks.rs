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
            let result = check();
            self.note(name, result.map_err(|error| format!("{error:#}")));
        }
    }

    /// Takes note of a check that has been made.
    pub(crate) fn note(&mut self, name: &str, result: Result<String, String>) {
        match result {
            Ok(measured) => {
                self.passed += 1;
                print(&format!("ok      {name}  {measured}"));
            }
            Err(error) => {
                print(&format!("FAILED  {name}  {error}"));
                self.failed.push(name.to_owned());
            }
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
            print(&format!("  FAILED {name}"));
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
