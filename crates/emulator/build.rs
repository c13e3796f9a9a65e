//! Compiles the kernels' units as C++ for the host, each with a table of its entries.

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use oxllama_nvcc::{UnitEntry, UnitSource};

/// What does not have Hopper's own instructions.
const OLDER_TARGET: &str = "sm_80";

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
    let units = |folder| oxllama_nvcc::units(folder).expect("a folder of kernels");
    for source in [units(kernels), units(tests)].concat() {
        let unit = &source.name;
        let has_clusters = source.text().contains("__cluster_dims__");
        let has_second = has_clusters && source.text().contains("__shared__");
        if has_second {
            let file = out.join(format!("{unit}_second.cpp"));
            write_second(&source, &file);
            build.file(&file);
        }
        let is_hoppers = source.kernels_on(OLDER_TARGET).is_empty();
        let mut declarations = String::new();
        let mut entries = String::new();
        for UnitEntry {
            name,
            bounds,
            cluster,
        } in source.entries()
        {
            let bounds = bounds.as_deref().unwrap_or("emulated::MOST_THREADS");
            let ctas = cluster.as_deref().unwrap_or("1");
            let mut second = "nullptr".to_owned();
            if has_second {
                second = format!("{name}_second_run");
                writeln!(declarations, "extern \"C\" void {second}(const void*);")
                    .expect("a string takes everything");
            }
            writeln!(
                entries,
                "    ENTRY({name}, emulated::first_of({ctas}), {second}, {is_hoppers}, {bounds}),"
            )
            .expect("a string takes everything");
        }
        // A namespace of its own: what units call by one name, a linker would make one.
        let file = out.join(format!("{unit}.cpp"));
        let source = format!(
            "#define oxl unit_{unit}\n#include <emulated_ptx.h>\n#include \"{unit}.cu\"\n{declarations}\
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

/// The same unit once more, for a cluster's second block: it has static shared memory of its own.
fn write_second(source: &UnitSource, file: &Path) {
    let unit = &source.name;
    let mut names = String::new();
    let mut runs = String::new();
    for UnitEntry { name, .. } in source.entries() {
        writeln!(names, "#define {name} {name}_second").expect("a string takes everything");
        writeln!(
            runs,
            "extern \"C\" void {name}_second_run(const void* args) {{ emulated::run_with({name}, args); }}"
        )
        .expect("a string takes everything");
    }
    let source = format!(
        "#define oxl unit_{unit}_second\n{names}#include <emulated_ptx.h>\n#include \"{unit}.cu\"\n{runs}"
    );
    oxllama_nvcc::write_if_changed(file, &source).expect("the build's own folder");
}
