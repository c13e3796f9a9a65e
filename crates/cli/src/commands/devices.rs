//! `oxllama devices`

use std::process::ExitCode;

use anyhow::Result;
use oxllama_cpu::{Isa, SpinPool};
use oxllama_cuda::{CudaDevice, GpuInfo, GpuState, Monitor};
use oxllama_format::HostMemory;
use oxllama_memory::{Bytes, DeviceId};
use serde::Serialize;

use crate::args::DevicesArgs;
use crate::{output, session};

/// The object that `--json` prints.
#[derive(Serialize)]
struct Answer {
    cpu: Cpu,
    /// The release of the NVIDIA driver, where its management library tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    driver_version: Option<String>,
    gpus: Vec<Gpu>,
    /// Why there are no GPUs to use.
    #[serde(skip_serializing_if = "Option::is_none")]
    no_gpus: Option<String>,
}

#[derive(Serialize)]
struct Cpu {
    id: DeviceId,
    name: String,
    threads: usize,
    instructions: &'static str,
    memory_bytes: Bytes,
    available_bytes: Bytes,
}

#[derive(Serialize)]
struct Gpu {
    id: DeviceId,
    name: String,
    pci_bus: String,
    compute_capability: String,
    multiprocessors: usize,
    memory_bytes: Bytes,
    /// `None` where it cannot be used.
    available_bytes: Option<Bytes>,
    /// Why models cannot run on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    unusable: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature_celsius: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    power_watts: Option<f64>,
    /// Other processes that compute on it.
    processes: Vec<Process>,
}

#[derive(Serialize)]
struct Process {
    id: u32,
    name: Option<String>,
    bytes: Option<Bytes>,
}

pub(crate) fn run(args: &DevicesArgs) -> Result<ExitCode> {
    let memory = HostMemory::read()?;
    let monitor = Monitor::open();
    let (gpus, no_gpus) = match oxllama_cuda::gpus() {
        Ok(gpus) => (
            gpus.iter()
                .map(|gpu| look_at(gpu, monitor.as_ref()))
                .collect(),
            None,
        ),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let answer = Answer {
        cpu: Cpu {
            id: DeviceId::cpu(0),
            name: session::cpu_name(),
            threads: SpinPool::default_threads(),
            instructions: Isa::select().name(),
            memory_bytes: Bytes(memory.total_bytes),
            available_bytes: Bytes(memory.available_bytes),
        },
        driver_version: monitor.and_then(|monitor| monitor.driver_version()),
        gpus,
        no_gpus,
    };
    if args.json {
        output::json(&answer)?;
    } else {
        print(&answer)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens the GPU, which tells whether it can be used and what is free.
fn look_at(info: &GpuInfo, monitor: Option<&Monitor>) -> Gpu {
    let (major, minor) = info.capability;
    // Before the GPU is opened, so that this process is not among those that use it.
    let GpuState {
        temperature_celsius,
        power_milliwatts,
        processes,
        ..
    } = monitor.map_or_else(GpuState::default, |monitor| monitor.state(info));
    let opened = CudaDevice::open(info).map_err(|error| error.to_string());
    let available = opened.and_then(|device| {
        let free = device.free_memory();
        free.map_err(|error| error.to_string())
    });
    Gpu {
        id: info.id.clone(),
        name: info.name.clone(),
        pci_bus: info.pci_bus.clone(),
        compute_capability: format!("{major}.{minor}"),
        multiprocessors: info.multiprocessors,
        memory_bytes: info.memory,
        available_bytes: available.as_ref().ok().copied(),
        unusable: available.err(),
        temperature_celsius,
        power_watts: power_milliwatts.map(|power| f64::from(power) / 1000.0),
        processes: processes
            .into_iter()
            .map(|process| Process {
                id: process.id,
                name: process.name,
                bytes: process.bytes,
            })
            .collect(),
    }
}

/// `, 41 °C, 73 W`, as far as it is known.
fn sensors(gpu: &Gpu) -> String {
    let temperature = gpu
        .temperature_celsius
        .map(|degrees| format!(", {degrees} °C"));
    let power = gpu.power_watts.map(|watts| format!(", {watts:.0} W"));
    temperature.unwrap_or_default() + &power.unwrap_or_default()
}

fn print(answer: &Answer) -> Result<()> {
    let cpu = &answer.cpu;
    output::line(format_args!(
        "{}   {}, {} threads, {} instructions, {} of {} available",
        cpu.id, cpu.name, cpu.threads, cpu.instructions, cpu.available_bytes, cpu.memory_bytes
    ))?;
    if let Some(version) = &answer.driver_version {
        output::line(format_args!("NVIDIA driver {version}"))?;
    }
    for gpu in &answer.gpus {
        let memory = match (gpu.available_bytes, &gpu.unusable) {
            (Some(available), _) => format!("{available} of {} available", gpu.memory_bytes),
            (None, reason) => format!(
                "{}; cannot be used: {}",
                gpu.memory_bytes,
                reason.as_deref().unwrap_or("it did not say why")
            ),
        };
        output::line(format_args!(
            "{}  {} at {}, compute capability {}, {} multiprocessors, {memory}{}",
            gpu.id,
            gpu.name,
            gpu.pci_bus,
            gpu.compute_capability,
            gpu.multiprocessors,
            sensors(gpu)
        ))?;
        for process in &gpu.processes {
            let bytes = process.bytes.map(|bytes| bytes.to_string());
            output::line(format_args!(
                "        {} held by {} (process {})",
                bytes.as_deref().unwrap_or("memory"),
                process.name.as_deref().unwrap_or("another program"),
                process.id
            ))?;
        }
    }
    match &answer.no_gpus {
        Some(reason) => output::line(format_args!("no GPU: {reason}; models run on the CPU")),
        None => Ok(()),
    }
}
