//! In which order packed weights take their inputs.

use std::hash::{DefaultHasher, Hash, Hasher};

use cudarc::driver::sys::CUdeviceptr;
use oxllama_format::LinearSource;

/// An order of inputs.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Order {
    /// Tells orders apart; equal for those that are inputs as they come.
    hash: u64,
    /// u32 `[in_features]`: the input at each packed place; `None`: its own.
    pub(super) permutation: Option<CUdeviceptr>,
    /// u32 `[in_features]`: each input's packed place; `None`: its own.
    pub(crate) places: Option<CUdeviceptr>,
}

impl Order {
    /// Inputs as they come.
    pub(super) fn plain() -> Self {
        Self {
            hash: hash_of(&[]),
            ..Self::default()
        }
    }

    /// The order that `order` says, which lies on the device together with its inverse; inputs as
    /// they come where it is empty.
    pub(super) fn new(order: &[u32], permutation: CUdeviceptr, places: CUdeviceptr) -> Self {
        if order.is_empty() {
            return Self::plain();
        }
        Self {
            hash: hash_of(order),
            permutation: Some(permutation),
            places: Some(places),
        }
    }

    /// Whether rows in one order are rows in the other.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

/// A number that stands for an order of inputs.
fn hash_of(order: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    order.hash(&mut hasher);
    hasher.finish()
}

/// The input at each packed place, empty where packed rows are inputs as they come.
pub(super) fn permutation_of(source: &LinearSource<'_>) -> Vec<u32> {
    let order = match source {
        LinearSource::Exl2(linear) => linear.permutation().to_vec(),
        LinearSource::Gptq(linear) if linear.is_reordered() => linear.permutation(),
        LinearSource::Gptq(_) | LinearSource::Float(_) => Vec::new(),
    };
    let is_identity = order
        .iter()
        .enumerate()
        .all(|(at, &from)| at == from as usize);
    if is_identity { Vec::new() } else { order }
}

/// Where each input goes, of an order of all.
pub(super) fn inverse(permutation: &[u32]) -> Vec<u32> {
    let mut places = vec![0; permutation.len()];
    for (place, &input) in permutation.iter().enumerate() {
        places[input as usize] = place as u32;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_is_found_at_its_place() {
        let permutation = [3, 0, 4, 1, 2];
        let places = inverse(&permutation);
        assert_eq!(places, [1, 3, 4, 0, 2]);
        assert_eq!(inverse(&places), permutation);
    }
}
