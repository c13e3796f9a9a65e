//! Compiles every unit to one image for all architectures, where an nvcc is found.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Architectures when none are asked for.
const DEFAULT_ARCHITECTURES: &str = "80,86,89,90a";

fn main() {
    println!("cargo::rerun-if-changed=cuda");
    for variable in ["OXLLAMA_NVCC", "OXLLAMA_CUDA_ARCHITECTURES", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = find_nvcc();
    if nvcc.is_none() {
        println!(
            "cargo::warning=no nvcc found (OXLLAMA_NVCC, CUDA_HOME, PATH, /usr/local/cuda): \
             kernels are compiled at run time"
        );
    }
    let mut sources: Vec<PathBuf> = fs::read_dir("cuda")
        .expect("the folder of kernels exists")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    sources.sort();
    let mut units = String::from("&[\n");
    let mut headers = String::from("&[\n");
    for path in &sources {
        let full = path.canonicalize().expect("the file was just listed");
        let name = path
            .file_stem()
            .expect("a file has a name")
            .to_string_lossy();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("cu") => {
                let image = nvcc.as_ref().map(|nvcc| compile(nvcc, path, &out));
                let image = match image {
                    Some(image) => format!("Some(include_bytes!({image:?}))"),
                    None => "None".to_owned(),
                };
                writeln!(
                    units,
                    "Unit {{ name: {name:?}, source: include_str!({full:?}), image: {image} }},"
                )
                .expect("a string takes everything");
            }
            Some("cuh") => {
                writeln!(headers, "(\"{name}.cuh\", include_str!({full:?})),")
                    .expect("a string takes everything");
            }
            _ => {}
        }
    }
    units.push(']');
    headers.push(']');
    fs::write(out.join("units.rs"), units).expect("cargo's folder is writable");
    fs::write(out.join("headers.rs"), headers).expect("cargo's folder is writable");
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(path) = env::var_os("OXLLAMA_NVCC") {
        return Some(path.into());
    }
    let homes = env::var_os("CUDA_HOME").map(PathBuf::from);
    let in_homes = homes
        .into_iter()
        .chain([PathBuf::from("/usr/local/cuda")])
        .map(|home| home.join("bin/nvcc"));
    let paths = env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<_> = env::split_paths(&paths)
        .map(|path| path.join("nvcc"))
        .collect();
    in_homes.chain(on_path).find(|path| path.is_file())
}

fn compile(nvcc: &Path, source: &Path, out: &Path) -> PathBuf {
    let architectures = env::var("OXLLAMA_CUDA_ARCHITECTURES");
    let architectures = architectures.as_deref().unwrap_or(DEFAULT_ARCHITECTURES);
    let image = out.join(source.with_extension("fatbin").file_name().expect("named"));
    let mut command = Command::new(nvcc);
    command.args([
        "-O3",
        "-std=c++17",
        "-Xfatbin",
        "-compress-all",
        "--compress-mode=size",
    ]);
    for architecture in architectures.split(',') {
        let architecture = architecture.trim();
        command.arg("-gencode").arg(format!(
            "arch=compute_{architecture},code=sm_{architecture}"
        ));
    }
    command.arg("-fatbin").arg("-o").arg(&image).arg(source);
    let status = command.status();
    match status {
        Ok(status) if status.success() => image,
        other => panic!("{command:?} failed: {other:?}"),
    }
}
