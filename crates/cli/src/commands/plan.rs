//! `oxllama plan`

use std::process::ExitCode;

use anyhow::Result;
use oxllama_memory::{Infeasible, PlanError};
use oxllama_model::ModelError;
use serde::Serialize;

use crate::args::PlanArgs;
use crate::output;
use crate::session::{self, Host, StepSize};

/// The object that `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    fits: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<&'a oxllama_memory::Plan>,
    #[serde(skip_serializing_if = "Option::is_none")]
    infeasible: Option<&'a Infeasible>,
}

pub(crate) fn run(args: &PlanArgs) -> Result<ExitCode> {
    let placement = &args.model.placement;
    let opened = session::open(&args.model.model, Some(placement))?;
    let host = Host::new(placement)?;
    let size = StepSize {
        batch: args.batch,
        logit_rows: args.batch,
        ..StepSize::ONE_JOB
    };
    let plan = match session::plan(&opened, &host, placement, size) {
        Ok(plan) => plan,
        Err(error) => return refuse(error, args.json),
    };
    if args.json {
        output::json(&Answer {
            fits: true,
            plan: Some(&plan.memory),
            infeasible: None,
        })?;
    } else {
        output::line(&plan.memory)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A request that does not fit is this command's answer, though with an error's exit code.
fn refuse(error: anyhow::Error, json: bool) -> Result<ExitCode> {
    match error.downcast_ref::<ModelError>() {
        Some(ModelError::Plan(PlanError::Infeasible(infeasible))) if json => {
            output::json(&Answer {
                fits: false,
                plan: None,
                infeasible: Some(infeasible),
            })?;
            Ok(ExitCode::FAILURE)
        }
        _ => Err(error),
    }
}
