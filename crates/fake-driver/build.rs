//! Gives the library the driver's name: once it is loaded from wherever it is, the loader answers
//! with it when a program asks for the driver.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
}
