//! The real `oxllama` binary on real and on tiny models, command by command.

#[path = "../common/mod.rs"]
mod common;

mod batch;
mod chat;
mod generate;
mod golden;
mod gpu;
mod hostile;
mod measure;
mod plan;
mod show;
mod support;
mod terminal;
mod together;
