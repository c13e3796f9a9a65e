//! Normalisations, gates, sums, gathered rows, logits and the embedding.

use oxllama_format::DType;

use super::random::Random;
use super::weights::{LinearCase, Stored};
use super::{Bench, CaseError, ConformanceError, Suite, differing_bits, oracle};
use crate::{Activation, Device, LogitArgs, Norm, NormKind};

/// All cases of this module.
pub(super) fn run<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    run_norms(suite)?;
    run_embeddings(suite)?;
    let tolerance = suite.tolerances.elementwise;
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
        for elements in [1, 37, 4096] {
            let name = format!("gate {activation:?}, {elements} elements");
            let mut random = Random::for_case(&name);
            suite.case(name, tolerance, |bench| {
                gate(bench, activation, elements, &mut random)
            })?;
        }
    }
    for (elements, scale) in [(1, 1.0), (37, 0.22), (4096, -1.5)] {
        let name = format!("add, {elements} elements times {scale}");
        let mut random = Random::for_case(&name);
        suite.case(name, tolerance, |bench| {
            add(bench, elements, scale, &mut random)
        })?;
    }
    for (rows, width) in [(1, 37), (9, 64), (33, 576)] {
        let name = format!("gather rows, {rows} of {width}");
        let mut random = Random::for_case(&name);
        suite.case(name, 0.0, |bench| gather(bench, rows, width, &mut random))?;
        let name = format!("scatter and add rows, {rows} of {width}");
        let mut random = Random::for_case(&name);
        suite.case(name, tolerance, |bench| {
            scatter_add(bench, rows, width, &mut random)
        })?;
    }
    for (from, to, elements) in [(0, 64, 37), (96, 32, 64), (5, 6, 1)] {
        let name = format!("copy within, {elements} from {from} to {to}");
        let mut random = Random::for_case(&name);
        suite.case(name, 0.0, |bench| {
            copy_within(bench, [from, to, elements], &mut random)
        })?;
    }
    for (scale, softcap) in [
        (1.0, None),
        (0.0625, None),
        (1.0, Some(30.0)),
        (2.5, Some(5.0)),
    ] {
        for (width, vocab_size) in [(64, 64), (96, 67)] {
            let name = format!("logits {vocab_size} of {width}, scale {scale}, cap {softcap:?}");
            let mut random = Random::for_case(&name);
            let args = LogitArgs {
                rows: 3,
                width,
                vocab_size,
                scale,
                softcap,
            };
            suite.case(name, tolerance, |bench| {
                finish_logits(bench, args, &mut random)
            })?;
        }
    }
    Ok(())
}

/// A normalisation with random weights on the device and on the host.
pub(super) struct RandomNorm<B> {
    /// As the device takes it.
    pub(super) norm: Norm<B>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl<B> RandomNorm<B> {
    /// Draws one.
    pub(super) fn new<D: Device<Buffer = B>>(
        bench: &Bench<'_, D>,
        kind: NormKind,
        bias: bool,
        width: usize,
        random: &mut Random,
    ) -> Result<Self, CaseError> {
        let weight = random.uniforms(width, -0.5, 2.0);
        let bias = bias.then(|| random.uniforms(width, -1.0, 1.0));
        let norm = Norm {
            kind,
            weight: bench.upload(&weight)?,
            bias: match &bias {
                Some(bias) => Some(bench.upload(bias)?),
                None => None,
            },
            epsilon: 1e-5,
            width,
        };
        Ok(Self { norm, weight, bias })
    }

    /// What it should give.
    pub(super) fn expected(&self, x: &[f32]) -> Vec<f64> {
        oracle::norm(
            self.norm.kind,
            &oracle::widen(x),
            &self.weight,
            self.bias.as_deref(),
            self.norm.epsilon,
        )
    }
}

fn run_norms<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for (kind, bias) in [
        (NormKind::Rms, false),
        (NormKind::Layer, false),
        (NormKind::Layer, true),
    ] {
        for width in [37, 64, 576, 5120] {
            let tolerance = suite.tolerances.norm;
            let name = format!("norm {kind:?}, bias {bias}, width {width}");
            let random = Random::for_case(&name);
            suite.case(name.clone(), tolerance, |bench| {
                let (norm, x) = draw_norm(bench, kind, bias, width, random.clone())?;
                let found = normalize(bench, &norm, &x)?;
                Ok(oracle::worst_error(&found, &norm.expected(&x), width))
            })?;
            suite.case(format!("row independence: {name}"), 0.0, |bench| {
                let (norm, x) = draw_norm(bench, kind, bias, width, random.clone())?;
                let together = normalize(bench, &norm, &x)?;
                let mut alone = Vec::new();
                for x in x.chunks_exact(width) {
                    alone.extend(normalize(bench, &norm, x)?);
                }
                Ok(differing_bits(&alone, &together))
            })?;
        }
    }
    Ok(())
}

/// A norm and rows for it, whose sizes differ by orders of magnitude as those of hidden
/// states do.
fn draw_norm<D: Device>(
    bench: &Bench<'_, D>,
    kind: NormKind,
    bias: bool,
    width: usize,
    mut random: Random,
) -> Result<(RandomNorm<D::Buffer>, Vec<f32>), CaseError> {
    let norm = RandomNorm::new(bench, kind, bias, width, &mut random)?;
    let mut x = random.activations(7 * width);
    for (row, x) in x.chunks_exact_mut(width).enumerate() {
        let size = 10.0_f32.powi(row as i32 - 3);
        x.iter_mut().for_each(|x| *x *= size);
    }
    Ok((norm, x))
}

fn normalize<D: Device>(
    bench: &Bench<'_, D>,
    norm: &RandomNorm<D::Buffer>,
    x: &[f32],
) -> Result<Vec<f32>, CaseError> {
    let width = norm.norm.width;
    let rows = x.len() / width;
    let mut workspace = bench.begin_rows(rows, width)?;
    let mut out = bench.output(x.len())?;
    let x_buffer = bench.upload(x)?;
    bench
        .device
        .norm(&norm.norm, &x_buffer, &mut out, rows, &mut workspace)?;
    bench.read(&out, x.len())
}

fn run_embeddings<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for (vocab_size, hidden) in [(37, 50), (300, 64)] {
            for scale in [1.0, 7.25] {
                let tolerance = suite.tolerances.float_linear;
                let name = format!("embed {dtype}, {vocab_size} of {hidden}, scale {scale}");
                let mut random = Random::for_case(&name);
                suite.case(name, tolerance, |bench| {
                    let case = LinearCase {
                        stored: Stored::Float {
                            dtype,
                            beyond_f16: dtype != DType::F16,
                        },
                        in_features: hidden,
                        out_features: vocab_size,
                        bias: false,
                    };
                    embed(bench, &case, scale, &mut random)
                })?;
            }
        }
    }
    Ok(())
}

fn embed<D: Device>(
    bench: &Bench<'_, D>,
    case: &LinearCase,
    scale: f32,
    random: &mut Random,
) -> Result<f64, CaseError> {
    let (hidden, vocab_size) = (case.in_features, case.out_features);
    let table = case.random(random);
    let last = vocab_size as u32 - 1;
    // The last two do not exist, and read token 0.
    let token_ids = [0, last, 5, 5, 1, 17, last + 1, u32::MAX];
    let weights = bench.load(&table)?;
    let mut workspace = bench.begin(&token_ids, hidden.max(vocab_size))?;
    let mut out = bench.output(token_ids.len() * hidden)?;
    bench
        .device
        .embed(&weights, scale, &mut out, &mut workspace)?;
    let mut expected = Vec::new();
    for token_id in token_ids {
        let token = if token_id > last { 0 } else { token_id } as usize;
        expected.extend(
            (0..hidden).map(|input| {
                f64::from(scale) * f64::from(table.weights[input * vocab_size + token])
            }),
        );
    }
    let found = bench.read(&out, token_ids.len() * hidden)?;
    Ok(oracle::worst_error(&found, &expected, hidden))
}

fn gate<D: Device>(
    bench: &Bench<'_, D>,
    activation: Activation,
    elements: usize,
    random: &mut Random,
) -> Result<f64, CaseError> {
    let mut gate = random.activations(elements);
    // Where exponentials overflow and functions saturate.
    for (gate, extreme) in gate.iter_mut().skip(1).zip([0.0, -200.0, 200.0, -9.0, 9.0]) {
        *gate = extreme;
    }
    let up = random.activations(elements);
    let mut gate_buffer = bench.upload(&gate)?;
    let up_buffer = bench.upload(&up)?;
    bench
        .device
        .gate(activation, &mut gate_buffer, &up_buffer, elements)?;
    let found = bench.read(&gate_buffer, elements)?;
    let expected = oracle::gate(activation, &gate, &up);
    Ok(oracle::worst_error(&found, &expected, elements))
}

fn add<D: Device>(
    bench: &Bench<'_, D>,
    elements: usize,
    scale: f32,
    random: &mut Random,
) -> Result<f64, CaseError> {
    let x = random.activations(elements);
    let old = random.activations(elements);
    let mut out = bench.upload(&old)?;
    bench
        .device
        .add(&bench.upload(&x)?, scale, &mut out, elements)?;
    let expected: Vec<f64> = x
        .iter()
        .zip(&old)
        .map(|(&x, &old)| f64::from(old) + f64::from(scale) * f64::from(x))
        .collect();
    let found = bench.read(&out, elements)?;
    Ok(oracle::worst_error(&found, &expected, elements))
}

/// Copies inside a buffer of 160 elements; what lies outside the destination stays.
fn copy_within<D: Device>(
    bench: &Bench<'_, D>,
    [from, to, elements]: [usize; 3],
    random: &mut Random,
) -> Result<f64, CaseError> {
    let mut expected = random.uniforms(160, -1.0, 1.0);
    let mut buffer = bench.upload(&expected)?;
    let [from_byte, to_byte, bytes] = [from, to, elements].map(|count| count * size_of::<f32>());
    bench
        .device
        .copy_within(&mut buffer, from_byte, to_byte, bytes)?;
    expected.copy_within(from..from + elements, to);
    let found = bench.read(&buffer, expected.len())?;
    let in_place = match bench.device.host_memory(&mut buffer) {
        Some(memory) => {
            let bytes = memory.iter().zip(bytemuck::cast_slice::<f32, u8>(&found));
            bytes.filter(|(here, read)| here != read).count()
        }
        None => 0,
    };
    Ok(differing_bits(&found, &expected) + in_place as f64)
}

fn gather<D: Device>(
    bench: &Bench<'_, D>,
    rows: usize,
    width: usize,
    random: &mut Random,
) -> Result<f64, CaseError> {
    let x = random.activations(rows * width);
    let wanted: Vec<u32> = (0..rows.div_ceil(2))
        .map(|_| random.below(rows) as u32)
        .collect();
    let mut out = bench.output(wanted.len() * width)?;
    bench
        .device
        .gather_rows(&bench.upload(&x)?, &wanted, width, &mut out)?;
    let expected: Vec<f32> = wanted
        .iter()
        .flat_map(|&row| &x[row as usize * width..][..width])
        .copied()
        .collect();
    let found = bench.read(&out, expected.len())?;
    Ok(differing_bits(&found, &expected))
}

/// Adds to every other row; the rows between must keep their bits.
fn scatter_add<D: Device>(
    bench: &Bench<'_, D>,
    rows: usize,
    width: usize,
    random: &mut Random,
) -> Result<f64, CaseError> {
    let scale = -1.75;
    let old = random.activations(rows * width);
    let wanted: Vec<u32> = (0..rows as u32).step_by(2).rev().collect();
    let x = random.activations(wanted.len() * width);
    let mut out = bench.upload(&old)?;
    bench
        .device
        .scatter_add_rows(&bench.upload(&x)?, &wanted, scale, width, &mut out)?;
    let found = bench.read(&out, old.len())?;
    let mut worst = 0.0_f64;
    for (row, (found, old)) in found
        .chunks_exact(width)
        .zip(old.chunks_exact(width))
        .enumerate()
    {
        let Some(from) = wanted.iter().position(|&wanted| wanted as usize == row) else {
            worst = worst.max(differing_bits(found, old));
            continue;
        };
        let x = &x[from * width..][..width];
        let sum = |(&old, &x): (&f32, &f32)| f64::from(old) + f64::from(scale) * f64::from(x);
        let expected: Vec<f64> = old.iter().zip(x).map(sum).collect();
        worst = worst.max(oracle::worst_error(found, &expected, width));
    }
    Ok(worst)
}

fn finish_logits<D: Device>(
    bench: &Bench<'_, D>,
    args: LogitArgs,
    random: &mut Random,
) -> Result<f64, CaseError> {
    let logits = random.activations(args.rows * args.width);
    let mut buffer = bench.upload(&logits)?;
    bench.device.finish_logits(&mut buffer, args)?;
    let found = bench.read(&buffer, logits.len())?;
    let mut worst = 0.0_f64;
    let rows = logits.chunks_exact(args.width);
    for (found, logits) in found.chunks_exact(args.width).zip(rows) {
        let finish = |&logit: &f32| {
            let scaled = f64::from(logit) * f64::from(args.scale);
            args.softcap.map_or(scaled, |cap| {
                f64::from(cap) * (scaled / f64::from(cap)).tanh()
            })
        };
        let expected: Vec<f64> = logits[..args.vocab_size].iter().map(finish).collect();
        let (tokens, padding) = found.split_at(args.vocab_size);
        worst = worst.max(oracle::worst_error(tokens, &expected, args.vocab_size));
        if padding.iter().any(|&logit| logit != f32::NEG_INFINITY) {
            worst = f64::INFINITY;
        }
    }
    Ok(worst)
}
