//! The suite that every backend is held to.

use std::collections::HashSet;
use std::time::Instant;

use anyhow::{Result, bail};
use oxllama_backend::DeviceError;
use oxllama_backend::conformance::{self, CaseError, CaseReport};
use oxllama_cuda::TOLERANCES;

use crate::checks::{Checks, print};

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
