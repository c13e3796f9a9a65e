//! Opening a 70B model for planning reads its headers and nothing else.
//!
//! The only test of this binary, so that what the process reads is what the test reads.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use oxllama_format::{Encoding, GptqConfig, LinearHeader, ModelSource};

const LAYERS: usize = 80;
const HIDDEN: usize = 8192;
const INTERMEDIATE: usize = 28672;
const KV: usize = 1024;
const VOCABULARY: usize = 128_256;

/// One shard: header text and the bytes of data it declares.
#[derive(Default)]
struct Shard {
    header: String,
    data_bytes: usize,
}

impl Shard {
    fn add(&mut self, name: &str, dtype: &str, element_bytes: usize, shape: &[usize]) {
        let end = self.data_bytes + shape.iter().product::<usize>() * element_bytes;
        let separator = if self.header.is_empty() { "{" } else { "," };
        write!(
            self.header,
            r#"{separator}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{},{end}]}}"#,
            self.data_bytes
        )
        .expect("a string grows");
        self.data_bytes = end;
    }

    /// An EXL2 linear of 4 bits in groups of 128.
    fn add_exl2(&mut self, key: &str, k: usize, n: usize) {
        let groups = k / 128;
        self.add(&format!("{key}.q_groups"), "I16", 2, &[2 * groups]);
        self.add(&format!("{key}.q_invperm"), "I32", 4, &[k]);
        self.add(&format!("{key}.q_scale"), "I32", 4, &[groups, n / 8]);
        self.add(&format!("{key}.q_scale_max"), "F16", 2, &[groups]);
        self.add(&format!("{key}.q_weight"), "I32", 4, &[k / 8, n]);
    }

    /// Writes the shard with a hole where its data would be.
    fn write(mut self, path: &Path) -> u64 {
        self.header.push('}');
        let mut file = File::create(path).expect("a file");
        file.write_all(&(self.header.len() as u64).to_le_bytes())
            .expect("a write");
        file.write_all(self.header.as_bytes()).expect("a write");
        let bytes = 8 + self.header.len() + self.data_bytes;
        file.set_len(bytes as u64).expect("a sparse file");
        bytes as u64
    }
}

/// The linears of a layer: name, K, N.
const LINEARS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HIDDEN, HIDDEN),
    ("self_attn.k_proj", HIDDEN, KV),
    ("self_attn.v_proj", HIDDEN, KV),
    ("self_attn.o_proj", HIDDEN, HIDDEN),
    ("mlp.gate_proj", HIDDEN, INTERMEDIATE),
    ("mlp.up_proj", HIDDEN, INTERMEDIATE),
    ("mlp.down_proj", INTERMEDIATE, HIDDEN),
];

/// Writes the directory, one shard a layer; returns the bytes of its files.
fn write_model(directory: &Path) -> u64 {
    fs::write(directory.join("config.json"), "{}").expect("a file");
    let mut stored_bytes = 0;
    for layer in 0..LAYERS {
        let mut shard = Shard::default();
        if layer == 0 {
            shard.add("model.embed_tokens.weight", "F16", 2, &[VOCABULARY, HIDDEN]);
            shard.add("model.norm.weight", "F16", 2, &[HIDDEN]);
            shard.add_exl2("lm_head", HIDDEN, VOCABULARY);
        }
        for (name, k, n) in LINEARS {
            shard.add_exl2(&format!("model.layers.{layer}.{name}"), k, n);
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shard.add(
                &format!("model.layers.{layer}.{norm}.weight"),
                "F16",
                2,
                &[HIDDEN],
            );
        }
        let name = format!("output-{:05}-of-{LAYERS:05}.safetensors", layer + 1);
        stored_bytes += shard.write(&directory.join(name));
    }
    stored_bytes
}

/// Bytes that this process has asked to read so far; `None` where the system does not say.
fn bytes_read() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/io").ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("rchar: ")?.parse().ok())
}

#[test]
fn opening_a_70b_directory_reads_headers_only() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let stored_bytes = write_model(directory.path());
    assert!(stored_bytes > 30 << 30, "{stored_bytes} bytes");

    let before = bytes_read();
    let model = ModelSource::open(directory.path()).expect("a valid model");
    let mut linear_bytes = 0;
    let mut weights = 0;
    for layer in 0..LAYERS {
        for (name, k, n) in LINEARS {
            let key = format!("model.layers.{layer}.{name}");
            let header = LinearHeader::find(model.tensors(), &key, &GptqConfig::default())
                .expect("valid headers")
                .expect("a linear");
            assert_eq!((header.in_features, header.out_features), (k, n), "{key}");
            assert!(matches!(header.encoding, Encoding::Exl2 { .. }), "{key}");
            linear_bytes += header.stored_bytes();
            weights += k * n;
        }
    }
    if let (Some(before), Some(after)) = (before, bytes_read()) {
        let read = after - before;
        assert!(
            read < stored_bytes / 100,
            "{read} of {stored_bytes} bytes read"
        );
    }
    assert_eq!(model.stored_bytes(), stored_bytes);
    let bits = linear_bytes as f64 * 8.0 / weights as f64;
    assert!((4.03..4.06).contains(&bits), "{bits} bits per weight");
}
