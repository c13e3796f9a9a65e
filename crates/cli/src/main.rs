//! The `oxllama` command.

fn main() {}
