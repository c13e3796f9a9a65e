//! How much memory this process may still use: the machine's, or the container's if that is
//! less.

use std::fs;
use std::path::{Path, PathBuf};

use crate::FormatError;

/// Memory of the host as seen by this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All memory of the machine, or the cgroup's limit if that is less.
    pub total_bytes: u64,
    /// What can be allocated without swapping or meeting the limit; cached file pages, which
    /// the kernel gives back on demand, count as available.
    pub available_bytes: u64,
}

impl HostMemory {
    /// Reads `/proc/meminfo` and the limits of this process's cgroup (v2 or v1) and of every
    /// cgroup above it.
    ///
    /// # Errors
    /// There is no `/proc/meminfo`, or it lacks its totals. Missing cgroups are no error.
    pub fn read() -> Result<Self, FormatError> {
        Self::read_below(Path::new("/"))
    }

    /// [`HostMemory::read`] with another root of the file system, for tests.
    fn read_below(root: &Path) -> Result<Self, FormatError> {
        let path = root.join("proc/meminfo");
        let text =
            fs::read_to_string(&path).map_err(|source| FormatError::io(&path, "read", source))?;
        let mut memory = parse_meminfo(&text).ok_or_else(|| {
            FormatError::malformed(
                &path,
                "fields",
                format!("{} lines", text.lines().count()),
                "MemTotal and MemAvailable in kB",
            )
        })?;
        let membership = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        for directory in cgroup_directories(root, &membership) {
            if let Some(limit) = read_cgroup(&directory) {
                memory = memory.limited_by(limit);
            }
        }
        Ok(memory)
    }

    /// The lesser of two views, each field by itself.
    fn limited_by(self, other: HostMemory) -> HostMemory {
        HostMemory {
            total_bytes: self.total_bytes.min(other.total_bytes),
            available_bytes: self.available_bytes.min(other.available_bytes),
        }
    }
}

/// `MemTotal` and `MemAvailable` of `/proc/meminfo`, which gives them in KiB.
fn parse_meminfo(text: &str) -> Option<HostMemory> {
    let field = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    Some(HostMemory {
        total_bytes: field("MemTotal")?,
        available_bytes: field("MemAvailable")?,
    })
}

/// The directories whose limits bind this process, from `/proc/self/cgroup`: its own and those
/// above, up to the mount point (all that a container sees).
fn cgroup_directories(root: &Path, membership: &str) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let mount = if controllers.is_empty() {
            root.join("sys/fs/cgroup")
        } else if controllers
            .split(',')
            .any(|controller| controller == "memory")
        {
            root.join("sys/fs/cgroup/memory")
        } else {
            continue;
        };
        // A path from outside the container's view starts with "/..": only the mount point counts.
        let outside = group.split('/').any(|part| part == "..");
        let group = if outside { "" } else { group.trim_matches('/') };
        let below = Path::new(group)
            .ancestors()
            .map(|ancestor| mount.join(ancestor));
        directories.extend(below);
    }
    directories
}

/// The limit of one cgroup directory, v2 or v1; `None` if it has none.
fn read_cgroup(directory: &Path) -> Option<HostMemory> {
    let read = |name: &str| fs::read_to_string(directory.join(name)).ok();
    let stat = read("memory.stat").unwrap_or_default();
    let (limit, usage) = match read("memory.max") {
        Some(limit) => (limit, read("memory.current")?),
        None => (
            read("memory.limit_in_bytes")?,
            read("memory.usage_in_bytes")?,
        ),
    };
    parse_cgroup(&limit, &usage, &stat)
}

/// A cgroup's limit and what is left of it. `max` (v2), and in v1 a number near 2^63, mean that
/// there is no limit.
fn parse_cgroup(limit: &str, usage: &str, stat: &str) -> Option<HostMemory> {
    let total_bytes = limit
        .trim()
        .parse::<u64>()
        .ok()
        .filter(|&limit| limit < 1 << 60)?;
    let usage_bytes = usage.trim().parse::<u64>().ok()?;
    let field = |name: &str| {
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.trim().parse::<u64>().ok()
    };
    // v1 counts the groups below under "total_"; v2 always does.
    let file_pages = |name: &str| {
        field(&format!("total_{name}"))
            .or_else(|| field(name))
            .unwrap_or(0)
    };
    let reclaimable = file_pages("inactive_file").saturating_add(file_pages("active_file"));
    let held = usage_bytes.saturating_sub(reclaimable);
    Some(HostMemory {
        total_bytes,
        available_bytes: total_bytes.saturating_sub(held),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MEMINFO: &str = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\n\
                           MemAvailable:    8388608 kB\nBuffers:          204800 kB\n";

    /// A file system root with the given files.
    fn root_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a temporary directory");
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
            fs::write(path, content).expect("a file");
        }
        root
    }

    #[test]
    fn meminfo_alone() {
        let root = root_with(&[("proc/meminfo", MEMINFO)]);
        let memory = HostMemory::read_below(root.path()).expect("memory");
        assert_eq!(
            memory,
            HostMemory {
                total_bytes: 16 * GIB,
                available_bytes: 8 * GIB
            }
        );
    }

    #[test]
    fn meminfo_without_its_fields_is_an_error() {
        let root = root_with(&[("proc/meminfo", "MemTotal: 5 kB\n")]);
        let error = HostMemory::read_below(root.path()).expect_err("no MemAvailable");
        assert!(error.to_string().contains("MemAvailable"), "{error}");
        assert!(parse_meminfo("MemTotal: x kB\nMemAvailable: 1 kB").is_none());
        assert!(parse_meminfo("MemTotal: 99999999999999999999 kB\nMemAvailable: 1 kB").is_none());
    }

    #[test]
    fn the_tightest_v2_ancestor_binds_and_file_pages_are_available() {
        let root = root_with(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/jobs/one\n"),
            ("sys/fs/cgroup/jobs/one/memory.max", "max\n"),
            ("sys/fs/cgroup/jobs/one/memory.current", "1\n"),
            ("sys/fs/cgroup/jobs/memory.max", &format!("{}\n", 4 * GIB)),
            (
                "sys/fs/cgroup/jobs/memory.current",
                &format!("{}\n", 3 * GIB),
            ),
            (
                "sys/fs/cgroup/jobs/memory.stat",
                &format!("anon 7\ninactive_file {GIB}\nactive_file {}\n", GIB / 2),
            ),
        ]);
        let memory = HostMemory::read_below(root.path()).expect("memory");
        let expected = HostMemory {
            total_bytes: 4 * GIB,
            available_bytes: 2 * GIB + GIB / 2,
        };
        assert_eq!(memory, expected);
    }

    #[test]
    fn v1_limit_of_a_container() {
        let root = root_with(&[
            ("proc/meminfo", MEMINFO),
            (
                "proc/self/cgroup",
                "5:cpu,cpuacct:/x\n4:memory:/../outside\n",
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                &GIB.to_string(),
            ),
            (
                "sys/fs/cgroup/memory/memory.usage_in_bytes",
                &(GIB / 4).to_string(),
            ),
            (
                "sys/fs/cgroup/memory/memory.stat",
                "inactive_file 1\ntotal_inactive_file 4096\n",
            ),
        ]);
        let memory = HostMemory::read_below(root.path()).expect("memory");
        let expected = HostMemory {
            total_bytes: GIB,
            available_bytes: GIB - GIB / 4 + 4096,
        };
        assert_eq!(memory, expected);
    }

    #[test]
    fn no_limit_in_either_version() {
        assert_eq!(parse_cgroup("max\n", "5", ""), None);
        assert_eq!(parse_cgroup("9223372036854771712\n", "5", ""), None);
        assert_eq!(parse_cgroup("100", "not a number", ""), None);
        let over = parse_cgroup("100", "400", "").expect("a limit");
        assert_eq!(
            over,
            HostMemory {
                total_bytes: 100,
                available_bytes: 0
            }
        );
    }
}
