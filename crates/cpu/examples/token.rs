//! Times whole decode, batched decode and prefill steps of a SmolLM2-135M-shaped EXL2 model with random weights.
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
/// Sequences with one row each.
const BATCHES: [usize; 4] = [2, 4, 8, 16];
const MOST_SEQUENCES: usize = 16;

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

/// Seconds of every operation of a step: those of each layer, and the head with what surrounds
/// the layers.
#[derive(Clone, Copy)]
struct Times {
    /// Queries, keys and values; attention; output; MLP.
    layers: [[f64; 4]; LAYERS],
    head: f64,
}

impl Times {
    /// Each operation's best time of all runs: what a step takes that nobody disturbs.
    fn best(runs: impl Iterator<Item = Self>) -> Self {
        let longest = Self {
            layers: [[f64::MAX; 4]; LAYERS],
            head: f64::MAX,
        };
        runs.fold(longest, |mut best, run| {
            let operations = best.layers.as_flattened_mut().iter_mut();
            for (best, time) in operations.zip(run.layers.as_flattened()) {
                *best = best.min(*time);
            }
            best.head = best.head.min(run.head);
            best
        })
    }

    /// All, then by operation.
    fn sums(&self) -> [f64; 6] {
        let operation = |index: usize| self.layers.iter().map(|layer| layer[index]).sum::<f64>();
        let [qkv, attention, output, mlp] = [0, 1, 2, 3].map(operation);
        let all = qkv + attention + output + mlp + self.head;
        [all, qkv, attention, output, mlp, self.head]
    }
}

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
    let pages_each = (context + PREFILL_TOKENS).div_ceil(PAGE_TOKENS) + 1;
    let pages = MOST_SEQUENCES * pages_each;
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
        sequences: MOST_SEQUENCES,
        pages_per_sequence: pages_each,
        max_in_features: INTERMEDIATE,
        max_out_features: VOCABULARY,
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
        logits: bench.zeros(MOST_SEQUENCES * VOCABULARY * 4),
    };
    let rope = Rope {
        inverse_frequencies: (0..32).map(|i| 1e4_f32.powf(-(i as f32) / 32.0)).collect(),
        attention_factor: 1.0,
        style: RopeStyle::Halves,
    };
    let page_table: Vec<u32> = (0..pages as u32).collect();
    // `rows` rows from `first` on of one sequence with the logits of the last, or the row at
    // `first` of each of `rows` sequences with the logits of all.
    let mut step = |first: usize, rows: usize, is_batch: bool| -> Times {
        let row = |row: usize| if is_batch { first } else { first + row } as u32;
        let positions: Vec<u32> = (0..rows).map(row).collect();
        let row_sequences = (0..rows).map(|row| if is_batch { row as u32 } else { 0 });
        let row_sequences: Vec<u32> = row_sequences.collect();
        let (sequences, logit_rows) = if is_batch { (rows, rows) } else { (1, 1) };
        let batch = StepBatch {
            token_ids: &vec![1; rows],
            positions: &positions,
            row_sequences: &row_sequences,
            page_tables: &page_table[..sequences * pages_each],
            pages_per_sequence: pages_each,
        };
        bench
            .device
            .upload(bytemuck::cast_slice(&input), &mut a.x)
            .unwrap();
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
            rows: logit_rows,
        };
        bench.device.norm_linears(args, &mut workspace).unwrap();
        times.head = before_head.elapsed().as_secs_f64();
        times
    };
    step(0, PREFILL_TOKENS, false);
    for round in 0..3 {
        let decode = Times::best((0..60).map(|i| step(context + i % 8, 1, false))).sums();
        let prefill = Times::best((0..4).map(|_| step(0, PREFILL_TOKENS, false))).sums();
        let bandwidth = measure_read_bandwidth(threads, 1 << 29).unwrap();
        let floor = bench.weight_bytes as f64 / bandwidth;
        let ms = |times: [f64; 6]| times.map(|seconds| (seconds * 1e5).round() / 1e2);
        println!(
            "round {round}: read {:.1} GB/s, floor {:.2} ms",
            bandwidth / 1e9,
            floor * 1e3
        );
        println!(
            "  decode {:.0} tokens/s = {:.0}% of the floor; ms [all, qkv, attention, o, mlp, head] {:?}",
            1.0 / decode[0],
            100.0 * floor / decode[0],
            ms(decode)
        );
        for rows in BATCHES {
            let batch = Times::best((0..30).map(|i| step(context + i % 8, rows, true))).sums();
            println!(
                "  batch {rows:2} {:.0} tokens/s = {:.2} times decode; ms {:?}",
                rows as f64 / batch[0],
                rows as f64 * decode[0] / batch[0],
                ms(batch)
            );
        }
        println!(
            "  prefill {:.0} tokens/s; ms {:?}",
            PREFILL_TOKENS as f64 / prefill[0],
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
    let mut times = Times {
        layers: [[0.0; 4]; LAYERS],
        head: 0.0,
    };
    for (times, layer) in times.layers.iter_mut().zip(layers) {
        let [q, k, v, o, gate, up, down] = &layer.linears[..] else {
            unreachable!()
        };
        let mut lap = Instant::now();
        let mut mark = |index: usize| {
            times[index] = lap.elapsed().as_secs_f64();
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
        mark(0);
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
        mark(1);
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
        mark(2);
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
        mark(3);
    }
    times
}
