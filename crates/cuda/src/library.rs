//! Libraries that are looked for when the program runs.

use cudarc::driver::sys as driver;

/// Whether the driver's library can be loaded. Asked before any of its functions is called:
/// the bindings panic without it.
pub(crate) fn has_driver() -> bool {
    // SAFETY: loads libcuda, whose initialisation touches nothing of ours.
    unsafe { driver::is_culib_present() }
}
