//! The suite that every backend is held to.

use std::collections::HashSet;
use std::time::Instant;

use anyhow::{Result, bail};
use oxllama_backend::DeviceError;
use oxllama_backend::conformance::{self, CaseError, CaseReport, Tolerances};

use crate::checks::{Checks, print};

/// How far CUDA's results may lie from the oracle's.
///
/// Linears take activations that are rounded to fp16 (half a unit: 4.9e-4 of each term), and in
/// quantised ones the oracle rounds every weight to fp16 besides (2.4e-4), which the kernels do
/// not. Attention multiplies queries, keys, values and weights as fp16, and where scores are
/// large, a rounding of 5e-4 of a score of 16 changes a weight by 1%; over f32 pages it computes
/// in f32. Everything else is f32 in another order of sums than the oracle's, with the device's
/// own functions.
const TOLERANCES: Tolerances = Tolerances {
    exl2_linear: 2e-3,
    gptq_linear: 2e-3,
    float_linear: 2e-3,
    norm: 4e-6,
    elementwise: 4e-6,
    attention_f32: 1e-4,
    attention_f16: 1e-2,
    attention_quantised: 1e-2,
};

pub(crate) fn run(checks: &mut Checks<'_>) -> Result<()> {
    if !checks.wants("conformance") {
        return Ok(());
    }
    let start = Instant::now();
    let (_, ledger) = checks.books()?;
    let mut asked = HashSet::new();
    let mut reports: Vec<CaseReport> = Vec::new();
    loop {
        // Begins anew after a case that stopped, with what was not asked for before.
        let mut select = |name: &str| asked.insert(name.to_owned());
        let mut report = |case: &CaseReport| reports.push(case.clone());
        let (device, tolerances) = (checks.device, &TOLERANCES);
        let run = conformance::run_selected(device, &ledger, tolerances, &mut select, &mut report);
        let Err(error) = run else { break };
        checks.note("conformance", start, Err(error.to_string()));
        if matches!(&*error.source, CaseError::Device(DeviceError::Lost { .. })) {
            bail!("{error}; no other check can run");
        }
    }
    let mut by_share = reports.clone();
    by_share.retain(|case| case.tolerance > 0.0);
    let share = |case: &CaseReport| case.error / case.tolerance;
    by_share.sort_by(|a, b| share(b).total_cmp(&share(a)));
    for case in by_share.iter().take(5) {
        let CaseReport {
            name,
            error,
            tolerance,
        } = case;
        print(&format!("        {error:.2e} of {tolerance:.0e}: {name}"));
    }
    let failed = reports.iter().filter(|case| !case.passed());
    let failed: Vec<&str> = failed.map(|case| case.name.as_str()).collect();
    let result = if failed.is_empty() {
        Ok(format!("{} cases", reports.len()))
    } else {
        Err(format!("{} cases failed: {failed:?}", failed.len()))
    };
    checks.note("conformance", start, result);
    Ok(())
}
