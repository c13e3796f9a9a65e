//! Compiles the kernels' units as C++ for the host, each with a table of its entries.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Units of Hopper's own instructions, which are not emulated.
const HOPPERS: [&str; 2] = ["attention_groups", "linear_many"];

fn main() {
    let kernels = Path::new("../kernels/cuda");
    let tests = Path::new("tests");
    for folder in [kernels, Path::new("include"), tests] {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .includes([Path::new("include"), kernels, tests])
        // Products and sums are joined where a kernel says so, and nowhere else.
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        .flag("-Wno-unknown-pragmas")
        // Attributes of a declaration that are of no use here.
        .flag("-Wno-attributes")
        .opt_level(2)
        .debug(false)
        .warnings(false);
    let mut tables = String::new();
    let mut list = String::new();
    for path in [units(kernels), units(tests)].concat() {
        let unit = path.file_stem().unwrap_or_default().to_string_lossy();
        let text = fs::read_to_string(&path).expect("a unit");
        let mut entries = String::new();
        for (name, bounds) in entries_of(&text) {
            writeln!(entries, "    ENTRY({name}, {bounds}),").expect("a string takes everything");
        }
        // A namespace of its own: what units call by one name, a linker would make one.
        let file = out.join(format!("{unit}.cpp"));
        let source = format!(
            "#define oxl unit_{unit}\n#include <emulated_ptx.h>\n#include \"{unit}.cu\"\n\
             extern \"C\" const emulated::Entry oxl_entries_{unit}[] = {{\n{entries}    {{}}\n}};\n"
        );
        write(&file, &source);
        build.file(&file);
        writeln!(
            tables,
            "extern \"C\" const emulated::Entry oxl_entries_{unit}[];"
        )
        .expect("a string takes everything");
        writeln!(list, "    oxl_entries_{unit},").expect("a string takes everything");
    }
    let file = out.join("entries.cpp");
    let source = format!(
        "#include <emulated.h>\n{tables}\
         extern \"C\" const emulated::Entry* const oxl_entries[] = {{\n{list}    nullptr\n}};\n"
    );
    write(&file, &source);
    build.file(&file).file("include/emulated.cpp");
    build.compile("oxllama_emulated_kernels");
}

/// Files of a folder's units that are emulated, in order.
fn units(folder: &Path) -> Vec<PathBuf> {
    let is_hoppers = |path: &PathBuf| {
        let unit = path.file_stem().unwrap_or_default();
        HOPPERS.iter().any(|&hoppers| unit == hoppers)
    };
    let mut units: Vec<PathBuf> = fs::read_dir(folder)
        .expect("a folder of kernels")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .filter(|path| !is_hoppers(path))
        .collect();
    units.sort();
    units
}

/// Names of a unit's entries and what stands in their bounds, or what bounds every block:
/// `__global__ void __launch_bounds__(BOUNDS) NAME(const __grid_constant__`.
fn entries_of(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.match_indices("(const __grid_constant__")
        .map(|(at, _)| {
            let before = &text[..at];
            let start = before.rfind("__global__").expect("an entry is global");
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let (head, name) = before.split_at(before.trim_end_matches(is_name).len());
            let bounds = head[start..].split_once("__launch_bounds__(");
            let bounds = bounds.and_then(|(_, bounds)| Some(bounds.rsplit_once(')')?.0));
            (name, bounds.unwrap_or("emulated::MOST_THREADS"))
        })
}

/// Leaves a file that is right already as it is.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|found| found == text) {
        return;
    }
    fs::write(path, text).expect("the build's own folder");
}
