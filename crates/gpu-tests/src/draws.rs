//! Tokens drawn on the device, in recorded steps and at the size of real vocabularies.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use oxllama_backend::reference::draw;
use oxllama_backend::{
    Device, DeviceMemory, Draw, ElementwiseOps, LogitArgs, LogitChange, StepBatch, StepOps,
    WorkspaceShape,
};
use oxllama_cuda::CudaDevice;
use oxllama_memory::{Bytes, Inventory, Ledger, Purpose};
use oxllama_model::{Runner, StepPlan};

use crate::checks::Checks;
use crate::models::{load, request};

/// Sequences that decode together.
const SEQUENCES: u32 = 16;

/// Steps of them: the first of each kind runs as it is, the second is recorded, the others are
/// replayed.
const STEPS: usize = 24;

/// Draws that are timed together.
const TIMED_DRAWS: usize = 32;

pub(crate) fn run(checks: &mut Checks<'_>, folder: &Path) -> Result<()> {
    let path = folder.join("llama2");
    let (device, books) = (checks.device, checks.books()?);
    checks.check("draws in recorded steps follow the definition", || {
        in_recorded_steps(&path, device, &books)
    });
    for width in [32_000, 128_256] {
        let (_, ledger) = checks.books()?;
        checks.check(&format!("time of 32 draws from {width} logits"), || {
            timed(width, device, &ledger)
        });
    }
    Ok(())
}

/// A draw for a row of a step, different in each.
fn settings(vocab_size: u32, step: usize, row: usize) -> Draw {
    let greedy = Draw {
        repetition_penalty: 1.3,
        first_change: row as u32,
        change_count: 1,
        ..Draw::greedy(vocab_size)
    };
    // Every third step is greedy throughout.
    if step.is_multiple_of(3) || row % 3 == 1 {
        return greedy;
    }
    Draw {
        random: ((step * 31 + row * 17) % 101) as f64 / 101.0,
        cut_scale: 0.9,
        draw_scale: 0.9,
        top_k: [0, 40, 0][step % 3],
        top_p: [1.0, 0.9, 0.95][row % 3],
        ..greedy
    }
}

/// Runs each step without draws, then with draws from some or all rows.
fn in_recorded_steps<D: Device + Clone>(
    path: &Path,
    device: &D,
    books: &(Inventory, Ledger),
) -> Result<String> {
    let mut model = load(path, &request(256, u64::from(SEQUENCES)), device, books)?;
    let vocab_size = model.spec().vocab_size;
    let rows = SEQUENCES as usize;
    let mut tokens: Vec<u32> = (1..=SEQUENCES).collect();
    let mut plan = StepPlan::default();
    let mut draws = 0;
    for step in 0..STEPS {
        plan.clear();
        plan.pages_per_sequence = 1;
        for (sequence, &token) in (0..).zip(&tokens) {
            plan.push_sequence([token], step, [sequence], 1);
        }
        let logits = model.run(&plan)?.logits.to_vec();
        let kept = [0, 3, 7][step % 4 % 3];
        plan.changes.extend((0..rows as u32).map(|row| LogitChange {
            token_id: (row + step as u32) % 90,
            strongest: 1.0,
            total: 1.0,
            bias: 0.5,
        }));
        for row in kept..rows {
            plan.draws.push(settings(vocab_size as u32, step, row));
        }
        let output = model.run(&plan)?;
        ensure!(
            output.logits == &logits[..kept * vocab_size],
            "the logits of other rows differ in step {step}"
        );
        for (row, &found) in (kept..).zip(output.drawn) {
            let logits = &logits[row * vocab_size..][..vocab_size];
            let settings = settings(vocab_size as u32, step, row);
            let expected = draw(logits, &settings, &plan.changes[row..=row]);
            ensure!(
                found == expected,
                "step {step}, row {row}: {found} instead of {expected}: {settings:?}"
            );
            tokens[row] = found;
            draws += 1;
        }
    }
    Ok(format!("{draws} draws"))
}

/// Microseconds of a step's draws, greedy and with top-k and top-p, launches included.
fn timed(width: usize, device: &CudaDevice, ledger: &Ledger) -> Result<String> {
    const REPEATS: u32 = 100;
    let reserve = |bytes| ledger.reserve(device.id(), "draws", Purpose::Workspace, bytes);
    let logits: Vec<f32> = (0..TIMED_DRAWS * width)
        .map(|index| {
            let bits = (index as u32).wrapping_mul(2_654_435_761) >> 8;
            // Rather peaked, as a model's: the best stands 16 above the middle.
            16.0 * (bits as f32 / (1 << 24) as f32).powi(9)
        })
        .collect();
    let bytes: &[u8] = bytemuck::cast_slice(&logits);
    let mut logits = device.allocate(reserve(Bytes::from_usize(bytes.len()))?)?;
    device.upload(bytes, &mut logits)?;
    let shape = WorkspaceShape {
        rows: TIMED_DRAWS,
        sequences: TIMED_DRAWS,
        pages_per_sequence: 1,
        max_in_features: 32,
        max_out_features: width,
        draw_width: width,
        heads: 1,
        kv_heads: 1,
        head_dim: 32,
        rotary_dim: 0,
        ropes: 0,
    };
    let mut workspace =
        device.create_workspace(&shape, reserve(device.workspace_bytes(&shape))?)?;
    let indices: Vec<u32> = (0..TIMED_DRAWS as u32).collect();
    let args = LogitArgs {
        rows: TIMED_DRAWS,
        width,
        vocab_size: width,
        scale: 1.0,
        softcap: None,
    };
    let greedy = Draw::greedy(width as u32);
    let random = Draw {
        random: 0.6,
        cut_scale: 1.0,
        draw_scale: 1.0,
        top_k: 50,
        top_p: 0.9,
        ..greedy
    };
    let share = Draw { top_k: 0, ..random };
    let mut times = Vec::new();
    for settings in [greedy, random, share] {
        let batch = StepBatch {
            token_ids: &[0; TIMED_DRAWS],
            positions: &[0; TIMED_DRAWS],
            row_sequences: &indices,
            page_tables: &indices,
            pages_per_sequence: 1,
            logit_rows: &indices,
            draws: &[settings; TIMED_DRAWS],
            changes: &[],
        };
        device.begin_step(&batch, &[], &mut workspace)?;
        device.draw_tokens(&mut logits, args, &mut workspace)?;
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..REPEATS {
            device.draw_tokens(&mut logits, args, &mut workspace)?;
        }
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(REPEATS));
    }
    Ok(format!(
        "greedy {:.1} us, top-k and top-p {:.1} us, top-p {:.1} us",
        times[0], times[1], times[2]
    ))
}
