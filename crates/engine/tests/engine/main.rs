//! The engine on tiny real models: what jobs get, whatever runs beside them.

mod ahead;
mod basics;
mod common;
mod device_draws;
mod faults;
mod features;
mod invariance;
mod speculation;
