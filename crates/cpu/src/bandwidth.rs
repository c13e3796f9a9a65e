//! How fast this machine reads memory: the floor under a decode step.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use crate::Isa;
use crate::isa::per_isa;
use crate::pool::SpinPool;
use crate::simd::{LANES, Simd};

/// Passes, of which the median counts.
const PASSES: usize = 5;

per_isa! {
    /// Largest of `vectors` vectors of sixteen elements.
    ///
    /// # Safety
    /// `from` holds that many.
    unsafe fn read_all(from: *const f32, vectors: usize) -> f32 = read_all_generic;
}

#[inline(always)]
unsafe fn read_all_generic<S: Simd>(from: *const f32, vectors: usize) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        let mut largest = [S::splat(0.0); 4];
        for vector in (0..vectors / 4 * 4).step_by(4) {
            for (i, largest) in largest.iter_mut().enumerate() {
                *largest = S::max(S::load(from.add((vector + i) * LANES)), *largest);
            }
        }
        S::reduce_max(S::max(
            S::max(largest[0], largest[1]),
            S::max(largest[2], largest[3]),
        ))
    }
}

/// Asks for large pages, which weights are kept in as well, in the whole pages of a range. Refusal
/// costs speed only.
fn advise_huge_pages(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const LARGE_PAGE: usize = 2 << 20;
        let offset = start.align_offset(LARGE_PAGE).min(bytes);
        // SAFETY: the range lies within one allocation, and the advice does not change contents.
        unsafe {
            let from = start.add(offset);
            libc::madvise(from.cast(), bytes - offset, libc::MADV_HUGEPAGE);
        }
    }
}

/// Bytes a second that `threads` threads read together, streaming once through `bytes` bytes
/// each pass; the median of several passes. `bytes` should be far above the caches' size.
///
/// # Errors
/// The system refuses the memory or a thread.
pub fn measure_read_bandwidth(threads: usize, bytes: usize) -> std::io::Result<f64> {
    let pool = SpinPool::new(threads)?;
    let isa = Isa::select();
    let vectors = (bytes / size_of::<f32>() / LANES).max(4 * threads);
    let mut memory: Vec<f32> = Vec::new();
    memory
        .try_reserve_exact(vectors * LANES)
        .map_err(|error| std::io::Error::new(std::io::ErrorKind::OutOfMemory, error))?;
    advise_huge_pages(
        memory.as_mut_ptr().cast(),
        vectors * LANES * size_of::<f32>(),
    );
    // Written, not just reserved: untouched pages would all be the one zero page.
    memory.resize(vectors * LANES, 1.0);
    let mut seconds = [0.0_f64; PASSES];
    // What was read must have a use, or the compiler may leave the reading out.
    let largest = AtomicU32::new(0);
    for seconds in &mut seconds {
        let start = Instant::now();
        pool.run(&|team| {
            let share = team.share(vectors);
            let from = memory[share.start * LANES..].as_ptr();
            // SAFETY: the share lies within the memory.
            let found = unsafe { read_all(isa, from, share.len()) };
            largest.fetch_max(found.to_bits(), Ordering::Relaxed);
        });
        *seconds = start.elapsed().as_secs_f64();
    }
    std::hint::black_box(largest.into_inner());
    seconds.sort_by(f64::total_cmp);
    Ok((vectors * LANES * size_of::<f32>()) as f64 / seconds[PASSES / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_measured() {
        let rate = measure_read_bandwidth(2, 1 << 20).unwrap();
        assert!(rate.is_finite() && rate > 0.0);
    }
}
