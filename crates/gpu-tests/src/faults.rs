//! What goes wrong, on purpose: each fault is a typed error, the books stay true, and other
//! models are unharmed as far as the driver lets them be.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use oxllama_backend::{DeviceError, DeviceMemory};
use oxllama_cuda::CudaDevice;
use oxllama_format::{FormatError, ModelSource, SyntheticShape, write_model};
use oxllama_memory::{Bytes, DeviceInfo, Inventory, Ledger, Purpose};
use oxllama_model::{Decoder, ModelError, ModelRequest};
use serde_json::Value;

use crate::checks::Checks;
use crate::models::{feed, load, request};

/// The option that makes this program break its device and look at what is left.
pub(crate) const INJECT_FAULT: &str = "--inject-fault";

/// Memory that is left when another process has taken the rest.
const LEFT: Bytes = Bytes::from_mib(512);

/// Tokens of a cache that takes more than what is left: 256 bytes a token in the tiny model.
const LARGE_CACHE_TOKENS: u64 = 4 << 20;

type Books = (Inventory, Ledger);

pub(crate) fn run(checks: &mut Checks<'_>, folder: &Path) -> Result<()> {
    let path = folder.join("llama3");
    let (device, books) = (checks.device, checks.books()?);
    checks.check("fault: memory is taken between plan and load", || {
        beside_a_neighbour(&path, device, &books, |books| {
            memory_is_taken(&path, device, books)
        })
    });
    checks.check("fault: a weight is damaged", || {
        beside_a_neighbour(&path, device, &books, |books| {
            weight_is_damaged(device, books)
        })
    });
    checks.check("fault: a kernel fails", || kernel_fails(folder));
    Ok(())
}

/// Makes a fault while another model is loaded: the books and the device's memory are afterwards
/// as they were before, and the other model's numbers are the same.
fn beside_a_neighbour(
    path: &Path,
    device: &CudaDevice,
    books: &Books,
    fault: impl Fn(&Books) -> Result<String>,
) -> Result<String> {
    let mut neighbour = load(path, &request(256, 1), device, books)?;
    let expected = feed(&mut neighbour, &[1, 2, 3], 0, 0)?;
    // The first time, the driver takes memory for itself.
    fault(books)?;
    let used = |books: &Books| books.1.usage(&device.info().id).map(|usage| usage.used);
    let before = (used(books), device.free_memory()?);
    let words = fault(books)?;
    let after = (used(books), device.free_memory()?);
    ensure!(
        before == after,
        "booked and free memory: {before:?}, then {after:?}"
    );
    let found = feed(&mut neighbour, &[1, 2, 3], 0, 0)?;
    ensure!(found == expected, "the other model's numbers changed");
    Ok(words)
}

/// Loads with a plan that counts on memory which is gone when it is carried out.
fn memory_is_taken(path: &Path, device: &CudaDevice, books: &Books) -> Result<String> {
    let large = ModelRequest {
        cache_tokens: Some(LARGE_CACHE_TOKENS),
        ..request(256, 1)
    };
    // Books of another process: ours do not know of what it takes.
    let free = device.free_memory()?;
    let info = device.info();
    let theirs = DeviceInfo::new(info.id.clone(), info.name.clone(), free);
    let theirs = Ledger::new(&Inventory::new(vec![theirs])?);
    let taken = free.saturating_sub(LEFT);
    let taken = theirs.reserve(&info.id, "another process", Purpose::Workspace, taken)?;
    let taken = device.allocate(taken)?;
    let words = match load(path, &large, device, books) {
        Ok(_) => bail!("more was loaded than there is"),
        Err(error) => match device_error(&error) {
            Some(DeviceError::OutOfMemory { state, .. })
                if state.free.is_some_and(|free| free <= LEFT) =>
            {
                error.to_string()
            }
            _ => return Err(error.context("expected that the device is out of memory")),
        },
    };
    drop(taken);
    let mut model = load(path, &large, device, books).context("the memory is free again")?;
    feed(&mut model, &[1, 2, 3], 0, 0)?;
    Ok(words)
}

/// Loads a model whose last linear's row order is no permutation.
fn weight_is_damaged(device: &CudaDevice, books: &Books) -> Result<String> {
    let shape = SyntheticShape {
        name: "damaged".to_owned(),
        hidden_size: 256,
        intermediate_size: 512,
        layers: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab_size: 320,
        rope_theta: 1e4,
        bits_per_weight: 4.0,
        seed: 1,
    };
    let folder = Folder::new("damaged")?;
    let path = folder.0.join("model");
    write_model(&ModelSource::synthetic(&shape)?, &path, &mut |_, _| {})?;
    damage(
        &path.join("model.safetensors"),
        "model.layers.3.mlp.down_proj.q_invperm",
    )?;
    let loaded: Result<Decoder<CudaDevice>> = load(&path, &request(256, 1), device, books);
    match loaded {
        Ok(_) => bail!("a damaged model was loaded"),
        Err(error) => match error.downcast_ref::<ModelError>() {
            Some(ModelError::Format(format))
                if matches!(**format, FormatError::InvalidTensor { .. }) =>
            {
                Ok("refused, and nothing is left of it".to_owned())
            }
            _ => Err(error.context("expected a tensor that is refused")),
        },
    }
}

/// Overwrites a tensor of a safetensors file with ones.
fn damage(file: &Path, tensor: &str) -> Result<()> {
    let mut bytes = fs::read(file)?;
    let (length, rest) = bytes.split_first_chunk().context("no header")?;
    let header_bytes = usize::try_from(u64::from_le_bytes(*length))?;
    let header: Value = serde_json::from_slice(&rest[..header_bytes])?;
    let place = |index: usize| -> Result<usize> {
        let offset = header[tensor]["data_offsets"][index].as_u64();
        Ok(size_of::<u64>() + header_bytes + usize::try_from(offset.context("no such tensor")?)?)
    };
    let (start, end) = (place(0)?, place(1)?);
    bytes[start..end].fill(1);
    Ok(fs::write(file, bytes)?)
}

/// A folder of this process that goes with the value.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let name = format!("oxllama-gpu-tests-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left lies where temporary files are cleared away.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The fault costs the whole process its device, so another one makes it.
fn kernel_fails(fixtures: &Path) -> Result<String> {
    let program = std::env::current_exe()?;
    let output = Command::new(program)
        .arg(fixtures)
        .arg(INJECT_FAULT)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().last().unwrap_or_default();
    ensure!(
        output.status.success(),
        "ended with {}: {last} {}",
        output.status,
        errors.trim_end()
    );
    Ok(last.to_owned())
}

/// What [`INJECT_FAULT`] does: breaks the device under a loaded model. Returns what was said.
pub(crate) fn inject(device: &CudaDevice, books: &Books, folder: &Path) -> Result<String> {
    let path = folder.join("llama3");
    let mut model = load(&path, &request(256, 1), device, books)?;
    feed(&mut model, &[1, 2, 3], 0, 0)?;
    let is_lost = |error: &DeviceError| matches!(error, DeviceError::Lost { .. });
    match device.inject_fault() {
        Err(error) if is_lost(&error) => {}
        other => bail!("the kernel that fails gave {other:?}"),
    }
    ensure!(device.is_lost(), "the device is not marked as lost");
    expect_lost("a step", feed(&mut model, &[4], 3, 0).map(|_| ()))?;
    expect_lost("a second step", feed(&mut model, &[4], 3, 0).map(|_| ()))?;
    expect_lost(
        "a load",
        load(&path, &request(256, 1), device, books).map(|_| ()),
    )?;
    drop(model);
    let used = books.1.usage(&device.info().id).map(|usage| usage.used);
    ensure!(used == Some(Bytes::ZERO), "the books hold {used:?}");
    Ok("the device is said to be lost, and the books are empty".to_owned())
}

fn expect_lost(what: &str, result: Result<()>) -> Result<()> {
    match result {
        Ok(()) => bail!("{what} worked on a lost device"),
        Err(error) => match device_error(&error) {
            Some(DeviceError::Lost { .. }) => Ok(()),
            _ => Err(error.context(format!("{what}: expected that the device is lost"))),
        },
    }
}

/// What the device said, where it is the device that failed.
fn device_error(error: &anyhow::Error) -> Option<&DeviceError> {
    match error.downcast_ref::<ModelError>() {
        Some(ModelError::Device(device)) => Some(device),
        _ => None,
    }
}
