//! The scalar reference backend.
