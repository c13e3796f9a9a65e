//! `oxllama devices`

use std::process::ExitCode;

use anyhow::Result;
use oxllama_cpu::{Isa, SpinPool};
use oxllama_format::HostMemory;
use oxllama_memory::{Bytes, DeviceId};
use serde::Serialize;

use crate::args::DevicesArgs;
use crate::{output, session};

#[derive(Serialize)]
struct Device {
    id: DeviceId,
    name: String,
    threads: usize,
    instructions: &'static str,
    memory_bytes: Bytes,
    available_bytes: Bytes,
}

pub(crate) fn run(args: &DevicesArgs) -> Result<ExitCode> {
    let memory = HostMemory::read()?;
    let cpu = Device {
        id: DeviceId::cpu(0),
        name: session::cpu_name(),
        threads: SpinPool::default_threads(),
        instructions: Isa::select().name(),
        memory_bytes: Bytes(memory.total_bytes),
        available_bytes: Bytes(memory.available_bytes),
    };
    if args.json {
        output::json(&[cpu])?;
    } else {
        output::line(format_args!(
            "{}  {}, {} threads, {} instructions, {} of {} available",
            cpu.id, cpu.name, cpu.threads, cpu.instructions, cpu.available_bytes, cpu.memory_bytes
        ))?;
        output::line("GPUs are not supported by this version; models run on the CPU.")?;
    }
    Ok(ExitCode::SUCCESS)
}
