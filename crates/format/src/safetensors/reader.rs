//! A directory of safetensors files as one set of tensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::Mmap;

use super::header::{MAX_HEADER_BYTES, SafetensorsHeader, StoredDType};
use crate::mmap::map_file;
use crate::{DType, FormatError, TensorData, TensorInfo, TensorSource};

/// One file of the directory.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    /// Length of the whole file when its header was read.
    file_bytes: u64,
    /// Where the tensors begin.
    data_start: u64,
    /// Made at the first read of a tensor.
    map: OnceLock<Mmap>,
}

/// A tensor and where it lies.
#[derive(Debug)]
struct Located {
    info: TensorInfo,
    shard: usize,
    /// Offsets from the start of the file.
    begin: u64,
    end: u64,
}

/// All tensors of the `*.safetensors` files in a directory's root, merged by name.
///
/// Opening reads the headers only. A file is mapped when one of its tensors is first read.
/// `model.safetensors.index.json` is not used: a quantised model often carries its source's.
#[derive(Debug)]
pub struct SafetensorsDir {
    directory: PathBuf,
    shards: Vec<Shard>,
    /// By tensor name.
    tensors: BTreeMap<String, Located>,
    /// Tensors whose element type is not read here: name → (shard, type as spelled).
    unreadable: BTreeMap<String, (usize, String)>,
}

impl SafetensorsDir {
    /// Reads the headers of every `*.safetensors` file in the root of `directory`.
    ///
    /// # Errors
    /// No such directory or no such file in it, a header that does not hold together, a tensor
    /// in two files.
    pub fn open(directory: &Path) -> Result<Self, FormatError> {
        let paths = list_files(directory)?;
        if paths.is_empty() {
            return Err(FormatError::MissingFile {
                path: directory.join("*.safetensors"),
                expected: "at least one safetensors file in the model's directory",
            });
        }
        Self::open_files(directory, &paths)
    }

    /// Reads the headers of the given files; `directory` is used in errors.
    pub(crate) fn open_files(directory: &Path, paths: &[PathBuf]) -> Result<Self, FormatError> {
        let mut merged = SafetensorsDir {
            directory: directory.to_path_buf(),
            shards: Vec::with_capacity(paths.len()),
            tensors: BTreeMap::new(),
            unreadable: BTreeMap::new(),
        };
        for path in paths {
            let (shard, header) = open_shard(path)?;
            merged.add(shard, header)?;
        }
        Ok(merged)
    }

    /// Merges one file's tensors.
    fn add(&mut self, shard: Shard, header: SafetensorsHeader) -> Result<(), FormatError> {
        let index = self.shards.len();
        for entry in header.entries {
            let earlier = match self.tensors.get(&entry.name) {
                Some(located) => Some(located.shard),
                None => self.unreadable.get(&entry.name).map(|(shard, _)| *shard),
            };
            if let Some(earlier) = earlier {
                return Err(FormatError::DuplicateTensor {
                    tensor: entry.name,
                    first: self.shards[earlier].path.clone(),
                    second: shard.path,
                });
            }
            match entry.dtype {
                StoredDType::Unknown(spelling) => {
                    self.unreadable.insert(entry.name, (index, spelling));
                }
                StoredDType::Known(dtype) => {
                    let info = TensorInfo {
                        name: entry.name.clone(),
                        dtype,
                        shape: entry.shape,
                    };
                    let begin = shard.data_start + entry.begin;
                    let end = shard.data_start + entry.end;
                    self.tensors.insert(
                        entry.name,
                        Located {
                            info,
                            shard: index,
                            begin,
                            end,
                        },
                    );
                }
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Bytes of all its safetensors files, headers included.
    pub fn stored_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.file_bytes).sum()
    }

    /// Whether every tensor has an element type that is read here.
    ///
    /// # Errors
    /// The first that has another.
    pub(crate) fn check_readable(&self) -> Result<(), FormatError> {
        match self.unreadable.keys().next() {
            Some(name) => Err(self.absent(name)),
            None => Ok(()),
        }
    }

    /// The error for a name that [`TensorSource::info`] does not know.
    fn absent(&self, name: &str) -> FormatError {
        match self.unreadable.get(name) {
            Some((shard, spelling)) => FormatError::WrongDType {
                path: self.shards[*shard].path.clone(),
                tensor: name.to_owned(),
                found: spelling.clone(),
                expected: DType::ALL.map(DType::name).join(", "),
            },
            None => FormatError::MissingTensor {
                path: self.directory.clone(),
                tensor: name.to_owned(),
                expected: "expected in one of its safetensors files".to_owned(),
            },
        }
    }
}

impl TensorSource for SafetensorsDir {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|located| &located.info)
    }

    fn infos(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        Box::new(self.tensors.values().map(|located| &located.info))
    }

    fn read(&self, name: &str) -> Result<TensorData<'_>, FormatError> {
        let located = self.tensors.get(name).ok_or_else(|| self.absent(name))?;
        let shard = &self.shards[located.shard];
        // The header's checks put both offsets within the mapped length.
        let bytes = &shard.map()?[located.begin as usize..located.end as usize];
        Ok(TensorData {
            info: located.info.clone(),
            bytes: Cow::Borrowed(bytes),
        })
    }

    fn file_of(&self, name: &str) -> &Path {
        let shard = match self.tensors.get(name) {
            Some(located) => Some(located.shard),
            None => self.unreadable.get(name).map(|(shard, _)| *shard),
        };
        shard.map_or(&self.directory, |index| &self.shards[index].path)
    }
}

impl Shard {
    /// The mapped file, at least as long as it was when its header was read.
    fn map(&self) -> Result<&Mmap, FormatError> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let map = map_file(&self.path, &self.file)?;
        if (map.len() as u64) < self.file_bytes {
            return Err(FormatError::Truncated {
                path: self.path.clone(),
                what: "the file as it was when it was opened".to_owned(),
                found_bytes: map.len() as u64,
                expected_bytes: self.file_bytes,
            });
        }
        Ok(self.map.get_or_init(|| map))
    }
}

/// The regular files `*.safetensors` of a directory, sorted by name, hidden ones left out.
fn list_files(directory: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let listing = fs::read_dir(directory)
        .map_err(|source| FormatError::io(directory, "list the directory", source))?;
    let mut paths = Vec::new();
    for entry in listing {
        let entry =
            entry.map_err(|source| FormatError::io(directory, "list the directory", source))?;
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        let named = path
            .extension()
            .is_some_and(|extension| extension == "safetensors");
        if !hidden && named && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Opens one file and reads its header: the 8-byte length and as many bytes as it says.
fn open_shard(path: &Path) -> Result<(Shard, SafetensorsHeader), FormatError> {
    // Looked at before opening, because opening a named pipe would wait for a writer.
    let metadata = fs::metadata(path).map_err(|source| FormatError::io(path, "open", source))?;
    if !metadata.is_file() {
        return Err(FormatError::malformed(
            path,
            "file type",
            "a special file",
            "a regular file",
        ));
    }
    let mut file = File::open(path).map_err(|source| FormatError::io(path, "open", source))?;
    let file_bytes = metadata.len();
    let truncated = |what: &str, expected_bytes: u64| FormatError::Truncated {
        path: path.to_path_buf(),
        what: what.to_owned(),
        found_bytes: file_bytes,
        expected_bytes,
    };
    if file_bytes < 8 {
        return Err(truncated("the 8-byte header length", 8));
    }
    let mut length = [0u8; 8];
    file.read_exact(&mut length)
        .map_err(|source| FormatError::io(path, "read", source))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(FormatError::malformed(
            path,
            "header length",
            format!("{header_bytes} bytes"),
            format!("at most {MAX_HEADER_BYTES}; is this a safetensors file?"),
        ));
    }
    let data_start = 8 + header_bytes;
    if data_start > file_bytes {
        return Err(truncated("the header", data_start));
    }
    let mut json = vec![0u8; header_bytes as usize];
    file.read_exact(&mut json)
        .map_err(|source| FormatError::io(path, "read", source))?;
    let header = SafetensorsHeader::parse(path, &json, file_bytes - data_start)?;
    let shard = Shard {
        path: path.to_path_buf(),
        file,
        file_bytes,
        data_start,
        map: OnceLock::new(),
    };
    Ok((shard, header))
}
