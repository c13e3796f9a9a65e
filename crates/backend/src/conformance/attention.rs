//! Attention over scattered pages, for prompts cut in every way.

use oxllama_memory::CacheFormat;

use super::kept::Kept;
use super::linear_cases::{exl2, region};
use super::random::Random;
use super::{Bench, CaseError, ConformanceError, Suite, differing_bits, oracle};
use crate::quantised::GROUP;
use crate::{
    AttentionArgs, CacheShape, Device, HeadNorm, KvLayer, LinearOutput, NormKind, PAGE_TOKENS,
    Rope, RopeStyle, StepBatch, Store, WorkspaceShape,
};

/// One attention layer and the sequences that pass through it.
#[derive(Debug, Clone)]
struct AttentionCase {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    softcap: Option<f32>,
    window: Option<usize>,
    /// Normalisation of query and key heads.
    norm: Option<NormKind>,
    /// Style, rotated dimensions, factor.
    rope: Option<(RopeStyle, usize, f32)>,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
}

impl AttentionCase {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, lengths: &[usize]) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap: None,
            window: None,
            norm: None,
            rope: Some((RopeStyle::Halves, head_dim, 1.0)),
            lengths: lengths.to_vec(),
        }
    }
}

/// All cases of this module.
pub(super) fn run<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for (words, case) in table() {
        for format in CacheFormat::ALL {
            let AttentionCase {
                heads,
                kv_heads,
                head_dim,
                ..
            } = case;
            if format.is_quantised() && !head_dim.is_multiple_of(GROUP) {
                continue;
            }
            let name = format!(
                "attention {words}, {heads}/{kv_heads} heads of {head_dim}, {:?} tokens, {format}",
                case.lengths
            );
            let random = Random::for_case(&name);
            let tolerance = suite.tolerances.attention(format);
            suite.case(name.clone(), tolerance, |bench| {
                let sequences = Sequences::draw(bench, &case, format, random.clone())?;
                let (found, cache) = sequences.play(bench, &sequences.all(), usize::MAX)?;
                let cache = Kept::read(bench, &cache)?;
                Ok(sequences.worst_error(&found, &cache))
            })?;
            // Formats differ in how vectors are kept, and Q6 keeps some in either way: the other
            // two are cut in every way where groups, pages and sequences vary.
            let alike = matches!(format, CacheFormat::Q8 | CacheFormat::Q4);
            if alike && !matches!(words.as_str(), "groups" | "page borders") {
                continue;
            }
            suite.case(format!("row independence: {name}"), 0.0, |bench| {
                let sequences = Sequences::draw(bench, &case, format, random.clone())?;
                sequences.chunk_independence(bench)
            })?;
            let is_usual = matches!(format, CacheFormat::F16 | CacheFormat::Q4);
            if is_usual && matches!(words.as_str(), "groups" | "head") {
                suite.case(format!("announced reader: {name}"), 0.0, |bench| {
                    Sequences::draw(bench, &case, format, random.clone())?.announced_reader(bench)
                })?;
            }
        }
    }
    Ok(())
}

/// Every layer that is tried, with what is special about it.
fn table() -> Vec<(String, AttentionCase)> {
    let mut cases: Vec<(String, AttentionCase)> = Vec::new();
    let mut add = |words: &str, case: AttentionCase| cases.push((words.to_owned(), case));
    for (heads, kv_heads) in [
        (8, 8),
        (4, 2),
        (9, 3),
        (8, 2),
        (5, 1),
        (6, 1),
        (14, 2),
        (8, 1),
        (20, 1),
    ] {
        add(
            "groups",
            AttentionCase::new(heads, kv_heads, 64, &[17, 1, 40]),
        );
    }
    for head_dim in [32, 64, 80, 96, 128, 256] {
        add("head", AttentionCase::new(4, 2, head_dim, &[3, 37]));
    }
    // Vectors of fp16 that do not begin at multiples of 16 bytes.
    for head_dim in [36, 130] {
        add(
            "uneven head",
            AttentionCase::new(4, 2, head_dim, &[3, 37, 70]),
        );
    }
    add(
        "page borders",
        AttentionCase::new(4, 2, 32, &[256, 257, 255, 300]),
    );
    add("three pages", AttentionCase::new(2, 1, 64, &[530]));
    let base = AttentionCase::new(4, 2, 64, &[50, 9]);
    for (words, window) in [
        ("window 1", 1),
        ("window 2", 2),
        ("window 33", 33),
        ("a window beyond the first token", 64),
    ] {
        let case = AttentionCase {
            window: Some(window),
            ..base.clone()
        };
        add(words, case);
    }
    for window in [100, 256, 257] {
        let case = AttentionCase {
            window: Some(window),
            ..AttentionCase::new(4, 2, 32, &[520, 270])
        };
        add(&format!("window {window}"), case);
    }
    for (softcap, scale) in [(50.0, 0.125), (5.0, 0.5)] {
        let case = AttentionCase {
            softcap: Some(softcap),
            scale,
            ..base.clone()
        };
        add(&format!("cap {softcap}, scale {scale}"), case);
    }
    let sharp = AttentionCase {
        scale: 1.0,
        ..base.clone()
    };
    add("large scores", sharp);
    let everything = AttentionCase {
        softcap: Some(30.0),
        window: Some(128),
        norm: Some(NormKind::Rms),
        rope: Some((RopeStyle::Halves, 64, 1.0)),
        ..AttentionCase::new(8, 2, 128, &[270, 31])
    };
    add("all at once", everything);
    for norm in [NormKind::Rms, NormKind::Layer] {
        let case = AttentionCase {
            norm: Some(norm),
            ..base.clone()
        };
        add(&format!("{norm:?} heads"), case);
    }
    for style in [RopeStyle::Halves, RopeStyle::Interleaved] {
        for (rotary_dim, factor) in [(64, 1.0), (64, 1.19), (32, 1.19), (2, 1.0)] {
            let case = AttentionCase {
                rope: Some((style, rotary_dim, factor)),
                ..base.clone()
            };
            add(
                &format!("rope {style:?} {rotary_dim}, factor {factor}"),
                case,
            );
        }
    }
    add("no rope", AttentionCase { rope: None, ..base });
    cases
}

/// A case with its numbers, on the device and on the host.
struct Sequences<'a, D: Device> {
    case: &'a AttentionCase,
    format: CacheFormat,
    /// The rope of the case comes second, behind another that must not be used.
    ropes: Vec<Rope>,
    query_norm: Option<HeadNorm<D::Buffer>>,
    key_norm: Option<HeadNorm<D::Buffer>>,
    /// f32 `[heads, head_dim]` and `[kv_heads, head_dim]`
    norm_weights: (Vec<f32>, Vec<f32>),
    /// Pages in the pool, in random order.
    page_order: Vec<usize>,
    /// The sequences' tokens.
    tokens: Vec<Vec<Token>>,
    /// Reads what attention gives; results are its own then.
    reader: Option<Reader<D::Linear>>,
}

/// A linear of as many outputs as inputs.
struct Reader<L> {
    weights: L,
    is_announced: bool,
}

/// What a token brings to attention.
struct Token {
    /// f32 `[heads, head_dim]`
    query: Vec<f32>,
    /// f32 `[kv_heads, head_dim]`
    key: Vec<f32>,
    /// f32 `[kv_heads, head_dim]`
    value: Vec<f32>,
}

/// Results of a run: by sequence and token, f32 `[heads, head_dim]`.
type Results = Vec<Vec<Vec<f32>>>;

const EPSILON: f32 = 1e-6;

impl<'a, D: Device> Sequences<'a, D> {
    fn draw(
        bench: &Bench<'_, D>,
        case: &'a AttentionCase,
        format: CacheFormat,
        mut random: Random,
    ) -> Result<Self, CaseError> {
        let query_width = case.heads * case.head_dim;
        let key_width = case.kv_heads * case.head_dim;
        let norm_weights = (
            random.uniforms(query_width, 0.2, 1.5),
            random.uniforms(key_width, 0.2, 1.5),
        );
        let head_norm = |weight: &[f32]| -> Result<_, CaseError> {
            let Some(kind) = case.norm else {
                return Ok(None);
            };
            Ok(Some(HeadNorm {
                kind,
                weight: bench.upload(weight)?,
                epsilon: EPSILON,
            }))
        };
        let query_norm = head_norm(&norm_weights.0)?;
        let key_norm = head_norm(&norm_weights.1)?;
        let token = |random: &mut Random| Token {
            query: random.uniforms(query_width, -2.0, 2.0),
            key: random.uniforms(key_width, -2.0, 2.0),
            value: random.uniforms(key_width, -2.0, 2.0),
        };
        let tokens = case
            .lengths
            .iter()
            .map(|&length| (0..length).map(|_| token(&mut random)).collect())
            .collect();
        let used_pages: usize = case.lengths.iter().map(|&length| pages_of(length)).sum();
        Ok(Self {
            case,
            format,
            ropes: ropes_of(case),
            query_norm,
            key_norm,
            norm_weights,
            page_order: random.permutation(2 * used_pages + 1),
            tokens,
            reader: None,
        })
    }

    /// Every sequence.
    fn all(&self) -> Vec<usize> {
        (0..self.tokens.len()).collect()
    }

    /// Runs `sequences` side by side from their first token to their last, at most `chunk`
    /// tokens of each in a step. The results of other sequences are empty. Returns the cache
    /// as well.
    fn play(
        &self,
        bench: &Bench<'_, D>,
        sequences: &[usize],
        chunk: usize,
    ) -> Result<(Results, KvLayer<D::Buffer>), CaseError> {
        let lengths = sequences
            .iter()
            .map(|&sequence| self.tokens[sequence].len());
        let longest = lengths.clone().max().unwrap_or(0);
        let rows = lengths.map(|length| length.min(chunk)).sum();
        let (mut cache, mut workspace) = self.prepare(bench, rows, sequences.len(), longest)?;
        let mut results: Results = self.tokens.iter().map(|_| Vec::new()).collect();
        let mut first = 0;
        while first < longest {
            let end = longest.min(first.saturating_add(chunk));
            // Rows of a sequence are in order, but may have others' rows between them.
            let mut step: Vec<(usize, usize)> = Vec::new();
            if first % 2 == 0 {
                for slot in 0..sequences.len() {
                    step.extend((first..end).map(|position| (slot, position)));
                }
            } else {
                for position in first..end {
                    step.extend((0..sequences.len()).map(|slot| (slot, position)));
                }
            }
            step.retain(|&(slot, position)| position < self.tokens[sequences[slot]].len());
            let found = self.step(bench, sequences, &step, &mut cache, &mut workspace)?;
            let width = self.case.heads * self.case.head_dim;
            for (&(slot, _), row) in step.iter().zip(found.chunks_exact(width)) {
                results[sequences[slot]].push(row.to_vec());
            }
            first = end;
        }
        Ok((results, cache))
    }

    /// A cache full of what others have left there, and a workspace.
    fn prepare(
        &self,
        bench: &Bench<'_, D>,
        rows: usize,
        sequences: usize,
        longest: usize,
    ) -> Result<(KvLayer<D::Buffer>, D::Workspace), CaseError> {
        let case = self.case;
        let shape = CacheShape {
            pages: self.page_order.len(),
            kv_heads: case.kv_heads,
            head_dim: case.head_dim,
            format: self.format,
        };
        // Huge in f32 and hundreds in fp16, scales included: seen by no row.
        let stale = |page_bytes: usize| vec![0x60_u8; shape.pages * page_bytes];
        let cache = KvLayer {
            shape,
            keys: bench.upload_bytes(&stale(shape.key_page_bytes()))?,
            values: bench.upload_bytes(&stale(shape.value_page_bytes()))?,
        };
        let workspace = bench.workspace(&WorkspaceShape {
            rows,
            sequences,
            pages_per_sequence: pages_of(longest),
            max_in_features: case.heads * case.head_dim,
            max_out_features: case.heads * case.head_dim,
            draw_width: 0,
            heads: case.heads,
            kv_heads: case.kv_heads,
            head_dim: case.head_dim,
            rotary_dim: case.head_dim,
            ropes: self.ropes.len(),
        })?;
        Ok((cache, workspace))
    }

    /// One step over rows of `(index into sequences, position)`.
    fn step(
        &self,
        bench: &Bench<'_, D>,
        sequences: &[usize],
        rows: &[(usize, usize)],
        cache: &mut KvLayer<D::Buffer>,
        workspace: &mut D::Workspace,
    ) -> Result<Vec<f32>, CaseError> {
        let case = self.case;
        let positions: Vec<u32> = rows.iter().map(|&(_, position)| position as u32).collect();
        let row_sequences: Vec<u32> = rows.iter().map(|&(slot, _)| slot as u32).collect();
        let furthest = positions.iter().copied().max().unwrap_or(0) as usize;
        let pages_per_sequence = pages_of(furthest + 1);
        let batch = StepBatch {
            token_ids: &vec![0; rows.len()],
            positions: &positions,
            row_sequences: &row_sequences,
            page_tables: &self.page_tables(sequences, pages_per_sequence),
            pages_per_sequence,
            logit_rows: &[],
            draws: &[],
            changes: &[],
        };
        bench.device.begin_step(&batch, &self.ropes, workspace)?;

        let rows_of = |part: fn(&Token) -> &[f32]| -> Vec<f32> {
            rows.iter()
                .flat_map(|&(slot, position)| part(&self.tokens[sequences[slot]][position]))
                .copied()
                .collect()
        };
        let elements = rows.len() * case.heads * case.head_dim;
        let mut out = bench.output(elements)?;
        let args = AttentionArgs {
            queries: &mut bench.upload(&rows_of(|token| &token.query))?,
            keys: &mut bench.upload(&rows_of(|token| &token.key))?,
            values: &bench.upload(&rows_of(|token| &token.value))?,
            cache,
            out: &mut out,
            query_norm: self.query_norm.as_ref(),
            key_norm: self.key_norm.as_ref(),
            rope: case.rope.map(|_| 1),
            heads: case.heads,
            scale: case.scale,
            softcap: case.softcap,
            window: case.window,
        };
        if let Some(reader) = self.reader.as_ref().filter(|reader| reader.is_announced) {
            bench.device.announce_reader(&reader.weights, workspace);
        }
        bench.device.attention(args, workspace)?;
        let Some(Reader { weights, .. }) = &self.reader else {
            return bench.read(&out, elements);
        };
        let mut read = bench.output(elements)?;
        let output = LinearOutput {
            weights,
            out: &mut read,
        };
        let rows = rows.len();
        bench
            .device
            .linear(&out, output, Store::Overwrite, rows, workspace)?;
        bench.read(&read, elements)
    }

    /// `[sequences, pages_per_sequence]`: each sequence keeps its pages from step to step;
    /// those that it does not have yet are marked as no page at all.
    fn page_tables(&self, sequences: &[usize], pages_per_sequence: usize) -> Vec<u32> {
        let mut tables = Vec::new();
        for &sequence in sequences {
            let earlier = &self.tokens[..sequence];
            let first: usize = earlier.iter().map(|tokens| pages_of(tokens.len())).sum();
            let own = pages_of(self.tokens[sequence].len());
            tables.extend((0..pages_per_sequence).map(|page| {
                if page < own {
                    self.page_order[first + page] as u32
                } else {
                    u32::MAX
                }
            }));
        }
        tables
    }

    fn worst_error(&self, found: &Results, cache: &Kept) -> f64 {
        let mut worst = 0.0_f64;
        for (sequence, found) in found.iter().enumerate() {
            let Some(expected) = self.expected(sequence, cache) else {
                return f64::INFINITY;
            };
            let found: Vec<f32> = found.concat();
            // Each head is a row of its own: none hides behind a larger one.
            worst = worst.max(oracle::worst_error(&found, &expected, self.case.head_dim));
        }
        worst
    }

    /// f64 `[tokens, heads, head_dim]`; `None` when the cache keeps something else than its
    /// format makes of a sequence's keys and values.
    fn expected(&self, sequence: usize, cache: &Kept) -> Option<Vec<f64>> {
        let case = self.case;
        let tokens = &self.tokens[sequence];
        let table = self.page_tables(&[sequence], pages_of(tokens.len()));
        // By kv head and position.
        let mut keys = vec![Vec::new(); case.kv_heads];
        let mut values = vec![Vec::new(); case.kv_heads];
        let mut out = Vec::new();
        let scores = oracle::Scores {
            scale: case.scale,
            softcap: case.softcap,
        };
        for (position, token) in tokens.iter().enumerate() {
            let page = table[position / PAGE_TOKENS] as usize;
            let key = self.prepared(&token.key, &self.norm_weights.1, position);
            for (head, key) in key.chunks_exact(case.head_dim).enumerate() {
                keys[head].push(cache.key(page, head, position % PAGE_TOKENS, key)?);
            }
            let value = oracle::widen(&token.value);
            for (head, value) in value.chunks_exact(case.head_dim).enumerate() {
                values[head].push(cache.value(page, head, position % PAGE_TOKENS, value)?);
            }
            let first = case
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            let query = self.prepared(&token.query, &self.norm_weights.0, position);
            for (head, query) in query.chunks_exact(case.head_dim).enumerate() {
                let kv_head = head * case.kv_heads / case.heads;
                let (keys, values) = (&keys[kv_head][first..], &values[kv_head][first..]);
                out.extend(oracle::attend(scores, query, keys, values));
            }
        }
        Some(out)
    }

    /// Heads normed and rotated.
    fn prepared(&self, heads: &[f32], weights: &[f32], position: usize) -> Vec<f64> {
        let head_dim = self.case.head_dim;
        let mut prepared = oracle::widen(heads);
        let weights = weights.chunks_exact(head_dim);
        for (head, weight) in prepared.chunks_exact_mut(head_dim).zip(weights) {
            if let Some(kind) = self.case.norm {
                head.copy_from_slice(&oracle::norm(kind, head, weight, None, EPSILON));
            }
            if self.case.rope.is_some() {
                oracle::rotate(&self.ropes[1], position, head);
            }
        }
        prepared
    }

    /// Numbers that differ between runs that cut the prompts otherwise, or run each alone.
    fn chunk_independence(&self, bench: &Bench<'_, D>) -> Result<f64, CaseError> {
        let (whole, _) = self.play(bench, &self.all(), usize::MAX)?;
        let mut differing = 0.0;
        for chunk in [1, 7, 64] {
            let (found, _) = self.play(bench, &self.all(), chunk)?;
            differing += differing_bits(&found.concat().concat(), &whole.concat().concat());
        }
        for (sequence, expected) in whole.iter().enumerate() {
            for chunk in [usize::MAX, 5] {
                let (found, _) = self.play(bench, &[sequence], chunk)?;
                differing += differing_bits(&found[sequence].concat(), &expected.concat());
            }
        }
        Ok(differing)
    }

    /// Numbers that differ when the linear that reads attention is announced: with one row of each
    /// sequence in a step, and with all.
    fn announced_reader(mut self, bench: &Bench<'_, D>) -> Result<f64, CaseError> {
        let width = self.case.heads * self.case.head_dim;
        let linear = exl2(vec![region(4, width, 32)], width, Some(7));
        let weights = bench.load(&linear.random(&mut Random::for_case("reader")))?;
        self.reader = Some(Reader {
            weights,
            is_announced: false,
        });
        let mut differing = 0.0;
        for chunk in [1, usize::MAX] {
            let mut runs = Vec::new();
            for is_announced in [false, true] {
                self.reader = self.reader.map(|reader| Reader {
                    is_announced,
                    ..reader
                });
                runs.push(self.play(bench, &self.all(), chunk)?.0.concat().concat());
            }
            differing += differing_bits(&runs[1], &runs[0]);
        }
        Ok(differing)
    }
}

/// Pages that `tokens` tokens take.
pub(super) fn pages_of(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// A rope's, one for each pair of the dimensions that it rotates.
pub(super) fn inverse_frequencies(base: f32, rotary_dim: usize) -> Vec<f32> {
    (0..rotary_dim / 2)
        .map(|pair| base.powf(-2.0 * pair as f32 / rotary_dim as f32))
        .collect()
}

fn ropes_of(case: &AttentionCase) -> Vec<Rope> {
    let (style, rotary_dim, attention_factor) =
        case.rope.unwrap_or((RopeStyle::Halves, case.head_dim, 1.0));
    let other = Rope {
        inverse_frequencies: inverse_frequencies(500.0, rotary_dim),
        attention_factor: 3.0,
        style: RopeStyle::Interleaved,
    };
    let used = Rope {
        inverse_frequencies: inverse_frequencies(10_000.0, rotary_dim),
        attention_factor,
        style,
    };
    vec![other, used]
}
