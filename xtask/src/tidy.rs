//! The invariants of ARCHITECTURE.md that a search can check.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::root;

/// Crates from the bottom up: each may depend on those before it only.
const LAYERS: [&str; 12] = [
    "oxllama-memory",
    "oxllama-format",
    "oxllama-text",
    "oxllama-backend",
    "oxllama-cpu",
    "oxllama-nvcc",
    "oxllama-kernels",
    "oxllama-cuda",
    "oxllama-model",
    "oxllama-engine",
    "oxllama-gpu-tests",
    "oxllama",
];

/// Licences that may be linked into the binary.
const LICENCES: [&str; 13] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

fn sources() -> Vec<(PathBuf, String)> {
    fn collect(folder: &Path, files: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).expect("a readable folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                collect(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a readable source");
                files.push((path, text));
            }
        }
    }
    let mut files = Vec::new();
    collect(&root().join("crates"), &mut files);
    collect(&root().join("xtask"), &mut files);
    assert!(files.len() > 20, "found only {} sources", files.len());
    files
}

/// Sources under `src/` of the crates not named in `exempt`.
fn library_sources(exempt: &[&str]) -> Vec<(PathBuf, String)> {
    sources()
        .into_iter()
        .filter(|(path, _)| {
            let parts: Vec<_> = path
                .components()
                .map(|c| c.as_os_str().to_string_lossy())
                .collect();
            parts.iter().any(|part| part == "src")
                && !parts.iter().any(|part| exempt.contains(&&**part))
        })
        .collect()
}

#[test]
fn only_the_command_line_prints() {
    for (path, text) in library_sources(&["cli", "gpu-tests", "xtask"]) {
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for call in ["println!", "print!(", "eprintln!", "eprint!("] {
            assert!(!code.contains(call), "{} uses {call}", path.display());
        }
    }
}

#[test]
fn only_the_command_line_knows_http() {
    for (path, text) in library_sources(&["cli", "xtask"]) {
        for name in ["ureq", "reqwest", "hyper::", "axum"] {
            assert!(!text.contains(name), "{} uses {name}", path.display());
        }
    }
}

#[test]
fn nothing_is_chosen_at_compile_time() {
    for (path, text) in library_sources(&["xtask"]) {
        assert!(!text.contains("feature = \"cuda\""), "{}", path.display());
    }
}

#[test]
fn files_stay_readable() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(
            lines <= 650,
            "{} has {lines} lines: split it by role",
            path.display()
        );
    }
}

/// What cargo knows of the workspace, for this platform: other platforms' packages were never
/// downloaded.
fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", &host()])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

/// The platform that rustc builds for.
fn host() -> String {
    let output = Command::new("rustc")
        .arg("-vV")
        .output()
        .expect("rustc runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.expect("rustc names its host").to_owned()
}

#[test]
fn arrows_between_crates_point_down() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    for (height, name) in LAYERS.iter().enumerate() {
        let package = packages
            .iter()
            .find(|package| package["name"] == *name)
            .unwrap_or_else(|| panic!("{name} is not in the workspace"));
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let dependency_name = dependency["name"].as_str().expect("a name");
            let is_for_tests = dependency["kind"] == "dev";
            if let Some(other) = LAYERS.iter().position(|layer| *layer == dependency_name) {
                assert!(
                    other < height || is_for_tests,
                    "{name} imports {dependency_name}"
                );
            }
        }
    }
}

#[test]
fn licences_are_permissive() {
    let metadata = metadata();
    let mut refused = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().unwrap_or_default();
        let licence = package["license"]
            .as_str()
            .unwrap_or_default()
            .replace('/', " OR ");
        let allowed = |part: &str| {
            let part = part.trim().trim_matches(['(', ')']).trim();
            LICENCES.contains(&part)
        };
        // "A OR B" needs one allowed part, "A AND B" all of them.
        let ok = licence
            .split(" OR ")
            .any(|choice| choice.split(" AND ").all(allowed));
        if !ok {
            refused.insert(name.to_owned(), licence);
        }
    }
    assert!(refused.is_empty(), "{refused:?}");
}

/// The units' folder.
fn kernel_folder() -> PathBuf {
    root().join("crates/kernels/cuda")
}

/// Name and text of every unit and header, without comments.
fn kernel_sources() -> Vec<(String, String)> {
    let entries = fs::read_dir(kernel_folder()).expect("the folder of kernels");
    entries
        .map(|entry| {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let text = fs::read_to_string(&path).expect("a readable source");
            let lines = text.lines();
            let code: Vec<_> = lines
                .map(|line| line.split("//").next().unwrap_or_default())
                .collect();
            (name.into_owned(), code.join("\n"))
        })
        .collect()
}

#[test]
fn only_the_cuda_crate_calls_the_driver() {
    for (path, text) in sources() {
        let is_allowed = ["crates/cuda", "crates/fake-driver", "xtask"]
            .iter()
            .any(|folder| path.starts_with(root().join(folder)));
        for name in ["cudarc", "libcuda", "cuInit", "CUdeviceptr"] {
            assert!(
                is_allowed || !text.contains(name),
                "{} uses {name}",
                path.display()
            );
        }
    }
    let metadata = metadata();
    for package in metadata["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().unwrap_or_default();
        let dependencies = package["dependencies"].as_array().expect("dependencies");
        let has_driver = dependencies.iter().any(|other| other["name"] == "cudarc");
        assert!(
            !has_driver || name == "oxllama-cuda",
            "{name} imports cudarc"
        );
    }
}

#[test]
fn kernels_are_device_code_only() {
    const HEADERS: [&str; 3] = ["cuda_fp16.h", "cuda_bf16.h", "stdint.h"];
    for (name, code) in kernel_sources() {
        for line in code.lines() {
            if let Some((_, header)) = line.split_once("#include <") {
                let header = header.trim_end().trim_end_matches('>');
                assert!(
                    HEADERS.contains(&header),
                    "{name} includes {header}: NVRTC has {HEADERS:?} only"
                );
            }
        }
        assert!(!code.contains("<<<"), "{name} launches a kernel");
        // `cudaMalloc` and its like: the runtime library.
        let runtime = code.match_indices("cuda").find(|(at, _)| {
            let next = code[at + "cuda".len()..].chars().next();
            next.is_some_and(|letter| letter.is_ascii_uppercase())
        });
        assert!(runtime.is_none(), "{name} calls the runtime library");
    }
}

#[test]
fn every_kernel_is_found_by_a_name_of_its_own() {
    let units = oxllama_nvcc::units(&kernel_folder()).expect("readable units");
    let mut owners = BTreeMap::new();
    for unit in &units {
        let kernels = unit.kernels();
        assert!(!kernels.is_empty(), "{} has no kernel", unit.name);
        for kernel in kernels {
            let name = &unit.name;
            assert!(
                kernel.starts_with("oxl_"),
                "{kernel} of {name}: say oxl_{kernel}"
            );
            let other = owners.insert(kernel.clone(), name);
            assert!(other.is_none(), "{kernel} is in {name} and in {other:?}");
        }
    }
    // What the list of units would miss: files elsewhere, and entries written in another way.
    for (name, code) in kernel_sources() {
        let is_source = name.ends_with(".cu") || name.ends_with(".cuh");
        assert!(is_source, "{name} is neither a unit nor a header");
        let entries = code.matches("__global__").count();
        let listed = units
            .iter()
            .find(|unit| format!("{}.cu", unit.name) == name);
        let listed = listed.map_or(0, |unit| unit.kernels().len());
        assert_eq!(
            entries, listed,
            "{name} declares kernels that are not `extern \"C\" __global__ void oxl_name(`"
        );
    }
}
