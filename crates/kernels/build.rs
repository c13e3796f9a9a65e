//! Lists the units and compiles each to one image for all targets, where an nvcc is found.

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use oxllama_nvcc::{
    ARCHITECTURES_VARIABLE, DEFAULT_TARGETS, NVCC_VARIABLE, Nvcc, NvccError, Target, UnitSource,
};

fn main() -> ExitCode {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    match build(Path::new("cuda"), &out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.to_string().lines() {
                println!("cargo::error={line}");
            }
            println!("cargo::error=with {NVCC_VARIABLE} set to nothing, no image is made");
            ExitCode::FAILURE
        }
    }
}

fn build(folder: &Path, out: &Path) -> Result<(), NvccError> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let units = oxllama_nvcc::units(folder)?;
    let images = match find_nvcc()? {
        Some(nvcc) => Some(compile(&nvcc, &units, out)?),
        None => None,
    };
    let (targets, paths) = images.unwrap_or_default();
    let mut table = String::from("&[\n");
    for (index, unit) in units.iter().enumerate() {
        let name = &unit.name;
        let source = absolute(&unit.path);
        let image = match paths.get(index) {
            Some(path) => format!("Some(include_bytes!({path:?}))"),
            None => "None".to_owned(),
        };
        writeln!(
            table,
            "Unit {{ name: {name:?}, source: include_str!({source:?}), image: {image} }},"
        )
        .expect("a string takes everything");
    }
    oxllama_nvcc::write_if_changed(&out.join("units.rs"), &(table + "]"))?;

    let mut table = String::from("&[\n");
    for header in oxllama_nvcc::headers(folder)? {
        let name = header.file_name().unwrap_or_default().to_string_lossy();
        let path = absolute(&header);
        writeln!(table, "({name:?}, include_str!({path:?})),").expect("a string takes everything");
    }
    oxllama_nvcc::write_if_changed(&out.join("headers.rs"), &(table + "]"))?;

    let names: Vec<String> = targets.iter().map(ToString::to_string).collect();
    oxllama_nvcc::write_if_changed(&out.join("targets.rs"), &format!("&{names:?}"))?;
    Ok(())
}

/// The compiler, and when to look for it again.
fn find_nvcc() -> Result<Option<Nvcc>, NvccError> {
    for variable in [NVCC_VARIABLE, ARCHITECTURES_VARIABLE, "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let nvcc = match Nvcc::find() {
        Err(error @ NvccError::TooOld { .. }) => {
            println!("cargo::warning={error}");
            None
        }
        found => found?,
    };
    match &nvcc {
        Some(nvcc) => println!("cargo::rerun-if-changed={}", nvcc.path().display()),
        // The user said so.
        None if env::var_os(NVCC_VARIABLE).is_some_and(|path| path.is_empty()) => {}
        None => println!(
            "cargo::warning=no nvcc in {NVCC_VARIABLE}, CUDA_HOME, PATH or /usr/local/cuda*: the CUDA \
             kernels are compiled at run time"
        ),
    }
    // Paths come and go with every terminal and editor: they matter only where the compiler was
    // looked for there.
    let is_in_home = nvcc.as_ref().is_some_and(|nvcc| {
        env::var_os("CUDA_HOME").is_some_and(|home| nvcc.path().starts_with(home))
    });
    if env::var_os(NVCC_VARIABLE).is_none() && !is_in_home {
        println!("cargo::rerun-if-env-changed=PATH");
    }
    Ok(nvcc)
}

/// The targets, and each unit's image.
fn compile(
    nvcc: &Nvcc,
    units: &[UnitSource],
    out: &Path,
) -> Result<(Vec<Target>, Vec<PathBuf>), NvccError> {
    let list = env::var(ARCHITECTURES_VARIABLE);
    let targets = Target::parse_list(list.as_deref().unwrap_or(DEFAULT_TARGETS))?;
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok());
    // Each run of the compiler works on two targets at a time.
    let at_a_time = jobs.unwrap_or(1_usize).div_ceil(2);
    let images = oxllama_nvcc::for_each_in_parallel(at_a_time, units, |unit| {
        nvcc.compile_if_stale(unit, &targets, out)
    });
    Ok((targets, images.into_iter().collect::<Result<_, _>>()?))
}

fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().expect("the file was just listed")
}
