//! Compiled kernels on disk.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::nvrtc::{CompileError, KernelSource, RuntimeCompiler};

/// Bytes of the hash that an entry begins with.
const HASH_BYTES: usize = blake3::OUT_LEN;

/// Machine code that [`RuntimeCompiler`] made earlier, by all that it depends on.
///
/// An entry is the blake3 hash of the code, then the code. It is written under another name and
/// renamed, so several processes may use one folder; one that is damaged is made again.
#[derive(Debug, Clone)]
pub struct KernelCache {
    folder: Option<PathBuf>,
}

impl KernelCache {
    /// A cache in `folder`, which is made when it is needed.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder: Some(folder),
        }
    }

    /// The user's: `oxllama/kernels` in `$XDG_CACHE_HOME`, or in `.cache` of `$HOME`. With
    /// neither nothing is kept.
    pub fn of_user() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let caches = caches.filter(|folder| folder.is_absolute());
        let caches =
            caches.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")));
        Self {
            folder: caches.map(|folder| folder.join("oxllama/kernels")),
        }
    }

    /// The code of `source` for `architecture`, compiled if there is no entry. An entry that
    /// cannot be written costs only the time of the next compilation.
    ///
    /// # Errors
    /// As [`RuntimeCompiler::compile`].
    pub fn compile(
        &self,
        compiler: &RuntimeCompiler,
        source: &KernelSource,
        architecture: &str,
    ) -> Result<Vec<u8>, CompileError> {
        let key = compiler.key(source, architecture).to_hex();
        let name = format!("{}-{architecture}-{key}", source.name);
        let path = self.folder.as_ref().map(|folder| folder.join(name));
        if let Some(code) = path.as_deref().and_then(read) {
            return Ok(code);
        }
        let code = compiler.compile(source, architecture)?;
        if let Some(path) = path {
            let _ = write(&path, &code);
        }
        Ok(code)
    }
}

/// The code of an entry, unless it is damaged or not there.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut entry = fs::read(path).ok()?;
    let (hash, code) = entry.split_at_checked(HASH_BYTES)?;
    if blake3::hash(code).as_bytes() != hash {
        return None;
    }
    Some(entry.split_off(HASH_BYTES))
}

fn write(path: &Path, code: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Unique among processes and threads.
    let thread = std::thread::current().id();
    let temporary = path.with_extension(format!("{}-{thread:?}.tmp", std::process::id()));
    let written = fs::File::create(&temporary).and_then(|mut file| {
        file.write_all(blake3::hash(code).as_bytes())?;
        file.write_all(code)
    });
    let renamed = written.and_then(|()| fs::rename(&temporary, path));
    if renamed.is_err() {
        // Best effort: what is left over is only rubbish.
        let _ = fs::remove_file(&temporary);
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_unless_it_is_damaged() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deeper/unit-sm_90a-key");
        assert_eq!(read(&path), None);
        write(&path, b"code").expect("an own folder");
        assert_eq!(read(&path).as_deref(), Some(&b"code"[..]));
        write(&path, b"").expect("an own folder");
        assert_eq!(read(&path).as_deref(), Some(&b""[..]));
        write(&path, b"newer").expect("an own folder");
        let mut entry = fs::read(&path).expect("an entry");
        entry.pop();
        fs::write(&path, &entry).expect("an own file");
        assert_eq!(read(&path), None);
        fs::write(&path, "short").expect("an own file");
        assert_eq!(read(&path), None);
        let names = fs::read_dir(path.parent().expect("a folder")).expect("readable");
        assert_eq!(names.count(), 1, "nothing temporary stays");
    }
}
