//! `cargo xtask kernels`: every kernel for every architecture, on a machine without a GPU.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use oxllama_nvcc::{
    Checks, DEFAULT_TARGETS, FunctionReport, Nvcc, NvccError, Target, UnitSource, parse_report,
};

use crate::toolkit::Toolkit;
use crate::{cargo_command, print, report, root, run, target_folder};

/// The most that the images of one target may take, all units together.
const MOST_IMAGE_BYTES: u64 = 3 << 20;

/// What one unit became for one target.
#[derive(Debug, Clone, Default, PartialEq)]
struct Outcome {
    unit: String,
    target: String,
    functions: Vec<FunctionReport>,
    image_bytes: u64,
    seconds: f64,
}

/// Compiles with nvcc for each target of `list`, prints what ptxas says, then with NVRTC.
pub(crate) fn kernels(list: Option<&str>) -> Result<()> {
    let targets = Target::parse_list(list.unwrap_or(DEFAULT_TARGETS))?;
    let toolkit = Toolkit::find_or_install()?;
    let units = oxllama_nvcc::units(&root().join("crates/kernels/cuda"))?;
    let out = target_folder().join("kernels");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;

    let started = Instant::now();
    let pairs: Vec<(&UnitSource, &Target)> = units
        .iter()
        .flat_map(|unit| targets.iter().map(move |target| (unit, target)))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let results = oxllama_nvcc::for_each_in_parallel(threads, &pairs, |(unit, target)| {
        compile(&toolkit.nvcc, unit, target, &out)
    });
    let mut outcomes = Vec::new();
    let mut failures = Vec::new();
    for result in results {
        match result {
            Ok(outcome) => outcomes.push(outcome),
            Err(error) => failures.push(error.to_string()),
        }
    }
    print(&table(&outcomes));
    for unit in &units {
        let compiled = outcomes.iter().filter(|outcome| outcome.unit == unit.name);
        failures.extend(
            compiled.flat_map(|outcome| faults(outcome, &unit.kernels_on(&outcome.target))),
        );
    }
    failures.extend(sizes(&outcomes));
    let seconds = started.elapsed().as_secs_f64();
    print(&format!(
        "{} images in {seconds:.0} s on {threads} threads",
        outcomes.len()
    ));
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    compile_at_run_time(&toolkit)
}

fn compile(
    nvcc: &Nvcc,
    unit: &UnitSource,
    target: &Target,
    out: &Path,
) -> Result<Outcome, NvccError> {
    let started = Instant::now();
    let image = out.join(format!("{}.{target}.fatbin", unit.name));
    let output = nvcc.compile(unit, std::slice::from_ref(target), Checks::Strict, &image)?;
    Ok(Outcome {
        unit: unit.name.clone(),
        target: target.to_string(),
        functions: parse_report(&output),
        // An image that is not there was never written, whatever the compiler says.
        image_bytes: fs::metadata(&image).map_or(0, |file| file.len()),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The tests of the runtime compiler, with NVRTC of the same release.
fn compile_at_run_time(toolkit: &Toolkit) -> Result<()> {
    report("xtask: compiling every unit with NVRTC");
    // All of the workspace, so that what is built is what its tests need as well.
    let mut command: Command = cargo_command(["test", "--workspace", "--test", "nvrtc"]);
    command.env("OXLLAMA_REQUIRE_NVRTC", "1");
    if let Some(libraries) = &toolkit.libraries {
        command.env("OXLLAMA_CUDA_LIBRARIES", libraries);
    }
    run(&mut command)
}

/// One line a kernel and target. Size and time are those of the unit and stand on its first line.
fn table(outcomes: &[Outcome]) -> String {
    let mut rows = vec![
        [
            "unit",
            "kernel",
            "target",
            "registers",
            "shared bytes",
            "stack bytes",
            "spilled bytes",
            "image bytes",
            "seconds",
        ]
        .map(str::to_owned),
    ];
    for outcome in outcomes {
        let mut size = [
            outcome.image_bytes.to_string(),
            format!("{:.1}", outcome.seconds),
        ];
        let mut row = |kernel: &str, numbers: [String; 4]| {
            let [registers, shared, stack, spilled] = numbers;
            let [bytes, seconds] = std::mem::take(&mut size);
            rows.push([
                outcome.unit.clone(),
                kernel.to_owned(),
                outcome.target.clone(),
                registers,
                shared,
                stack,
                spilled,
                bytes,
                seconds,
            ]);
        };
        for function in &outcome.functions {
            let spilled = function.spill_store_bytes + function.spill_load_bytes;
            let numbers = [
                function.registers,
                function.shared_bytes,
                function.stack_bytes,
                spilled,
            ];
            // What kernels call has no registers of its own.
            if function.is_kernel || function.stack_bytes + spilled > 0 {
                row(&function.name, numbers.map(|number| number.to_string()));
            }
        }
        // PTX is not assembled: there is nothing to say of its kernels.
        if outcome.functions.is_empty() {
            row("", Default::default());
        }
    }
    aligned(&rows)
}

/// Columns as wide as their widest cell, numbers to the right.
fn aligned<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = width(column);
            let written = if column < 3 {
                write!(line, "{cell:<width$}  ")
            } else {
                write!(line, "{cell:>width$}  ")
            };
            written.expect("a string takes everything");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// What is wrong with an image that compiled: `kernels` are those that its source declares for it.
fn faults(outcome: &Outcome, kernels: &[String]) -> Vec<String> {
    let Outcome { unit, target, .. } = outcome;
    let mut faults = Vec::new();
    for function in &outcome.functions {
        let name = &function.name;
        let spilled = function.spill_store_bytes + function.spill_load_bytes;
        if function.stack_bytes + spilled > 0 {
            faults.push(format!(
                "{name} of {unit} for {target} keeps {} bytes in local memory and spills {spilled}: \
                 use fewer registers, or index arrays with constants",
                function.stack_bytes
            ));
        }
    }
    if outcome.image_bytes == 0 {
        faults.push(format!("{unit} for {target} has no image"));
    }
    // A report that was not understood must not pass for a clean one.
    let reported: Vec<_> = outcome.functions.iter().map(|f| &f.name).collect();
    if target.starts_with("sm_") {
        let missing = kernels.iter().filter(|kernel| !reported.contains(kernel));
        faults.extend(missing.map(|kernel| {
            format!("ptxas says nothing of {kernel}, which {unit} declares, for {target}")
        }));
    }
    faults
}

/// Targets whose images are too large together.
fn sizes(outcomes: &[Outcome]) -> Vec<String> {
    let mut bytes: BTreeMap<&str, u64> = BTreeMap::new();
    for outcome in outcomes {
        *bytes.entry(&outcome.target).or_default() += outcome.image_bytes;
    }
    for (target, bytes) in &bytes {
        print(&format!("{target}: {bytes} bytes of {MOST_IMAGE_BYTES}"));
    }
    let too_large = bytes
        .into_iter()
        .filter(|(_, bytes)| *bytes > MOST_IMAGE_BYTES);
    too_large
        .map(|(target, bytes)| {
            format!("the images for {target} take {bytes} bytes, more than {MOST_IMAGE_BYTES}")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome() -> Outcome {
        Outcome {
            unit: "step".to_owned(),
            target: "sm_80".to_owned(),
            functions: vec![FunctionReport {
                name: "oxl_begin_step".to_owned(),
                is_kernel: true,
                registers: 30,
                ..FunctionReport::default()
            }],
            image_bytes: 1000,
            seconds: 1.25,
        }
    }

    #[test]
    fn a_clean_report_has_no_faults() {
        assert_eq!(faults(&outcome(), &["oxl_begin_step".to_owned()]), [""; 0]);
        let table = table(&[outcome()]);
        let cells: Vec<_> = table
            .lines()
            .nth(1)
            .map(|row| row.split_whitespace().collect())
            .unwrap_or_default();
        assert_eq!(
            cells,
            [
                "step",
                "oxl_begin_step",
                "sm_80",
                "30",
                "0",
                "0",
                "0",
                "1000",
                "1.2"
            ]
        );
    }

    #[test]
    fn spills_stacks_and_silence_are_faults() {
        let mut spilling = outcome();
        spilling.functions[0].spill_load_bytes = 8;
        assert!(faults(&spilling, &[])[0].contains("spills 8"));
        let mut stack = outcome();
        stack.functions[0].stack_bytes = 40;
        assert!(faults(&stack, &[])[0].contains("40 bytes in local memory"));
        assert!(faults(&outcome(), &["oxl_other".to_owned()])[0].contains("oxl_other"));
        let empty = Outcome {
            image_bytes: 0,
            ..outcome()
        };
        assert_eq!(faults(&empty, &[]).len(), 1);
    }

    #[test]
    fn images_are_summed_by_target() {
        let half = Outcome {
            image_bytes: MOST_IMAGE_BYTES / 2,
            ..outcome()
        };
        let other = Outcome {
            target: "sm_90a".to_owned(),
            ..half.clone()
        };
        assert_eq!(sizes(&[half.clone(), half.clone(), other.clone()]), [""; 0]);
        let found = sizes(&[half.clone(), half, outcome(), other]);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("sm_80"), "{found:?}");
    }
}
