//! Sequences, page table, sampler and generation jobs.
