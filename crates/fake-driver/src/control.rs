//! How tests find the library, program the machine and ask what is alive on it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::Library;

use crate::state::lock;

/// The environment variable with the settings of a machine, for programs that are started.
pub const VARIABLE: &str = "OXLLAMA_FAKE_DRIVER";

/// Obeys settings. Called through the shared library, whose machine it is.
///
/// # Safety
/// `text` has `length` bytes of UTF-8.
#[unsafe(no_mangle)]
unsafe extern "C" fn oxllama_fake_driver_set(text: *const u8, length: usize) {
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(text, length) };
    lock().set(&String::from_utf8_lossy(bytes));
}

/// Writes as much of the report as fits; returns its length.
///
/// # Safety
/// `text` has room for `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn oxllama_fake_driver_report(text: *mut u8, length: usize) -> usize {
    let report = lock().report();
    // SAFETY: the caller's promise.
    unsafe { text.copy_from(report.as_ptr(), report.len().min(length)) };
    report.len()
}

type Set = unsafe extern "C" fn(*const u8, usize);
type Write = unsafe extern "C" fn(*mut u8, usize) -> usize;

/// What is alive on the machine, and what has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    counts: HashMap<String, usize>,
    /// Functions that were called on devices that were lost.
    pub calls_after_loss: Vec<String>,
    /// What a real driver would have refused.
    pub misuse: Vec<String>,
    /// With `trace=on`: the calls since then that wait for something or let a stream wait, and
    /// copies, each with its stream and event or 0x0.
    pub trace: Vec<String>,
}

impl Report {
    /// A number of the report, as `allocations`.
    ///
    /// # Panics
    /// The report has no such number.
    pub fn count(&self, key: &str) -> usize {
        self.counts[key]
    }

    /// Whether the fault that was set has happened.
    pub fn has_fired(&self) -> bool {
        self.count("has_fired") > 0
    }

    /// Everything that is alive: names and numbers.
    pub fn alive(&self) -> Vec<(&'static str, usize)> {
        let kinds = [
            "allocations",
            "allocated_bytes",
            "pinned",
            "streams",
            "events",
            "modules",
            "graphs",
            "executables",
            "contexts",
        ];
        let counts = kinds.map(|kind| (kind, self.count(kind)));
        counts.into_iter().filter(|(_, count)| *count > 0).collect()
    }
}

/// Where the driver, NVML and NVRTC lie under the names that programs look for, and the rest of
/// the environment in which a program finds these and no others.
///
/// # Panics
/// The shared library is not beside the calling test program, or the folder cannot be written.
pub fn environment() -> [(&'static str, PathBuf); 3] {
    let program = std::env::current_exe().expect("a program has a file");
    let folder = program.parent().unwrap_or(Path::new("."));
    let library = folder.join("liboxllama_fake_driver.so");
    assert!(library.is_file(), "{} is not there", library.display());
    let root = folder.join("fake-driver");
    for part in ["lib", "include"] {
        std::fs::create_dir_all(root.join(part)).expect("cargo's folder is writable");
    }
    for name in ["libcuda.so.1", "libnvidia-ml.so.1", "libnvrtc.so.13"] {
        // Other programs may make the same links at this moment.
        let _ = std::os::unix::fs::symlink(&library, root.join("lib").join(name));
    }
    std::fs::write(root.join("include/cuda_fp16.h"), "").expect("cargo's folder is writable");
    [
        ("OXLLAMA_CUDA_LIBRARIES", root.join("lib")),
        ("XDG_CACHE_HOME", root.join("cache")),
        ("OXLLAMA_CUDA_KERNELS", PathBuf::from("nvrtc")),
    ]
}

/// The driver in this process. It is one: who holds this value is alone with it.
#[derive(Debug)]
pub struct FakeDriver {
    library: &'static Library,
    _alone: MutexGuard<'static, ()>,
}

impl FakeDriver {
    /// Puts the driver in place of the real one, for good, with a new machine of these settings.
    ///
    /// # Panics
    /// The shared library is not beside the test program.
    pub fn start(settings: &str) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        // A test that failed must not fail the others.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let library = LIBRARY.get_or_init(|| {
            let environment = environment();
            let driver = environment[0].1.join("libcuda.so.1");
            for (name, value) in environment {
                // SAFETY: this is the first thing that a test does; other tests wait for the
                // lock above, and the environment is read by the standard library only.
                unsafe { std::env::set_var(name, value) };
            }
            for name in ["CUDA_VISIBLE_DEVICES", "OXLLAMA_KERNEL_DIR", VARIABLE] {
                // SAFETY: as above.
                unsafe { std::env::remove_var(name) };
            }
            // SAFETY: this crate's own library, whose loading does nothing.
            unsafe { Library::new(driver) }.expect("the fake driver loads")
        });
        let driver = Self {
            library,
            _alone: alone,
        };
        driver.set(&format!("reset {settings}"));
        driver
    }

    /// Changes settings of the machine.
    ///
    /// # Panics
    /// The library is not this crate's.
    pub fn set(&self, settings: &str) {
        // SAFETY: the symbol is declared so above.
        let set = unsafe { self.library.get::<Set>(b"oxllama_fake_driver_set\0") };
        let set = set.expect("this crate's library");
        // SAFETY: a string is as long as it says.
        unsafe { set(settings.as_ptr(), settings.len()) };
    }

    /// What is alive now.
    ///
    /// # Panics
    /// The library is not this crate's.
    pub fn report(&self) -> Report {
        // SAFETY: the symbol is declared so above.
        let write = unsafe { self.library.get::<Write>(b"oxllama_fake_driver_report\0") };
        let write = write.expect("this crate's library");
        let mut text = vec![0; 1 << 16];
        // SAFETY: the buffer is as long as it says.
        let length = unsafe { write(text.as_mut_ptr(), text.len()) };
        text.truncate(length);
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        let mut report = Report {
            counts: HashMap::new(),
            calls_after_loss: Vec::new(),
            misuse: Vec::new(),
            trace: Vec::new(),
        };
        for (key, value) in lines {
            match (key, value.parse()) {
                ("misuse", _) => report.misuse.push(value.to_owned()),
                ("trace", _) => report.trace.push(value.to_owned()),
                ("call_after_loss", _) => report.calls_after_loss.push(value.to_owned()),
                (_, Ok(count)) => {
                    report.counts.insert(key.to_owned(), count);
                }
                (_, Err(_)) => {}
            }
        }
        report
    }
}
