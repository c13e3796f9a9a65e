//! From a plan to the ledger.

use super::{DevicePlan, HostPlan, Plan};
use crate::device::DeviceId;
use crate::ledger::{Ledger, Purpose, Reservation, Shortfall};

impl Plan {
    /// Reserves everything as one transaction: either all is reserved, or nothing.
    /// The owner is [`Plan::model`].
    ///
    /// # Errors
    /// [`Shortfall`] of the first device without room, which can only be when the
    /// ledger has changed since the inventory was taken of it.
    pub fn reserve(&self, ledger: &Ledger) -> Result<Vec<DeviceReservations>, Shortfall> {
        // On an error, dropping what was collected gives it back.
        let reserve_device = |plan: &DevicePlan| {
            let reserve =
                |purpose, bytes| ledger.reserve(&plan.device, &self.model, purpose, bytes);
            Ok(DeviceReservations {
                device: plan.device.clone(),
                weights: reserve(Purpose::Weights, plan.weights)?,
                kv_cache: reserve(Purpose::KvCache, plan.kv_cache)?,
                workspace: reserve(Purpose::Workspace, plan.workspace)?,
                recordings: reserve(Purpose::Recordings, plan.recordings)?,
            })
        };
        self.devices.iter().map(reserve_device).collect()
    }

    /// Reserves what stays on the host; `None` where nothing does.
    ///
    /// # Errors
    /// [`Shortfall`]: the host has less, or the ledger no account of it.
    pub fn reserve_host(&self, ledger: &Ledger) -> Result<Option<Reservation>, Shortfall> {
        let reserve = |host: &HostPlan| {
            ledger.reserve(&host.device, &self.model, Purpose::Weights, host.embedding)
        };
        self.host.as_ref().map(reserve).transpose()
    }
}

/// The reservations of one device of a plan, to carve buffers from.
#[derive(Debug)]
pub struct DeviceReservations {
    /// The device.
    pub device: DeviceId,
    /// Room for its parameters.
    pub weights: Reservation,
    /// Room for its cache.
    pub kv_cache: Reservation,
    /// Room for its intermediate results.
    pub workspace: Reservation,
    /// Room for its recorded steps.
    pub recordings: Reservation,
}
