//! The contract of operations, the scalar reference backend and the conformance suite.
