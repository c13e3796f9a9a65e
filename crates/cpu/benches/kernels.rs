//! Kernels by themselves: `cargo bench -p oxllama-cpu`. Bytes a second are those of the weights.

use std::sync::Mutex;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use oxllama_backend::{
    DeviceMemory, HostBuffer, LinearOps, LinearOutput, StepBatch, StepOps, Store, WorkspaceShape,
};
use oxllama_cpu::{CpuDevice, CpuLinear, CpuOptions, CpuWorkspace, SpinPool};
use oxllama_format::{GptqConfig, LinearSource};
use oxllama_memory::{Bytes, DeviceId, Ledger, Purpose, Reservation};

#[path = "../tests/support/mod.rs"]
mod support;

use support::{Random, Tensors, exl2, half};

fn main() {
    divan::main();
}

const IN_FEATURES: usize = 2048;
const OUT_FEATURES: usize = 8192;

/// A matrix with rows to multiply.
struct Product {
    device: CpuDevice,
    linear: CpuLinear,
    x: HostBuffer,
    out: HostBuffer,
    workspace: CpuWorkspace,
    rows: usize,
    weight_bytes: u64,
}

impl Product {
    fn new(tensors: &Tensors, rows: usize) -> Self {
        let id = DeviceId::cpu(0);
        let device = CpuDevice::new(id.clone(), CpuOptions::default()).expect("threads start");
        let ledger = Ledger::for_device(id, Bytes::from_gib(1));
        let reserve = |bytes: Bytes| -> Reservation {
            let held = ledger.reserve(device.id(), "bench", Purpose::Workspace, bytes);
            held.expect("the ledger has room")
        };
        let source = LinearSource::load(tensors, "x", &GptqConfig::default(), 1.0).expect("valid");
        let bytes = device.linear_bytes(&source.header());
        let linear = device.load_linear(&source, reserve(bytes)).expect("loads");
        let floats = |elements: usize| {
            let held = reserve(Bytes::from_usize(elements * 4));
            device.allocate(held).expect("memory")
        };
        let mut x = floats(rows * IN_FEATURES);
        let values = Random(3).floats(rows * IN_FEATURES);
        let bytes_of_x = bytemuck::cast_slice(&values);
        device.upload(bytes_of_x, &mut x).expect("upload");
        let out = floats(rows * OUT_FEATURES);
        let shape = WorkspaceShape {
            rows,
            sequences: 1,
            pages_per_sequence: rows.div_ceil(256),
            max_in_features: IN_FEATURES,
            max_out_features: OUT_FEATURES,
            draw_width: 0,
            heads: 1,
            kv_heads: 1,
            head_dim: 16,
            rotary_dim: 0,
            ropes: 0,
        };
        let held = reserve(device.workspace_bytes(&shape));
        let mut workspace = device.create_workspace(&shape, held).expect("a workspace");
        let pages: Vec<u32> = (0..rows.div_ceil(256) as u32).collect();
        let batch = StepBatch {
            token_ids: &vec![0; rows],
            positions: &(0..rows as u32).collect::<Vec<_>>(),
            row_sequences: &vec![0; rows],
            page_tables: &pages,
            pages_per_sequence: pages.len(),
            logit_rows: &[],
            draws: &[],
            changes: &[],
        };
        let begun = device.begin_step(&batch, &[], &mut workspace);
        begun.expect("the step fits");
        Self {
            device,
            linear,
            x,
            out,
            workspace,
            rows,
            weight_bytes: bytes.get(),
        }
    }

    fn run(&mut self) {
        let output = LinearOutput {
            weights: &self.linear,
            out: &mut self.out,
        };
        let store = Store::Overwrite;
        let done = self
            .device
            .linear(&self.x, output, store, self.rows, &mut self.workspace);
        done.expect("the product is computed");
    }
}

fn time(bencher: Bencher<'_, '_>, product: Product) {
    let weight_bytes = product.weight_bytes;
    let products = product.rows * IN_FEATURES * OUT_FEATURES;
    let product = Mutex::new(product);
    bencher
        .counter(BytesCount::new(weight_bytes))
        .counter(ItemsCount::new(products))
        .bench(|| product.lock().expect("no panic").run());
}

/// One row: bound by reading the weights.
#[divan::bench(args = [2, 3, 4, 5, 6, 8])]
fn one_row_exl2(bencher: Bencher<'_, '_>, bits: u32) {
    let tensors = exl2(
        "x",
        OUT_FEATURES,
        &[(bits, IN_FEATURES)],
        128,
        &mut Random(1),
    );
    time(bencher, Product::new(&tensors, 1));
}

/// One row of an unquantised matrix.
#[divan::bench]
fn one_row_f16(bencher: Bencher<'_, '_>) {
    let tensors = half("x", OUT_FEATURES, IN_FEATURES, &mut Random(1));
    time(bencher, Product::new(&tensors, 1));
}

/// Many rows at 4 bits: items are multiply-adds.
#[divan::bench(args = [4, 32, 256])]
fn many_rows_exl2(bencher: Bencher<'_, '_>, rows: usize) {
    let tensors = exl2("x", OUT_FEATURES, &[(4, IN_FEATURES)], 128, &mut Random(1));
    time(bencher, Product::new(&tensors, rows));
}

/// Many rows of an unquantised matrix.
#[divan::bench]
fn many_rows_f16(bencher: Bencher<'_, '_>) {
    let tensors = half("x", OUT_FEATURES, IN_FEATURES, &mut Random(1));
    time(bencher, Product::new(&tensors, 128));
}

/// An empty region, and one with a barrier in it.
#[divan::bench(args = [false, true])]
fn region(bencher: Bencher<'_, '_>, with_barrier: bool) {
    let pool = SpinPool::new(SpinPool::default_threads()).expect("threads start");
    bencher.bench(|| {
        pool.run(&|team| {
            if with_barrier {
                team.barrier();
            }
        });
    });
}
