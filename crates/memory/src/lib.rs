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
//!
//! ```
//! use oxllama_memory::{
//!     Bytes, CacheFormat, DeviceId, DeviceInfo, DeviceRole, Inventory, LayerFootprint, Ledger,
//!     ModelFootprint, PlanRequest, Policy, StepLimits, plan,
//! };
//!
//! let device = |index| {
//!     DeviceInfo::new(DeviceId::cpu(index), "virtual device", Bytes::from_mib(300))
//! };
//! let ledger = Ledger::new(&Inventory::new(vec![device(0), device(1)])?);
//!
//! let layer = LayerFootprint {
//!     weights: Bytes::from_mib(10),
//!     weight_elements: 20 << 20,
//!     kv_elements_per_token: 2 * 3 * 64, // keys and values of 3 heads
//! };
//! let footprint = ModelFootprint {
//!     name: "small".to_owned(),
//!     embedding: Bytes::from_mib(50),
//!     final_norm: Bytes::from_kib(2),
//!     head: Bytes::from_mib(50),
//!     head_tied_to_embedding: true,
//!     layers: vec![layer; 30],
//!     max_context_tokens: 2048,
//!     page_tokens: 256,
//!     quantisable_cache: true,
//! };
//! let workspace = |_: &DeviceRole, limits: &StepLimits| Bytes::from_kib(8 * limits.chunk_tokens);
//! let request = PlanRequest {
//!     footprint: &footprint,
//!     workspace: &workspace,
//!     context_tokens: None, // the longest that fits
//!     cache_tokens: None, // room for `batch` such contexts
//!     batch: 1,
//!     chunk_tokens: 512,
//!     cache: CacheFormat::F16,
//!     policy: Policy::Fill,
//!     caps: Vec::new(),
//!     excluded: Vec::new(),
//! };
//! let plan = plan(&ledger.inventory(), &request)?;
//! assert_eq!(plan.context_tokens, 2048);
//! let mut reservations = plan.reserve(&ledger)?;
//! // Every buffer of the model is carved from what its plan reserved.
//! let matrix = reservations[0].weights.split(Bytes::from_mib(1))?;
//! assert_eq!(matrix.owner(), "small");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
    CacheFormat, DeviceRole, ElementFormat, LayerFootprint, ModelFootprint, StepLimits,
    WorkspaceModel,
};
pub use ledger::{Holding, Ledger, Purpose, Reservation, Shortfall, SplitError, Usage};
pub use plan::{
    Alternative, Asked, BindingConstraint, Change, DevicePlan, DeviceReservations, DeviceShortfall,
    HostPlan, Infeasible, LimitedBy, Plan, PlanError, PlanRequest, Policy, Totals, plan,
};
