//! What every example does first: plan a model, load it on the CPU, and start an engine.

use std::error::Error;
use std::path::{Path, PathBuf};

use oxllama_cpu::{CpuDevice, CpuOptions};
use oxllama_engine::{Engine, EngineParts, EngineSettings};
use oxllama_format::{HostMemory, ModelSource};
use oxllama_memory::{Bytes, DeviceId, DeviceInfo, Inventory, Ledger};
use oxllama_model::{
    Decoder, LoadOptions, ModelRequest, ModelSpec, PairedModel, Runner, diagnose_draft, plan_model,
};
use oxllama_text::Tokenizer;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The path that the command line has at `place`, counted from 1.
pub(crate) fn path_argument(place: usize, what: &str) -> Result<PathBuf> {
    match std::env::args_os().nth(place) {
        Some(path) => Ok(path.into()),
        None => Err(format!("argument {place} is missing: expected {what}").into()),
    }
}

/// An engine over the model in `directory`, with a smaller one to guess ahead if one is given.
pub(crate) fn engine(directory: &Path, draft: Option<&Path>) -> Result<Engine> {
    let memory = HostMemory::read()?;
    let mut cpu = DeviceInfo::new(DeviceId::cpu(0), "CPU", Bytes(memory.total_bytes));
    cpu.available = Bytes(memory.available_bytes);
    let ledger = Ledger::new(&Inventory::new(vec![cpu])?);

    let target = Opened::new(directory)?;
    let draft = match draft.map(Opened::new).transpose()? {
        None => None,
        Some(draft) => {
            for warning in diagnose_draft(target.paired(), draft.paired())? {
                println!("note: {warning}");
            }
            Some(draft.load(&ledger)?)
        }
    };
    let parts = EngineParts {
        runner: target.load(&ledger)?,
        draft,
        tokenizer: target.tokenizer,
    };
    Ok(Engine::start(parts, EngineSettings::default())?)
}

struct Opened {
    source: ModelSource,
    spec: ModelSpec,
    tokenizer: Tokenizer,
}

impl Opened {
    fn new(directory: &Path) -> Result<Self> {
        let source = ModelSource::open(directory)?;
        let spec = ModelSpec::from_config(source.config())?;
        let tokenizer = Tokenizer::new(
            &source.tokenizer_json()?,
            source.tokenizer_config(),
            source.config(),
            source.generation_config(),
        )?;
        Ok(Self {
            source,
            spec,
            tokenizer,
        })
    }

    fn paired(&self) -> PairedModel<'_> {
        PairedModel {
            source: &self.source,
            spec: &self.spec,
            tokenizer: &self.tokenizer,
        }
    }

    /// Plans for eight jobs that share a cache of 8,192 tokens, and loads.
    fn load(&self, ledger: &Ledger) -> Result<Box<dyn Runner>> {
        let device = CpuDevice::new(DeviceId::cpu(0), CpuOptions::default())?;
        let request = ModelRequest {
            cache_tokens: Some(8192),
            batch: 8,
            // Guesses are judged all in one step: five rows of logits a job.
            logit_rows: 40,
            ..ModelRequest::default()
        };
        let inventory = ledger.inventory();
        let plan = plan_model(&self.source, &self.spec, &device, &inventory, &request)?;
        let options = LoadOptions::new(ledger);
        let decoder = Decoder::load(
            &self.source,
            self.spec.clone(),
            vec![device],
            &plan,
            &options,
        )?;
        Ok(Box::new(decoder))
    }
}
