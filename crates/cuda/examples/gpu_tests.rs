//! The backend contract's whole conformance suite on every GPU that can be used.
//!
//! `gpu_tests [--list] [NAME...]` runs the cases whose names contain one of the words, or all;
//! `--list` prints the names and runs nothing. Ends with 0 if all passed, 1 if some did not, 2
//! if it was called wrongly, 3 if there is no GPU to run on.

use std::collections::HashSet;
use std::process::ExitCode;
use std::time::Instant;

use oxllama_backend::conformance::{self, CaseError, CaseReport, Tolerances};
use oxllama_backend::reference::ReferenceDevice;
use oxllama_backend::{Device, DeviceError};
use oxllama_cuda::{CudaDevice, gpus};
use oxllama_memory::{Bytes, DeviceId, Ledger};

/// Linears take activations that are rounded to fp16 (half a unit: 4.9e-4 of each term), and in
/// quantised ones the oracle rounds every weight to fp16 besides (2.4e-4), which the kernels do
/// not. Everything else is f32 in another order of sums than the oracle's, with the device's own
/// functions; attention multiplies fp16 keys and values as they are.
const TOLERANCES: Tolerances = Tolerances {
    exl2_linear: 2e-3,
    gptq_linear: 2e-3,
    float_linear: 2e-3,
    norm: 4e-6,
    elementwise: 4e-6,
    attention_f32: 2e-5,
    attention_f16: 1e-3,
    attention_quantised: 1e-3,
};

/// The ledger's room for the suite, whose largest case takes 64 MiB.
const ROOM: Bytes = Bytes::from_mib(256);

fn main() -> ExitCode {
    let mut words = Vec::new();
    let mut only_list = false;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--list" => only_list = true,
            option if option.starts_with('-') => {
                say(&format!(
                    "unknown option {option}: use --list, or words of cases' names"
                ));
                return ExitCode::from(2);
            }
            _ => words.push(argument),
        }
    }
    let is_wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word));
    if only_list {
        names()
            .iter()
            .filter(|name| is_wanted(name))
            .for_each(|name| say(name));
        return ExitCode::SUCCESS;
    }
    let gpus = match gpus() {
        Ok(gpus) => gpus,
        Err(error) => {
            say(&error.to_string());
            return ExitCode::from(3);
        }
    };
    let mut all_passed = true;
    for gpu in &gpus {
        say(&format!(
            "{}: {}, compute capability {}.{}, {}",
            gpu.id, gpu.name, gpu.capability.0, gpu.capability.1, gpu.memory
        ));
        let started = Instant::now();
        let device = match CudaDevice::open(gpu) {
            Ok(device) => device,
            Err(error) => {
                say(&format!("  {error}"));
                all_passed = false;
                continue;
            }
        };
        say(&format!(
            "  opened in {:.2} s",
            started.elapsed().as_secs_f64()
        ));
        all_passed &= conforms(&device, &is_wanted);
    }
    ExitCode::from(u8::from(!all_passed))
}

/// Names of all cases: what the suite asks for, when nothing is to run.
fn names() -> Vec<String> {
    let id = DeviceId::cpu(0);
    let ledger = Ledger::for_device(id.clone(), ROOM);
    let device = ReferenceDevice::new(id);
    let mut names = Vec::new();
    let mut collect = |name: &str| {
        names.push(name.to_owned());
        false
    };
    let run = conformance::run_selected(&device, &ledger, &TOLERANCES, &mut collect, &mut |_| ());
    run.expect("nothing runs, so nothing fails");
    names
}

/// Runs the wanted cases and prints those that do not pass, then a line of counts. A case that
/// stops with an error is one of them; the rest still run, unless the device is lost.
fn conforms<D: Device>(device: &D, is_wanted: &dyn Fn(&str) -> bool) -> bool {
    let started = Instant::now();
    let ledger = Ledger::for_device(device.id().clone(), ROOM);
    let mut asked = HashSet::new();
    let (mut passed, mut failed) = (0, 0);
    loop {
        let mut report = |case: &CaseReport| {
            if case.passed() {
                passed += 1;
            } else {
                failed += 1;
                say(&format!(
                    "  FAILED {}: error {:.3e}, tolerance {:.1e}",
                    case.name, case.error, case.tolerance
                ));
            }
        };
        // Begins anew after a case that stopped, with what was not asked for before.
        let mut select = |name: &str| asked.insert(name.to_owned()) && is_wanted(name);
        let run = conformance::run_selected(device, &ledger, &TOLERANCES, &mut select, &mut report);
        let Err(error) = run else { break };
        failed += 1;
        say(&format!("  STOPPED {error}"));
        if matches!(&*error.source, CaseError::Device(DeviceError::Lost { .. })) {
            say("  the device is lost: no other case can run");
            break;
        }
    }
    say(&format!(
        "  conformance: {passed} passed, {failed} failed, {:.1} s",
        started.elapsed().as_secs_f64()
    ));
    failed == 0 && passed > 0
}

#[expect(clippy::print_stdout, reason = "a program that reports")]
fn say(line: &str) {
    println!("{line}");
}
