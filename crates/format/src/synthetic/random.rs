//! Numbers for synthetic tensors: the same for the same seed, on every machine.

use half::f16;

/// Independent streams that are advanced together, so that the compiler keeps them in vector
/// registers: 64 bytes a step.
const LANES: usize = 8;

/// Entries of the table that Gaussian numbers are drawn from; 8 KiB stay in the first cache.
const TABLE_BITS: u32 = 12;

/// Uniform numbers whose sum stands for a Gaussian one: twelve have a variance of 1.
const SUMMANDS: u32 = 12;

/// The seed of what is called `name` in a model of seed `seed`.
pub(super) fn seed_of(seed: u64, name: &str) -> u64 {
    // FNV-1a of the name.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    scramble(hash ^ scramble(seed))
}

/// The output function of SplitMix64, a bijection: neighbouring numbers become unrelated ones.
fn scramble(number: u64) -> u64 {
    let mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Marsaglia's 64-bit xorshift (13, 7, 17), `LANES` times side by side. Shifts and exclusive ors
/// only: every x86-64 and ARM processor has them for vectors, and a core makes numbers faster than
/// it writes them to memory.
struct Streams([u64; LANES]);

impl Streams {
    fn new(seed: u64) -> Self {
        // A state of zero would stay zero.
        Self(std::array::from_fn(|lane| {
            scramble(seed.wrapping_add(lane as u64)) | 1
        }))
    }

    fn next(&mut self) -> [u64; LANES] {
        for state in &mut self.0 {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
        }
        self.0
    }
}

/// `bytes` random bytes.
pub(super) fn random_bytes(seed: u64, bytes: usize) -> Vec<u8> {
    let mut streams = Streams::new(seed);
    let mut filled = vec![0u8; bytes];
    let mut steps = filled.chunks_exact_mut(8 * LANES);
    for step in &mut steps {
        step.copy_from_slice(bytemuck::bytes_of(&streams.next()));
    }
    let rest = steps.into_remainder();
    let last = streams.next();
    rest.copy_from_slice(&bytemuck::bytes_of(&last)[..rest.len()]);
    filled
}

/// `count` fp16 numbers of mean 0 and standard deviation `deviation`, as bytes: drawn from a table
/// of sums of uniform numbers, which is as Gaussian as an embedding needs to be.
pub(super) fn gaussian_bytes(seed: u64, count: usize, deviation: f64) -> Vec<u8> {
    let mut streams = Streams::new(scramble(seed));
    let table: Vec<f16> = (0..1 << TABLE_BITS)
        .map(|_| {
            let mut uniform = || (streams.next()[0] >> 11) as f64 / (1u64 << 53) as f64;
            let sum: f64 = (0..SUMMANDS).map(|_| uniform()).sum();
            f16::from_f64((sum - f64::from(SUMMANDS / 2)) * deviation)
        })
        .collect();
    let mut values = random_bytes(seed, count * size_of::<f16>());
    for value in values.chunks_exact_mut(size_of::<f16>()) {
        let random = u16::from_le_bytes([value[0], value[1]]);
        let index = random >> (u16::BITS - TABLE_BITS);
        value.copy_from_slice(&table[usize::from(index)].to_le_bytes());
    }
    values
}

/// The numbers `0..count` in random order (Fisher and Yates).
pub(super) fn permutation(seed: u64, count: usize) -> Vec<u32> {
    let mut streams = Streams::new(seed);
    let mut order: Vec<u32> = (0..count as u32).collect();
    for last in (1..count).rev() {
        // The upper half times the number of choices, over 2^32: below the number of choices.
        let random = streams.next()[0] >> 32;
        let other = (random * (last as u64 + 1)) >> 32;
        order.swap(last, other as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_same_for_a_seed_and_evenly_spread() {
        let bytes = random_bytes(7, 100_003);
        assert_eq!(bytes.len(), 100_003);
        assert_eq!(bytes, random_bytes(7, 100_003));
        assert_eq!(bytes[..50_000], random_bytes(7, 50_000));
        assert_ne!(bytes[..64], random_bytes(8, 64));
        let mut counts = [0u32; 256];
        bytes
            .iter()
            .for_each(|&byte| counts[usize::from(byte)] += 1);
        // Expected 391 of each with a standard deviation of 20.
        assert!(counts.iter().all(|count| (280..500).contains(count)));
        for bit in 0..8 {
            let set = bytes.iter().filter(|&byte| byte >> bit & 1 == 1).count();
            assert!((49_000..51_000).contains(&set), "bit {bit}: {set}");
        }
    }

    #[test]
    fn gaussian_numbers_have_their_mean_and_deviation() {
        let bytes = gaussian_bytes(3, 200_000, 0.02);
        let values: Vec<f64> = bytes
            .chunks_exact(2)
            .map(|value| f16::from_le_bytes([value[0], value[1]]).to_f64())
            .collect();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| value * value).sum::<f64>() / count;
        assert!(mean.abs() < 0.001, "{mean}");
        assert!(
            (variance.sqrt() - 0.02).abs() < 0.001,
            "{}",
            variance.sqrt()
        );
        let outside = values.iter().filter(|value| value.abs() > 0.02).count() as f64;
        assert!(
            (outside / count - 0.317).abs() < 0.03,
            "{}",
            outside / count
        );
    }

    #[test]
    fn a_permutation_has_every_number_once() {
        let order = permutation(5, 1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
        let fixed = order.iter().zip(0..).filter(|&(&a, b)| a == b).count();
        assert!(fixed < 10, "{fixed} numbers stayed in their places");
        assert_ne!(order, permutation(6, 1000));
    }

    #[test]
    fn seeds_differ_by_name_and_by_model() {
        assert_ne!(seed_of(1, "a"), seed_of(1, "b"));
        assert_ne!(seed_of(1, "a"), seed_of(2, "a"));
    }
}
