//! The runtime compiler on every unit. Needs NVRTC, but no GPU and no driver.

use std::fs;

use oxllama_cuda::{CompileError, KernelCache, KernelSource, RuntimeCompiler};
use oxllama_kernels::UNITS;

/// Set where the test must not skip.
const REQUIRED: &str = "OXLLAMA_REQUIRE_NVRTC";

#[expect(clippy::print_stderr, reason = "a test says that it skips")]
fn compiler() -> Option<RuntimeCompiler> {
    match RuntimeCompiler::find(13) {
        Ok(compiler) => Some(compiler),
        Err(error @ (CompileError::Library(_) | CompileError::Headers { .. }))
            if std::env::var_os(REQUIRED).is_none() =>
        {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Cubins are ELF files.
fn is_machine_code(code: &[u8]) -> bool {
    code.starts_with(b"\x7fELF") && code.len() > 1000
}

#[test]
fn every_unit_compiles() {
    let Some(compiler) = compiler() else { return };
    let architecture = compiler.architecture((9, 0)).expect("a known GPU");
    assert_eq!(architecture, "sm_90a");
    assert!(!UNITS.is_empty());
    std::thread::scope(|scope| {
        for units in UNITS.chunks(UNITS.len().div_ceil(2)) {
            let (compiler, architecture) = (&compiler, &architecture);
            scope.spawn(move || {
                for unit in units {
                    let source = KernelSource::embedded(unit);
                    let code = compiler
                        .compile(&source, architecture)
                        .unwrap_or_else(|error| panic!("{error}"));
                    assert!(is_machine_code(&code), "{}", unit.name);
                }
            });
        }
    });
}

#[test]
fn a_gpu_that_the_compiler_does_not_know_is_named() {
    let Some(compiler) = compiler() else { return };
    assert_eq!(compiler.architecture((8, 0)).expect("a known GPU"), "sm_80");
    let error = compiler.architecture((99, 9)).expect_err("from the future");
    let text = error.to_string();
    assert!(text.contains("99.9") && text.contains("newer"), "{text}");
}

#[test]
fn a_wrong_source_gives_the_compilers_messages() {
    let Some(compiler) = compiler() else { return };
    let source = KernelSource {
        name: "wrong".to_owned(),
        text: "#include \"own.cuh\"\nextern \"C\" __global__ void oxl_a() { nothing(); }"
            .to_owned(),
        headers: vec![("own.cuh".to_owned(), String::new())],
    };
    let error = compiler
        .compile(&source, "sm_80")
        .expect_err("wrong")
        .to_string();
    assert!(
        error.contains("wrong.cu(2)") && error.contains("nothing"),
        "{error}"
    );
}

#[test]
fn compiled_code_is_kept_and_a_damaged_entry_made_again() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let cache = KernelCache::new(folder.path().join("kernels"));
    let source = |text: &str| KernelSource {
        name: "unit".to_owned(),
        text: text.to_owned(),
        headers: Vec::new(),
    };
    let one = source("extern \"C\" __global__ void oxl_a(float* x) { x[0] = 1; }");
    let code = cache.compile(&compiler, &one, "sm_80").expect("compiles");
    assert!(is_machine_code(&code));
    let entries = || -> Vec<_> {
        let entries = fs::read_dir(folder.path().join("kernels")).expect("a cache");
        entries
            .map(|entry| entry.expect("an entry").path())
            .collect()
    };
    let [entry] = &*entries() else {
        panic!("one entry: {:?}", entries());
    };
    let kept = fs::read(entry).expect("an entry");
    // What the cache gives is what it has: the code of an entry with a right hash, whatever it is.
    let other = b"other code";
    let forged = [blake3::hash(other).as_bytes().as_slice(), other].concat();
    fs::write(entry, forged).expect("an own file");
    let found = cache.compile(&compiler, &one, "sm_80").expect("kept");
    assert_eq!(found, other);
    fs::write(entry, &kept[..kept.len() - 1]).expect("an own file");
    let again = cache.compile(&compiler, &one, "sm_80").expect("compiles");
    assert_eq!(again.len(), code.len());
    assert_eq!(fs::read(entry).expect("an entry").len(), kept.len());

    // Another text and another architecture are other entries.
    let two = source("extern \"C\" __global__ void oxl_a(float* x) { x[0] = 2; }");
    cache.compile(&compiler, &two, "sm_80").expect("compiles");
    cache.compile(&compiler, &two, "sm_86").expect("compiles");
    assert_eq!(entries().len(), 3);
}
