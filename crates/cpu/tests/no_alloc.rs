//! No operation of a step allocates, on any thread: a program of its own, as the allocator that
//! counts is the whole process's.

use oxllama_backend::{
    Activation, AttentionArgs, AttentionOps, CacheShape, DeviceMemory, ElementwiseOps, GatedLinear,
    HeadNorm, HostBuffer, KvLayer, LinearOps, LinearOutput, LogitArgs, Norm, NormKind, NormLinears,
    NormOps, Rope, RopeStyle, StepBatch, StepOps, Store, WorkspaceShape,
};
use oxllama_cpu::{CpuDevice, CpuLinear, CpuOptions, CpuWorkspace};
use oxllama_format::{GptqConfig, LinearSource};
use oxllama_memory::{Bytes, CacheFormat, DeviceId, Ledger, Purpose, Reservation};
use oxllama_test_support::{CountingAllocator, allocations_so_far};

mod support;

use support::{Random, Tensors, exl2, half};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 160;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const VOCABULARY: usize = 64;
const ROWS: usize = 20;

struct Setup {
    device: CpuDevice,
    ledger: Ledger,
    random: Random,
}

impl Setup {
    fn reserve(&self, bytes: Bytes) -> Reservation {
        let purpose = Purpose::Workspace;
        let held = self
            .ledger
            .reserve(self.device.id(), "test", purpose, bytes);
        held.expect("the ledger has room")
    }
    fn buffer(&mut self, elements: usize) -> HostBuffer {
        let held = self.reserve(Bytes::from_usize(elements * 4));
        let mut buffer = self.device.allocate(held).expect("memory");
        let values = self.random.floats(elements);
        let bytes = bytemuck::cast_slice(&values);
        self.device.upload(bytes, &mut buffer).expect("upload");
        buffer
    }
    fn linear(&mut self, tensors: &Tensors) -> CpuLinear {
        let source = LinearSource::load(tensors, "x", &GptqConfig::default(), 1.0).expect("valid");
        let held = self.reserve(self.device.linear_bytes(&source.header()));
        self.device.load_linear(&source, held).expect("loads")
    }
}

struct Model {
    table: CpuLinear,
    queries: CpuLinear,
    keys: CpuLinear,
    values: CpuLinear,
    gate: CpuLinear,
    down: CpuLinear,
    norm: Norm<HostBuffer>,
    head_norm: HeadNorm<HostBuffer>,
    /// One of each format.
    caches: Vec<KvLayer<HostBuffer>>,
}

/// Buffers wide enough for anything here.
struct Buffers([HostBuffer; 8]);

#[test]
fn a_step_allocates_nothing() {
    let id = DeviceId::cpu(0);
    for threads in [1, 2, 3] {
        let options = CpuOptions {
            threads: Some(threads),
            isa: None,
        };
        let device = CpuDevice::new(id.clone(), options).expect("threads start");
        let ledger = Ledger::for_device(id.clone(), Bytes::from_mib(64));
        let mut setup = Setup {
            device,
            ledger,
            random: Random(11),
        };
        let mut model = model(&mut setup);
        let mut buffers = Buffers(std::array::from_fn(|_| setup.buffer(ROWS * INTERMEDIATE)));
        let shape = WorkspaceShape {
            rows: ROWS,
            sequences: 2,
            pages_per_sequence: 1,
            max_in_features: INTERMEDIATE,
            max_out_features: INTERMEDIATE,
            draw_width: 0,
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            rotary_dim: HEAD_DIM,
            ropes: 1,
        };
        let held = setup.reserve(setup.device.workspace_bytes(&shape));
        let created = setup.device.create_workspace(&shape, held);
        let mut workspace = created.expect("a workspace");
        let ropes = [Rope {
            inverse_frequencies: vec![1.0; HEAD_DIM / 2],
            attention_factor: 1.0,
            style: RopeStyle::Halves,
        }];
        for rows in [1, 2, ROWS] {
            let token_ids = vec![3; rows];
            let positions: Vec<u32> = (0..rows as u32).collect();
            let row_sequences: Vec<u32> = (0..rows).map(|row| u32::from(row >= rows / 2)).collect();
            let batch = StepBatch {
                token_ids: &token_ids,
                positions: &positions,
                row_sequences: &row_sequences,
                page_tables: &[0, 1],
                pages_per_sequence: 1,
                logit_rows: &[],
                draws: &[],
                changes: &[],
            };
            // Once to warm up, once to count.
            let mut step = || {
                let before = allocations_so_far();
                let begun = setup.device.begin_step(&batch, &ropes, &mut workspace);
                begun.expect("the step fits");
                run(
                    &setup.device,
                    &mut model,
                    &mut buffers,
                    &mut workspace,
                    rows,
                );
                allocations_so_far() - before
            };
            step();
            assert_eq!(step(), 0, "{rows} rows on {threads} threads");
        }
    }
}

fn model(setup: &mut Setup) -> Model {
    let wide = HEADS * HEAD_DIM;
    let quantised = |setup: &mut Setup, n: usize, regions: &[(u32, usize)]| {
        let tensors = exl2("x", n, regions, 32, &mut setup.random);
        setup.linear(&tensors)
    };
    let table = half("x", VOCABULARY, HIDDEN, &mut setup.random);
    let allocate = |setup: &mut Setup, bytes: Bytes| {
        let held = setup.reserve(bytes);
        setup.device.allocate(held).expect("memory")
    };
    let caches = CacheFormat::ALL.map(|format| {
        let shape = CacheShape {
            pages: 2,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            format,
        };
        KvLayer {
            shape,
            keys: allocate(setup, shape.key_bytes()),
            values: allocate(setup, shape.value_bytes()),
        }
    });
    Model {
        table: setup.linear(&table),
        queries: quantised(setup, wide, &[(8, 32), (5, 32), (4, 32)]),
        keys: quantised(setup, KV_HEADS * HEAD_DIM, &[(6, 64), (2, 32)]),
        values: quantised(setup, KV_HEADS * HEAD_DIM, &[(4, 96)]),
        gate: quantised(setup, INTERMEDIATE, &[(3, 96)]),
        down: quantised(setup, HIDDEN, &[(6, 32), (4, 128)]),
        norm: Norm {
            kind: NormKind::Rms,
            weight: setup.buffer(HIDDEN),
            bias: None,
            epsilon: 1e-5,
            width: HIDDEN,
        },
        head_norm: HeadNorm {
            kind: NormKind::Rms,
            weight: setup.buffer(HEADS * HEAD_DIM),
            epsilon: 1e-5,
        },
        caches: caches.into(),
    }
}

/// Every operation once.
fn run(
    device: &CpuDevice,
    model: &mut Model,
    buffers: &mut Buffers,
    workspace: &mut CpuWorkspace,
    rows: usize,
) {
    let [x, normed, q, k, v, attended, gate, up] = &mut buffers.0;
    let done = "operations on valid buffers succeed";
    device.embed(&model.table, 1.0, x, workspace).expect(done);
    device
        .norm(&model.norm, x, normed, rows, workspace)
        .expect(done);
    let args = NormLinears {
        norm: Some(&model.norm),
        x,
        normed,
        linears: &mut [
            LinearOutput {
                weights: &model.queries,
                out: q,
            },
            LinearOutput {
                weights: &model.keys,
                out: k,
            },
            LinearOutput {
                weights: &model.values,
                out: v,
            },
        ],
        rows,
    };
    device.norm_linears(args, workspace).expect(done);
    for cache in &mut model.caches {
        let args = AttentionArgs {
            queries: q,
            keys: k,
            values: v,
            cache,
            out: attended,
            query_norm: Some(&model.head_norm),
            key_norm: Some(&model.head_norm),
            rope: Some(0),
            heads: HEADS,
            scale: 0.25,
            softcap: Some(30.0),
            window: Some(7),
        };
        device.attention(args, workspace).expect(done);
    }
    for (linear, out) in [(&model.gate, &mut *gate), (&model.gate, &mut *up)] {
        let output = LinearOutput {
            weights: linear,
            out,
        };
        device
            .linear(x, output, Store::Overwrite, rows, workspace)
            .expect(done);
    }
    device
        .gate(Activation::GeluErf, gate, up, rows * INTERMEDIATE)
        .expect(done);
    let args = GatedLinear {
        activation: Activation::Silu,
        gate,
        up,
        weights: &model.down,
        out: x,
        store: Store::Add { scale: 1.0 },
        rows,
    };
    device.gated_linear(args, workspace).expect(done);
    device.add(x, 0.5, normed, rows * HIDDEN).expect(done);
    device.gather_rows(normed, &[0], HIDDEN, x).expect(done);
    let output = LinearOutput {
        weights: &model.table,
        out: gate,
    };
    device
        .linear(x, output, Store::Overwrite, 1, workspace)
        .expect(done);
    let args = LogitArgs {
        rows: 1,
        width: VOCABULARY,
        vocab_size: VOCABULARY - 3,
        scale: 0.5,
        softcap: Some(20.0),
    };
    device.finish_logits(gate, args).expect(done);
}
