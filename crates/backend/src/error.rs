//! What can go wrong on a device.

use oxllama_format::FormatError;
use oxllama_memory::{Bytes, DeviceId};

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
