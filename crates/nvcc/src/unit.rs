//! The sources of a folder of kernels.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::NvccError;

/// One `.cu` file: compiled by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitSource {
    /// The file's name without `.cu`.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// File names and texts of the unit itself and of the headers of its folder that it includes,
    /// directly or through others: all that its image depends on but the compiler.
    pub texts: BTreeMap<String, String>,
}

impl UnitSource {
    /// The unit's own text.
    pub fn text(&self) -> &str {
        &self.texts[&format!("{}.cu", self.name)]
    }

    /// Names of the kernels: the entries that the unit defines.
    pub fn kernels(&self) -> Vec<String> {
        self.entries().into_iter().map(|entry| entry.name).collect()
    }

    /// The entries that the unit defines. Each is written `extern "C" __global__ … name(`, attributes
    /// with parentheses in between or not.
    pub fn entries(&self) -> Vec<UnitEntry> {
        let entries = self.text().split("extern \"C\" __global__").skip(1);
        entries.filter_map(UnitEntry::parse).collect()
    }

    /// Names of the kernels that `target` has: all, or none where the unit is made of another
    /// target's own instructions.
    pub fn kernels_on(&self, target: &str) -> Vec<String> {
        let (condition, only_target) = HOPPER;
        if target != only_target && self.text().contains(condition) {
            return Vec::new();
        }
        self.kernels()
    }
}

/// A kernel of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitEntry {
    /// By which it is found.
    pub name: String,
    /// What stands in its `__launch_bounds__(…)`, if it has any: expressions of the unit.
    pub bounds: Option<String>,
    /// What stands in its `__cluster_dims__(…)`, if it has any: expressions of the unit.
    pub cluster: Option<String>,
}

/// What the compiler defines for the one target that has Hopper's own instructions, and that target.
const HOPPER: (&str, &str) = ("#if defined(__CUDA_ARCH_FEAT_SM90_ALL)", "sm_90a");

impl UnitEntry {
    /// Of what follows `__global__`: the last word before the parameters is the name.
    fn parse(declaration: &str) -> Option<Self> {
        let mut rest = declaration;
        let mut bounds = None;
        let mut cluster = None;
        loop {
            let open = rest.find('(')?;
            let before = rest[..open].trim_end();
            let start = before.rfind(|c: char| !c.is_alphanumeric() && c != '_');
            let word = &before[start.map_or(0, |start| start + 1)..];
            if !word.starts_with("__") {
                let name = word.to_owned();
                return Some(Self {
                    name,
                    bounds,
                    cluster,
                });
            }
            // An attribute as `__launch_bounds__(256, 2)`: go on after its closing parenthesis.
            let mut depth = 0;
            let close = rest[open..].find(|c: char| {
                depth += i32::from(c == '(') - i32::from(c == ')');
                depth == 0
            })?;
            let inside = || Some(rest[open + 1..open + close].to_owned());
            match word {
                "__launch_bounds__" => bounds = inside(),
                "__cluster_dims__" => cluster = inside(),
                _ => {}
            }
            rest = &rest[open + close + 1..];
        }
    }
}

/// Every unit of `folder`, by name.
///
/// # Errors
/// A file cannot be read.
pub fn units(folder: &Path) -> Result<Vec<UnitSource>, NvccError> {
    files(folder, "cu")?
        .into_iter()
        .map(|path| {
            let name = path.file_stem().unwrap_or_default();
            let mut texts = BTreeMap::new();
            collect(&path, &mut texts)?;
            Ok(UnitSource {
                name: name.to_string_lossy().into_owned(),
                path,
                texts,
            })
        })
        .collect()
}

/// Writes a file, but leaves one that is right already as it is, so that nothing after it is built again.
///
/// # Errors
/// The file cannot be written.
pub fn write_if_changed(path: &Path, text: &str) -> Result<(), NvccError> {
    if fs::read_to_string(path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(NvccError::file("write", path))
}

/// Every header of `folder`, by name.
///
/// # Errors
/// The folder cannot be read.
pub fn headers(folder: &Path) -> Result<Vec<PathBuf>, NvccError> {
    files(folder, "cuh")
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, NvccError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(NvccError::file("list", folder))? {
        let path = entry.map_err(NvccError::file("list", folder))?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Adds `path` and the headers beside it that it includes; the compiler's own are not there.
fn collect(path: &Path, texts: &mut BTreeMap<String, String>) -> Result<(), NvccError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if texts.contains_key(&*name) {
        return Ok(());
    }
    let text = fs::read_to_string(path).map_err(NvccError::file("read", path))?;
    let included: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| {
            let include = line.trim_start().strip_prefix('#')?.trim_start();
            let quoted = include.strip_prefix("include")?.trim_start();
            let header = quoted.strip_prefix('"')?.split('"').next()?;
            Some(path.with_file_name(header))
        })
        .filter(|header| header.is_file())
        .collect();
    texts.insert(name.into_owned(), text);
    included
        .iter()
        .try_for_each(|header| collect(header, texts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_knows_its_headers_and_kernels() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            fs::write(folder.path().join(name), text).expect("a writable folder");
        };
        write(
            "a.cuh",
            "#pragma once\n#include \"b.cuh\"\n#include <cuda_fp16.h>\n",
        );
        write("b.cuh", "#include \"a.cuh\"\n");
        write("other.cuh", "");
        write(
            "one.cu",
            "# include \"a.cuh\"\n\
             extern \"C\" __global__ void oxl_first(const __grid_constant__ FirstArgs args) {}\n\
             extern \"C\" __global__ void\n__launch_bounds__(4 * (32), 2) oxl_second(SecondArgs args) {}\n\
             extern \"C\" __global__ __launch_bounds__(32) void third (int n) {}\n",
        );
        write(
            "two.cu",
            "#if defined(__CUDA_ARCH_FEAT_SM90_ALL)\n\
             extern \"C\" __global__ void fourth(int n) {}\n#endif\n",
        );
        let units = units(folder.path()).expect("readable");
        let names: Vec<_> = units.iter().map(|unit| &*unit.name).collect();
        assert_eq!(names, ["one", "two"]);
        let texts: Vec<_> = units[0].texts.keys().map(|name| &**name).collect();
        assert_eq!(texts, ["a.cuh", "b.cuh", "one.cu"]);
        assert_eq!(units[0].kernels(), ["oxl_first", "oxl_second", "third"]);
        assert_eq!(units[0].kernels_on("sm_80"), units[0].kernels());
        assert_eq!(units[1].kernels_on("sm_90a"), ["fourth"]);
        assert_eq!(units[1].kernels_on("sm_80"), [""; 0]);
        assert_eq!(headers(folder.path()).expect("readable").len(), 3);
    }
}
