//! The counting allocator counts: a program of its own, as it must be the process's allocator.

use std::hint::black_box;

use oxllama_test_support::{CountingAllocator, allocations_so_far};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[test]
fn allocations_of_the_test_and_of_its_threads_count() {
    let before = allocations_so_far();
    drop(black_box(Box::new(1_u64)));
    assert_eq!(allocations_so_far() - before, 1);
    let mut vec = black_box(Vec::<u8>::with_capacity(1));
    vec.reserve_exact(100);
    assert_eq!(allocations_so_far() - before, 3);
    let elsewhere = std::thread::spawn(|| {
        let before = allocations_so_far();
        drop(black_box(Box::new(1_u64)));
        allocations_so_far() - before
    });
    assert_eq!(elsewhere.join().unwrap(), 1);
    assert_eq!(allocations_so_far(), allocations_so_far());
}
