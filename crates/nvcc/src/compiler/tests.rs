//! Search and staleness, with a shell script in the compiler's place.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;

use super::*;

/// Held by tests that write a program and start it: another thread's fork in between would hold
/// the program open for writing, and it could not be started.
static STARTS_PROGRAMS: Mutex<()> = Mutex::new(());

/// A program that answers like nvcc and, asked to compile, appends a line to `log`.
fn write_compiler(path: &Path, release: &str, log: &Path) {
    let script = format!(
        "#!/bin/sh\n\
         if [ \"$1\" = --version ]; then echo 'Cuda compilation tools, release {release}, V{release}.1'; exit; fi\n\
         while [ \"$1\" != -o ]; do shift; done\n\
         if grep -q wrong \"$3\"; then echo 'x.cu(1): error'; exit 2; fi\n\
         echo compiled >> {log}; cp \"$3\" \"$2\"\n",
        log = log.display()
    );
    fs::create_dir_all(path.parent().expect("a folder")).expect("a writable folder");
    fs::write(path, script).expect("a writable folder");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("an own file");
}

#[test]
fn releases_are_read() {
    let printed =
        "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\n";
    let release = Release::parse(printed).expect("a release");
    assert_eq!(release.to_string(), "13.0");
    assert!(release > OLDEST_RELEASE);
    assert_eq!(Release::parse("gcc 12"), None);
}

#[test]
fn the_search_has_an_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let log = root.join("log");
    for toolkit in [
        "home",
        "system/cuda-12.9",
        "system/cuda-13.10",
        "system/cuda-13.9",
    ] {
        write_compiler(&root.join(toolkit).join("bin/nvcc"), "13.0", &log);
    }
    write_compiler(&root.join("path/nvcc"), "13.0", &log);
    let system = root.join("system");
    let found = |variables: &[(&str, PathBuf)]| {
        let variable = |name: &str| {
            let pair = variables.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| value.clone().into_os_string())
        };
        find_path(&variable, &system)
    };
    let nvcc = |toolkit: &str| Some(root.join(toolkit).join("bin/nvcc"));
    assert_eq!(found(&[]), nvcc("system/cuda-13.10"));
    let path = ("PATH", root.join("path"));
    let home = ("CUDA_HOME", root.join("home"));
    assert_eq!(
        found(std::slice::from_ref(&path)),
        Some(root.join("path/nvcc"))
    );
    assert_eq!(found(&[path.clone(), home.clone()]), nvcc("home"));
    let named = (NVCC_VARIABLE, PathBuf::from("mine"));
    assert_eq!(found(&[path.clone(), home, named]), Some("mine".into()));
    assert_eq!(found(&[path, (NVCC_VARIABLE, PathBuf::new())]), None);
    assert_eq!(find_path(&|_| None, &root.join("nowhere")), None);
}

#[test]
fn an_old_or_foreign_program_is_refused() {
    let _guard = STARTS_PROGRAMS.lock();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nvcc");
    write_compiler(&path, "12.4", &folder.path().join("log"));
    let error = Nvcc::open(path.clone()).expect_err("too old").to_string();
    assert!(error.contains("of CUDA 12.4, and 12.8 or later"), "{error}");
    fs::write(&path, "#!/bin/sh\necho hello\n").expect("an own file");
    let error = Nvcc::open(path).expect_err("no nvcc").to_string();
    assert!(error.contains("does not print a release"), "{error}");
    let error = Nvcc::open(folder.path().join("none"))
        .expect_err("no file")
        .to_string();
    assert!(error.contains("cannot start"), "{error}");
}

#[test]
fn an_image_is_made_again_only_when_its_inputs_change() {
    let _guard = STARTS_PROGRAMS.lock();
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let log = root.join("log");
    write_compiler(&root.join("nvcc"), "13.0", &log);
    let write = |name: &str, text: &str| fs::write(root.join(name), text).expect("an own file");
    let runs = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    let compile = |list: &str| {
        let nvcc = Nvcc::open(root.join("nvcc")).expect("answers");
        let targets = Target::parse_list(list).expect("a list");
        let units = crate::units(root).expect("readable");
        nvcc.compile_if_stale(&units[0], &targets, root)
    };
    write("one.cu", "#include \"used.cuh\"\n");
    write("used.cuh", "1");
    write("other.cuh", "1");
    let image = compile("80").expect("compiles");
    assert_eq!(
        fs::read_to_string(&image).expect("an image"),
        "#include \"used.cuh\"\n"
    );
    write("other.cuh", "2");
    compile("80").expect("compiles");
    assert_eq!(runs(), 1, "what the unit does not include does not count");
    write("used.cuh", "2");
    compile("80").expect("compiles");
    compile("80").expect("compiles");
    assert_eq!(runs(), 2);
    compile("80,90a").expect("compiles");
    assert_eq!(runs(), 3);
    fs::remove_file(&image).expect("an own file");
    compile("80,90a").expect("compiles");
    assert_eq!(runs(), 4);
    write_compiler(&root.join("nvcc"), "13.1", &log);
    compile("80,90a").expect("compiles");
    assert_eq!(runs(), 5);
    write("one.cu", "wrong");
    let error = compile("80").expect_err("refused").to_string();
    assert!(error.contains("x.cu(1): error"), "{error}");
    write("one.cu", "#include \"used.cuh\"\n");
    compile("80,90a").expect("compiles");
    assert_eq!(runs(), 6, "a failure leaves nothing that counts as made");
}
