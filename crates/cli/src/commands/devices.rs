//! `oxllama devices`

use std::process::ExitCode;

use anyhow::Result;
use oxllama_cpu::{Isa, SpinPool};
use oxllama_cuda::{CudaDevice, GpuInfo};
use oxllama_format::HostMemory;
use oxllama_memory::{Bytes, DeviceId};
use serde::Serialize;

use crate::args::DevicesArgs;
use crate::{output, session};

/// The object that `--json` prints.
#[derive(Serialize)]
struct Answer {
    cpu: Cpu,
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
}

pub(crate) fn run(args: &DevicesArgs) -> Result<ExitCode> {
    let memory = HostMemory::read()?;
    let (gpus, no_gpus) = match oxllama_cuda::gpus() {
        Ok(gpus) => (gpus.iter().map(look_at).collect(), None),
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
fn look_at(info: &GpuInfo) -> Gpu {
    let (major, minor) = info.capability;
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
    }
}

fn print(answer: &Answer) -> Result<()> {
    let cpu = &answer.cpu;
    output::line(format_args!(
        "{}   {}, {} threads, {} instructions, {} of {} available",
        cpu.id, cpu.name, cpu.threads, cpu.instructions, cpu.available_bytes, cpu.memory_bytes
    ))?;
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
            "{}  {} at {}, compute capability {}, {} multiprocessors, {memory}",
            gpu.id, gpu.name, gpu.pci_bus, gpu.compute_capability, gpu.multiprocessors
        ))?;
    }
    match &answer.no_gpus {
        Some(reason) => output::line(format_args!("no GPU: {reason}; models run on the CPU")),
        None => Ok(()),
    }
}
