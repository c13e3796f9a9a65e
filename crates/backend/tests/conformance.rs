//! The scalar reference against the conformance suite's f64 oracle.

use oxllama_backend::conformance::{self, Tolerances};
use oxllama_backend::reference::ReferenceDevice;
use oxllama_memory::{Bytes, DeviceId, Ledger};

#[test]
fn the_reference_conforms() {
    let id = DeviceId::cpu(0);
    let ledger = Ledger::for_device(id.clone(), Bytes::from_mib(256));
    let device = ReferenceDevice::new(id);
    let mut names = std::collections::HashSet::new();
    let summary = conformance::run(&device, &ledger, &Tolerances::REFERENCE, &mut |report| {
        assert!(names.insert(report.name.clone()), "twice: {}", report.name);
    })
    .expect("every case runs");
    assert_eq!(summary.failures, [], "of {} cases", summary.cases);
    assert_eq!(summary.cases, names.len());
}
