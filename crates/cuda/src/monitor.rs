//! What NVIDIA's management library (NVML) knows of the machine, where it is installed.
//!
//! It comes with the driver. Everything here is optional: what it does not tell is left out.

use std::ffi::OsStr;

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::device::UsedGpuMemory;
use oxllama_backend::ProcessMemory;
use oxllama_memory::Bytes;

use crate::context::GpuInfo;
use crate::library;

/// The library's file.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// The management library, started.
#[derive(Debug)]
pub struct Monitor(Nvml);

/// What the management library says of one GPU at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuState {
    /// Memory that is taken, by whomever.
    pub used: Option<Bytes>,
    /// Of the chip, in degrees Celsius.
    pub temperature_celsius: Option<u32>,
    /// What the board draws, in milliwatts.
    pub power_milliwatts: Option<u32>,
    /// Processes that compute on the GPU, this one included where it does.
    pub processes: Vec<ProcessMemory>,
}

impl Monitor {
    /// Starts the library; `None` where it is not installed or does not start.
    pub fn open() -> Option<Self> {
        let named = library::in_named_folders(LIBRARY);
        let path = named.as_deref().map_or(OsStr::new(LIBRARY), OsStr::new);
        Nvml::builder().lib_path(path).init().ok().map(Self)
    }

    /// The driver's release, as `580.95.05`.
    pub fn driver_version(&self) -> Option<String> {
        self.0.sys_driver_version().ok()
    }

    /// What is known of `gpu`.
    pub fn state(&self, gpu: &GpuInfo) -> GpuState {
        let Ok(device) = self.0.device_by_pci_bus_id(gpu.pci_bus.as_str()) else {
            return GpuState::default();
        };
        let processes = device.running_compute_processes().unwrap_or_default();
        let processes = processes.into_iter().map(|process| ProcessMemory {
            id: process.pid,
            name: self.process_name(process.pid),
            bytes: match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
                UsedGpuMemory::Unavailable => None,
            },
        });
        GpuState {
            used: device.memory_info().ok().map(|memory| Bytes(memory.used)),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            power_milliwatts: device.power_usage().ok(),
            processes: processes.collect(),
        }
    }

    /// The program that a process runs, without its folder.
    fn process_name(&self, id: u32) -> Option<String> {
        const LONGEST: usize = 256;
        if id == std::process::id() {
            return Some("this process".to_owned());
        }
        let path = self.0.sys_process_name(id, LONGEST).ok()?;
        let program = path.split_whitespace().next().unwrap_or_default();
        let name = program.rsplit('/').next().unwrap_or_default();
        (!name.is_empty()).then(|| name.to_owned())
    }
}

/// Who holds memory of `gpu`; empty where nobody tells.
pub(crate) fn processes(gpu: &GpuInfo) -> Vec<ProcessMemory> {
    let monitor = Monitor::open();
    monitor.map_or_else(Vec::new, |monitor| monitor.state(gpu).processes)
}
