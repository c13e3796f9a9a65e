//! Whole models: loaded by plan, run on the scalar backend, held against other programs.

mod adapter_books;
mod adapters;
mod cache;
mod draws;
mod families;
mod files;
mod harness;
mod hostile;
mod layouts;
mod ledger;
mod pairing;
mod planning;
mod smollm2;
mod split;
mod synthetic;
