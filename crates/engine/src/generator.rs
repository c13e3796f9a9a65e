//! Running jobs on a model.

use std::ops::ControlFlow;
use std::time::Instant;

use oxllama_model::{Runner, StepPlan};
use oxllama_text::{StopMatcher, StreamDecoder, Tokenizer};

use crate::{
    Completion, EngineError, Event, FinishReason, Job, PagePool, SampleError, Sampler,
    SamplerVocabulary, SequencePages, Timings, TokenLogprob, token_logprobs,
};

/// Runs one job at a time on a loaded model.
///
/// The keys and values of the last job stay in the cache: a job whose prompt begins with the
/// same tokens (the next turn of a chat) continues from there. By the backends' row
/// independence that changes no bit of the result.
pub struct Generator<'a> {
    runner: &'a mut dyn Runner,
    tokenizer: &'a Tokenizer,
    vocabulary: SamplerVocabulary,
    pool: PagePool,
    pages: SequencePages,
    /// The tokens whose keys and values `pages` holds, from position 0.
    cached_ids: Vec<u32>,
    step: StepPlan,
}

impl<'a> Generator<'a> {
    /// A generator over the runner's whole cache.
    pub fn new(runner: &'a mut dyn Runner, tokenizer: &'a Tokenizer) -> Self {
        let pool = PagePool::new(runner.limits().pages);
        Self {
            runner,
            tokenizer,
            vocabulary: SamplerVocabulary::new(tokenizer),
            pool,
            pages: SequencePages::default(),
            cached_ids: Vec::new(),
            step: StepPlan::default(),
        }
    }

    /// Forgets the last job's keys and values.
    pub fn clear_cache(&mut self) {
        self.cached_ids.clear();
        self.pool.shrink(&mut self.pages, 0);
    }

    /// Runs `job` to its end, or until `on_event` breaks it off (which counts as a stop).
    ///
    /// # Errors
    /// The job is refused (an empty or too long prompt, ids or settings out of range) or the
    /// model fails before the first token. A failure after that ends the completion with
    /// [`FinishReason::Error`] and is returned beside it.
    pub fn run(
        &mut self,
        job: &Job,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<(Completion, Option<EngineError>), EngineError> {
        self.check(job)?;
        let mut output = Output::new(job, self.tokenizer)?;
        let mut sampler = self.sampler(job);
        let mut timings = Timings {
            prompt_tokens: job.prompt_ids.len(),
            ..Timings::default()
        };

        let prefill_start = Instant::now();
        timings.cached_tokens = self.reuse_prefix(&job.prompt_ids);
        let goes_on = self.prefill_all_but_last_chunk(job, on_event)?;
        if !goes_on || job.max_new_tokens == 0 {
            timings.prefill_s = prefill_start.elapsed().as_secs_f64();
            let reason = if goes_on {
                FinishReason::Length
            } else {
                FinishReason::Stop
            };
            return Ok((output.finish(reason, timings, on_event), None));
        }
        let first = self.cached_ids.len();
        let drawn = self.advance(&job.prompt_ids[first..], job, &mut sampler, 0)?;
        timings.prefill_s = prefill_start.elapsed().as_secs_f64();

        let decode_start = Instant::now();
        let outcome = self.decode(job, drawn, &mut sampler, &mut output, on_event);
        timings.decode_s = decode_start.elapsed().as_secs_f64();
        timings.generated_tokens = output.token_ids.len();
        timings.decode_steps = output.drawn_tokens.saturating_sub(1);
        let (reason, error) = match outcome {
            Ok(reason) => (reason, None),
            Err(error) => (FinishReason::Error, Some(error)),
        };
        Ok((output.finish(reason, timings, on_event), error))
    }

    fn check(&self, job: &Job) -> Result<(), EngineError> {
        job.sampling.check()?;
        let vocab_size = self.runner.spec().vocab_size;
        job.sampling.check_vocabulary(vocab_size)?;
        let context_tokens = self.runner.limits().context_tokens;
        if job.prompt_ids.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if job.prompt_ids.len() >= context_tokens {
            let prompt_tokens = job.prompt_ids.len();
            return Err(EngineError::PromptTooLong {
                prompt_tokens,
                context_tokens,
            });
        }
        match job.prompt_ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&token_id) => Err(EngineError::TokenOutOfRange {
                token_id,
                vocab_size,
            }),
            None => Ok(()),
        }
    }

    fn sampler(&self, job: &Job) -> Sampler {
        let vocab_size = self.runner.spec().vocab_size;
        let settings = job.sampling.clone();
        let mut sampler = Sampler::new(settings, job.seed, vocab_size, &self.vocabulary);
        for &token_id in &job.prompt_ids {
            sampler.observe(token_id);
        }
        sampler
    }

    /// Keeps what the cache shares with `prompt_ids`, frees the rest, and returns how many
    /// tokens were kept: never all, since the last one's logits are needed.
    fn reuse_prefix(&mut self, prompt_ids: &[u32]) -> usize {
        let shared = self
            .cached_ids
            .iter()
            .zip(prompt_ids)
            .take_while(|(a, b)| a == b)
            .count();
        let kept = shared.min(prompt_ids.len() - 1);
        self.cached_ids.truncate(kept);
        self.pool.shrink(&mut self.pages, kept);
        kept
    }

    /// Brings the prompt into the cache in chunks as large as a step may be, up to the chunk
    /// whose logits are wanted. Returns false if `on_event` broke it off.
    fn prefill_all_but_last_chunk(
        &mut self,
        job: &Job,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<bool, EngineError> {
        let total = job.prompt_ids.len();
        let max_rows = self.runner.limits().max_rows;
        while total - self.cached_ids.len() > max_rows {
            let first = self.cached_ids.len();
            self.forward(&job.prompt_ids[first..first + max_rows], false)?;
            let done = self.cached_ids.len();
            if on_event(Event::Prefill { done, total }).is_break() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Goes on from the first drawn token until something ends the job.
    fn decode(
        &mut self,
        job: &Job,
        mut drawn: Drawn,
        sampler: &mut Sampler,
        output: &mut Output,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<FinishReason, EngineError> {
        loop {
            output.drawn_tokens += 1;
            if job.stop_token_ids.contains(&drawn.token_id) {
                return Ok(FinishReason::Stop);
            }
            let token_id = drawn.token_id;
            if output.push(drawn, on_event).is_break() {
                return Ok(FinishReason::Stop);
            }
            let context_is_full = self.cached_ids.len() >= self.runner.limits().context_tokens;
            if output.token_ids.len() >= job.max_new_tokens || context_is_full {
                return Ok(FinishReason::Length);
            }
            sampler.observe(token_id);
            drawn = self.advance(&[token_id], job, sampler, output.drawn_tokens as u64)?;
        }
    }

    /// Runs `token_ids` as the sequence's next rows and draws the token after them.
    fn advance(
        &mut self,
        token_ids: &[u32],
        job: &Job,
        sampler: &mut Sampler,
        step: u64,
    ) -> Result<Drawn, EngineError> {
        let position = self.cached_ids.len() + token_ids.len() - 1;
        let logits = self.forward(token_ids, true)?;
        let token_id = sampler
            .sample(logits, None, step)
            .map_err(|error| match error {
                SampleError::NotFinite => EngineError::NotFinite { position },
                SampleError::NothingAllowed => EngineError::NothingAllowed { position },
            })?;
        let logprob = job
            .logprobs
            .map(|count| token_logprobs(logits, token_id, count));
        Ok(Drawn { token_id, logprob })
    }

    /// Runs `token_ids` as the sequence's next rows. With `want_logits` returns the last
    /// row's logits, f32 `[vocab_size]`.
    fn forward(&mut self, token_ids: &[u32], want_logits: bool) -> Result<&[f32], EngineError> {
        let first = self.cached_ids.len();
        let end = first + token_ids.len();
        self.pool.grow(&mut self.pages, end)?;
        let step = &mut self.step;
        step.clear();
        step.token_ids.extend_from_slice(token_ids);
        step.positions
            .extend((first..end).map(|position| position as u32));
        step.row_sequences.resize(token_ids.len(), 0);
        step.page_tables
            .extend(self.pages.table().iter().map(|page| page.0));
        step.pages_per_sequence = step.page_tables.len();
        if want_logits {
            step.logit_rows.push(token_ids.len() as u32 - 1);
        }
        let logits = self.runner.run(step)?;
        self.cached_ids.extend_from_slice(token_ids);
        Ok(logits)
    }
}

/// A token fresh from the sampler.
struct Drawn {
    token_id: u32,
    logprob: Option<TokenLogprob>,
}

/// The answer as it grows.
struct Output {
    decoder: StreamDecoder,
    stops: StopMatcher,
    text: String,
    token_ids: Vec<u32>,
    logprobs: Option<Vec<TokenLogprob>>,
    /// Tokens drawn so far, a stop token included.
    drawn_tokens: usize,
    /// A stop string was found: nothing held back may follow.
    stopped: bool,
}

impl Output {
    fn new(job: &Job, tokenizer: &Tokenizer) -> Result<Self, EngineError> {
        Ok(Self {
            decoder: tokenizer.stream_decoder(true),
            stops: StopMatcher::new(&job.stop_strings)?,
            text: String::new(),
            token_ids: Vec::new(),
            logprobs: job.logprobs.map(|_| Vec::new()),
            drawn_tokens: 0,
            stopped: false,
        })
    }

    /// Adds a token. Breaks when a stop string is complete or `on_event` wants to stop.
    fn push(
        &mut self,
        drawn: Drawn,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.token_ids.push(drawn.token_id);
        if let (Some(all), Some(logprob)) = (&mut self.logprobs, drawn.logprob) {
            all.push(logprob);
        }
        let released = self.stops.push(self.decoder.push(drawn.token_id));
        self.stopped = released.matched.is_some();
        let flow = self.emit(&released.text, on_event);
        if self.stopped {
            ControlFlow::Break(())
        } else {
            flow
        }
    }

    fn emit(
        &mut self,
        text: &str,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        if text.is_empty() {
            return ControlFlow::Continue(());
        }
        self.text.push_str(text);
        on_event(Event::Text(text))
    }

    fn finish(
        mut self,
        finish_reason: FinishReason,
        timings: Timings,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Completion {
        if !self.stopped {
            // The last bytes may complete a stop string still, or only look like the start of one.
            let released = self.stops.push(self.decoder.finish());
            let mut rest = released.text;
            if released.matched.is_none() {
                rest.push_str(&self.stops.finish());
            }
            // Nobody is left to break off.
            let _ = self.emit(&rest, on_event);
        }
        Completion {
            text: self.text,
            token_ids: self.token_ids,
            finish_reason,
            logprobs: self.logprobs,
            timings,
        }
    }
}
