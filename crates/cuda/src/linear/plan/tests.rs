//! How products are divided.

use super::*;

/// Dynamic shared memory of CTAs of compute capabilities 8.6, 8.0 and 9.0.
const SHARED_BYTES: [usize; 3] = [97 * 1024, 161 * 1024, 225 * 1024];

#[test]
fn every_block_belongs_to_one_warp() {
    for shared_bytes in SHARED_BYTES {
        for blocks in [1, 2, 3, 5, 18, 31, 64, 128, 344, 896, 65_535] {
            let plan = Plan::of(blocks, shared_bytes);
            assert!(plan.ranges.is_power_of_two() && plan.ranges <= MOST_WARPS);
            let mut next = 0;
            for range in 0..plan.ranges {
                assert_eq!(plan.range_start(range), next);
                let end = plan.range_start(range + 1);
                assert!(end > next && end - next <= plan.range_blocks);
                next = end;
            }
            assert_eq!(next, blocks);
            assert!(blocks * plan.ranges < i32::MAX as usize);
        }
    }
}

#[test]
fn launches_fit_and_take_all_rows() {
    for shared_bytes in SHARED_BYTES {
        let is_hopper = shared_bytes == SHARED_BYTES[2];
        let limits = Limits {
            shared_bytes,
            multiprocessors: 100,
            is_hopper,
            clusters: if is_hopper { 11 } else { 0 },
        };
        for blocks in [1, 2, 18, 64, 128, 344, 896, 1664] {
            let plan = Plan::of(blocks, shared_bytes);
            for (matrices, tiles) in [(1, 1), (3, 384), (MOST_MATRICES, 5000)] {
                for all in [1, 7, 8, 9, 16, 17, 24, 25, 32, 33, 64, 100, 128] {
                    let mut left = all;
                    while left > 0 {
                        let shape = LaunchShape {
                            rows: left,
                            matrices,
                            tiles,
                            range_units: plan.range_blocks,
                            is_gated: false,
                        };
                        // Those that do not fit together are multiplied one by one.
                        let alone = LaunchShape {
                            matrices: 1,
                            ..shape
                        };
                        let division = plan
                            .divide(shape, limits)
                            .or_else(|| plan.divide(alone, limits))
                            .unwrap();
                        check(&plan, &division, limits);
                        left -= division.rows;
                    }
                }
            }
        }
    }
}

fn check(plan: &Plan, division: &Division, limits: Limits) {
    assert!((1..=ROWS_OF_LAUNCH).contains(&division.rows));
    assert!(division.shared_bytes <= limits.shared_bytes, "{division:?}");
    assert!((1..=MOST_WARPS).contains(&division.warps));
    match division.kind {
        Kind::Few { tile_buffers } => {
            assert!(division.rows <= ROWS_OF_TILE && division.warps == plan.ranges);
            assert!((1..=MOST_TILE_BUFFERS).contains(&tile_buffers));
        }
        Kind::Parts {
            in_cluster,
            parts,
            part_blocks,
        } => {
            if in_cluster {
                assert!((1..=limits.clusters).contains(&division.shares));
                assert_eq!(parts, CLUSTER_PARTS);
                assert_eq!(plan.ranges, CLUSTER_PARTS * CLUSTER_RANGES);
            }
            assert!(parts.is_power_of_two() && parts <= plan.ranges);
            assert!(plan.ranges / parts <= MOST_PART_RANGES);
            assert!(division.rows <= 8 || division.warps <= 12);
            assert!(division.rows <= 16 || limits.is_hopper || division.warps <= 8);
            for part in 0..parts {
                let start = plan.blocks * part / parts;
                let end = plan.blocks * (part + 1) / parts;
                assert_eq!(start, plan.range_start(part * plan.ranges / parts));
                assert!(end - start <= part_blocks);
            }
        }
    }
}

#[test]
fn usual_shapes_are_divided_as_the_kernels_were_made_for() {
    let limits = Limits {
        shared_bytes: SHARED_BYTES[2],
        multiprocessors: 132,
        is_hopper: true,
        clusters: 0,
    };
    let divide = |blocks, tiles, rows, is_gated, limits: Limits| {
        let plan = Plan::of(blocks, limits.shared_bytes);
        let shape = LaunchShape {
            rows,
            matrices: if is_gated { 2 } else { 1 },
            tiles,
            range_units: plan.range_blocks.div_ceil(4),
            is_gated,
        };
        plan.divide(shape, limits)
    };
    let division = |blocks, tiles, rows, limits| {
        let division = divide(blocks, tiles, rows, false, limits).unwrap();
        match division.kind {
            Kind::Few { .. } => (division.rows, division.warps, 0),
            Kind::Parts {
                in_cluster: true, ..
            } => (division.rows, division.warps, division.shares * 100),
            Kind::Parts { parts, .. } => (division.rows, division.warps, parts),
        }
    };
    assert_eq!(division(128, 384, 1, limits), (1, 16, 0));
    assert_eq!(division(128, 384, 8, limits), (8, 16, 0));
    assert_eq!(division(344, 128, 8, limits), (8, 16, 16));
    assert_eq!(division(128, 384, 16, limits), (16, 12, 4));
    assert_eq!(division(128, 384, 32, limits), (32, 12, 4));
    assert_eq!(division(128, 128, 32, limits), (32, 12, 8));
    assert_eq!(division(344, 128, 32, limits), (32, 12, 8));
    assert_eq!(division(688, 256, 32, limits), (32, 12, 16));
    assert_eq!(division(128, 384, 33, limits), (17, 12, 4));
    let limits = Limits {
        clusters: 15,
        ..limits
    };
    assert_eq!(division(128, 384, 8, limits), (8, 16, 0));
    assert_eq!(division(344, 128, 8, limits), (8, 16, 16));
    // A cluster has 26 tiles: three rounds of twelve warps. With 33 shares of four parts it would be one of twice
    // as many blocks, and sums in memory.
    assert_eq!(division(128, 384, 32, limits), (32, 12, 1500));
    assert_eq!(division(128, 688, 32, limits), (32, 12, 1500));
    assert_eq!(division(128, 128, 32, limits), (32, 9, 1500));
    assert_eq!(division(64, 8, 32, limits), (32, 1, 800));
    let gated = |blocks, tiles, rows, limits| {
        let division = divide(blocks, tiles, rows, true, limits)?;
        Some((
            division.warps,
            matches!(
                division.kind,
                Kind::Parts {
                    in_cluster: true,
                    ..
                }
            ),
        ))
    };
    assert_eq!(gated(128, 688, 8, limits), Some((16, false)));
    assert_eq!(gated(128, 688, 9, limits), Some((12, true)));
    assert_eq!(gated(128, 688, 16, limits), Some((12, true)));
    assert_eq!(gated(128, 688, 17, limits), None);
    // Thirty tiles of each are six rounds instead of five.
    assert_eq!(gated(128, 896, 16, limits), None);
    // As the conformance suite's, here and on a small GPU.
    let small = Limits {
        clusters: 2,
        ..limits
    };
    for limits in [limits, small] {
        assert_eq!(gated(32, 624, 9, limits), Some((12, true)));
    }
    // Its rows leave room for four warps.
    assert_eq!(division(688, 256, 32, limits), (32, 12, 16));
}

#[test]
fn what_leaves_no_room_is_not_divided() {
    let limits = Limits {
        shared_bytes: SHARED_BYTES[2],
        multiprocessors: 132,
        is_hopper: true,
        clusters: 16,
    };
    let plan = Plan::of(65_535, limits.shared_bytes);
    assert!(!plan.can_be_divided(plan.range_blocks, limits));
    let plan = Plan::of(6_000, limits.shared_bytes);
    assert!(plan.can_be_divided(plan.range_blocks / 4, limits));
}

#[test]
fn every_tile_has_room_for_all_its_parts() {
    assert_eq!(most_partials(1), 5 * MOST_WARPS);
    assert_eq!(most_partials(128_256), MOST_PARTIALS);
    assert!(most_partials(0) >= MOST_WARPS);
    assert_eq!(partial_bytes(1), 8 * 128);
    assert_eq!(partial_bytes(2048), 32 * 128);
}
