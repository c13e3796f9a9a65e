//! Device memory as arithmetic: what devices there are, who holds which bytes of
//! them, and where the parts of a model would go.
//!
//! The crate makes no device calls and depends on no other crate of the workspace;
//! everything above it builds on three parts:
//!
//! - [`Bytes`] and the flags made of it ([`GpuSplit`], [`DeviceCap`],
//!   [`VirtualDevices`]): sizes with their unit, arithmetic that cannot wrap.
//! - [`Ledger`]: every byte that any model of the process holds on a device. A
//!   [`Reservation`] is the only proof of having room, and gives it back on drop.

mod bytes;
mod device;
mod ledger;

pub use bytes::{Bytes, BytesError};
pub use device::{
    DeviceCap, DeviceError, DeviceId, DeviceInfo, GpuSplit, Inventory, VirtualDevices,
};
pub use ledger::{Holding, Ledger, Purpose, Reservation, Shortfall, SplitError, Usage};
