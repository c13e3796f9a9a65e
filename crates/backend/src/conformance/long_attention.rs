//! A row that sees thousands of tokens: its bits are the same whether it is alone in its step, which a
//! backend may share among many workers, has hundreds of neighbours, which leave one for it, or ends a
//! short run of rows. At the end of a long run, which may be another kernel's, it is the same but for rounding.

use oxllama_memory::CacheFormat;

use super::attention::{inverse_frequencies, pages_of};
use super::oracle::worst_error;
use super::random::Random;
use super::{Bench, CaseError, ConformanceError, Suite, differing_bits};
use crate::{
    AttentionArgs, CacheShape, Device, KvLayer, PAGE_TOKENS, Rope, RopeStyle, StepBatch,
    WorkspaceShape,
};

const HEADS: usize = 2;
const KV_HEADS: usize = 1;

/// Rows of the runs that end the sequence: of what a draft may have, and of a piece of a prompt.
const SHORT_RUN: usize = 12;
const LONG_RUN: usize = 40;

/// What the order of sums may change in a result, of the largest.
const TOLERANCE: f64 = 1e-5;

/// One-token sequences beside the row.
const NEIGHBOURS: usize = 400;

pub(super) fn run<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for format in [CacheFormat::F16, CacheFormat::Q4] {
        for (tokens, head_dim, window) in [
            (4_200, 128, None),
            (8_300, 32, None),
            (4_500, 64, Some(4_200)),
        ] {
            let seen = window.map_or(String::new(), |window| format!(" in a window of {window}"));
            let name =
                format!("attention over {tokens} tokens{seen}, heads of {head_dim}, {format}");
            let case = LongCase {
                tokens,
                head_dim,
                window,
                format,
            };
            suite.case(format!("row independence: {name}"), 0.0, |bench| {
                LongSequence::new(bench, case)?.differing()
            })?;
            suite.case(format!("long run: {name}"), TOLERANCE, |bench| {
                LongSequence::new(bench, case)?.error_of_long_run()
            })?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct LongCase {
    tokens: usize,
    head_dim: usize,
    window: Option<usize>,
    format: CacheFormat,
}

/// The sequence, whose pages come first in the pool, and its neighbours, of a page each.
struct LongSequence<'a, D: Device> {
    bench: &'a Bench<'a, D>,
    case: LongCase,
    cache: KvLayer<D::Buffer>,
    workspace: D::Workspace,
    rope: Rope,
}

/// Rows of a step: `(sequence, position)`, and the sequences' pages.
struct Rows {
    rows: Vec<(usize, usize)>,
    /// Added to positions, names what tokens bring.
    first_token: usize,
    /// `[sequences, pages_per_sequence]`
    page_tables: Vec<u32>,
    pages_per_sequence: usize,
}

impl<'a, D: Device> LongSequence<'a, D> {
    fn new(bench: &'a Bench<'a, D>, case: LongCase) -> Result<Self, CaseError> {
        let head_dim = case.head_dim;
        let pages = pages_of(case.tokens);
        let shape = CacheShape {
            pages: pages + NEIGHBOURS,
            kv_heads: KV_HEADS,
            head_dim,
            format: case.format,
        };
        let cache = KvLayer {
            shape,
            keys: bench.upload_bytes(&vec![0; shape.pages * shape.key_page_bytes()])?,
            values: bench.upload_bytes(&vec![0; shape.pages * shape.value_page_bytes()])?,
        };
        let workspace = bench.workspace(&WorkspaceShape {
            rows: PAGE_TOKENS.max(NEIGHBOURS + 1),
            sequences: NEIGHBOURS + 1,
            pages_per_sequence: pages,
            max_in_features: HEADS * head_dim,
            max_out_features: HEADS * head_dim,
            draw_width: 0,
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim,
            rotary_dim: head_dim,
            ropes: 1,
        })?;
        Ok(Self {
            bench,
            case,
            cache,
            workspace,
            rope: Rope {
                inverse_frequencies: inverse_frequencies(10_000.0, head_dim),
                attention_factor: 1.0,
                style: RopeStyle::Halves,
            },
        })
    }

    /// Fills the pages. What they hold does not matter: each is filled as if it were a sequence's only one.
    fn fill(&mut self) -> Result<(), CaseError> {
        for page in 0..pages_of(self.case.tokens) as u32 {
            let rows = (0..PAGE_TOKENS).map(|position| (0, position)).collect();
            self.step(&Rows {
                rows,
                first_token: page as usize * PAGE_TOKENS,
                page_tables: vec![page],
                pages_per_sequence: 1,
            })?;
        }
        Ok(())
    }

    /// A step of the sequence's last rows.
    fn last_rows(&self, count: usize) -> Rows {
        let pages = pages_of(self.case.tokens);
        Rows {
            rows: (self.case.tokens - count..self.case.tokens)
                .map(|position| (0, position))
                .collect(),
            first_token: 0,
            page_tables: (0..pages as u32).collect(),
            pages_per_sequence: pages,
        }
    }

    /// The last row's result in a step of the last rows.
    fn last_of(&mut self, count: usize) -> Result<Vec<f32>, CaseError> {
        let mut out = self.step(&self.last_rows(count))?;
        Ok(out.split_off((count - 1) * HEADS * self.case.head_dim))
    }

    /// Numbers of the last row's result that differ between the ways to compute it.
    fn differing(&mut self) -> Result<f64, CaseError> {
        self.fill()?;
        // First, for it stores tokens anew.
        let run = self.last_of(SHORT_RUN)?;
        let alone = self.last_of(1)?;
        let mut crowd = self.last_rows(1);
        for neighbour in 0..NEIGHBOURS {
            crowd.rows.push((neighbour + 1, 0));
            let first = (crowd.pages_per_sequence + neighbour) as u32;
            crowd.page_tables.push(first);
            let others = crowd.pages_per_sequence - 1;
            crowd
                .page_tables
                .extend(std::iter::repeat_n(u32::MAX, others));
        }
        let crowd = self.step(&crowd)?;
        Ok(differing_bits(&run, &alone) + differing_bits(&crowd[..alone.len()], &alone))
    }

    /// The largest difference between the last row's results alone and in a long run, of the largest number.
    fn error_of_long_run(&mut self) -> Result<f64, CaseError> {
        self.fill()?;
        let run = self.last_of(LONG_RUN)?;
        let alone = self.last_of(1)?;
        let expected: Vec<f64> = alone.iter().map(|&x| f64::from(x)).collect();
        Ok(worst_error(&run, &expected, expected.len()))
    }

    /// f32 `[rows, heads, head_dim]` of one step.
    fn step(&mut self, step: &Rows) -> Result<Vec<f32>, CaseError> {
        let positions: Vec<u32> = step.rows.iter().map(|&(_, at)| at as u32).collect();
        let row_sequences: Vec<u32> = step.rows.iter().map(|&(slot, _)| slot as u32).collect();
        let batch = StepBatch {
            token_ids: &vec![0; step.rows.len()],
            positions: &positions,
            row_sequences: &row_sequences,
            page_tables: &step.page_tables,
            pages_per_sequence: step.pages_per_sequence,
            logit_rows: &[],
            draws: &[],
            changes: &[],
        };
        let head_dim = self.case.head_dim;
        let device = self.bench.device;
        let ropes = std::slice::from_ref(&self.rope);
        device.begin_step(&batch, ropes, &mut self.workspace)?;
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for &(_, position) in &step.rows {
            let token = step.first_token + position;
            let mut random = Random::for_case(&format!("token {token}"));
            let mut part = |heads: usize| random.uniforms(heads * head_dim, -2.0, 2.0);
            queries.extend(part(HEADS));
            keys.extend(part(KV_HEADS));
            values.extend(part(KV_HEADS));
        }
        let elements = queries.len();
        let mut out = self.bench.output(elements)?;
        let args = AttentionArgs {
            queries: &mut self.bench.upload(&queries)?,
            keys: &mut self.bench.upload(&keys)?,
            values: &self.bench.upload(&values)?,
            cache: &mut self.cache,
            out: &mut out,
            query_norm: None,
            key_norm: None,
            rope: Some(0),
            heads: HEADS,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap: None,
            window: self.case.window,
        };
        device.attention(args, &mut self.workspace)?;
        self.bench.read(&out, elements)
    }
}
