//! A model that takes jobs: loaded, with what guesses and adapts beside it.

use std::time::Instant;

use anyhow::{Context, Result};
use oxllama_engine::{Engine, EngineParts, EngineSettings, Speculation};
use oxllama_format::AdapterSource;
use oxllama_model::{AdapterId, ModelPlan, PairedModel, Runner, diagnose_draft};
use oxllama_text::Tokenizer;

use crate::args::{EngineArgs, LoraArg, MOST_CHOICES, ModelArgs, PlacementArgs};
use crate::jobs::MOST_IN_FLIGHT;
use crate::output;
use crate::session::{self, Host, Opened, StepSize};

/// A running engine and what it was made from.
pub(crate) struct Serving {
    pub(crate) opened: Opened,
    pub(crate) plan: ModelPlan,
    pub(crate) engine: Engine,
    /// The adapter that every job gets.
    pub(crate) adapter: Option<AdapterId>,
    /// Where every job's guesses come from.
    pub(crate) speculation: Speculation,
    /// Seconds from the command's start of loading to here.
    pub(crate) load_s: f64,
}

impl Serving {
    /// Plans and loads the models, reading the tokenizer meanwhile, for steps of up to
    /// `sequences` sequences.
    pub(crate) fn start(args: &ModelArgs, engine: &EngineArgs, sequences: u64) -> Result<Self> {
        let start = Instant::now();
        let adapter = engine.lora.as_ref().map(open_adapter).transpose()?;
        let size = step_size(engine, sequences);
        let opened = session::open(&args.model, Some(&args.placement))?;
        // The diagnosis of a draft needs the tokenizer; without one it is read beside the weights.
        let mut known_tokenizer = None;
        let draft = match &engine.draft {
            Some(draft) => {
                let tokenizer = known_tokenizer.insert(session::tokenizer(&opened.source)?);
                Some(open_draft(draft, (&opened, tokenizer), &args.placement)?)
            }
            None => None,
        };
        let host = Host::new(&args.placement)?;
        let placement = &shared_placement(&opened, draft.as_ref(), &host, args, size)?;
        let plan = session::plan(&opened, &host, placement, size)?;
        let (tokenizer, runner) = std::thread::scope(|scope| {
            let tokenizer = scope.spawn(|| match known_tokenizer {
                Some(tokenizer) => Ok(tokenizer),
                None => session::tokenizer(&opened.source),
            });
            let runner = session::load(&opened, &host, &plan);
            let tokenizer = tokenizer
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (tokenizer, runner)
        });
        let parts = EngineParts {
            tokenizer: tokenizer?,
            runner: runner?,
            draft: match &draft {
                Some(draft) => Some(load_draft(draft, &host, placement, size, &plan)?),
                None => None,
            },
        };
        let settings = EngineSettings {
            queue_limit: MOST_IN_FLIGHT + MOST_CHOICES as usize,
            latency_factor: engine.latency_factor,
            max_draft_tokens: engine.most_drafts(),
            ..EngineSettings::default()
        };
        let running = Engine::start(parts, settings)?;
        let adapter = adapter
            .map(|(source, scale)| running.load_adapter(source, scale))
            .transpose()?;
        Ok(Self {
            opened,
            plan,
            engine: running,
            adapter,
            speculation: match (engine.ngram, &draft) {
                (true, _) => Speculation::Ngram,
                (false, Some(_)) => Speculation::DraftModel,
                (false, None) => Speculation::Off,
            },
            load_s: start.elapsed().as_secs_f64(),
        })
    }
}

/// Chunks as for one job; the logits of every sequence's next token and of its guesses.
fn step_size(engine: &EngineArgs, sequences: u64) -> StepSize {
    StepSize {
        batch: sequences,
        logit_rows: sequences * (1 + engine.most_drafts() as u64),
        ..StepSize::ONE_JOB
    }
}

fn open_adapter(lora: &LoraArg) -> Result<(AdapterSource, f32)> {
    Ok((AdapterSource::open(&lora.directory)?, lora.scale))
}

fn open_draft(
    draft: &str,
    model: (&Opened, &Tokenizer),
    placement: &PlacementArgs,
) -> Result<Opened> {
    let opened = session::open(draft, Some(placement)).context("cannot use the draft model")?;
    check_draft(model, &opened)?;
    Ok(opened)
}

/// Whether the draft model can guess for the model at all, before either is loaded; what speaks
/// against it is told.
fn check_draft((model, tokenizer): (&Opened, &Tokenizer), draft: &Opened) -> Result<()> {
    let target = PairedModel {
        source: &model.source,
        spec: &model.spec,
        tokenizer,
    };
    let draft = PairedModel {
        source: &draft.source,
        spec: &draft.spec,
        tokenizer: &session::tokenizer(&draft.source)?,
    };
    for warning in diagnose_draft(target, draft)? {
        output::note(format_args!("warning: {warning}"));
    }
    Ok(())
}

/// The placement with the longest context that both models can have, unless one was asked for:
/// page for page, the draft model holds what the model holds.
fn shared_placement(
    model: &Opened,
    draft: Option<&Opened>,
    host: &Host,
    args: &ModelArgs,
    size: StepSize,
) -> Result<PlacementArgs> {
    let mut placement = args.placement.clone();
    if let (Some(draft), None) = (draft, placement.context) {
        let alone = session::plan(model, host, &placement, size)?;
        let most = draft.spec.max_context_tokens() as u64;
        placement.context = Some(alone.memory.context_tokens.min(most));
    }
    Ok(placement)
}

/// Loads the draft model into what the model leaves.
fn load_draft(
    draft: &Opened,
    host: &Host,
    placement: &PlacementArgs,
    size: StepSize,
    model: &ModelPlan,
) -> Result<Box<dyn Runner>> {
    let placement = &PlacementArgs {
        context: Some(model.memory.context_tokens),
        cache_tokens: Some(model.memory.cache_tokens),
        ..placement.clone()
    };
    let plan = session::plan(draft, host, placement, size)
        .context("the draft model does not fit beside the model: give a shorter --context")?;
    session::load(draft, host, &plan)
}
