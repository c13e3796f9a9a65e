//! Compiles the kernels' units as C++ for the host, each with a table of its entries.

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use oxllama_nvcc::{UnitEntry, UnitSource};

/// What units are compiled as: none of Hopper's own instructions is emulated.
const TARGET: &str = "sm_80";

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
        .opt_level(2)
        .debug(false)
        // What CUDA's compiler knows and this one does not: pragmas, attributes.
        .warnings(false);
    let mut tables = String::new();
    let mut list = String::new();
    for source in [units(kernels), units(tests)].concat() {
        let unit = &source.name;
        let mut entries = String::new();
        for UnitEntry { name, bounds } in source.entries() {
            let bounds = bounds.as_deref().unwrap_or("emulated::MOST_THREADS");
            writeln!(entries, "    ENTRY({name}, {bounds}),").expect("a string takes everything");
        }
        // A namespace of its own: what units call by one name, a linker would make one.
        let file = out.join(format!("{unit}.cpp"));
        let source = format!(
            "#define oxl unit_{unit}\n#include <emulated_ptx.h>\n#include \"{unit}.cu\"\n\
             extern \"C\" const emulated::Entry oxl_entries_{unit}[] = {{\n{entries}    {{}}\n}};\n"
        );
        oxllama_nvcc::write_if_changed(&file, &source).expect("the build's own folder");
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
    oxllama_nvcc::write_if_changed(&file, &source).expect("the build's own folder");
    build.file(&file).file("include/emulated.cpp");
    build.compile("oxllama_emulated_kernels");
}

/// A folder's units that are emulated.
fn units(folder: &Path) -> Vec<UnitSource> {
    let mut units = oxllama_nvcc::units(folder).expect("a folder of kernels");
    units.retain(|unit| !unit.kernels_on(TARGET).is_empty());
    units
}
