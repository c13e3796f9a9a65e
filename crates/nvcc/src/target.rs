//! What an image holds code for.

use std::fmt;
use std::str::FromStr;

use crate::NvccError;

/// The environment variable with the list of targets.
pub const ARCHITECTURES_VARIABLE: &str = "OXLLAMA_CUDA_ARCHITECTURES";

/// Targets when none are named: every architecture with kernels of its own, and PTX that the
/// driver can compile for all later ones.
pub const DEFAULT_TARGETS: &str = "80,86,89,90a,compute_80";

/// The oldest compute capability with what the kernels use (`cp.async`, `mma.m16n8k16`).
const OLDEST_CAPABILITY: u32 = 80;

/// One piece of an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Machine code for one architecture: `80`, `90a`.
    Machine(String),
    /// PTX for one architecture: runs there and, compiled by the driver, on all later ones.
    Ptx(String),
}

impl Target {
    /// Reads a list as `80,90a,compute_80`; a target named twice counts once.
    ///
    /// # Errors
    /// [`NvccError::Target`] for a name that means nothing, an empty list among them.
    pub fn parse_list(list: &str) -> Result<Vec<Self>, NvccError> {
        let mut targets = Vec::new();
        for name in list.split(',') {
            let target: Self = name.parse()?;
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
        Ok(targets)
    }

    /// The value of nvcc's option `-gencode`.
    pub(crate) fn gencode(&self) -> String {
        let (Self::Machine(architecture) | Self::Ptx(architecture)) = self;
        format!("arch=compute_{architecture},code={self}")
    }
}

impl FromStr for Target {
    type Err = NvccError;

    fn from_str(name: &str) -> Result<Self, NvccError> {
        let name = name.trim();
        let unknown = || NvccError::Target {
            found: name.to_owned(),
        };
        let (is_ptx, architecture) = match name.strip_prefix("compute_") {
            Some(architecture) => (true, architecture),
            None => (false, name.strip_prefix("sm_").unwrap_or(name)),
        };
        // `a` and `f` mark code that runs on one architecture, or one family of them.
        let digits = architecture
            .strip_suffix(['a', 'f'])
            .unwrap_or(architecture);
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(unknown());
        }
        let capability: u32 = digits.parse().map_err(|_| unknown())?;
        if capability < OLDEST_CAPABILITY {
            return Err(unknown());
        }
        let architecture = architecture.to_owned();
        Ok(if is_ptx {
            Self::Ptx(architecture)
        } else {
            Self::Machine(architecture)
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(architecture) => write!(formatter, "sm_{architecture}"),
            Self::Ptx(architecture) => write!(formatter, "compute_{architecture}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_in_order_and_without_repetition() {
        let targets = Target::parse_list("90a, sm_80,compute_80,80").expect("a list");
        let names: Vec<_> = targets.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["sm_90a", "sm_80", "compute_80"]);
        assert_eq!(targets[0].gencode(), "arch=compute_90a,code=sm_90a");
        assert_eq!(targets[2].gencode(), "arch=compute_80,code=compute_80");
        assert_eq!(
            Target::parse_list(DEFAULT_TARGETS).expect("a list").len(),
            5
        );
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for list in [
            "",
            "80,",
            "a",
            "90b",
            "75",
            "compute_",
            "+80",
            "native",
            "90aa",
            "99999999999",
        ] {
            let error = Target::parse_list(list).expect_err(list).to_string();
            assert!(error.contains("unknown architecture"), "{list}: {error}");
        }
    }
}
