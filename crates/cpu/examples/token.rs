//! Times whole decode and prefill steps of a SmolLM2-135M-shaped EXL2 model with random weights.
//!
//! Arguments: threads (default: all), context tokens before the timed steps (default 64), format
//! of the cache (default f16). Tensors at 4.0 bits a weight are laid out as EXL2 writes them.
#![allow(
    clippy::print_stdout,
    reason = "a measuring program prints what it measured"
)]

use std::time::Instant;

use oxllama_backend::{
    Activation, AttentionArgs, AttentionOps, CacheShape, DeviceMemory, GatedLinear, KvLayer,
    LinearOps, LinearOutput, Norm, NormKind, NormLinears, PAGE_TOKENS, Rope, RopeStyle, StepBatch,
    StepOps, Store, WorkspaceShape,
};
use oxllama_cpu::{CpuDevice, CpuLinear, CpuOptions, CpuWorkspace, measure_read_bandwidth};
use oxllama_format::{GptqConfig, LinearSource};
use oxllama_memory::{Bytes, CacheFormat, DeviceId, Ledger, Purpose};

#[path = "../tests/support/mod.rs"]
mod support;

use support::{Random, exl2};

type Buffer = <CpuDevice as DeviceMemory>::Buffer;

const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49152;
const PREFILL_TOKENS: usize = 512;

struct Layer {
    linears: Vec<CpuLinear>,
    attention_norm: Norm<Buffer>,
    mlp_norm: Norm<Buffer>,
    cache: KvLayer<Buffer>,
}

struct Bench {
    device: CpuDevice,
    ledger: Ledger,
    random: Random,
    weight_bytes: u64,
    load_s: f64,
}

impl Bench {
    fn new(threads: Option<usize>) -> Self {
        let id = DeviceId::cpu(0);
        Self {
            device: CpuDevice::new(id.clone(), CpuOptions { threads, isa: None }).unwrap(),
            ledger: Ledger::for_device(id, Bytes::from_gib(4)),
            random: Random(7),
            weight_bytes: 0,
            load_s: 0.0,
        }
    }
    fn buffer(&mut self, values: &[f32]) -> Buffer {
        let mut buffer = self.zeros(values.len() * 4);
        self.device
            .upload(bytemuck::cast_slice(values), &mut buffer)
            .unwrap();
        buffer
    }
    fn zeros(&mut self, bytes: usize) -> Buffer {
        let bytes = Bytes::from_usize(bytes);
        let held = self
            .ledger
            .reserve(self.device.id(), "bench", Purpose::Workspace, bytes);
        self.device.allocate(held.unwrap()).unwrap()
    }
    fn norm(&mut self) -> Norm<Buffer> {
        Norm {
            kind: NormKind::Rms,
            weight: self.buffer(&[1.0; HIDDEN]),
            bias: None,
            epsilon: 1e-5,
            width: HIDDEN,
        }
    }
    fn linear(&mut self, n: usize, regions: &[(u32, usize)], group: usize) -> CpuLinear {
        let tensors = exl2("x", n, regions, group, &mut self.random);
        let source = LinearSource::load(&tensors, "x", &GptqConfig::default(), 1.0).unwrap();
        let bytes = self.device.linear_bytes(&source.header());
        self.weight_bytes += bytes.get();
        let held = self
            .ledger
            .reserve(self.device.id(), "bench", Purpose::Workspace, bytes);
        let start = Instant::now();
        let linear = self.device.load_linear(&source, held.unwrap()).unwrap();
        self.load_s += start.elapsed().as_secs_f64();
        linear
    }
    fn layer(&mut self, shape: CacheShape) -> Layer {
        let attention: &[(u32, usize)] = &[(5, 64), (4, 512)];
        let down: &[(u32, usize)] = &[(6, 64), (4, 1472)];
        let linears = vec![
            self.linear(HEADS * HEAD_DIM, attention, 128),
            self.linear(KV_HEADS * HEAD_DIM, attention, 64),
            self.linear(KV_HEADS * HEAD_DIM, attention, 64),
            self.linear(HIDDEN, attention, 128),
            self.linear(INTERMEDIATE, &[(4, 448), (3, 128)], 64),
            self.linear(INTERMEDIATE, &[(5, 64), (4, 384), (3, 128)], 64),
            self.linear(HIDDEN, down, 128),
        ];
        Layer {
            linears,
            attention_norm: self.norm(),
            mlp_norm: self.norm(),
            cache: KvLayer {
                shape,
                keys: self.zeros(shape.key_bytes().get() as usize),
                values: self.zeros(shape.value_bytes().get() as usize),
            },
        }
    }
    fn workspace(&mut self, pages: usize) -> CpuWorkspace {
        let shape = WorkspaceShape {
            rows: PREFILL_TOKENS,
            sequences: 1,
            pages_per_sequence: pages,
            max_in_features: INTERMEDIATE,
            max_out_features: VOCABULARY,
            draw_width: 0,
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            rotary_dim: HEAD_DIM,
            ropes: 1,
        };
        let bytes = self.device.workspace_bytes(&shape);
        let held = self
            .ledger
            .reserve(self.device.id(), "bench", Purpose::Workspace, bytes);
        let held = held.unwrap();
        self.device.create_workspace(&shape, held).unwrap()
    }
    fn activations(&mut self) -> Activations {
        let rows = PREFILL_TOKENS;
        Activations {
            x: self.zeros(rows * HIDDEN * 4),
            normed: self.zeros(rows * HIDDEN * 4),
            q: self.zeros(rows * HIDDEN * 4),
            k: self.zeros(rows * KV_HEADS * HEAD_DIM * 4),
            v: self.zeros(rows * KV_HEADS * HEAD_DIM * 4),
            attended: self.zeros(rows * HIDDEN * 4),
            gate: self.zeros(rows * INTERMEDIATE * 4),
            up: self.zeros(rows * INTERMEDIATE * 4),
            logits: self.zeros(VOCABULARY * 4),
        }
    }
}

/// Times of one step in seconds: all, and by operation.
#[derive(Default, Clone, Copy)]
struct Times([f64; 6]);

struct Activations {
    x: Buffer,
    normed: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    attended: Buffer,
    gate: Buffer,
    up: Buffer,
    logits: Buffer,
}

/// The model, and what its steps are made with.
struct Model {
    device: CpuDevice,
    layers: Vec<Layer>,
    final_norm: Norm<Buffer>,
    head: CpuLinear,
    rope: Rope,
    page_table: Vec<u32>,
    /// f32 `[PREFILL_TOKENS, HIDDEN]`: what the first layer takes.
    input: Vec<f32>,
    activations: Activations,
    workspace: CpuWorkspace,
}

impl Model {
    fn new(bench: &mut Bench, context: usize, format: CacheFormat) -> Self {
        let pages = (context + PREFILL_TOKENS).div_ceil(PAGE_TOKENS) + 1;
        let shape = CacheShape {
            pages,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            format,
        };
        Self {
            device: bench.device.clone(),
            layers: (0..LAYERS).map(|_| bench.layer(shape)).collect(),
            head: bench.linear(VOCABULARY, &[(8, 64), (6, 512)], 128),
            final_norm: bench.norm(),
            rope: Rope {
                inverse_frequencies: (0..32).map(|i| 1e4_f32.powf(-(i as f32) / 32.0)).collect(),
                attention_factor: 1.0,
                style: RopeStyle::Halves,
            },
            page_table: (0..pages as u32).collect(),
            input: bench.random.floats(PREFILL_TOKENS * HIDDEN),
            activations: bench.activations(),
            workspace: bench.workspace(pages),
        }
    }

    /// Times a step of `rows` tokens from position `first` on.
    fn step(&mut self, first: usize, rows: usize) -> Times {
        let positions: Vec<u32> = (first..first + rows).map(|p| p as u32).collect();
        let batch = StepBatch {
            token_ids: &vec![1; rows],
            positions: &positions,
            row_sequences: &vec![0; rows],
            page_tables: &self.page_table,
            pages_per_sequence: self.page_table.len(),
            logit_rows: &[],
            draws: &[],
            changes: &[],
        };
        let (device, a, workspace) = (&self.device, &mut self.activations, &mut self.workspace);
        device
            .upload(bytemuck::cast_slice(&self.input), &mut a.x)
            .unwrap();
        let start = Instant::now();
        let ropes = std::slice::from_ref(&self.rope);
        device.begin_step(&batch, ropes, workspace).unwrap();
        let mut times = Times::default();
        for layer in &mut self.layers {
            attend(device, layer, a, workspace, rows, &mut times);
            let start = Instant::now();
            mlp(device, layer, a, workspace, rows);
            times.0[4] += start.elapsed().as_secs_f64();
        }
        let before_head = Instant::now();
        let mut output = [LinearOutput {
            weights: &self.head,
            out: &mut a.logits,
        }];
        let args = NormLinears {
            norm: Some(&self.final_norm),
            x: &a.x,
            normed: &mut a.normed,
            linears: &mut output,
            rows: 1,
        };
        device.norm_linears(args, workspace).unwrap();
        times.0[5] = before_head.elapsed().as_secs_f64();
        times.0[0] = start.elapsed().as_secs_f64();
        times
    }

    /// The fastest of several steps, from `first` of each on.
    fn best(&mut self, firsts: impl Iterator<Item = usize>, rows: usize) -> Times {
        firsts
            .map(|first| self.step(first, rows))
            .min_by(|a, b| a.0[0].total_cmp(&b.0[0]))
            .unwrap()
    }
}

fn main() {
    let argument = |index: usize| {
        std::env::args()
            .nth(index)
            .and_then(|text| text.parse().ok())
    };
    let context: usize = argument(2).unwrap_or(64);
    let format = match std::env::args().nth(3) {
        None => CacheFormat::F16,
        Some(name) => CacheFormat::ALL
            .into_iter()
            .find(|format| format.to_string() == name)
            .expect("f32, f16, q8, q6 or q4"),
    };
    let mut bench = Bench::new(argument(1));
    let threads = bench.device.pool().threads();
    let mut model = Model::new(&mut bench, context, format);
    println!(
        "{:?}, {threads} threads, weights {:.1} MB, repacked in {:.0} ms on one thread",
        bench.device.isa(),
        bench.weight_bytes as f64 / 1e6,
        bench.load_s * 1e3
    );
    model.step(0, PREFILL_TOKENS);
    for round in 0..3 {
        let decode = model.best((0..60).map(|i| context + i % 8), 1);
        let prefill = model.best(std::iter::repeat_n(0, 4), PREFILL_TOKENS);
        let bandwidth = measure_read_bandwidth(threads, 1 << 29).unwrap();
        let floor = bench.weight_bytes as f64 / bandwidth;
        let ms = |times: Times| times.0.map(|seconds| (seconds * 1e5).round() / 1e2);
        println!(
            "round {round}: read {:.1} GB/s, floor {:.2} ms",
            bandwidth / 1e9,
            floor * 1e3
        );
        println!(
            "  decode {:.0} tokens/s = {:.0}% of the floor; ms [all, qkv, attention, o, mlp, head] {:?}",
            1.0 / decode.0[0],
            100.0 * floor / decode.0[0],
            ms(decode)
        );
        println!(
            "  prefill {:.0} tokens/s; ms {:?}",
            PREFILL_TOKENS as f64 / prefill.0[0],
            ms(prefill)
        );
    }
}

/// A layer's attention, timed by operation.
fn attend(
    device: &CpuDevice,
    layer: &mut Layer,
    a: &mut Activations,
    workspace: &mut CpuWorkspace,
    rows: usize,
    times: &mut Times,
) {
    let [q, k, v, o, ..] = &layer.linears[..] else {
        unreachable!()
    };
    let mut lap = Instant::now();
    let mut mark = |index: usize| {
        times.0[index] += lap.elapsed().as_secs_f64();
        lap = Instant::now();
    };
    let outputs = [(q, &mut a.q), (k, &mut a.k), (v, &mut a.v)];
    let args = NormLinears {
        norm: Some(&layer.attention_norm),
        x: &a.x,
        normed: &mut a.normed,
        linears: &mut outputs.map(|(weights, out)| LinearOutput { weights, out }),
        rows,
    };
    device.norm_linears(args, workspace).unwrap();
    mark(1);
    let args = AttentionArgs {
        queries: &mut a.q,
        keys: &mut a.k,
        values: &a.v,
        cache: &mut layer.cache,
        out: &mut a.attended,
        query_norm: None,
        key_norm: None,
        rope: Some(0),
        heads: HEADS,
        scale: 0.125,
        softcap: None,
        window: None,
    };
    device.attention(args, workspace).unwrap();
    mark(2);
    let output = LinearOutput {
        weights: o,
        out: &mut a.x,
    };
    let store = Store::Add { scale: 1.0 };
    device
        .linear(&a.attended, output, store, rows, workspace)
        .unwrap();
    mark(3);
}

/// The rest of a layer: norm, gate and up, activation, down.
fn mlp(
    device: &CpuDevice,
    layer: &Layer,
    a: &mut Activations,
    workspace: &mut CpuWorkspace,
    rows: usize,
) {
    let [.., gate, up, down] = &layer.linears[..] else {
        unreachable!()
    };
    let outputs = [(gate, &mut a.gate), (up, &mut a.up)];
    let args = NormLinears {
        norm: Some(&layer.mlp_norm),
        x: &a.x,
        normed: &mut a.normed,
        linears: &mut outputs.map(|(weights, out)| LinearOutput { weights, out }),
        rows,
    };
    device.norm_linears(args, workspace).unwrap();
    let args = GatedLinear {
        activation: Activation::Silu,
        gate: &mut a.gate,
        up: &a.up,
        weights: down,
        out: &mut a.x,
        store: Store::Add { scale: 1.0 },
        rows,
    };
    device.gated_linear(args, workspace).unwrap();
}
