//! Matrix products with every stored format, alone and fused.

use oxllama_format::DType;

use super::elementwise::RandomNorm;
use super::random::Random;
use super::weights::{LinearCase, RandomLinear, Region, Stored};
use super::{Bench, CaseError, ConformanceError, Suite, differing_bits, oracle};
use crate::{Activation, Device, GatedLinear, LinearOutput, NormKind, NormLinears, Store};

/// The bit widths of the format.
const WIDTHS: [u32; 6] = [8, 6, 5, 4, 3, 2];

/// Rows of the largest step of a case.
const MOST_ROWS: usize = 33;

/// All cases of this module.
pub(super) fn run<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for (index, (words, case)) in table().into_iter().enumerate() {
        let (in_features, out_features) = (case.in_features, case.out_features);
        let bias = if case.bias { ", bias" } else { "" };
        let name = format!("linear {words}, {in_features} x {out_features}{bias}");
        let random = Random::for_case(&name);
        let tolerance = suite.tolerances.linear(&case.stored);
        suite.case(name.clone(), tolerance, |bench| {
            values(bench, &case, random.clone())
        })?;
        // Every row count for some of each kind, the usual edges for all.
        let every_count = index % 8 == 0;
        let row_counts: Vec<usize> = (1..=MOST_ROWS)
            .filter(|rows| every_count || [1, 2, 3, 4, 7, 8, 16, 32, 33].contains(rows))
            .collect();
        suite.case(format!("row independence: {name}"), 0.0, |bench| {
            row_independence(bench, &case, &row_counts, random.clone())
        })?;
    }
    run_norm_linears(suite)?;
    run_gated_linears(suite)
}

fn exl2(regions: Vec<Region>, out_features: usize, permutation_seed: Option<u64>) -> LinearCase {
    LinearCase {
        in_features: regions.iter().map(|region| region.rows).sum(),
        out_features,
        bias: false,
        stored: Stored::Exl2 {
            regions,
            permutation_seed,
        },
    }
}

fn region(bits: u32, rows: usize, group_size: usize) -> Region {
    Region {
        bits,
        rows,
        group_size,
    }
}

fn float(dtype: DType) -> Stored {
    Stored::Float {
        dtype,
        beyond_f16: false,
    }
}

/// A typical matrix of a 4-bit model: a twentieth of the inputs with more bits.
fn typical(in_features: usize, out_features: usize, permutation_seed: u64) -> LinearCase {
    let regions = vec![
        region(6, 32, 32),
        region(5, 64, 64),
        region(4, in_features - 96, 128),
    ];
    exl2(regions, out_features, Some(permutation_seed))
}

/// Every linear that is tried by itself, with what is special about it.
fn table() -> Vec<(String, LinearCase)> {
    let mut cases = exl2_cases();
    let mut add = |words: String, stored: Stored, in_features: usize, out_features: usize| {
        for bias in [false, true] {
            let case = LinearCase {
                stored: stored.clone(),
                in_features,
                out_features,
                bias,
            };
            cases.push((words.clone(), case));
        }
    };
    for (group_size, in_features, out_features) in [
        (32, 160, 8),
        (64, 96, 40),
        (64, 128, 96),
        (128, 128, 64),
        (128, 288, 72),
        (1024, 544, 64),
    ] {
        let stored = Stored::Gptq {
            group_size,
            act_order: false,
        };
        let words = format!("GPTQ, groups of {group_size}");
        add(words, stored, in_features, out_features);
    }
    for (group_size, in_features, out_features) in [(32, 160, 8), (64, 192, 96), (128, 384, 40)] {
        let stored = Stored::Gptq {
            group_size,
            act_order: true,
        };
        let words = format!("GPTQ, act-order, groups of {group_size}");
        add(words, stored, in_features, out_features);
    }
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for (in_features, out_features) in [(1, 2), (50, 37), (37, 50), (64, 96), (576, 193)] {
            let words = format!("{dtype}");
            add(words, float(dtype), in_features, out_features);
        }
    }
    for dtype in [DType::BF16, DType::F32] {
        let stored = Stored::Float {
            dtype,
            beyond_f16: true,
        };
        add(format!("{dtype} beyond fp16"), stored, 64, 50);
    }
    cases
}

/// Every bit mix, group size and kind of edge that an EXL2 file may have.
fn exl2_cases() -> Vec<(String, LinearCase)> {
    let mut cases: Vec<(String, LinearCase)> = Vec::new();
    let mut add = |words: String, case: LinearCase| cases.push((words, case));
    for (index, bits) in WIDTHS.into_iter().enumerate() {
        // Each width alone: the smallest matrix, whole groups, ragged last groups.
        let seed = Some(index as u64);
        let words = |what: &str| format!("EXL2 {bits} bit, {what}");
        add(
            words("one block"),
            exl2(vec![region(bits, 32, 32)], 32, None),
        );
        for (rows, group_size) in [(160, 32), (224, 64), (320, 128), (416, 128)] {
            let words = words(&format!("groups of {group_size}"));
            add(words, exl2(vec![region(bits, rows, group_size)], 96, seed));
        }
        // Files of early 2023: one power of two for the whole matrix.
        let words_early = words("early groups of 256");
        add(words_early, exl2(vec![region(bits, 544, 256)], 64, seed));
        let words_single = words("one group for all");
        add(words_single, exl2(vec![region(bits, 544, 1024)], 32, seed));
    }
    for (index, high) in WIDTHS.into_iter().enumerate() {
        for low in WIDTHS.into_iter().skip(index + 1) {
            // Regions of 32 rows, then a ragged last group behind an uneven border.
            let blocks = vec![region(high, 32, 32), region(low, 32, 32)];
            let words = format!("EXL2 {high} and {low} bit, blocks");
            add(words, exl2(blocks, 64, Some(1)));
            let ragged = vec![region(high, 96, 32), region(low, 224, 128)];
            let words = format!("EXL2 {high} and {low} bit, ragged");
            add(words, exl2(ragged, 160, Some(2)));
        }
    }
    let all = |rows: [usize; 6], sizes: [usize; 6]| -> Vec<Region> {
        let parts = WIDTHS.into_iter().zip(rows).zip(sizes);
        parts
            .map(|((bits, rows), size)| region(bits, rows, size))
            .collect()
    };
    let blocks = all([32; 6], [32; 6]);
    add(
        "EXL2 all six widths, blocks".to_owned(),
        exl2(blocks, 32, Some(3)),
    );
    let uneven = all([32, 64, 128, 64, 32, 96], [32, 32, 64, 64, 32, 128]);
    let mut uneven = exl2(uneven, 224, Some(4));
    add("EXL2 all six widths, uneven".to_owned(), uneven.clone());
    uneven.bias = true;
    add("EXL2 all six widths, uneven".to_owned(), uneven);
    add(
        "EXL2 in order".to_owned(),
        exl2(vec![region(4, 288, 128)], 64, None),
    );
    add("EXL2 typical".to_owned(), typical(576, 1536, 5));
    add("EXL2 typical".to_owned(), typical(1536, 576, 6));
    add("EXL2 typical".to_owned(), typical(192, 4096, 7));
    cases
}

/// A linear on the device, and rows for it.
struct Loaded<L> {
    linear: RandomLinear,
    weights: L,
    /// f32 `[MOST_ROWS, in_features]`
    x: Vec<f32>,
    /// f32 `[MOST_ROWS, out_features]`: what a residual stream held before.
    old: Vec<f32>,
}

fn draw<D: Device>(
    bench: &Bench<'_, D>,
    case: &LinearCase,
    mut random: Random,
) -> Result<Loaded<D::Linear>, CaseError> {
    let linear = case.random(&mut random);
    let weights = bench.load(&linear)?;
    let x = random.activations(MOST_ROWS * case.in_features);
    let old = random.activations(MOST_ROWS * case.out_features);
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
    random: Random,
) -> Result<f64, CaseError> {
    let loaded = draw(bench, case, random)?;
    let shape = bench.device.linear_shape(&loaded.weights);
    if shape != (case.in_features, case.out_features) {
        return Ok(f64::INFINITY);
    }
    let y = oracle::linear(&loaded.linear, &oracle::widen(&loaded.x));
    let mut worst = 0.0_f64;
    for store in STORES {
        let expected = oracle::store(store, &loaded.old, &y);
        let found = multiply(bench, &loaded, store, 0, MOST_ROWS)?;
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
    let loaded = draw(bench, case, random)?;
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

/// Linears that read one input.
struct SharedInput {
    words: &'static str,
    norm: Option<(NormKind, bool)>,
    linears: Vec<LinearCase>,
}

fn shared_inputs() -> Vec<SharedInput> {
    let attention = |seeds: [u64; 3]| {
        vec![
            typical(320, 320, seeds[0]),
            exl2(vec![region(5, 320, 64)], 96, Some(seeds[1])),
            exl2(
                vec![region(8, 64, 32), region(3, 256, 128)],
                96,
                Some(seeds[2]),
            ),
        ]
    };
    let with_bias = |mut linears: Vec<LinearCase>| {
        linears.iter_mut().for_each(|linear| linear.bias = true);
        linears
    };
    let plain = |stored: Stored, out_features| LinearCase {
        stored,
        in_features: 192,
        out_features,
        bias: true,
    };
    let gptq = Stored::Gptq {
        group_size: 64,
        act_order: true,
    };
    let rms = Some((NormKind::Rms, false));
    let input = |words, norm, linears| SharedInput {
        words,
        norm,
        linears,
    };
    vec![
        input("one permutation", rms, attention([11, 11, 11])),
        input(
            "one permutation, biases",
            rms,
            with_bias(attention([11, 11, 11])),
        ),
        input("different permutations", rms, attention([11, 12, 13])),
        input("one permutation, no norm", None, attention([11, 11, 11])),
        input(
            "different permutations, no norm",
            None,
            attention([11, 12, 13]),
        ),
        input(
            "layer norm",
            Some((NormKind::Layer, false)),
            attention([11, 11, 11]),
        ),
        input(
            "layer norm with bias",
            Some((NormKind::Layer, true)),
            attention([14, 14, 14]),
        ),
        input(
            "gate and up",
            rms,
            vec![typical(576, 1536, 15), typical(576, 1536, 15)],
        ),
        input("one linear", rms, vec![typical(576, 576, 16)]),
        input(
            "three formats",
            rms,
            vec![
                plain(float(DType::BF16), 50),
                plain(gptq, 96),
                typical(192, 64, 17),
            ],
        ),
        input(
            "plain",
            rms,
            vec![plain(float(DType::F16), 193), plain(float(DType::F16), 37)],
        ),
    ]
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
        suite.case(name.clone(), tolerance, |bench| {
            let group = SharedLinears::draw(bench, &shared, random.clone())?;
            let found = group.multiply(bench, 0, MOST_ROWS)?;
            Ok(group.worst_error(&found))
        })?;
        suite.case(format!("row independence: {name}"), 0.0, |bench| {
            let group = SharedLinears::draw(bench, &shared, random.clone())?;
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
    /// f32 `[MOST_ROWS, in_features]`
    x: Vec<f32>,
}

impl<D: Device> SharedLinears<D> {
    fn draw(
        bench: &Bench<'_, D>,
        shared: &SharedInput,
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
            x: random.activations(MOST_ROWS * in_features),
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
            suite.case(name.clone(), tolerance, |bench| {
                let gated = GatedCase::draw(bench, activation, &case, random.clone())?;
                gated.worst_error(bench)
            })?;
            suite.case(format!("row independence: {name}"), 0.0, |bench| {
                let gated = GatedCase::draw(bench, activation, &case, random.clone())?;
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
    /// f32 `[MOST_ROWS, in_features]`
    up: Vec<f32>,
}

impl<L> GatedCase<L> {
    fn draw<D: Device<Linear = L>>(
        bench: &Bench<'_, D>,
        activation: Activation,
        case: &LinearCase,
        mut random: Random,
    ) -> Result<Self, CaseError> {
        let up = random.activations(MOST_ROWS * case.in_features);
        Ok(Self {
            activation,
            down: draw(bench, case, random)?,
            up,
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
            let found = self.multiply(bench, store, 0, MOST_ROWS)?;
            worst = worst.max(oracle::worst_error(&found, &expected, linear.out_features));
        }
        Ok(worst)
    }
}
