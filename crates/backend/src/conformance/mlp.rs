//! Gate, up and down projections after each other, as a decoder's layer runs them.

use oxllama_format::DType;

use super::linear_cases::{exl2, float, plain, region, typical, with_bias};
use super::random::Random;
use super::weights::{LinearCase, RandomLinear, Stored};
use super::{Bench, CaseError, ConformanceError, Suite, differing_bits, oracle};
use crate::{Activation, Device, GatedLinear, LinearOutput, NormLinears, Store};

/// Of one, of few, of some, and of a prompt that ends within a tile of rows.
const ROWS: [usize; 5] = [1, 3, 8, 40, 300];

/// Gate, up and down.
struct Mlp {
    words: &'static str,
    rows: &'static [usize],
    linears: [LinearCase; 3],
}

fn mlps() -> Vec<Mlp> {
    let floats = |inputs, outputs| plain(float(DType::F16), inputs, outputs);
    let gptq = |inputs, outputs| {
        let stored = Stored::Gptq {
            group_size: 32,
            act_order: false,
        };
        plain(stored, inputs, outputs)
    };
    let narrow = vec![region(6, 96, 32), region(2, 128, 64)];
    vec![
        Mlp {
            words: "EXL2",
            rows: &ROWS,
            linears: [
                typical(224, 416, 51),
                typical(224, 416, 51),
                typical(416, 160, 52),
            ],
        },
        Mlp {
            words: "EXL2 of other widths for each, bias",
            rows: &ROWS,
            linears: with_bias([
                typical(224, 192, 53),
                exl2(narrow, 192, Some(53)),
                exl2(vec![region(5, 192, 64)], 96, None),
            ]),
        },
        Mlp {
            words: "EXL2 of other orders",
            rows: &ROWS,
            linears: [
                typical(224, 192, 54),
                typical(224, 192, 55),
                typical(192, 96, 56),
            ],
        },
        // Tiles for all multiprocessors of a large GPU, and a last round for some of them.
        Mlp {
            words: "EXL2 of many outputs",
            rows: &[1, 8, 200],
            linears: [
                exl2(vec![region(4, 64, 32)], 12_672, Some(56)),
                exl2(vec![region(4, 64, 32)], 12_672, Some(56)),
                typical(12_672, 96, 57),
            ],
        },
        // Inputs and outputs for a large GPU's workers of 9 to 16 rows.
        Mlp {
            words: "EXL2 of many inputs and outputs",
            rows: &[9, 16],
            linears: [
                typical(1024, 9984, 58),
                typical(1024, 9984, 58),
                exl2(vec![region(4, 9984, 128)], 96, Some(59)),
            ],
        },
        Mlp {
            words: "GPTQ",
            rows: &ROWS,
            linears: [gptq(160, 288), gptq(160, 288), gptq(288, 72)],
        },
        Mlp {
            words: "F16 of odd extents",
            rows: &ROWS,
            linears: [floats(50, 37), floats(50, 37), floats(37, 20)],
        },
    ]
}

/// All cases of this module.
pub(super) fn run<D: Device>(suite: &mut Suite<'_, D>) -> Result<(), ConformanceError> {
    for (index, mlp) in mlps().into_iter().enumerate() {
        let activations: &[Activation] = match index {
            0 => &[Activation::Silu, Activation::GeluTanh, Activation::GeluErf],
            1 => &[Activation::GeluTanh],
            _ => &[Activation::Silu],
        };
        for &activation in activations {
            for &rows in mlp.rows {
                let name = format!("mlp {}, {activation:?}, {rows} rows", mlp.words);
                let random = Random::for_case(&name);
                let tolerances = &suite.tolerances;
                let [gate, up, down] = &mlp.linears;
                let linears = [gate, up, down].map(|linear| tolerances.linear(&linear.stored));
                let tolerance = linears.iter().sum::<f64>() + tolerances.elementwise;
                suite.case(name.clone(), tolerance, |bench| {
                    let drawn = Drawn::new(bench, &mlp, rows, random.clone())?;
                    let found = drawn.run(bench, activation, true)?;
                    Ok(drawn.worst_error(activation, &found))
                })?;
                suite.case(format!("announced: {name}"), 0.0, |bench| {
                    let drawn = Drawn::new(bench, &mlp, rows, random.clone())?;
                    let announced = drawn.run(bench, activation, true)?;
                    let plain = drawn.run(bench, activation, false)?;
                    Ok(differing_bits(&announced, &plain))
                })?;
            }
        }
    }
    Ok(())
}

/// An [`Mlp`] on the device, and rows for it.
struct Drawn<D: Device> {
    linears: [RandomLinear; 3],
    weights: [D::Linear; 3],
    rows: usize,
    /// f32 `[rows, in_features]`
    x: Vec<f32>,
    /// f32 `[rows, out_features]`: what the residual stream held before.
    old: Vec<f32>,
}

impl<D: Device> Drawn<D> {
    fn new(
        bench: &Bench<'_, D>,
        mlp: &Mlp,
        rows: usize,
        mut random: Random,
    ) -> Result<Self, CaseError> {
        let [gate, up, down] = &mlp.linears;
        let linears = [gate, up, down].map(|case| case.random(&mut random));
        let [gate, up, down] = &linears;
        let weights = [bench.load(gate)?, bench.load(up)?, bench.load(down)?];
        let x = random.activations(rows * gate.in_features);
        let old = random.activations(rows * down.out_features);
        Ok(Self {
            linears,
            weights,
            rows,
            x,
            old,
        })
    }

    fn run(
        &self,
        bench: &Bench<'_, D>,
        activation: Activation,
        is_announced: bool,
    ) -> Result<Vec<f32>, CaseError> {
        let rows = self.rows;
        let [gate_case, _, down_case] = &self.linears;
        let (inputs, width) = (gate_case.in_features, gate_case.out_features);
        let widest = inputs.max(width).max(down_case.out_features);
        let mut workspace = bench.begin_rows(rows, widest)?;
        let [gate_weights, up_weights, down_weights] = &self.weights;
        let mut gate = bench.output(rows * width)?;
        let mut up = bench.output(rows * width)?;
        let mut linears = [
            LinearOutput {
                weights: gate_weights,
                out: &mut gate,
            },
            LinearOutput {
                weights: up_weights,
                out: &mut up,
            },
        ];
        let args = NormLinears {
            norm: None,
            x: &bench.upload(&self.x)?,
            normed: &mut bench.output(rows * inputs)?,
            linears: &mut linears,
            rows,
        };
        if is_announced {
            bench
                .device
                .announce_gate(activation, down_weights, &mut workspace);
        }
        bench.device.norm_linears(args, &mut workspace)?;
        let mut out = bench.upload(&self.old)?;
        let args = GatedLinear {
            activation,
            gate: &mut gate,
            up: &up,
            weights: down_weights,
            out: &mut out,
            store: Store::Add { scale: 0.5 },
            rows,
        };
        bench.device.gated_linear(args, &mut workspace)?;
        bench.read(&out, rows * down_case.out_features)
    }

    fn worst_error(&self, activation: Activation, found: &[f32]) -> f64 {
        let [gate, up, down] = &self.linears;
        let x = oracle::widen(&self.x);
        let narrowed = |y: Vec<f64>| y.into_iter().map(|y| y as f32).collect::<Vec<f32>>();
        let gate = narrowed(oracle::linear(gate, &x));
        let up = narrowed(oracle::linear(up, &x));
        let gated = oracle::gate(activation, &gate, &up);
        let y = oracle::linear(down, &gated);
        let expected = oracle::store(Store::Add { scale: 0.5 }, &self.old, &y);
        oracle::worst_error(found, &expected, down.out_features)
    }
}
