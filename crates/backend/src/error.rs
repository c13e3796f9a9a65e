//! What can go wrong on a device.

use std::fmt::Write as _;

use oxllama_format::FormatError;
use oxllama_memory::{Bytes, DeviceId};

/// A process that holds memory of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessMemory {
    /// The system's number of it.
    pub id: u32,
    /// What runs in it, where the system tells.
    pub name: Option<String>,
    /// What it holds, where the driver tells.
    pub bytes: Option<Bytes>,
}

/// What a device had left when its driver was out of memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryState {
    /// What nobody holds, right after the refusal.
    pub free: Option<Bytes>,
    /// Who holds memory of the device; empty where nobody tells.
    pub processes: Vec<ProcessMemory>,
}

/// `; 3 GiB are free now; held: …`, as far as it is known.
fn state_words(state: &MemoryState) -> String {
    let mut words = String::new();
    // Writing to a string cannot fail.
    if let Some(free) = state.free {
        let _ = write!(words, "; {free} free now");
    }
    for (index, process) in state.processes.iter().enumerate() {
        let separator = if index == 0 { "; held:" } else { "," };
        let bytes = match process.bytes {
            Some(bytes) => bytes.to_string(),
            None => "an unknown part".to_owned(),
        };
        let name = process.name.as_deref().unwrap_or("unknown");
        let _ = write!(
            words,
            "{separator} {bytes} by {name} (process {})",
            process.id
        );
    }
    words
}

/// A device refused or failed an operation.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The operating system or driver gave less than the ledger had promised.
    #[error(
        "{device}: allocating {bytes} failed ({reason}); the plan counted on it, so another \
         process has probably taken memory since: free some, or plan with a lower cap"
    )]
    Allocation {
        /// Where.
        device: DeviceId,
        /// How much was asked for.
        bytes: Bytes,
        /// The system's words.
        reason: String,
    },

    /// The driver has less memory than the ledger had promised.
    #[error(
        "{device} is out of memory: {operation} failed{}. What was asked for was planned, so \
         another process has probably taken memory since: end it or wait for it, or plan with a \
         lower cap",
        state_words(state)
    )]
    OutOfMemory {
        /// Where.
        device: DeviceId,
        /// What was attempted, with its size where it has one.
        operation: String,
        /// What was left.
        state: Box<MemoryState>,
    },

    /// A reservation for another device was handed over.
    #[error("{device}: was given a reservation made on {reserved_on}")]
    WrongDevice {
        /// The device asked to allocate.
        device: DeviceId,
        /// The device that holds the reservation.
        reserved_on: DeviceId,
    },

    /// A reservation has another size than what is to be stored in it.
    #[error("{device}: {what} needs {needed} but {reserved} were reserved")]
    ReservationSize {
        /// The device.
        device: DeviceId,
        /// What was to be stored.
        what: String,
        /// Bytes it takes.
        needed: Bytes,
        /// Bytes the reservation holds.
        reserved: Bytes,
    },

    /// A step is larger than the workspace was made for.
    #[error("{device}: a step has {found} {what}, the workspace was made for {limit}")]
    StepTooLarge {
        /// The device.
        device: DeviceId,
        /// `rows`, `sequences`, `pages per sequence`, …
        what: &'static str,
        /// In this step.
        found: usize,
        /// At most.
        limit: usize,
    },

    /// The driver or a library of the device refused an operation.
    #[error("{device}: {operation} failed: {reason}")]
    Operation {
        /// Where.
        device: DeviceId,
        /// What was attempted.
        operation: String,
        /// The driver's words.
        reason: String,
    },

    /// The device can do nothing more in this process: its context is broken.
    #[error(
        "{device} is lost: {operation} failed ({reason}), and the driver accepts nothing more \
         from this process; restart it to use the device again"
    )]
    Lost {
        /// Where.
        device: DeviceId,
        /// What was attempted when it broke.
        operation: String,
        /// The driver's words.
        reason: String,
    },

    /// A weight could not be read or decoded.
    #[error(transparent)]
    Format(#[from] FormatError),
}
