//! The conformance suite: what every backend must give, whatever it computes it with.
//!
//! Each case draws weights and activations from its name, runs one operation on the device
//! and compares with an oracle in f64 that follows the operation's formula; the scalar
//! [`crate::reference`] is one more backend under test. Row independence is compared bit
//! for bit: a row alone, among others, and in prompts cut in different ways.
//!
//! ```no_run
//! use oxllama_backend::conformance::{self, Tolerances};
//! use oxllama_backend::reference::ReferenceDevice;
//! use oxllama_memory::{Bytes, DeviceId, Ledger};
//!
//! let id = DeviceId::cpu(0);
//! let ledger = Ledger::for_device(id.clone(), Bytes::from_mib(256));
//! let device = ReferenceDevice::new(id);
//! let summary = conformance::run(&device, &ledger, &Tolerances::REFERENCE, &mut |_| ())?;
//! assert!(summary.failures.is_empty(), "{:#?}", summary.failures);
//! # Ok::<(), conformance::ConformanceError>(())
//! ```

mod attention;
mod draws;
mod elementwise;
mod kept;
mod linear;
mod linear_cases;
mod long_attention;
mod mlp;
mod oracle;
mod random;
mod weights;

use oxllama_format::{FormatError, GptqConfig, LinearSource};
use oxllama_memory::{Bytes, CacheFormat, Ledger, Purpose, Reservation, Shortfall};

use crate::{Device, DeviceError, PAGE_TOKENS, StepBatch, WorkspaceShape};
use weights::{LINEAR_NAME, RandomLinear, Stored};

/// How far a backend's results may lie from the oracle's: in each row, the largest absolute
/// difference divided by the row's largest expected magnitude.
///
/// A fused operation may add the tolerances of its parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerances {
    /// Products with EXL2 weights.
    pub exl2_linear: f64,
    /// Products with GPTQ weights.
    pub gptq_linear: f64,
    /// Products with plain weights; the embedding.
    pub float_linear: f64,
    /// Normalisations.
    pub norm: f64,
    /// Gates, sums, logits.
    pub elementwise: f64,
    /// Attention over a cache of f32.
    pub attention_f32: f64,
    /// Attention over a cache of fp16: the last bit of a key may round either way.
    pub attention_f16: f64,
    /// Attention over a quantised cache. What the device has stored is held to the definition
    /// by itself, and then taken as it is.
    pub attention_quantised: f64,
}

impl Tolerances {
    /// Those of the scalar reference: a few units in the last place of f32 sums.
    pub const REFERENCE: Self = Self {
        exl2_linear: 1e-5,
        gptq_linear: 1e-5,
        float_linear: 1e-5,
        norm: 1e-6,
        elementwise: 1e-6,
        attention_f32: 1e-5,
        attention_f16: 5e-4,
        attention_quantised: 1e-5,
    };

    fn attention(&self, format: CacheFormat) -> f64 {
        match format {
            CacheFormat::F32 => self.attention_f32,
            CacheFormat::F16 => self.attention_f16,
            CacheFormat::Q8 | CacheFormat::Q6 | CacheFormat::Q4 => self.attention_quantised,
        }
    }

    fn linear(&self, stored: &Stored) -> f64 {
        match stored {
            Stored::Exl2 { .. } => self.exl2_linear,
            Stored::Gptq { .. } => self.gptq_linear,
            Stored::Float { .. } => self.float_linear,
        }
    }
}

/// The result of one case.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseReport {
    /// Operation, weights and shape, in words; unique in the suite.
    pub name: String,
    /// As [`Tolerances`] measures it. In cases of bit equality: how many numbers differ.
    pub error: f64,
    /// The largest error that passes.
    pub tolerance: f64,
}

impl CaseReport {
    /// Whether the error is within the tolerance.
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// The results of all cases.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Summary {
    /// How many cases ran.
    pub cases: usize,
    /// Those that did not pass.
    pub failures: Vec<CaseReport>,
}

/// A case could not be run to its end.
#[derive(Debug, thiserror::Error)]
#[error("conformance case `{case}`: {source}")]
pub struct ConformanceError {
    /// The case's name.
    pub case: String,
    /// What stopped it.
    pub source: Box<CaseError>,
}

/// What stops a case.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// The device refused an operation.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The ledger has too little for the case; no case needs more than 64 MiB.
    #[error(transparent)]
    Shortfall(#[from] Shortfall),
    /// The weights that the suite made were refused.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// Runs every case on `device`, whose memory is booked in `ledger`, and hands each result to
/// `reporter` as it is known.
///
/// # Errors
/// A case could not run to its end. Wrong results are no errors but [`Summary::failures`].
pub fn run<D: Device>(
    device: &D,
    ledger: &Ledger,
    tolerances: &Tolerances,
    reporter: &mut dyn FnMut(&CaseReport),
) -> Result<Summary, ConformanceError> {
    run_selected(device, ledger, tolerances, &mut |_| true, reporter)
}

/// As [`run`], for the cases whose names `is_selected` takes. It is asked once for each case of
/// the suite, in the suite's order.
///
/// # Errors
/// As [`run`].
pub fn run_selected<D: Device>(
    device: &D,
    ledger: &Ledger,
    tolerances: &Tolerances,
    is_selected: &mut dyn FnMut(&str) -> bool,
    reporter: &mut dyn FnMut(&CaseReport),
) -> Result<Summary, ConformanceError> {
    let held = |ledger: &Ledger| ledger.usage(device.id()).map(|usage| usage.used.get());
    let before = held(ledger);
    let mut suite = Suite {
        bench: Bench { device, ledger },
        tolerances: *tolerances,
        is_selected,
        reporter,
        summary: Summary::default(),
    };
    elementwise::run(&mut suite)?;
    linear::run(&mut suite)?;
    mlp::run(&mut suite)?;
    attention::run(&mut suite)?;
    long_attention::run(&mut suite)?;
    draws::run(&mut suite)?;
    suite.case("memory: every byte is given back".to_owned(), 0.0, |_| {
        Ok(if held(ledger) == before { 0.0 } else { 1.0 })
    })?;
    Ok(suite.summary)
}

/// A run of the suite.
struct Suite<'a, D> {
    bench: Bench<'a, D>,
    tolerances: Tolerances,
    is_selected: &'a mut dyn FnMut(&str) -> bool,
    reporter: &'a mut dyn FnMut(&CaseReport),
    summary: Summary,
}

impl<D: Device> Suite<'_, D> {
    /// Runs one case, if it is selected; `measure` returns its error.
    fn case(
        &mut self,
        name: String,
        tolerance: f64,
        measure: impl FnOnce(&Bench<'_, D>) -> Result<f64, CaseError>,
    ) -> Result<(), ConformanceError> {
        if !(self.is_selected)(&name) {
            return Ok(());
        }
        let error = match measure(&self.bench) {
            Ok(error) => error,
            Err(source) => {
                return Err(ConformanceError {
                    case: name,
                    source: Box::new(source),
                });
            }
        };
        let report = CaseReport {
            name,
            error,
            tolerance,
        };
        (self.reporter)(&report);
        self.summary.cases += 1;
        if !report.passed() {
            self.summary.failures.push(report);
        }
        Ok(())
    }
}

/// A device, and how cases put data on it.
struct Bench<'a, D> {
    device: &'a D,
    ledger: &'a Ledger,
}

/// Elements by which every buffer is longer than what is used of it.
const SLACK: usize = 5;

impl<D: Device> Bench<'_, D> {
    fn reserve(&self, bytes: Bytes) -> Result<Reservation, CaseError> {
        let purpose = Purpose::Workspace;
        Ok(self
            .ledger
            .reserve(self.device.id(), "conformance", purpose, bytes)?)
    }

    /// A buffer that starts with `values`; what follows is not a number.
    fn upload(&self, values: &[f32]) -> Result<D::Buffer, CaseError> {
        let mut padded = values.to_vec();
        padded.extend([f32::NAN; SLACK]);
        self.upload_bytes(bytemuck::cast_slice(&padded))
    }

    fn upload_bytes(&self, bytes: &[u8]) -> Result<D::Buffer, CaseError> {
        let reservation = self.reserve(Bytes::from_usize(bytes.len()))?;
        let mut buffer = self.device.allocate(reservation)?;
        self.device.upload(bytes, &mut buffer)?;
        Ok(buffer)
    }

    /// A buffer for `elements` results: not numbers, so that an operation that reads what it
    /// should overwrite, or leaves some of it, is found out.
    fn output(&self, elements: usize) -> Result<D::Buffer, CaseError> {
        self.upload(&vec![f32::NAN; elements])
    }

    fn read(&self, buffer: &D::Buffer, elements: usize) -> Result<Vec<f32>, CaseError> {
        let mut values = vec![0.0_f32; elements];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        self.device.download(buffer, bytes)?;
        Ok(values)
    }

    /// Loads a linear as the model would: by its header, into exactly what that takes.
    fn load(&self, linear: &RandomLinear) -> Result<D::Linear, CaseError> {
        let gptq = GptqConfig::default();
        let source = LinearSource::load(&linear.tensors, LINEAR_NAME, &gptq, 1.0)?;
        let bytes = self.device.linear_bytes(&source.header());
        Ok(self.device.load_linear(&source, self.reserve(bytes)?)?)
    }

    fn workspace(&self, shape: &WorkspaceShape) -> Result<D::Workspace, CaseError> {
        let reservation = self.reserve(self.device.workspace_bytes(shape))?;
        Ok(self.device.create_workspace(shape, reservation)?)
    }

    /// A workspace in which a step of one sequence has begun whose tokens are `token_ids`;
    /// linears may be up to `widest` on either side.
    fn begin(&self, token_ids: &[u32], widest: usize) -> Result<D::Workspace, CaseError> {
        let rows = token_ids.len();
        let pages = rows.div_ceil(PAGE_TOKENS);
        let mut workspace = self.workspace(&WorkspaceShape {
            rows,
            sequences: 1,
            pages_per_sequence: pages,
            max_in_features: widest,
            max_out_features: widest,
            draw_width: 0,
            heads: 1,
            kv_heads: 1,
            head_dim: 32,
            rotary_dim: 0,
            ropes: 0,
        })?;
        let positions: Vec<u32> = (0..rows as u32).collect();
        let page_table: Vec<u32> = (0..pages as u32).collect();
        let batch = StepBatch {
            token_ids,
            positions: &positions,
            row_sequences: &vec![0; rows],
            page_tables: &page_table,
            pages_per_sequence: pages,
            logit_rows: &[],
            draws: &[],
            changes: &[],
        };
        self.device.begin_step(&batch, &[], &mut workspace)?;
        Ok(workspace)
    }

    /// As [`Self::begin`], for operations to which the tokens do not matter.
    fn begin_rows(&self, rows: usize, widest: usize) -> Result<D::Workspace, CaseError> {
        self.begin(&vec![0; rows], widest)
    }
}

/// How many numbers are not the same bit for bit.
fn differing_bits(found: &[f32], expected: &[f32]) -> f64 {
    let pairs = found.iter().zip(expected);
    let differing = pairs.filter(|(found, expected)| found.to_bits() != expected.to_bits());
    (differing.count() + found.len().abs_diff(expected.len())) as f64
}
