//! Mapped files and typed views of their bytes: the only unsafe code of this crate.

use std::borrow::Cow;
use std::fs::File;
use std::path::Path;

use bytemuck::{AnyBitPattern, NoUninit};
use memmap2::Mmap;

use crate::FormatError;

#[cfg(target_endian = "big")]
compile_error!("model files are little-endian and are viewed in place");

/// Maps a whole file for reading.
///
/// The mapping reflects the file: a model file must not be truncated while a process uses it
/// (the operating system answers with SIGBUS, as for every mapped file).
///
/// # Errors
/// The file cannot be mapped.
pub(crate) fn map_file(path: &Path, file: &File) -> Result<Mmap, FormatError> {
    // SAFETY: the mapping is read-only and private to this process's view; the bytes are plain
    // data (every bit pattern is a valid u8). That nobody truncates or rewrites a model file
    // while it is loaded is the documented condition of using this crate.
    unsafe { Mmap::map(file) }.map_err(|source| FormatError::io(path, "map", source))
}

/// Views little-endian bytes as elements, in place if they are aligned, else by copying.
///
/// A trailing part of an element is dropped; callers have checked the length before.
pub(crate) fn cast_bytes<T>(bytes: Cow<'_, [u8]>) -> Cow<'_, [T]>
where
    T: AnyBitPattern + NoUninit,
{
    let whole = bytes.len() / size_of::<T>() * size_of::<T>();
    if let Cow::Borrowed(borrowed) = bytes
        && let Ok(view) = bytemuck::try_cast_slice(&borrowed[..whole])
    {
        return Cow::Borrowed(view);
    }
    Cow::Owned(
        bytes
            .chunks_exact(size_of::<T>())
            .map(bytemuck::pod_read_unaligned)
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unaligned_bytes_are_copied_and_aligned_ones_viewed() {
        let words: Vec<u32> = vec![0x0403_0201, 0x0807_0605];
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let aligned = cast_bytes::<u32>(Cow::Borrowed(bytes));
        assert!(matches!(aligned, Cow::Borrowed(_)));
        assert_eq!(aligned.as_ref(), words.as_slice());
        let unaligned = cast_bytes::<u32>(Cow::Borrowed(&bytes[1..5]));
        assert!(matches!(unaligned, Cow::Owned(_)));
        assert_eq!(unaligned.as_ref(), [0x0504_0302]);
        assert_eq!(
            cast_bytes::<u32>(Cow::Owned(bytes.to_vec())).as_ref(),
            words.as_slice()
        );
    }
}
