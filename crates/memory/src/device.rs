//! Devices by name, what is known of each, and the flags that limit them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::bytes::{Bytes, BytesError, scale_decimal};

/// The most virtual devices that one flag may ask for.
const MAX_VIRTUAL_DEVICES: usize = 64;

/// A device by kind and index, written `"cpu:0"` or `"cuda:1"`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    kind: Cow<'static, str>,
    index: u32,
}

impl DeviceId {
    /// The device `kind:index`; `kind` is the backend's name in lower-case letters.
    pub fn new(kind: impl Into<Cow<'static, str>>, index: u32) -> Self {
        Self {
            kind: kind.into(),
            index,
        }
    }

    /// The CPU, or with several virtual devices the one of this index.
    pub const fn cpu(index: u32) -> Self {
        Self {
            kind: Cow::Borrowed("cpu"),
            index,
        }
    }

    /// The CUDA device of this index.
    pub const fn cuda(index: u32) -> Self {
        Self {
            kind: Cow::Borrowed("cuda"),
            index,
        }
    }

    /// The backend's name: `"cpu"`, `"cuda"`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The position among the devices of this kind, from 0.
    pub const fn index(&self) -> u32 {
        self.index
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(&format!("{}:{}", self.kind, self.index))
    }
}

impl Serialize for DeviceId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for DeviceId {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let malformed = || DeviceError::MalformedDevice {
            text: text.to_owned(),
        };
        let (kind, index) = text.split_once(':').ok_or_else(malformed)?;
        let kind_is_word = !kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_alphabetic());
        // `u32::from_str` would accept a sign.
        if !kind_is_word || !index.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(malformed());
        }
        let index = index.parse().map_err(|_| malformed())?;
        Ok(Self::new(kind.to_ascii_lowercase(), index))
    }
}

/// Why a device or a flag about devices cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not of the form `kind:index`.
    #[error("\"{text}\" is not a device: expected a kind and an index, such as \"cpu:0\"")]
    MalformedDevice {
        /// The text found.
        text: String,
    },
    /// Not of the form `device=size`.
    #[error("\"{text}\" is not a cap: expected a device and a size, such as \"cpu:0=300MiB\"")]
    MalformedCap {
        /// The text found.
        text: String,
    },
    /// One part of a list of virtual devices cannot be read.
    #[error(
        "\"{text}\" does not describe virtual devices: expected sizes such as \
         \"300MiB,200MiB\" or a count and a size such as \"2x300MiB\""
    )]
    MalformedVirtualDevices {
        /// The text found.
        text: String,
    },
    /// More virtual devices than are worth having.
    #[error(
        "\"{text}\" asks for {count} virtual devices: at most {MAX_VIRTUAL_DEVICES} can be had"
    )]
    TooManyVirtualDevices {
        /// The text found.
        text: String,
        /// The number asked for.
        count: usize,
    },
    /// An entry of a split is not a number.
    #[error(
        "\"{entry}\" in the split \"{text}\" is not a number of GiB: expected one number per \
         device such as \"20,24\", with 0 to leave a device out; without a split, layers are \
         placed automatically"
    )]
    MalformedSplit {
        /// The entry that cannot be read.
        entry: String,
        /// The whole list.
        text: String,
    },
    /// A split which leaves every device out.
    #[error("the split \"{text}\" leaves no device to use: at least one entry must be above 0")]
    EmptySplit {
        /// The whole list.
        text: String,
    },
    /// Two devices of an inventory have the same name.
    #[error("device {device} is listed twice: every device needs an index of its own")]
    DuplicateDevice {
        /// The name found twice.
        device: DeviceId,
    },
    /// The size in a flag cannot be read.
    #[error(transparent)]
    Size(#[from] BytesError),
}

/// What is known of one device when the process starts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceInfo {
    /// The name by which plans and flags call it.
    pub id: DeviceId,
    /// The name by which people call it, such as the model of the GPU.
    pub name: String,
    /// All its memory, whoever uses it.
    pub capacity: Bytes,
    /// The part of [`DeviceInfo::capacity`] that this process may still take.
    pub available: Bytes,
    /// Measured or specified bandwidth of reading its memory, where known.
    pub read_bytes_per_second: Option<f64>,
}

impl DeviceInfo {
    /// A device of which all memory is available and the bandwidth is unknown.
    pub fn new(id: DeviceId, name: impl Into<String>, capacity: Bytes) -> Self {
        let name = name.into();
        Self {
            id,
            name,
            capacity,
            available: capacity,
            read_bytes_per_second: None,
        }
    }
}

/// The devices of this process in the order in which plans fill them; no two have
/// the same [`DeviceId`], and none has more available than its capacity.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Inventory(Vec<DeviceInfo>);

impl Inventory {
    /// The inventory of `devices`. Availability above capacity is cut to it.
    ///
    /// # Errors
    /// [`DeviceError::DuplicateDevice`] when two have the same id.
    pub fn new(mut devices: Vec<DeviceInfo>) -> Result<Self, DeviceError> {
        for (index, device) in devices.iter().enumerate() {
            if devices[..index]
                .iter()
                .any(|earlier| earlier.id == device.id)
            {
                return Err(DeviceError::DuplicateDevice {
                    device: device.id.clone(),
                });
            }
        }
        for device in &mut devices {
            device.available = device.available.min(device.capacity);
        }
        Ok(Self(devices))
    }

    /// The inventory of a single device.
    pub fn of_one(device: DeviceInfo) -> Self {
        let available = device.available.min(device.capacity);
        Self(vec![DeviceInfo {
            available,
            ..device
        }])
    }

    /// The inventory of devices whose ids are known to differ.
    pub(crate) fn of_distinct(devices: Vec<DeviceInfo>) -> Self {
        Self(devices)
    }

    /// All devices in order.
    pub fn devices(&self) -> &[DeviceInfo] {
        &self.0
    }

    /// The device of this name.
    pub fn get(&self, device: &DeviceId) -> Option<&DeviceInfo> {
        self.0.iter().find(|info| &info.id == device)
    }
}

/// The flag `--cap cpu:0=300MiB`: use at most so much of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceCap {
    /// The device that is limited.
    pub device: DeviceId,
    /// The most that a plan may place there.
    pub limit: Bytes,
}

impl FromStr for DeviceCap {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || DeviceError::MalformedCap {
            text: text.trim().to_owned(),
        };
        let (device, limit) = text.split_once('=').ok_or_else(malformed)?;
        Ok(Self {
            device: device.parse()?,
            limit: limit.parse()?,
        })
    }
}

/// The flag `--gpu-split 20,24`: GiB per device in order, 0 to leave a device out.
///
/// Numbers are GiB as in ExLlamaV2; an entry may also state its unit ("512MiB").
/// Devices beyond the end of the list are not used. The limits cover weights, cache
/// and workspace (ExLlamaV2's cover only weights and fixed buffers).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct GpuSplit(pub Vec<Bytes>);

impl FromStr for GpuSplit {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let read_entry = |entry: &str| {
            let entry = entry.trim();
            let is_bare = entry
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.');
            let size = if is_bare {
                scale_decimal(entry, 1 << 30, entry)
            } else {
                entry.parse()
            };
            size.map_err(|error| match error {
                BytesError::NotANumber { .. } => DeviceError::MalformedSplit {
                    entry: entry.to_owned(),
                    text: text.to_owned(),
                },
                other => other.into(),
            })
        };
        let limits = text
            .split(',')
            .map(read_entry)
            .collect::<Result<Vec<_>, _>>()?;
        if limits.iter().all(|limit| limit.is_zero()) {
            return Err(DeviceError::EmptySplit {
                text: text.to_owned(),
            });
        }
        Ok(Self(limits))
    }
}

/// The flag `--virtual-devices 2x300MiB` or `300MiB,200MiB`: CPU arithmetic on
/// devices with byte limits of their own. Holds the size of each, all above zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct VirtualDevices(pub Vec<Bytes>);

impl FromStr for VirtualDevices {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let malformed = || DeviceError::MalformedVirtualDevices {
            text: text.to_owned(),
        };
        let mut sizes = Vec::new();
        for part in text.split(',') {
            let (count, size) = match part.split_once(['x', 'X']) {
                Some((count, size)) => (
                    count.trim().parse::<usize>().map_err(|_| malformed())?,
                    size,
                ),
                None => (1, part),
            };
            let size: Bytes = size.parse()?;
            let total = sizes.len().saturating_add(count);
            if count == 0 || size.is_zero() {
                return Err(malformed());
            }
            if total > MAX_VIRTUAL_DEVICES {
                return Err(DeviceError::TooManyVirtualDevices {
                    text: text.to_owned(),
                    count: total,
                });
            }
            sizes.resize(total, size);
        }
        Ok(Self(sizes))
    }
}
