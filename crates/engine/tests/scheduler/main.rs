//! The scheduler and the page table without a model: a simulated one that only counts.

mod pages;
mod rules;
mod simulation;
