//! Which linears the suite multiplies by.

use oxllama_format::DType;

use super::weights::{LinearCase, Region, Stored};
use crate::NormKind;

/// The bit widths of the format.
const WIDTHS: [u32; 6] = [8, 6, 5, 4, 3, 2];

/// A linear without a bias.
pub(super) fn plain(stored: Stored, in_features: usize, out_features: usize) -> LinearCase {
    LinearCase {
        stored,
        in_features,
        out_features,
        bias: false,
    }
}

/// The same linears with biases.
pub(super) fn with_bias<C: AsMut<[LinearCase]>>(mut linears: C) -> C {
    linears
        .as_mut()
        .iter_mut()
        .for_each(|linear| linear.bias = true);
    linears
}

/// An EXL2 linear that these regions make up.
pub(super) fn exl2(
    regions: Vec<Region>,
    out_features: usize,
    permutation_seed: Option<u64>,
) -> LinearCase {
    let in_features = regions.iter().map(|region| region.rows).sum();
    let stored = Stored::Exl2 {
        regions,
        permutation_seed,
    };
    plain(stored, in_features, out_features)
}

/// Rows of one bit width.
pub(super) fn region(bits: u32, rows: usize, group_size: usize) -> Region {
    Region {
        bits,
        rows,
        group_size,
    }
}

/// Plain weights that fit fp16.
pub(super) fn float(dtype: DType) -> Stored {
    Stored::Float {
        dtype,
        beyond_f16: false,
    }
}

/// A typical matrix of a 4-bit model: a twentieth of the inputs with more bits.
pub(super) fn typical(
    in_features: usize,
    out_features: usize,
    permutation_seed: u64,
) -> LinearCase {
    let regions = vec![
        region(6, 32, 32),
        region(5, 64, 64),
        region(4, in_features - 96, 128),
    ];
    exl2(regions, out_features, Some(permutation_seed))
}

/// Every linear that is tried by itself, with what is special about it.
pub(super) fn table() -> Vec<(String, LinearCase)> {
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
    add("F16 wide".to_owned(), float(DType::F16), 16_900, 33);
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
    // So few inputs for so many warps that each has only a block or two of one width.
    for in_features in [544, 576, 1120] {
        let words = format!("EXL2, short ranges of {in_features}");
        add(words, typical(in_features, 96, 11));
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
    // A worker's share of so many inputs is more than a few groups.
    add("EXL2 wide".to_owned(), typical(11_008, 64, 8));
    // So many outputs that a worker of a large GPU has several of their tiles.
    add("EXL2 many outputs".to_owned(), typical(1024, 6304, 9));
    cases
}

/// The linears that are tried with the rows of a prompt.
pub(super) fn many_rows() -> Vec<(&'static str, LinearCase)> {
    let gptq = Stored::Gptq {
        group_size: 64,
        act_order: true,
    };
    // Sections that end within a pair of blocks, groups of one block, and a last block alone.
    let uneven = [
        (8, 32, 32),
        (6, 64, 32),
        (5, 96, 64),
        (4, 160, 128),
        (3, 32, 32),
        (2, 96, 32),
    ];
    let uneven = uneven.map(|(bits, rows, group_size)| region(bits, rows, group_size));
    vec![
        ("EXL2", typical(288, 160, 31)),
        (
            "EXL2 of more tiles than one block has",
            typical(320, 800, 32),
        ),
        ("EXL2 all six widths", exl2(uneven.to_vec(), 288, Some(33))),
        ("EXL2 in order", exl2(vec![region(3, 224, 128)], 64, None)),
        ("EXL2 one block", exl2(vec![region(5, 32, 32)], 32, None)),
        ("GPTQ", plain(gptq, 192, 72)),
        ("F16", plain(float(DType::F16), 96, 64)),
        ("F16 of odd extents", plain(float(DType::F16), 50, 37)),
        ("BF16", plain(float(DType::BF16), 576, 290)),
    ]
}

/// Linears that read one input.
pub(super) struct SharedInput {
    /// What is special about them.
    pub(super) words: &'static str,
    /// The formula, and whether it has a bias.
    pub(super) norm: Option<(NormKind, bool)>,
    /// All of the same width of input.
    pub(super) linears: Vec<LinearCase>,
}

/// Every set of linears that is multiplied by one input.
pub(super) fn shared_inputs() -> Vec<SharedInput> {
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
    let biased = |stored, out_features| LinearCase {
        bias: true,
        ..plain(stored, 192, out_features)
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
                biased(float(DType::BF16), 50),
                biased(gptq, 96),
                typical(192, 64, 17),
            ],
        ),
        input(
            "plain",
            rms,
            vec![
                biased(float(DType::F16), 193),
                biased(float(DType::F16), 37),
            ],
        ),
    ]
}
