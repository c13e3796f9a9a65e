//! Seeded numbers: the same on every machine.

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// A generator for one case: cases with different names get different numbers.
    pub(super) fn for_case(name: &str) -> Self {
        // FNV-1a.
        let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
        });
        Self(hash)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A whole number in `0..end`.
    pub(super) fn below(&mut self, end: usize) -> usize {
        // The bias of the remainder is far below anything these tests could see.
        (self.next() % end as u64) as usize
    }

    /// A number in `low..high`.
    pub(super) fn uniform(&mut self, low: f32, high: f32) -> f32 {
        let unit = (self.next() >> 40) as f32 / (1_u64 << 24) as f32;
        low + (high - low) * unit
    }

    /// `count` numbers in `low..high`.
    pub(super) fn uniforms(&mut self, count: usize, low: f32, high: f32) -> Vec<f32> {
        (0..count).map(|_| self.uniform(low, high)).collect()
    }

    /// Activations as a model has them: mostly near one, and a few a hundred times larger.
    pub(super) fn activations(&mut self, count: usize) -> Vec<f32> {
        let activation = |random: &mut Self| {
            let scale = if random.below(64) == 0 { 30.0 } else { 1.0 };
            scale * random.uniform(-2.0, 2.0)
        };
        (0..count).map(|_| activation(self)).collect()
    }

    /// The numbers `0..count` in random order.
    pub(super) fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for index in (1..count).rev() {
            order.swap(index, self.below(index + 1));
        }
        order
    }
}
