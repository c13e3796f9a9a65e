//! Matrix products with every stored format, alone and fused.

use oxllama_format::DType;

use super::elementwise::RandomNorm;
use super::linear_cases::{
    SharedInput, exl2, float, many_rows, region, shared_inputs, table, typical,
};
use super::random::Random;
use super::weights::{LinearCase, RandomLinear};
use super::{Bench, CaseError, ConformanceError, Suite, differing_bits, oracle};
use crate::{Activation, Device, GatedLinear, LinearOutput, NormLinears, Store};

/// Rows of the largest step of a case.
const MOST_ROWS: usize = 33;

/// Rows of a prompt: backends may have other ways for so many.
const MANY_ROWS: [usize; 3] = [65, 200, 321];

/// Rows of a prompt that are normed or gated.
const PROMPT_ROWS: usize = 150;

/// What a case's name says of more rows than usual.
fn of_rows(rows: usize) -> String {
    if rows > MOST_ROWS {
        format!(", {rows} rows")
    } else {
        String::new()
    }
}

/// All cases of this module.
pub(super) fn run<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for (index, (words, case)) in table().into_iter().enumerate() {
        let (in_features, out_features) = (case.in_features, case.out_features);
        let bias = if case.bias { ", bias" } else { "" };
        let name = format!("linear {words}, {in_features} x {out_features}{bias}");
        let random = Random::for_case(&name);
        let tolerance = suite.tolerances.linear(&case.stored);
        suite.case(name.clone(), tolerance, |bench| {
            values(bench, &case, MOST_ROWS, random.clone())
        })?;
        // Every row count for some of each kind, the usual edges for all small ones.
        let row_counts: Vec<usize> = match (in_features * out_features, index % 8) {
            (0x20000.., _) => vec![1, 3, 32],
            (_, 0) => (1..=MOST_ROWS).collect(),
            _ => vec![1, 2, 3, 4, 7, 8, 16, 32],
        };
        suite.case(format!("row independence: {name}"), 0.0, |bench| {
            row_independence(bench, &case, &row_counts, random.clone())
        })?;
    }
    run_many_rows(suite)?;
    run_norm_linears(suite)?;
    run_gated_linears(suite)
}

/// Values alone: above some number of rows a backend may sum in another order.
fn run_many_rows<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for (index, (words, mut case)) in many_rows().into_iter().enumerate() {
        for bias in [false, true] {
            case.bias = bias;
            let rows = MANY_ROWS[(index + usize::from(bias)) % MANY_ROWS.len()];
            let bias = if bias { ", bias" } else { "" };
            let name = format!("linear of {rows} rows, {words}{bias}");
            let random = Random::for_case(&name);
            let tolerance = suite.tolerances.linear(&case.stored);
            suite.case(name, tolerance, |bench| {
                values(bench, &case, rows, random.clone())
            })?;
        }
    }
    Ok(())
}

/// A linear on the device, and rows for it.
struct Loaded<L> {
    linear: RandomLinear,
    weights: L,
    /// f32 `[rows, in_features]`
    x: Vec<f32>,
    /// f32 `[rows, out_features]`: what a residual stream held before.
    old: Vec<f32>,
}

fn draw<D: Device>(
    bench: &Bench<'_, D>,
    case: &LinearCase,
    rows: usize,
    mut random: Random,
) -> Result<Loaded<D::Linear>, CaseError> {
    let linear = case.random(&mut random);
    let weights = bench.load(&linear)?;
    let x = random.activations(rows * case.in_features);
    let old = random.activations(rows * case.out_features);
    Ok(Loaded {
        linear,
        weights,
        x,
        old,
    })
}

/// What an operation finds in its output: not numbers where it should overwrite.
fn output<D: Device>(
    bench: &Bench<'_, D>,
    store: Store,
    old: &[f32],
) -> Result<D::Buffer, CaseError> {
    match store {
        Store::Overwrite => bench.output(old.len()),
        Store::Add { .. } => bench.upload(old),
    }
}

/// Multiplies the rows `first .. first + rows` of the case.
fn multiply<D: Device>(
    bench: &Bench<'_, D>,
    loaded: &Loaded<D::Linear>,
    store: Store,
    first: usize,
    rows: usize,
) -> Result<Vec<f32>, CaseError> {
    let (inputs, outputs) = (loaded.linear.in_features, loaded.linear.out_features);
    let mut workspace = bench.begin_rows(rows, inputs.max(outputs))?;
    let x = bench.upload(&loaded.x[first * inputs..][..rows * inputs])?;
    let mut out = output(
        bench,
        store,
        &loaded.old[first * outputs..][..rows * outputs],
    )?;
    let output = LinearOutput {
        weights: &loaded.weights,
        out: &mut out,
    };
    bench
        .device
        .linear(&x, output, store, rows, &mut workspace)?;
    bench.read(&out, rows * outputs)
}

const STORES: [Store; 3] = [
    Store::Overwrite,
    Store::Add { scale: 1.0 },
    Store::Add { scale: 0.22 },
];

fn values<D: Device>(
    bench: &Bench<'_, D>,
    case: &LinearCase,
    rows: usize,
    random: Random,
) -> Result<f64, CaseError> {
    let loaded = draw(bench, case, rows, random)?;
    let shape = bench.device.linear_shape(&loaded.weights);
    if shape != (case.in_features, case.out_features) {
        return Ok(f64::INFINITY);
    }
    let y = oracle::linear(&loaded.linear, &oracle::widen(&loaded.x));
    let mut worst = 0.0_f64;
    for store in STORES {
        let expected = oracle::store(store, &loaded.old, &y);
        let found = multiply(bench, &loaded, store, 0, rows)?;
        worst = worst.max(oracle::worst_error(&found, &expected, case.out_features));
    }
    Ok(worst)
}

fn row_independence<D: Device>(
    bench: &Bench<'_, D>,
    case: &LinearCase,
    row_counts: &[usize],
    random: Random,
) -> Result<f64, CaseError> {
    let loaded = draw(bench, case, MOST_ROWS, random)?;
    let mut differing = 0.0;
    for store in [Store::Overwrite, Store::Add { scale: 0.22 }] {
        let all = multiply(bench, &loaded, store, 0, MOST_ROWS)?;
        for &rows in row_counts {
            // The first and the last rows: each meets other neighbours and another place.
            for first in [0, MOST_ROWS - rows] {
                let found = multiply(bench, &loaded, store, first, rows)?;
                let expected = &all[first * case.out_features..][..rows * case.out_features];
                differing += differing_bits(&found, expected);
            }
        }
    }
    Ok(differing)
}

fn run_norm_linears<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for shared in shared_inputs() {
        let tolerances = &suite.tolerances;
        let widest = shared
            .linears
            .iter()
            .map(|case| tolerances.linear(&case.stored))
            .fold(0.0, f64::max);
        let tolerance = widest + tolerances.norm;
        let name = format!("norm and linears: {}", shared.words);
        let random = Random::for_case(&name);
        for rows in [MOST_ROWS, PROMPT_ROWS] {
            suite.case(format!("{name}{}", of_rows(rows)), tolerance, |bench| {
                let group = SharedLinears::draw(bench, &shared, rows, random.clone())?;
                let found = group.multiply(bench, 0, rows)?;
                Ok(group.worst_error(&found))
            })?;
        }
        suite.case(format!("row independence: {name}"), 0.0, |bench| {
            let group = SharedLinears::draw(bench, &shared, MOST_ROWS, random.clone())?;
            let all = group.multiply(bench, 0, MOST_ROWS)?;
            let mut differing = 0.0;
            for (first, rows) in [(0, 1), (7, 1), (32, 1), (3, 2), (5, 8), (16, 17), (0, 32)] {
                let part = group.multiply(bench, first, rows)?;
                for ((part, all), linear) in part.iter().zip(&all).zip(&group.linears) {
                    let width = linear.out_features;
                    differing += differing_bits(part, &all[first * width..][..rows * width]);
                }
            }
            Ok(differing)
        })?;
    }
    Ok(())
}

/// A [`SharedInput`] on the device, and rows for it.
struct SharedLinears<D: Device> {
    norm: Option<RandomNorm<D::Buffer>>,
    linears: Vec<RandomLinear>,
    weights: Vec<D::Linear>,
    /// f32 `[rows, in_features]`
    x: Vec<f32>,
}

impl<D: Device> SharedLinears<D> {
    fn draw(
        bench: &Bench<'_, D>,
        shared: &SharedInput,
        rows: usize,
        mut random: Random,
    ) -> Result<Self, CaseError> {
        let in_features = shared.linears[0].in_features;
        let norm = match shared.norm {
            Some((kind, bias)) => Some(RandomNorm::new(
                bench,
                kind,
                bias,
                in_features,
                &mut random,
            )?),
            None => None,
        };
        let cases = shared.linears.iter();
        let linears: Vec<RandomLinear> = cases.map(|case| case.random(&mut random)).collect();
        let weights = linears
            .iter()
            .map(|linear| bench.load(linear))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            norm,
            linears,
            weights,
            x: random.activations(rows * in_features),
        })
    }

    /// The results of each linear for the rows `first .. first + rows`.
    fn multiply(
        &self,
        bench: &Bench<'_, D>,
        first: usize,
        rows: usize,
    ) -> Result<Vec<Vec<f32>>, CaseError> {
        let in_features = self.linears[0].in_features;
        let outputs = self.linears.iter().map(|linear| linear.out_features);
        let widest = outputs.clone().max().unwrap_or(0).max(in_features);
        let mut workspace = bench.begin_rows(rows, widest)?;
        let x = bench.upload(&self.x[first * in_features..][..rows * in_features])?;
        let mut normed = bench.output(rows * in_features)?;
        let mut outs = outputs
            .map(|width| bench.output(rows * width))
            .collect::<Result<Vec<_>, _>>()?;
        let mut linears: Vec<LinearOutput<'_, D::Linear, D::Buffer>> = self
            .weights
            .iter()
            .zip(&mut outs)
            .map(|(weights, out)| LinearOutput { weights, out })
            .collect();
        let args = NormLinears {
            norm: self.norm.as_ref().map(|norm| &norm.norm),
            x: &x,
            normed: &mut normed,
            linears: &mut linears,
            rows,
        };
        bench.device.norm_linears(args, &mut workspace)?;
        outs.iter()
            .zip(&self.linears)
            .map(|(out, linear)| bench.read(out, rows * linear.out_features))
            .collect()
    }

    fn worst_error(&self, found: &[Vec<f32>]) -> f64 {
        let input = match &self.norm {
            Some(norm) => norm.expected(&self.x),
            None => oracle::widen(&self.x),
        };
        let mut worst = 0.0_f64;
        for (found, linear) in found.iter().zip(&self.linears) {
            let expected = oracle::linear(linear, &input);
            worst = worst.max(oracle::worst_error(found, &expected, linear.out_features));
        }
        worst
    }
}

fn run_gated_linears<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    let plain = LinearCase {
        stored: float(DType::F16),
        in_features: 50,
        out_features: 37,
        bias: true,
    };
    for (words, case) in [
        ("EXL2", typical(576, 192, 21)),
        ("EXL2 in order", exl2(vec![region(4, 288, 128)], 64, None)),
        ("F16", plain),
    ] {
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
            let name = format!("gated linear {words}, {activation:?}");
            let random = Random::for_case(&name);
            let tolerances = &suite.tolerances;
            let tolerance = tolerances.linear(&case.stored) + tolerances.elementwise;
            for rows in [MOST_ROWS, PROMPT_ROWS] {
                suite.case(format!("{name}{}", of_rows(rows)), tolerance, |bench| {
                    let gated = GatedCase::draw(bench, activation, &case, rows, random.clone())?;
                    gated.worst_error(bench)
                })?;
            }
            suite.case(format!("row independence: {name}"), 0.0, |bench| {
                let gated = GatedCase::draw(bench, activation, &case, MOST_ROWS, random.clone())?;
                let store = Store::Add { scale: 1.0 };
                let all = gated.multiply(bench, store, 0, MOST_ROWS)?;
                let mut differing = 0.0;
                for (first, rows) in [(0, 1), (9, 1), (32, 1), (3, 2), (5, 8), (16, 17)] {
                    let part = gated.multiply(bench, store, first, rows)?;
                    let expected = &all[first * case.out_features..][..rows * case.out_features];
                    differing += differing_bits(&part, expected);
                }
                Ok(differing)
            })?;
        }
    }
    Ok(())
}

/// The second half of a gated MLP on the device, and rows for it.
struct GatedCase<L> {
    activation: Activation,
    /// Its `x` is the gate.
    down: Loaded<L>,
    /// f32 `[rows, in_features]`
    up: Vec<f32>,
    rows: usize,
}

impl<L> GatedCase<L> {
    fn draw<D: Device<Linear = L>>(
        bench: &Bench<'_, D>,
        activation: Activation,
        case: &LinearCase,
        rows: usize,
        mut random: Random,
    ) -> Result<Self, CaseError> {
        let up = random.activations(rows * case.in_features);
        Ok(Self {
            activation,
            down: draw(bench, case, rows, random)?,
            up,
            rows,
        })
    }

    fn multiply<D: Device<Linear = L>>(
        &self,
        bench: &Bench<'_, D>,
        store: Store,
        first: usize,
        rows: usize,
    ) -> Result<Vec<f32>, CaseError> {
        let linear = &self.down.linear;
        let (inputs, outputs) = (linear.in_features, linear.out_features);
        let mut workspace = bench.begin_rows(rows, inputs.max(outputs))?;
        let input_range = first * inputs..(first + rows) * inputs;
        let mut gate = bench.upload(&self.down.x[input_range.clone()])?;
        let up = bench.upload(&self.up[input_range])?;
        let old = &self.down.old[first * outputs..][..rows * outputs];
        let mut out = output(bench, store, old)?;
        let args = GatedLinear {
            activation: self.activation,
            gate: &mut gate,
            up: &up,
            weights: &self.down.weights,
            out: &mut out,
            store,
            rows,
        };
        bench.device.gated_linear(args, &mut workspace)?;
        bench.read(&out, rows * outputs)
    }

    fn worst_error<D: Device<Linear = L>>(&self, bench: &Bench<'_, D>) -> Result<f64, CaseError> {
        let linear = &self.down.linear;
        let gated = oracle::gate(self.activation, &self.down.x, &self.up);
        let y = oracle::linear(linear, &gated);
        let mut worst = 0.0_f64;
        for store in STORES {
            let expected = oracle::store(store, &self.down.old, &y);
            let found = self.multiply(bench, store, 0, self.rows)?;
            worst = worst.max(oracle::worst_error(&found, &expected, linear.out_features));
        }
        Ok(worst)
    }
}
