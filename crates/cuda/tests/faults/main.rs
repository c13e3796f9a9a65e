//! Every fault that a driver can answer with, without a GPU: over a driver of the host's memory.

mod architectures;
mod books;
mod every_call;
mod lost;
mod memory;
mod pipeline;
mod recordings;
