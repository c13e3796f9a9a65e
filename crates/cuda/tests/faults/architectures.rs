//! Kernels that some GPUs have and others do not.

use oxllama_fake_driver::FakeDriver;

use crate::books::{assert_clean, books, load_for, open, source, step};

/// Rows for which Hopper has kernels of its own.
const MANY_ROWS: u32 = 100;

/// Launches of such kernels by a step of so many rows.
fn hopper_launches(driver: &FakeDriver, capability: &str, rows: u32) -> usize {
    driver.set(&format!("reset capability={capability}"));
    {
        let devices = open().expect("a GPU");
        let books = books(&devices);
        let chunk_tokens = u64::from(MANY_ROWS);
        let loaded = load_for(&source(2), &devices, &books, None, chunk_tokens);
        let mut model = loaded.expect("it fits");
        let tokens: Vec<u32> = (0..rows).collect();
        step(&mut model, &tokens, 0).expect("a healthy device");
    }
    let report = driver.report();
    assert_clean(&report, capability);
    report.count("hopper_launches")
}

#[test]
fn hopper_takes_many_rows_by_kernels_that_others_do_without() {
    const LAYERS: usize = 2;
    let driver = FakeDriver::start("");
    // Attention; of a layer: q, k and v together, o, gate and up together, down; and the head.
    let all = LAYERS + LAYERS * 4 + 1;
    assert_eq!(hopper_launches(&driver, "9.0", MANY_ROWS), all);
    // Attention of a run alone, and none.
    assert_eq!(hopper_launches(&driver, "9.0", 48), LAYERS);
    assert_eq!(hopper_launches(&driver, "9.0", 16), 0);
    for capability in ["8.0", "8.9"] {
        assert_eq!(hopper_launches(&driver, capability, MANY_ROWS), 0);
    }
}
