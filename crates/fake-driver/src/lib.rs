//! A GPU driver for tests where there is no GPU; no part of the product.
//!
//! The shared library of this crate has those entry points of the CUDA driver, of NVML and of
//! NVRTC that Oxllama calls. Device memory is the host's, copies are made at once, kernels do
//! nothing unless they are to be emulated (`oxllama-emulator`), and any bytes are device code. What the real driver would refuse (a handle that is
//! not alive, a range outside an allocation, a context that is not current, a call that a
//! recording forbids) is refused and reported as misuse. [`FakeDriver`] programs the machine and
//! the faults of this process, [`VARIABLE`] those of a program that is started; both take words
//! of the form `key=value`:
//!
//! | word | meaning |
//! | --- | --- |
//! | `devices=2` | GPUs, of 1 GiB each unless `memory=BYTES` says otherwise |
//! | `capability=8.0` | compute capability |
//! | `images=8.0` | what device code is made for, if that is older: Hopper's own kernels are not in it |
//! | `driver=13000` | the version that the driver says it is of |
//! | `init=803` | what starting the driver is answered with |
//! | `others=BYTES` | memory of every GPU that another process holds |
//! | `kernels=on` | kernels are emulated: they are run at once, and do what they do on a GPU |
//! | `kernels=backward` | and threads of a block take turns from the last one on |
//! | `nvml=off` | NVML does not start |
//! | `trace=on` | calls that have to do with waiting are reported, from here on |
//! | `fault=NAME:AFTER:CODE` | after AFTER calls of the function (or of `any` one) the next fails |
//! | `fault=NAME:AFTER:CODE:sticky` | and so does everything after it on that GPU |
//! | `fault=NAME:AFTER:CODE:other` | the same on the other one of two GPUs |
//! | `fault=none` | no more faults |
//! | `reset` | a new machine; before all other words |

mod control;
mod driver;
mod kernels;
mod management;
mod memory;
mod runtime_compiler;
mod state;
mod streams;

pub use control::{FakeDriver, Report, VARIABLE, environment};
