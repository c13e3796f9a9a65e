//! What tests of several crates need; no part of the product.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

/// The system's allocator, counting for [`allocations_so_far`]. A test program that makes it its
/// global allocator holds one test: the count is that of all threads but the test harness's.
#[derive(Debug)]
pub struct CountingAllocator;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether the thread asked for the count.
    static MEASURES: Cell<bool> = const { Cell::new(false) };
}

/// Counts an allocation, unless it is the test harness's own: that one keeps its books on the
/// process's first thread while the test runs on another.
fn count() {
    // SAFETY: neither call has a precondition.
    let is_first_thread = unsafe { libc::gettid() == libc::getpid() };
    if !is_first_thread || MEASURES.get() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

/// Allocations and reallocations so far, of every thread but the test harness's.
pub fn allocations_so_far() -> usize {
    MEASURES.set(true);
    ALLOCATIONS.load(Ordering::Relaxed)
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

/// A tokenizer.json for models without one: token `i` is the printable character `'!' + i`; past
/// those, words that never matter.
pub fn tokenizer_json(vocab_size: usize) -> String {
    let token = |id: usize| match id {
        0..94 => char::from(b'!' + id as u8).to_string(),
        _ => format!("~{id}"),
    };
    let vocab: serde_json::Map<_, _> = (0..vocab_size).map(|id| (token(id), json!(id))).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    });
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": []
        }
    });
    file.to_string()
}
