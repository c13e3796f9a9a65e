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
use oxllama_cpu::{CpuDevice, CpuLinear, CpuOptions, measure_read_bandwidth};
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

fn main() {
    let argument = |index: usize| {
        std::env::args()
            .nth(index)
            .and_then(|text| text.parse().ok())
    };
    let threads: Option<usize> = argument(1);
    let context: usize = argument(2).unwrap_or(64);
    let format = match std::env::args().nth(3) {
        None => CacheFormat::F16,
        Some(name) => CacheFormat::ALL
            .into_iter()
            .find(|format| format.to_string() == name)
            .expect("f32, f16, q8, q6 or q4"),
    };
    let id = DeviceId::cpu(0);
    let device = CpuDevice::new(id.clone(), CpuOptions { threads, isa: None }).unwrap();
    let threads = device.pool().threads();
    let ledger = Ledger::for_device(id, Bytes::from_gib(4));
    let mut bench = Bench {
        device,
        ledger,
        random: Random(7),
        weight_bytes: 0,
        load_s: 0.0,
    };
    let mut layers = Vec::new();
    let pages = (context + PREFILL_TOKENS).div_ceil(PAGE_TOKENS) + 1;
    let shape = CacheShape {
        pages,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        format,
    };
    let key_bytes = shape.key_bytes().get() as usize;
    let value_bytes = shape.value_bytes().get() as usize;
    for _ in 0..LAYERS {
        let attention: &[(u32, usize)] = &[(5, 64), (4, 512)];
        let down: &[(u32, usize)] = &[(6, 64), (4, 1472)];
        let linears = vec![
            bench.linear(HEADS * HEAD_DIM, attention, 128),
            bench.linear(KV_HEADS * HEAD_DIM, attention, 64),
            bench.linear(KV_HEADS * HEAD_DIM, attention, 64),
            bench.linear(HIDDEN, attention, 128),
            bench.linear(INTERMEDIATE, &[(4, 448), (3, 128)], 64),
            bench.linear(INTERMEDIATE, &[(5, 64), (4, 384), (3, 128)], 64),
            bench.linear(HIDDEN, down, 128),
        ];
        layers.push(Layer {
            linears,
            attention_norm: bench.norm(),
            mlp_norm: bench.norm(),
            cache: KvLayer {
                shape,
                keys: bench.zeros(key_bytes),
                values: bench.zeros(value_bytes),
            },
        });
    }
    let head = bench.linear(VOCABULARY, &[(8, 64), (6, 512)], 128);
    let final_norm = bench.norm();
    println!(
        "{:?}, {threads} threads, weights {:.1} MB, repacked in {:.0} ms on one thread",
        bench.device.isa(),
        bench.weight_bytes as f64 / 1e6,
        bench.load_s * 1e3
    );
    let rows = PREFILL_TOKENS;
    let workspace_shape = WorkspaceShape {
        rows,
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
    let bytes = bench.device.workspace_bytes(&workspace_shape);
    let held = bench
        .ledger
        .reserve(bench.device.id(), "bench", Purpose::Workspace, bytes);
    let mut workspace = bench
        .device
        .create_workspace(&workspace_shape, held.unwrap())
        .unwrap();
    let input = bench.random.floats(rows * HIDDEN);
    let mut a = Activations {
        x: bench.buffer(&input),
        normed: bench.zeros(rows * HIDDEN * 4),
        q: bench.zeros(rows * HIDDEN * 4),
        k: bench.zeros(rows * KV_HEADS * HEAD_DIM * 4),
        v: bench.zeros(rows * KV_HEADS * HEAD_DIM * 4),
        attended: bench.zeros(rows * HIDDEN * 4),
        gate: bench.zeros(rows * INTERMEDIATE * 4),
        up: bench.zeros(rows * INTERMEDIATE * 4),
        logits: bench.zeros(VOCABULARY * 4),
    };
    let rope = Rope {
        inverse_frequencies: (0..32).map(|i| 1e4_f32.powf(-(i as f32) / 32.0)).collect(),
        attention_factor: 1.0,
        style: RopeStyle::Halves,
    };
    let page_table: Vec<u32> = (0..pages as u32).collect();
    let mut step = |first: usize, rows: usize| -> Times {
        let positions: Vec<u32> = (first..first + rows).map(|p| p as u32).collect();
        let batch = StepBatch {
            token_ids: &vec![1; rows],
            positions: &positions,
            row_sequences: &vec![0; rows],
            page_tables: &page_table,
            pages_per_sequence: pages,
            logit_rows: &[],
            draws: &[],
            changes: &[],
        };
        bench
            .device
            .upload(bytemuck::cast_slice(&input), &mut a.x)
            .unwrap();
        let start = Instant::now();
        let ropes = std::slice::from_ref(&rope);
        bench
            .device
            .begin_step(&batch, ropes, &mut workspace)
            .unwrap();
        let mut times = forward(&bench.device, &mut layers, &mut a, &mut workspace, rows);
        let before_head = Instant::now();
        let mut output = [LinearOutput {
            weights: &head,
            out: &mut a.logits,
        }];
        let args = NormLinears {
            norm: Some(&final_norm),
            x: &a.x,
            normed: &mut a.normed,
            linears: &mut output,
            rows: 1,
        };
        bench.device.norm_linears(args, &mut workspace).unwrap();
        times.0[5] = before_head.elapsed().as_secs_f64();
        times.0[0] = start.elapsed().as_secs_f64();
        times
    };
    let best = |runs: Vec<Times>| {
        runs.into_iter()
            .min_by(|a, b| a.0[0].total_cmp(&b.0[0]))
            .unwrap()
    };
    step(0, PREFILL_TOKENS);
    for round in 0..3 {
        let decode = best((0..60).map(|i| step(context + i % 8, 1)).collect());
        let prefill = best((0..4).map(|_| step(0, PREFILL_TOKENS)).collect());
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

fn forward(
    device: &CpuDevice,
    layers: &mut [Layer],
    a: &mut Activations,
    workspace: &mut oxllama_cpu::CpuWorkspace,
    rows: usize,
) -> Times {
    let mut times = Times::default();
    for layer in layers {
        let [q, k, v, o, gate, up, down] = &layer.linears[..] else {
            unreachable!()
        };
        let mut lap = Instant::now();
        let mut mark = |index: usize| {
            times.0[index] += lap.elapsed().as_secs_f64();
            lap = Instant::now();
        };
        let mut outputs = [
            LinearOutput {
                weights: q,
                out: &mut a.q,
            },
            LinearOutput {
                weights: k,
                out: &mut a.k,
            },
            LinearOutput {
                weights: v,
                out: &mut a.v,
            },
        ];
        let args = NormLinears {
            norm: Some(&layer.attention_norm),
            x: &a.x,
            normed: &mut a.normed,
            linears: &mut outputs,
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
        device
            .linear(
                &a.attended,
                output,
                Store::Add { scale: 1.0 },
                rows,
                workspace,
            )
            .unwrap();
        mark(3);
        let mut outputs = [
            LinearOutput {
                weights: gate,
                out: &mut a.gate,
            },
            LinearOutput {
                weights: up,
                out: &mut a.up,
            },
        ];
        let args = NormLinears {
            norm: Some(&layer.mlp_norm),
            x: &a.x,
            normed: &mut a.normed,
            linears: &mut outputs,
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
        mark(4);
    }
    times
}
