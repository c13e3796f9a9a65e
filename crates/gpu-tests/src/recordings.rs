//! What recorded steps take of the device's memory.

use anyhow::{Context, Result, ensure};
use oxllama_cuda::CudaDevice;
use oxllama_format::{ModelSource, SyntheticShape};
use oxllama_memory::{Bytes, Inventory, Ledger};
use oxllama_model::{Decoder, LoadOptions, ModelRequest, ModelSpec, Runner, StepPlan, plan_model};

use crate::checks::Checks;

/// Layers of the model: as many as models of 13 billion parameters have.
const LAYERS: usize = 40;

/// Sequences that decode together, up to so many.
const SEQUENCES: u32 = 40;

/// What the driver takes at once: counted bytes may be by so much too few.
const PIECE: Bytes = Bytes::from_mib(2);

pub(crate) fn run(checks: &mut Checks<'_>) -> Result<()> {
    let (device, books) = (checks.device, checks.books()?);
    checks.check("recorded steps keep within their room", || {
        keep_within_room(device, &books)
    });
    Ok(())
}

/// Records decode steps of more numbers of rows than there is room for.
fn keep_within_room(
    device: &CudaDevice,
    (inventory, ledger): &(Inventory, Ledger),
) -> Result<String> {
    let shape = SyntheticShape {
        name: "deep".to_owned(),
        hidden_size: 64,
        intermediate_size: 96,
        layers: LAYERS,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        vocab_size: 288,
        rope_theta: 1e4,
        bits_per_weight: 3.5,
        seed: 1,
    };
    let source = ModelSource::synthetic(&shape)?;
    let spec = ModelSpec::from_config(source.config())?;
    let request = ModelRequest {
        context_tokens: Some(256),
        batch: u64::from(SEQUENCES),
        chunk_tokens: 64,
        logit_rows: u64::from(SEQUENCES),
        ..ModelRequest::default()
    };
    let plan = plan_model(&source, &spec, device, inventory, &request)?;
    let room = plan.memory.totals.recordings;
    let options = LoadOptions::new(ledger);
    let mut model = Decoder::load(&source, spec, vec![device.clone()], &plan, &options)?;
    let mut decode_all = || -> Result<()> {
        for rows in 1..=SEQUENCES {
            // The first runs as it is, the second is recorded, the third replayed.
            for position in 0..3 {
                let mut step = StepPlan {
                    pages_per_sequence: 1,
                    ..StepPlan::default()
                };
                for sequence in 0..rows {
                    step.push_sequence([sequence], position, [sequence], 1);
                }
                model.run(&step)?;
            }
        }
        Ok(())
    };
    let was_recorded = device.record_steps(false);
    let launched = decode_all();
    let before = device.free_memory()?;
    device.record_steps(true);
    let replayed = launched.and_then(|()| decode_all());
    device.record_steps(was_recorded);
    replayed?;
    let recorded = device.recorded_steps();
    let taken = before.saturating_sub(device.free_memory()?);
    let counted = Bytes::from_usize(recorded.launches * device.node_bytes());
    let launches = u64::try_from(recorded.launches)?;
    let each = taken.get().checked_div(launches);
    let each = each.context("nothing was recorded")?;
    ensure!(
        counted <= room,
        "{recorded:?} count {counted}, more than their room of {room}"
    );
    let measured = format!(
        "{} recordings of {launches} launches take {taken}, {each} bytes a launch; planned {}, \
         room {room}",
        recorded.recordings,
        device.node_bytes()
    );
    ensure!(
        taken <= counted.saturating_add(PIECE),
        "{measured}: counted too few"
    );
    Ok(measured)
}
