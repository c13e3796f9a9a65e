// Products of parts of K: what the kernels have in common that join a part's sums in memory (linear_parts.cu) and in a cluster
// (linear_cluster.cu).
//
// 32 rows of activations are four times a tile's 4-bit weights, so they must not be fetched for every tile. That is
// what decides how the work is divided: K is cut into *parts* of up to four ranges, so short that their activations of
// all rows lie in a multiprocessor's shared memory. A block of threads (CTA) has one part and goes through an equal,
// contiguous share of all column tiles; each warp multiplies tiles of its own, with nobody to wait for.
#pragma once

#include "units.cuh"

namespace oxl {

// What all warps of a CTA multiply of the tiles of `count` matrices from `first` on: units of all the part's ranges. A
// warp brings those of one range of a matrix, so that memory is waited for once, by all.
__device__ __forceinline__ void load_parts(const LinearArgs& args, int first, int count,
                                           int first_range, int ranges, Unit* units,
                                           int matrix_units, WarpRange* parts) {
    const int lane = lane_number();
    const int warps = blockDim.x / WARP_LANES;
#pragma unroll 1
    for (int task = warp_number(); task < count * ranges; task += warps) {
        const int index = first + task / ranges;
        const int own = task % ranges;
        const uint4* table = args.matrices[index].matrix.range_table;
        const uint2* from = reinterpret_cast<const uint2*>(table + (1 << args.ranges_shift)) +
                            (first_range + own) * args.range_blocks;
        const uint4 range = __ldg(table + first_range + min(lane, ranges - 1));
        const uint2 unit = __ldg(from + min(lane, args.range_blocks - 1));
        WarpRange sum = {0, int(__shfl_sync(0xffffffffu, range.y, 0)), 0, 0};
        uint2* to = nullptr;
        int own_units = 0;
#pragma unroll 1
        for (int i = 0; i < ranges; ++i) {
            const int here = int(__shfl_sync(0xffffffffu, range.x, i));
            if (i == own) {
                to = reinterpret_cast<uint2*>(units + index * matrix_units + sum.units);
                own_units = here;
            }
            sum.units += here;
            sum.bytes += int(__shfl_sync(0xffffffffu, range.z, i));
        }
        if (lane < own_units) to[lane] = unit;
#pragma unroll 1
        for (int i = lane + WARP_LANES; i < own_units; i += WARP_LANES) to[i] = __ldg(from + i);
        if (own == 0 && lane == 0) parts[index] = sum;
    }
}

// Copies the activations of a part, whose blocks are counted here: there are no registers to keep them in. Rows past
// the last are copies of the last: their sums are not stored.
template <int ROWS>
__device__ __forceinline__ void copy_rows(const LinearArgs& args, const __half* x, int part,
                                          char* places) {
    const int block = args.blocks * part >> args.parts_shift;
    const int count = (args.blocks * (part + 1) >> args.parts_shift) - block;
    const int stride = args.blocks * BLOCK_INPUTS;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(x + block * BLOCK_INPUTS);
#pragma unroll 4
    for (int piece = threadIdx.x; piece < count * ROWS * 4; piece += blockDim.x) {
        const int row = piece / 4 % ROWS;
        const int64_t at = int64_t(min(row, args.rows - 1)) * stride * sizeof(__half) +
                           piece / (4 * ROWS) * ROW_BLOCK_BYTES + piece % 4 * PIECE_BYTES;
        copy_async(shared_address(places + piece * PIECE_BYTES), from + at);
    }
    commit_copies();
    wait_for_copies<0>();
}

// A warp's sums in memory: float4 [fours, lanes].
template <int ROW_TILES>
struct SumsInMemory {
    static constexpr int FOURS = 2 * ROW_TILES;

    // `visit(float4 of the sums, its place)`, for the lane that `first` is the place of.
    template <typename Four, typename Visit>
    static __device__ __forceinline__ void each(Sums<ROW_TILES>& sums, Four* first, Visit visit) {
#pragma unroll
        for (int i = 0; i < FOURS; ++i) visit(sums[i / 2][i % 2], first + i * WARP_LANES);
    }
};

__device__ __forceinline__ float4 four_of(const float (&sums)[4]) {
    return make_float4(sums[0], sums[1], sums[2], sums[3]);
}

__device__ __forceinline__ void set_four(float (&sums)[4], const float4& four) {
    sums[0] = four.x;
    sums[1] = four.y;
    sums[2] = four.z;
    sums[3] = four.w;
}

// Takes note of the sums of range `number` of a part; those of the last become the part's. Sums of pairs,
// and of pairs of pairs, wait in shared memory for their neighbours: `waiting` is the lane's place there.
template <int ROW_TILES>
__device__ __forceinline__ void take_range(Sums<ROW_TILES>& sums, int number, int ranges,
                                           float4* waiting) {
    using Memory = SumsInMemory<ROW_TILES>;
#pragma unroll 1
    for (int left = number; left % 2 == 1; left /= 2) {
        Memory::each(sums, waiting, [](float(&four)[4], const float4* place) {
            set_four(four, plus(*place, four_of(four)));
        });
        waiting += Memory::FOURS * WARP_LANES;
    }
    if (number < ranges - 1) {
        Memory::each(sums, waiting, [](float(&four)[4], float4* place) { *place = four_of(four); });
    }
}

// The sums of a tile over the part, in `stream.sums`. `between()` is called whenever those of a range, but the last, lie
// in shared memory.
template <int ROW_TILES, bool IS_GATED, typename Between>
__device__ __forceinline__ void multiply_part(Stream<ROW_TILES, IS_GATED>& stream, const Unit* unit,
                                              const Unit* units_end, int ranges,
                                              const char* x_lane, float4* waiting,
                                              Between between) {
    stream.x.next = x_lane;
    clear<ROW_TILES>(stream.sums);
    int range = 0;
#pragma unroll 1
    while (unit != units_end) {
        const Unit* run_end = stream.multiply(unit);
        if (ends_range(run_end[-1].shape)) {
            take_range<ROW_TILES>(stream.sums, range, ranges, waiting);
            if (++range < ranges) {
                between();
                clear<ROW_TILES>(stream.sums);
            }
        }
        unit = run_end;
    }
}

// The first tile from `item` on whose matrix multiplies other rows than `item`'s, or `item_end`.
__device__ __forceinline__ int end_of_rows(const LinearArgs& args, int item, int item_end) {
    int index = matrix_of(args, item);
    const __half* rows = args.matrices[index].x;
#pragma unroll 1
    do {
        item = args.matrices[index].first_item + args.matrices[index].matrix.tiles;
        ++index;
    } while (item < item_end && args.matrices[index].x == rows);
    return min(item, item_end);
}

// How many matrices from `first_index` on have tiles before `item_end`: one at least.
__device__ __forceinline__ int matrices_until(const LinearArgs& args, int first_index, int item_end) {
    int end = first_index;
#pragma unroll 1
    do {
        ++end;
    } while (end < args.matrix_count && args.matrices[end].first_item < item_end);
    return end - first_index;
}

// A warp of a CTA that has a part of K.
struct PartWarp {
    int part;
    int warp;
    int first_item;  // of the CTA
    char* memory;    // shared memory of the CTA's `Exchange`s
    char* rest;      // and what lies behind all else
};

// What a warp does with a tile's sums of its part is an `Exchange`'s matter, made for a `PartWarp`:
//   IS_GATED                    whether the matrices are gate and up: a warp has the same tiles of both, first those of gate
//   bytes(warps)                of a CTA's shared memory
//   part_ranges(memory, warps)  room for what the part has of each matrix
//   meet()                      before earlier kernels are waited for
//   between()                   when a range of a tile, but the last, is done, and the sums lie in shared memory
//   after(sums, has_tile, item) when a tile is done, and once more, when there is none
template <int ROW_TILES, typename Exchange>
__device__ __forceinline__ void linear_parts(const LinearArgs& args) {
    constexpr int ROWS = ROW_TILES * ROWS_OF_TILE;
    constexpr int BLOCK_BYTES = ROWS * ROW_BLOCK_BYTES;
    DYNAMIC_SHARED(char, shared, 128);
    dependency_trigger();
    const int warp = warp_number();
    const int lane = lane_number();
    const int warps = blockDim.x / WARP_LANES;
    const int part = int(blockIdx.x) & ((1 << args.parts_shift) - 1);
    const int share = int(blockIdx.x) >> args.parts_shift;
    const int shares = int(gridDim.x) >> args.parts_shift;
    const int items = Exchange::IS_GATED ? args.items / 2 : args.items;
    const int first_item = args.first_item + items * share / shares;
    int item_end = args.first_item + items * (share + 1) / shares;
    const int count = item_end - first_item;
    // Of up.
    if (Exchange::IS_GATED) item_end += items;
    const int ranges = 1 << (args.ranges_shift - args.parts_shift);

    // Sums that wait for their neighbours: of one, two or no ranges.
    const int warp_fours = ranges / 2 * SumsInMemory<ROW_TILES>::FOURS * WARP_LANES;
    char* exchanged = shared + warps * SLOTS * SLOT_BYTES;
    WarpRange* part_of = Exchange::part_ranges(exchanged, warps);
    auto* all_waiting = reinterpret_cast<float4*>(exchanged + Exchange::bytes(warps));
    char* x = reinterpret_cast<char*>(all_waiting + warps * warp_fours);
    Unit* units = reinterpret_cast<Unit*>(x + args.part_blocks * BLOCK_BYTES);
    const int matrix_units = ranges * args.range_units;
    char* rest = reinterpret_cast<char*>(units + args.matrix_count * matrix_units);
    Exchange exchange(args, PartWarp{part, warp, first_item, exchanged, rest});
    const int first_index = matrix_of(args, first_item);
    const int matrices = matrices_until(args, first_index, item_end);
    load_parts(args, first_index, matrices, part * ranges, ranges, units, matrix_units, part_of);
    __syncthreads();
    char* ring = shared + warp * SLOTS * SLOT_BYTES;
    Stream<ROW_TILES, Exchange::IS_GATED> stream = {args, ring, units, part_of, matrix_units, lane, item_end};
    stream.x.block_bytes = BLOCK_BYTES;
    stream.slot = 0;
    stream.cursor.stride = warps;
    int item = first_item + warp;
    if (Exchange::IS_GATED) {
        // The warp's first item past those of gate is none of its own; from there to its first of up.
        const int gates = max((count - warp + warps - 1) / warps, 0) * warps;
        stream.gate_end = item + gates;
        stream.skip = items - gates;
        if (gates == 0) item = item_end;
    }
    stream.start(item, first_index);
    exchange.meet();
    dependency_wait();

    const char* x_lane = x + lane * PIECE_BYTES;
    float4* waiting = all_waiting + warp * warp_fours + lane;
    // The end of the tiles whose activations are there.
    int x_end = first_item;
    // Once for each of the warp's tiles, and once more for what is left of the last.
#pragma unroll 1
    for (;;) {
        while (item >= x_end && x_end < item_end) {
            // Not before all are past the activations that are there.
            if (x_end != first_item) __syncthreads();
            const __half* rows = args.matrices[matrix_of(args, x_end)].x;
            copy_rows<ROWS>(args, rows, part, x);
            __syncthreads();
            x_end = end_of_rows(args, x_end, item_end);
        }
        const bool has_tile = item < item_end;
        if (has_tile) {
            const int index = matrix_of(args, item);
            const Unit* unit = units + index * matrix_units;
            multiply_part(stream, unit, unit + part_of[index].units, ranges, x_lane, waiting,
                          [&] { exchange.between(); });
        }
        exchange.after(stream.sums, has_tile, item);
        if (!has_tile) return;
        item += warps;
        if (Exchange::IS_GATED && item == stream.gate_end) item += stream.skip;
    }
}

}  // namespace oxl
