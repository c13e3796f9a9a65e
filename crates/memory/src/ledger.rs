//! Who holds which bytes of which device.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::bytes::Bytes;
use crate::device::{DeviceId, DeviceInfo, Inventory};

/// What reserved memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Parameters of the model, in the layout in which the device keeps them.
    Weights,
    /// Keys and values of the tokens in context.
    KvCache,
    /// Intermediate results of one step.
    Workspace,
    /// Steps that a device has recorded, to replay them.
    Recordings,
    /// Adapters on top of the weights.
    Lora,
    /// Statistics gathered while quantising.
    Calibration,
}

impl fmt::Display for Purpose {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Weights => "weights",
            Self::KvCache => "kv cache",
            Self::Workspace => "workspace",
            Self::Recordings => "recordings",
            Self::Lora => "lora",
            Self::Calibration => "calibration",
        })
    }
}

/// All that one owner holds on one device for one purpose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holding {
    /// The model on whose behalf the memory is held.
    pub owner: String,
    /// What it is used for.
    pub purpose: Purpose,
    /// The sum of the live reservations.
    pub bytes: Bytes,
}

/// How much of one device is taken; `used + available == limit` at every instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// The most that all reservations together may take.
    pub limit: Bytes,
    /// The sum of the live reservations.
    pub used: Bytes,
    /// What can still be reserved.
    pub available: Bytes,
}

/// A reservation that a device has no room for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct Shortfall {
    /// The device asked.
    pub device: DeviceId,
    /// The bytes asked for.
    pub needed: Bytes,
    /// The bytes which could have been had.
    pub available: Bytes,
    /// The most that all reservations together may take; `None` when the ledger has
    /// no such device.
    pub capacity: Option<Bytes>,
    /// Who holds the rest, by owner and purpose.
    pub holders: Vec<Holding>,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            device,
            needed,
            available,
            capacity,
            holders,
        } = self;
        let Some(capacity) = capacity else {
            return write!(
                formatter,
                "device {device} is unknown: {needed} were to be reserved there, but it is not \
                 in the inventory"
            );
        };
        write!(
            formatter,
            "device {device} has too little memory: {needed} needed, {available} available of \
             {capacity}"
        )?;
        if needed.saturating_sub(*available) < Bytes::from_kib(10) {
            // Sizes this close can read the same when rounded.
            write!(
                formatter,
                " ({} B needed, {} B available)",
                needed.0, available.0
            )?;
        }
        for (
            index,
            Holding {
                owner,
                purpose,
                bytes,
            },
        ) in holders.iter().enumerate()
        {
            let separator = if index == 0 { "; held:" } else { "," };
            write!(formatter, "{separator} {bytes} {purpose} of {owner}")?;
        }
        Ok(())
    }
}

/// More was to be split off a reservation than it holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot take {requested} from a reservation of {held} for the {purpose} of {owner} on \
     {device}: plan at least {} B more",
    requested.saturating_sub(*held).0
)]
pub struct SplitError {
    /// The device of the reservation.
    pub device: DeviceId,
    /// The owner of the reservation.
    pub owner: String,
    /// The purpose of the reservation.
    pub purpose: Purpose,
    /// What was to be split off.
    pub requested: Bytes,
    /// What the reservation holds.
    pub held: Bytes,
}

/// The books of one device.
struct Account {
    info: DeviceInfo,
    /// Whether models are placed on it.
    is_planned: bool,
    limit: Bytes,
    used: Bytes,
    /// Sums of live reservations; no entry is zero.
    holdings: BTreeMap<(Arc<str>, Purpose), Bytes>,
}

impl Account {
    fn open(info: &DeviceInfo, is_planned: bool) -> Self {
        Self {
            info: info.clone(),
            is_planned,
            limit: info.available,
            used: Bytes::ZERO,
            holdings: BTreeMap::new(),
        }
    }

    fn available(&self) -> Bytes {
        self.limit.saturating_sub(self.used)
    }

    fn holdings(&self) -> Vec<Holding> {
        let to_holding = |((owner, purpose), bytes): (&(Arc<str>, Purpose), &Bytes)| Holding {
            owner: owner.to_string(),
            purpose: *purpose,
            bytes: *bytes,
        };
        self.holdings.iter().map(to_holding).collect()
    }

    /// Adds `bytes` to the books, or leaves them as they are and returns `false`.
    fn take(&mut self, owner: &Arc<str>, purpose: Purpose, bytes: Bytes) -> bool {
        if bytes > self.available() {
            return false;
        }
        if !bytes.is_zero() {
            self.used = self.used.saturating_add(bytes);
            let sum = self
                .holdings
                .entry((Arc::clone(owner), purpose))
                .or_default();
            *sum = sum.saturating_add(bytes);
        }
        true
    }

    fn give_back(&mut self, owner: &Arc<str>, purpose: Purpose, bytes: Bytes) {
        self.used = self.used.saturating_sub(bytes);
        let key = (Arc::clone(owner), purpose);
        if let Some(sum) = self.holdings.get_mut(&key) {
            *sum = sum.saturating_sub(bytes);
            if sum.is_zero() {
                self.holdings.remove(&key);
            }
        }
    }
}

/// The books of all devices of a process; a clone is another handle to the same books.
///
/// `used + available == limit` holds on every device whenever a call returns, and the
/// sum of all live [`Reservation`]s of a device is its `used`.
#[derive(Clone)]
pub struct Ledger {
    accounts: Arc<Mutex<Vec<Account>>>,
}

impl Ledger {
    /// Empty books. What a device had available is the limit of its reservations.
    pub fn new(inventory: &Inventory) -> Self {
        let devices = inventory.devices().iter();
        let accounts = devices.map(|info| Account::open(info, true)).collect();
        Self {
            accounts: Arc::new(Mutex::new(accounts)),
        }
    }

    /// As [`Self::new`], with an account of the host's memory as well, from which devices read
    /// some weights in place. No model is placed there: [`Self::inventory`] leaves it out.
    pub fn with_host(inventory: &Inventory, host: &DeviceInfo) -> Self {
        let ledger = Self::new(inventory);
        ledger.lock().push(Account::open(host, false));
        ledger
    }

    /// Empty books of a single device of which `limit` may be used.
    pub fn for_device(device: DeviceId, limit: Bytes) -> Self {
        let name = device.to_string();
        Self::new(&Inventory::of_one(DeviceInfo::new(device, name, limit)))
    }

    /// A panic elsewhere while the lock was held cannot have left the books half
    /// written, as no update of them can panic: a poisoned lock is usable.
    fn lock(&self) -> MutexGuard<'_, Vec<Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves `bytes` of `device` for a purpose of the model named `owner`.
    ///
    /// # Errors
    /// [`Shortfall`] when less is available, or when the device is unknown; the books
    /// are unchanged then.
    pub fn reserve(
        &self,
        device: &DeviceId,
        owner: &str,
        purpose: Purpose,
        bytes: Bytes,
    ) -> Result<Reservation, Shortfall> {
        let owner: Arc<str> = owner.into();
        let mut accounts = self.lock();
        let Some(index) = accounts
            .iter()
            .position(|account| &account.info.id == device)
        else {
            return Err(Shortfall {
                device: device.clone(),
                needed: bytes,
                available: Bytes::ZERO,
                capacity: None,
                holders: Vec::new(),
            });
        };
        let account = &mut accounts[index];
        if !account.take(&owner, purpose, bytes) {
            return Err(Shortfall {
                device: device.clone(),
                needed: bytes,
                available: account.available(),
                capacity: Some(account.limit),
                holders: account.holdings(),
            });
        }
        drop(accounts);
        Ok(Reservation {
            ledger: self.clone(),
            account: index,
            device: device.clone(),
            owner,
            purpose,
            bytes,
        })
    }

    /// What is taken of `device` now; `None` when the ledger has no such device.
    pub fn usage(&self, device: &DeviceId) -> Option<Usage> {
        let accounts = self.lock();
        let account = accounts.iter().find(|account| &account.info.id == device)?;
        Some(Usage {
            limit: account.limit,
            used: account.used,
            available: account.available(),
        })
    }

    /// Who holds what on `device` now, by owner and purpose; empty when nobody does or
    /// the ledger has no such device.
    pub fn entries(&self, device: &DeviceId) -> Vec<Holding> {
        let accounts = self.lock();
        let account = accounts.iter().find(|account| &account.info.id == device);
        account.map(Account::holdings).unwrap_or_default()
    }

    /// The devices that models are placed on as they are now: `available` is what can still be
    /// reserved.
    pub fn inventory(&self) -> Inventory {
        let current = |account: &Account| DeviceInfo {
            available: account.available(),
            ..account.info.clone()
        };
        let accounts = self.lock();
        let planned = accounts.iter().filter(|account| account.is_planned);
        Inventory::of_distinct(planned.map(current).collect())
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = formatter.debug_map();
        for account in self.lock().iter() {
            map.entry(&account.info.id, &account.holdings);
        }
        map.finish()
    }
}

/// Bytes of a device that belong to whoever holds this value; dropping it gives them
/// back. Made by [`Ledger::reserve`] only.
pub struct Reservation {
    ledger: Ledger,
    /// Index of the device among the ledger's accounts, which are never reordered.
    account: usize,
    device: DeviceId,
    owner: Arc<str>,
    purpose: Purpose,
    bytes: Bytes,
}

impl Reservation {
    /// The bytes held.
    pub fn bytes(&self) -> Bytes {
        self.bytes
    }

    /// The device they are on.
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// The model on whose behalf they are held.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// What they are used for.
    pub fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// Carves `bytes` off: they move to the returned reservation of the same device,
    /// owner and purpose, and the ledger's sums stay as they are. So all of a plan can
    /// be reserved at once and single buffers be made from that.
    ///
    /// # Errors
    /// [`SplitError`] when fewer are held; nothing moves then.
    pub fn split(&mut self, bytes: Bytes) -> Result<Self, SplitError> {
        let Some(rest) = self.bytes.checked_sub(bytes) else {
            return Err(SplitError {
                device: self.device.clone(),
                owner: self.owner.to_string(),
                purpose: self.purpose,
                requested: bytes,
                held: self.bytes,
            });
        };
        self.bytes = rest;
        Ok(Self {
            ledger: self.ledger.clone(),
            account: self.account,
            device: self.device.clone(),
            owner: Arc::clone(&self.owner),
            purpose: self.purpose,
            bytes,
        })
    }

    /// Takes over the bytes of `other`, the reverse of [`Reservation::split`].
    ///
    /// # Errors
    /// `other` itself, unchanged, when its ledger, device, owner or purpose differs.
    pub fn merge(&mut self, mut other: Self) -> Result<(), Self> {
        let same_books = Arc::ptr_eq(&self.ledger.accounts, &other.ledger.accounts)
            && self.account == other.account;
        if !same_books || self.owner != other.owner || self.purpose != other.purpose {
            return Err(other);
        }
        // Cannot saturate: both are part of one device's sum.
        self.bytes = self.bytes.saturating_add(other.bytes);
        other.bytes = Bytes::ZERO;
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes.is_zero() {
            return;
        }
        if let Some(account) = self.ledger.lock().get_mut(self.account) {
            account.give_back(&self.owner, self.purpose, self.bytes);
        }
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Reservation")
            .field("device", &self.device)
            .field("owner", &self.owner)
            .field("purpose", &self.purpose)
            .field("bytes", &self.bytes)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poisoned_lock_is_of_no_consequence() {
        let device = DeviceId::cpu(0);
        let ledger = Ledger::for_device(device.clone(), Bytes(10));
        let held = ledger
            .reserve(&device, "m", Purpose::Weights, Bytes(4))
            .unwrap();
        let poisoner = ledger.clone();
        let panicked = std::thread::spawn(move || {
            let _accounts = poisoner.lock();
            panic!("deliberate, while the lock is held");
        })
        .join();
        assert!(panicked.is_err() && ledger.accounts.is_poisoned());
        let more = ledger
            .reserve(&device, "m", Purpose::Weights, Bytes(6))
            .unwrap();
        assert!(
            ledger
                .reserve(&device, "m", Purpose::Weights, Bytes(1))
                .is_err()
        );
        drop((held, more));
        assert_eq!(
            ledger.usage(&device).map(|usage| usage.available),
            Some(Bytes(10))
        );
    }
}
