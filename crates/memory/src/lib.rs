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
//! - [`plan()`]: from what a model needs ([`ModelFootprint`], [`WorkspaceModel`]) and what
//!   the devices have, a [`Plan`] of what goes where, or an [`Infeasible`] with the
//!   shortfall and the nearest plans that fit.

mod bytes;
mod device;
mod footprint;
mod ledger;
mod plan;

pub use bytes::{Bytes, BytesError};
pub use device::{
    DeviceCap, DeviceError, DeviceId, DeviceInfo, GpuSplit, Inventory, VirtualDevices,
};
pub use footprint::{
    CacheFormat, DeviceRole, LayerFootprint, ModelFootprint, StepLimits, WorkspaceModel,
};
pub use ledger::{Holding, Ledger, Purpose, Reservation, Shortfall, SplitError, Usage};
pub use plan::{
    Alternative, Asked, BindingConstraint, Change, DevicePlan, DeviceReservations, DeviceShortfall,
    Infeasible, LimitedBy, Plan, PlanError, PlanRequest, Policy, Totals, plan,
};
