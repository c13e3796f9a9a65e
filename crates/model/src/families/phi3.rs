//! Phi-3 and Phi-4: a Llama stored with fused projections, stretched by longrope.

use super::common::{Defaults, read_base, read_window};
use crate::config::Config;
use crate::{ModelError, ModelSpec};

pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let defaults = Defaults {
        epsilon: 1e-5,
        ..Defaults::LLAMA
    };
    let mut spec = read_base(config, &defaults)?;
    let window = read_window(config)?;
    for layer in &mut spec.layers {
        layer.window = window;
    }
    Ok(spec)
}
