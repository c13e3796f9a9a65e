//! `cargo xtask gpu-bundle`: one folder that tests and measures on a machine with a GPU and
//! without Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use oxllama_nvcc::{ARCHITECTURES_VARIABLE, NVCC_VARIABLE, Target};

use crate::toolkit::Toolkit;
use crate::{cargo_command, print, root, run, target_folder};

/// The most that the bundle may take, so that it travels easily.
const MOST_BYTES: u64 = 40 << 20;

/// The oldest C library that the programs must run on (Ubuntu 22.04).
const OLDEST_GLIBC: Version = Version(2, 35);

/// Programs: the name in cargo's folder of release builds, and the one in the bundle.
const PROGRAMS: [(&str, &str); 2] = [
    ("oxllama", "oxllama"),
    ("oxllama-gpu-tests", "oxllama-gpu-tests"),
];

/// Models with their tokenizers, a few hundred kilobytes each: one of each kind of attention
/// and norm.
const MODELS: [&str; 4] = ["llama", "qwen3", "gemma3", "phi3"];

/// A model on real weights, a text, and the model's golden outputs, in the folder of larger test
/// data (see ARCHITECTURE.md).
const REAL_MODEL: &str = "models/smollm2-135m-exl2-4.0bpw";
const TEXT: &str = "data/wiki-eval.txt";
const GOLDEN: &str = "golden/smollm2-135m.json";

/// Most of the text that goes along: some 3,000 tokens.
const TEXT_BYTES: usize = 12 << 10;

/// Makes the bundle in `out` with images for the targets of `list`.
pub(crate) fn gpu_bundle(list: &str, out: Option<PathBuf>) -> Result<()> {
    // Refuses a wrong list before anything is built.
    let targets = Target::parse_list(list)?;
    let out = out.unwrap_or_else(|| target_folder().join("gpu-bundle"));
    let toolkit = Toolkit::find_or_install()?;
    let mut build = cargo_command(["build", "--release"]);
    build
        .args(["--package", "oxllama", "--package", "oxllama-gpu-tests"])
        .arg("--bins")
        .env(NVCC_VARIABLE, toolkit.nvcc.path())
        .env(ARCHITECTURES_VARIABLE, list);
    run(&mut build)?;

    let fixtures = out.join("fixtures");
    fs::create_dir_all(&fixtures).with_context(|| format!("cannot make {}", out.display()))?;
    let mut files = Vec::new();
    for (built, name) in PROGRAMS {
        let program = out.join(name);
        copy(&target_folder().join("release").join(built), &program)?;
        run(Command::new("strip").arg("--strip-all").arg(&program))?;
        check_symbols(&program)?;
        files.push(program);
    }
    for model in MODELS {
        let file = format!("{model}.gguf");
        copy(
            &root().join("tests/fixtures/gguf").join(&file),
            &fixtures.join(&file),
        )?;
        files.push(fixtures.join(file));
    }
    let families = root().join("tests/fixtures/models");
    copy_folder(&families, &fixtures.join("models"), &mut files)?;
    add_real_weights(&fixtures, &mut files)?;
    let names: Vec<_> = targets.iter().map(ToString::to_string).collect();
    let version = format!(
        "oxllama {}, kernels for {}, {}\n",
        revision()?,
        names.join(", "),
        toolkit.nvcc.version().lines().last().unwrap_or_default()
    );
    let texts = [
        (
            fixtures.join("jobs.jsonl"),
            include_str!("gpu_bundle/jobs.jsonl"),
        ),
        (out.join("run.sh"), include_str!("gpu_bundle/run.sh")),
        (out.join("VERSION"), &version),
    ];
    for (path, text) in texts {
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        files.push(path);
    }
    make_executable(&out.join("run.sh"))?;
    check_size(&files)?;
    print(&format!("{}: {}", out.display(), version.trim_end()));
    Ok(())
}

/// Adds what is there of real weights: a cut of a model with the CPU's logits, the text for a whole
/// model, and the golden outputs of that model; says so where there is nothing.
fn add_real_weights(fixtures: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let shared =
        std::env::var_os("OXLLAMA_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    let (model, text) = (shared.join(REAL_MODEL), shared.join(TEXT));
    let cut = fixtures.join("cut");
    // One of an earlier run is not this build's.
    if cut.exists() {
        fs::remove_dir_all(&cut).with_context(|| format!("cannot remove {}", cut.display()))?;
    }
    if !model.is_dir() || !text.is_file() {
        print(&format!(
            "no real weights in the bundle: OXLLAMA_SHARED names no folder with {REAL_MODEL} and \
             {TEXT}"
        ));
        return Ok(());
    }
    run(Command::new(fixtures.with_file_name("oxllama-gpu-tests"))
        .arg("cut")
        .args([&model, &text])
        .arg(&cut))?;
    list_files(&cut, files)?;
    let whole = fs::read_to_string(&text)?;
    let excerpt = fixtures.join("text.txt");
    fs::write(&excerpt, beginning(&whole, TEXT_BYTES))?;
    files.push(excerpt);
    let golden = shared.join(GOLDEN);
    if golden.is_file() {
        copy(&golden, &fixtures.join("golden.json"))?;
        files.push(fixtures.join("golden.json"));
    }
    Ok(())
}

/// The first lines of `text` that are no more than `bytes` together.
fn beginning(text: &str, bytes: usize) -> &str {
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        if end + line.len() > bytes {
            break;
        }
        end += line.len();
    }
    &text[..end]
}

fn list_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Copies all files of a folder and of those in it, and adds the copies to `files`.
fn copy_folder(from: &Path, to: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let entries = fs::read_dir(from).with_context(|| format!("no folder {}", from.display()))?;
    for entry in entries {
        let path = entry?.path();
        let copied = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_folder(&path, &copied, files)?;
        } else {
            copy(&path, &copied)?;
            files.push(copied);
        }
    }
    Ok(())
}

#[cfg(unix)]
fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

#[cfg(not(unix))]
fn make_executable(_path: &Path) -> Result<()> {
    bail!("a bundle is made on Linux, for Linux")
}

/// The commit, and whether there is more than it.
fn revision() -> Result<String> {
    let git = |arguments: &[&str]| -> Result<String> {
        let output = Command::new("git")
            .args(arguments)
            .current_dir(root())
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changes = git(&["status", "--porcelain"])?;
    Ok(if changes.is_empty() {
        commit
    } else {
        format!("{commit} and changes")
    })
}

/// Prints the size of the larger files and of all, and fails where they are too large together.
fn check_size(files: &[PathBuf]) -> Result<()> {
    const LARGE_BYTES: u64 = 1 << 20;
    let mut bytes = 0;
    for file in files {
        let size = fs::metadata(file)?.len();
        if size >= LARGE_BYTES {
            print(&format!("{size:>10} {}", file.display()));
        }
        bytes += size;
    }
    print(&format!("{bytes:>10} in {} files", files.len()));
    ensure!(
        bytes <= MOST_BYTES,
        "the bundle takes {bytes} bytes, more than {MOST_BYTES}"
    );
    Ok(())
}

/// Fails where a program needs a newer C library than the oldest it must run on.
fn check_symbols(program: &Path) -> Result<()> {
    let output = Command::new("objdump")
        .args(["--dynamic-syms", "--wide"])
        .arg(program)
        .output()
        .context("cannot start objdump (package binutils)")?;
    ensure!(
        output.status.success(),
        "objdump cannot read {}: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let symbols = String::from_utf8_lossy(&output.stdout);
    ensure!(
        symbols.contains("GLIBC_"),
        "{} has no symbol of the C library: was it linked statically?",
        program.display()
    );
    let newer = newer_symbols(&symbols);
    if !newer.is_empty() {
        bail!(
            "{} needs a C library newer than {}.{} for {}: build on an older system, or avoid them",
            program.display(),
            OLDEST_GLIBC.0,
            OLDEST_GLIBC.1,
            newer.join(", ")
        );
    }
    Ok(())
}

/// A version of the C library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

/// Symbols with their versions in what objdump printed that are newer than [`OLDEST_GLIBC`].
fn newer_symbols(symbols: &str) -> Vec<String> {
    symbols
        .lines()
        .filter(|line| {
            let number = line.split("GLIBC_").nth(1).unwrap_or_default();
            let number = number.split([')', ' ']).next().unwrap_or_default();
            let mut parts = number.split('.').map(|part| part.parse().unwrap_or(0));
            let version = Version(parts.next().unwrap_or(0), parts.next().unwrap_or(0));
            version > OLDEST_GLIBC
        })
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().rev().take(2).collect();
            words.into_iter().rev().collect::<Vec<_>>().join(" ")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_of_a_newer_library_are_named() {
        let symbols = "\
/bundle/oxllama:     file format elf64-x86-64

DYNAMIC SYMBOL TABLE:
0000000000000000      DF *UND*  0000000000000000 (GLIBC_2.2.5) memcpy
0000000000000000      DF *UND*  0000000000000000 (GLIBC_2.35) hypot
0000000000000000      DF *UND*  0000000000000000 (GLIBC_2.36) pidfd_open
0000000000000000  w   DF *UND*  0000000000000000 (GLIBC_2.100) later
0000000000000000      DF *UND*  0000000000000000 (GLIBC_3.0) last
0000000000000000      DF *UND*  0000000000000000 (GCC_3.0)   _Unwind_Resume
";
        let expected = [
            "(GLIBC_2.36) pidfd_open",
            "(GLIBC_2.100) later",
            "(GLIBC_3.0) last",
        ];
        assert_eq!(newer_symbols(symbols), expected);
    }

    #[test]
    fn a_text_begins_with_whole_lines() {
        let text = "one\ntwo\nthree";
        assert_eq!(beginning(text, 8), "one\ntwo\n");
        assert_eq!(beginning(text, 7), "one\n");
        assert_eq!(beginning(text, 13), text);
        assert_eq!(beginning(text, 2), "");
    }

    #[test]
    fn the_jobs_have_names_of_their_own() {
        let jobs = include_str!("gpu_bundle/jobs.jsonl");
        let mut names = Vec::new();
        for job in jobs.lines() {
            let job: serde_json::Value = serde_json::from_str(job).expect("one object a line");
            names.push(job["custom_id"].as_str().expect("a name").to_owned());
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert!(count > 1 && names.len() == count, "{names:?}");
    }
}
