//! Random weights in the layouts of model files, for tests and measurements.
#![allow(dead_code, reason = "each of the files that include this uses a part")]
#![allow(unreachable_pub, reason = "included as a module of several programs")]

use std::borrow::Cow;
use std::collections::BTreeMap;

use oxllama_format::{DType, FormatError, TensorData, TensorInfo, TensorSource};

/// Tensors in memory.
#[derive(Default)]
pub struct Tensors(BTreeMap<String, (TensorInfo, Vec<u8>)>);

impl Tensors {
    pub fn insert(&mut self, name: &str, dtype: DType, shape: &[usize], bytes: Vec<u8>) {
        let info = TensorInfo {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
        };
        assert_eq!(info.size_bytes(), bytes.len() as u64);
        self.0.insert(name.to_owned(), (info, bytes));
    }
}

impl TensorSource for Tensors {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.get(name).map(|(info, _)| info)
    }
    fn infos(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        Box::new(self.0.values().map(|(info, _)| info))
    }
    fn read(&self, name: &str) -> Result<TensorData<'_>, FormatError> {
        let (info, bytes) = self.0.get(name).ok_or_else(|| FormatError::MissingTensor {
            path: std::path::PathBuf::new(),
            tensor: name.to_owned(),
            expected: "a tensor of this linear".to_owned(),
        })?;
        Ok(TensorData {
            info: info.clone(),
            bytes: Cow::Borrowed(bytes),
        })
    }
}

/// A small generator: what the weights are does not matter for time.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as u32
    }
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count.div_ceil(4))
            .flat_map(|_| (self.word() << 1).to_le_bytes())
            .take(count)
            .collect()
    }
    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| self.word() as f32 / 2_147_483_648.0 - 0.5)
            .collect()
    }
}

/// An EXL2 linear whose rows are cut into `(bits, rows)` regions with groups of `group` rows.
pub fn exl2(
    name: &str,
    n: usize,
    regions: &[(u32, usize)],
    group: usize,
    random: &mut Random,
) -> Tensors {
    let k: usize = regions.iter().map(|&(_, rows)| rows).sum();
    let mut groups = Vec::new();
    let mut words = 0_usize;
    for &(bits, rows) in regions {
        let mut left = rows;
        while left > 0 {
            let rows = left.min(group);
            groups.extend([bits as u16, words as u16]);
            words += rows * bits as usize / 32;
            left -= rows;
        }
    }
    let count = groups.len() / 2;
    let mut tensors = Tensors::default();
    let part = |part: &str| format!("{name}.{part}");
    tensors.insert(
        &part("q_weight"),
        DType::I32,
        &[words, n],
        random.bytes(words * n * 4),
    );
    tensors.insert(
        &part("q_scale"),
        DType::I32,
        &[count, n / 8],
        random.bytes(count * n / 2),
    );
    let scale = half::f16::from_f32(0.01).to_le_bytes();
    tensors.insert(
        &part("q_scale_max"),
        DType::F16,
        &[count],
        scale.repeat(count),
    );
    let groups: Vec<u8> = groups.iter().flat_map(|word| word.to_le_bytes()).collect();
    tensors.insert(&part("q_groups"), DType::I16, &[2 * count], groups);
    let order: Vec<u8> = (0..k as u32)
        .flat_map(|row| ((row * 37 + 5) % k as u32).to_le_bytes())
        .collect();
    tensors.insert(&part("q_invperm"), DType::I32, &[k], order);
    tensors
}

/// A linear of f16 weights `[n, k]`.
pub fn half(name: &str, n: usize, k: usize, random: &mut Random) -> Tensors {
    let values = random.floats(n * k);
    let bytes = values
        .iter()
        .flat_map(|&x| half::f16::from_f32(x).to_le_bytes())
        .collect();
    let mut tensors = Tensors::default();
    tensors.insert(&format!("{name}.weight"), DType::F16, &[n, k], bytes);
    tensors
}
