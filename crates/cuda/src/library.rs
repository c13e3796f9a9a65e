//! Libraries that are looked for when the program runs.
//!
//! They lie where the system's loader finds them, in a toolkit's folder, or in a Python
//! environment, whose packages carry them in `site-packages/nvidia/<package>/lib`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::driver::sys as driver;
use libloading::Library;

/// The environment variable with folders to look in before all others, separated as in `PATH`.
pub const LIBRARIES_VARIABLE: &str = "OXLLAMA_CUDA_LIBRARIES";

/// Major versions of CUDA whose libraries are used, the newest first.
const MAJOR_VERSIONS: [i32; 2] = [13, 12];

/// The file of the driver's library.
const DRIVER: &str = "libcuda.so.1";

/// Whether the driver's library can be loaded. Asked before any of its functions is called:
/// the bindings panic without it.
///
/// Systems whose loader does not find the driver name its folder in [`LIBRARIES_VARIABLE`]: once
/// it is loaded, the bindings find it by its name.
pub(crate) fn has_driver() -> bool {
    static DRIVER_LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    DRIVER_LIBRARY.get_or_init(|| {
        let path = in_named_folders(DRIVER)?;
        // SAFETY: the user's word for it that this is the driver, whose initialisation touches
        // nothing of ours.
        unsafe { Library::new(path) }.ok()
    });
    // SAFETY: as above.
    unsafe { driver::is_culib_present() }
}

/// The file `name` in the first of the folders that the user names which has it.
pub(crate) fn in_named_folders(name: &str) -> Option<PathBuf> {
    let named = env::var_os(LIBRARIES_VARIABLE)?;
    env::split_paths(&named)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// A library that nowhere was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} was found neither by the system's loader nor in {}: install it (the CUDA toolkit and \
     NVIDIA's Python packages have it), or name its folder in {LIBRARIES_VARIABLE}",
    names.join(" or "),
    list(folders)
)]
pub struct LibraryNotFound {
    /// File names that would have done.
    pub names: Vec<String>,
    /// Folders that were looked in; those that do not exist are left out.
    pub folders: Vec<PathBuf>,
}

fn list(folders: &[PathBuf]) -> String {
    if folders.is_empty() {
        return "any well-known folder".to_owned();
    }
    let folders: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
    folders.join(", ")
}

/// Names of a library's file by the major version of CUDA, the newest first, up to
/// `newest_major`: code that a newer library makes, an older driver does not load.
pub(crate) fn file_names(stem: &str, newest_major: i32) -> Vec<String> {
    let majors = MAJOR_VERSIONS
        .iter()
        .filter(|&&major| major <= newest_major);
    majors
        .map(|major| format!("lib{stem}.so.{major}"))
        .collect()
}

/// Loads the first of `names` that is found. It stays loaded until the process ends, so bindings
/// that ask the loader for that name get this one.
///
/// # Errors
/// None of the names is anywhere, or what is there cannot be loaded.
pub(crate) fn open(names: &[String]) -> Result<&'static Library, LibraryNotFound> {
    let places = places(&|variable| env::var_os(variable), Path::new("/"));
    for place in &places {
        for name in names {
            let path = match place {
                Place::Loader => PathBuf::from(name),
                Place::Folder(folder) => folder.join(name),
            };
            if matches!(place, Place::Folder(_)) && !path.is_file() {
                continue;
            }
            // SAFETY: the libraries that we name are NVIDIA's, whose initialisation touches
            // nothing of ours; a folder that the user names is the user's word for it.
            if let Ok(library) = unsafe { Library::new(&path) } {
                return Ok(Box::leak(Box::new(library)));
            }
        }
    }
    Err(LibraryNotFound {
        names: names.to_vec(),
        folders: places.into_iter().filter_map(Place::into_folder).collect(),
    })
}

/// The file in which the loader found the code at `address`.
pub(crate) fn file_of(address: *const std::ffi::c_void) -> Option<PathBuf> {
    // SAFETY: plain integers and pointers, for which zeros are valid.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: the function looks the address up in its tables and does not read there.
    let found = unsafe { libc::dladdr(address, &raw mut info) };
    if found == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's own string, which lives as long as the library is loaded.
    let name = unsafe { std::ffi::CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(name.to_str().ok()?))
}

/// Where a library may lie.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Wherever the system's loader finds a bare name.
    Loader,
    Folder(PathBuf),
}

impl Place {
    fn into_folder(self) -> Option<PathBuf> {
        match self {
            Self::Loader => None,
            Self::Folder(folder) => Some(folder),
        }
    }
}

/// Every place in the order of the search, by `variable` (the environment) and the file system's
/// `root`: folders that the user names, the loader, toolkits, Python environments. Folders that
/// do not exist are left out.
fn places(variable: &dyn Fn(&str) -> Option<OsString>, root: &Path) -> Vec<Place> {
    let named = variable(LIBRARIES_VARIABLE).unwrap_or_default();
    let named = env::split_paths(&named).map(Place::Folder);
    let known = toolkits(variable, root)
        .into_iter()
        .map(|toolkit| toolkit.join("lib64"))
        .chain(python_libraries(variable, root))
        .map(Place::Folder);
    let mut places: Vec<Place> = Vec::new();
    for place in named.chain([Place::Loader]).chain(known) {
        let exists = match &place {
            Place::Loader => true,
            Place::Folder(folder) => folder.is_dir(),
        };
        if exists && !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// Folders of CUDA toolkits: named, the system's choice, then by version, the newest first.
pub(crate) fn toolkits(variable: &dyn Fn(&str) -> Option<OsString>, root: &Path) -> Vec<PathBuf> {
    let system = root.join("usr/local");
    let mut versions: Vec<((u32, u32), PathBuf)> = subfolders(&system)
        .into_iter()
        .filter_map(|folder| {
            let name = folder.file_name()?.to_str()?.strip_prefix("cuda-")?;
            let (major, minor) = name.split_once('.')?;
            Some(((major.parse().ok()?, minor.parse().ok()?), folder))
        })
        .collect();
    versions.sort();
    let home = variable("CUDA_HOME").map(PathBuf::from);
    let mut toolkits: Vec<PathBuf> = home.into_iter().chain([system.join("cuda")]).collect();
    toolkits.extend(versions.into_iter().rev().map(|(_, folder)| folder));
    toolkits
}

/// `lib` of every NVIDIA package of every Python environment that is active or well known.
fn python_libraries(variable: &dyn Fn(&str) -> Option<OsString>, root: &Path) -> Vec<PathBuf> {
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"];
    let active = active.into_iter().filter_map(variable).map(PathBuf::from);
    // The Python that a terminal would start: its environment is the folder above `bin`, of the
    // link as it stands (a virtual environment) and of what it points to.
    let path = variable("PATH").unwrap_or_default();
    let python = env::split_paths(&path)
        .map(|folder| folder.join("python3"))
        .find(|python| python.is_file());
    let started = python.iter().flat_map(|python| {
        let pointed_to = python.canonicalize().ok();
        [Some(python.clone()), pointed_to]
    });
    let started = started
        .flatten()
        .filter_map(|python| Some(python.parent()?.parent()?.to_owned()));
    let personal = variable("HOME").map(|home| PathBuf::from(home).join(".local"));
    let system = [root.join("usr/local"), root.join("usr")];
    active
        .chain(started)
        .chain(personal)
        .chain(system)
        .flat_map(|prefix| site_packages(&prefix))
        .flat_map(|packages| subfolders(&packages.join("nvidia")))
        .map(|package| package.join("lib"))
        .collect()
}

/// Where the packages of a Python environment lie: `lib/python3*/{site,dist}-packages`.
fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let interpreters = subfolders(&prefix.join("lib"))
        .into_iter()
        .filter(|folder| {
            let name = folder.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with("python3")
        });
    interpreters
        .flat_map(|folder| ["site-packages", "dist-packages"].map(|name| folder.join(name)))
        .collect()
}

/// The folders in a folder, by name in reverse, so that a newer version comes first; none where
/// it cannot be read.
fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut folders: Vec<_> = entries.map(|entry| entry.path()).collect();
    folders.retain(|path| path.is_dir());
    folders.sort();
    folders.reverse();
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_driver() {
        assert_eq!(
            file_names("nvrtc", 13),
            ["libnvrtc.so.13", "libnvrtc.so.12"]
        );
        assert_eq!(
            file_names("nvrtc", 14),
            ["libnvrtc.so.13", "libnvrtc.so.12"]
        );
        assert_eq!(file_names("nvrtc", 12), ["libnvrtc.so.12"]);
        assert_eq!(file_names("nvrtc", 11), [""; 0]);
    }

    #[test]
    fn places_have_an_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        let make = |path: &str| {
            fs::create_dir_all(root.join(path)).expect("an own folder");
            root.join(path)
        };
        let own = make("own");
        let home = make("toolkit/lib64");
        let oldest = make("usr/local/cuda-9.2/lib64");
        let newest = make("usr/local/cuda-13.10/lib64");
        let newer = make("usr/local/cuda-13.9/lib64");
        let active = make("active/lib/python3.12/site-packages/nvidia/cu13/lib");
        let personal = make("me/.local/lib/python3.10/site-packages/nvidia/cublas/lib");
        let system = make("usr/lib/python3/dist-packages/nvidia/cu13/lib");
        let started = make("other/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib");
        make("other/lib/python2.7/site-packages/nvidia/cuda_nvrtc/lib");
        fs::write(make("other/bin").join("python3"), "").expect("an own folder");

        let paths = |folders: &[&str]| {
            let folders = folders.iter().map(|folder| root.join(folder));
            Some(env::join_paths(folders).expect("no separator in it"))
        };
        let variable = |name: &str| match name {
            LIBRARIES_VARIABLE => paths(&["own", "absent"]),
            "CUDA_HOME" => paths(&["toolkit"]),
            "VIRTUAL_ENV" => paths(&["active"]),
            "PATH" => paths(&["absent", "other/bin"]),
            "HOME" => paths(&["me"]),
            _ => None,
        };
        let expected = [
            own, home, newest, newer, oldest, active, started, personal, system,
        ];
        let mut expected: Vec<_> = expected.into_iter().map(Place::Folder).collect();
        expected.insert(1, Place::Loader);
        assert_eq!(places(&variable, root), expected);
        assert_eq!(places(&|_| None, &root.join("absent")), [Place::Loader]);
    }

    #[test]
    fn what_is_nowhere_says_where_it_was_looked_for() {
        let names = ["liboxllama-of-which-there-is-none.so.13".to_owned()];
        let error = open(&names).expect_err("there is none");
        assert_eq!(error.names, names);
        let text = error.to_string();
        assert!(
            text.contains(&names[0]) && text.contains(LIBRARIES_VARIABLE),
            "{text}"
        );
    }
}
