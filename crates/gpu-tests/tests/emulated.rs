//! The program over emulated kernels: whole models, recorded steps, layers on two GPUs, draws, and the
//! generator. Conformance is the backend's own test.

use std::path::Path;
use std::process::Command;

use oxllama_fake_driver::{VARIABLE, environment};

/// Checks that the program is asked for, and how many it has of each.
const CHECKS: [(&str, usize); 6] = [
    ("model ", 18),
    ("an embedding on the host", 1),
    ("recorded steps give the bits", 1),
    ("layers on two GPUs", 3),
    ("draws in recorded steps", 1),
    ("32 jobs alone, together and cached", 1),
];

#[test]
fn whole_models_hold_without_a_gpu() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models");
    let output = Command::new(env!("CARGO_BIN_EXE_oxllama-gpu-tests"))
        .arg(fixtures)
        .args(CHECKS.map(|(name, _)| name))
        .envs(environment())
        .env(VARIABLE, "kernels=on capability=8.0 devices=2")
        .output()
        .expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for (name, count) in CHECKS {
        let passed = |line: &&str| line.starts_with("PASS") && line.contains(name);
        assert_eq!(text.lines().filter(passed).count(), count, "{name}: {text}");
    }
}
