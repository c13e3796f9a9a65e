// What the kernels that multiply weights as they are stored have in common: their arguments and the
// sums of a warp.
//
// Order of sums: within a unit (units.cuh) in the tensor core (weights less their zero point, exact in
// fp16), units in order with acc += scale * part, ranges of K in pairs, pairs of pairs and so on. All
// of it depends on the matrix and the device alone: a row's bits do not depend on the other rows
// nor on their number, and so not on the kernel either.
#pragma once

#include "tiles.cuh"

namespace oxl {

constexpr int MOST_MATRICES = 5;

constexpr int ROWS_OF_TILE = 8;

// Warps of a block of threads, at most.
constexpr int MOST_WARPS = 16;

}  // namespace oxl

// One matrix of a launch.
struct LinearMatrix {
    oxl::TileMatrix matrix;
    const __half* x;     // [rows, 32 * blocks], in the matrix' packed order
    const float* bias;   // [out_features], or null
    float* out;          // [rows, out_features]
    int32_t out_features;
    int32_t first_item;  // of the launch's column tiles
    int32_t reserved[2];
};

// All matrices have the same number of blocks. Scalars come first: parameters that lie together are
// fetched together.
struct LinearArgs {
    float* partials;     // [items, 2^parts_shift, rows up to a multiple of 8, TILE_OUTPUTS]
    uint32_t* counters;  // [items], zero before and after every launch
    __half* gated;       // of gated products: [rows, outputs of gate], in the next linear's order
    const uint32_t* gated_places;  // the place of each output there; null: its own
    int32_t matrix_count;
    int32_t rows;
    int32_t accumulate;  // 0: out = y; 1: out += store_scale * y
    float store_scale;
    int32_t ranges_shift;  // K is cut into 2^ranges_shift ranges
    int32_t first_item;    // of the column tiles of all matrices
    int32_t items;         // of this launch
    int32_t blocks;        // of K
    int32_t range_blocks;  // of the longest range
    int32_t range_units;   // of the range that has most of them, of all matrices
    int32_t tile_buffers;  // of `oxl_linear_few`: tiles whose sums have room in shared memory
    int32_t parts_shift;   // of `oxl_linear_..`: 2^parts_shift CTAs share a tile's K
    int32_t part_blocks;   // of the longest part of K
    int32_t gate;          // of gated products: ACTIVATION_...
    LinearMatrix matrices[oxl::MOST_MATRICES];
};

namespace oxl {

// Sums of a lane: [row tile][m-tile][fragment], the fragment's rows 2 t and 2 t + 1 of output
// 16 m + g, then of output 16 m + g + 8.
template <int ROW_TILES>
using Sums = float[ROW_TILES][2][4];

// part += weights * activations over one block and 8 rows.
__device__ __forceinline__ void multiply_block(const LaneWeights& weights, const uint4& x,
                                               float (&part)[2][4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const auto& low = weights.pairs[2 * m];
        const auto& high = weights.pairs[2 * m + 1];
        multiply(part[m], low[0], high[0], low[1], high[1], x.x, x.y);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const auto& low = weights.pairs[2 * m];
        const auto& high = weights.pairs[2 * m + 1];
        multiply(part[m], low[2], high[2], low[3], high[3], x.z, x.w);
    }
}

// sums += scales * part
template <int ROW_TILES>
__device__ __forceinline__ void add_scaled(const float (&scales)[4], const Sums<ROW_TILES>& part,
                                           Sums<ROW_TILES>& sums) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& sum = sums[tile][m][i];
                sum = fmaf(scales[2 * m + i / 2], part[tile][m][i], sum);
            }
        }
    }
}

__device__ __forceinline__ float plus(float a, float b) { return a + b; }

__device__ __forceinline__ float4 plus(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The sum of `count` numbers, a power of two up to MOST_WARPS: neighbours, then neighbouring pairs and
// so on, so that any aligned run of them may be summed elsewhere.
template <typename Number>
__device__ __forceinline__ auto sum_pairs(int count, Number number) {
    const auto sum_four = [&](int first) {
        auto sum = number(first);
        if (count > 1) sum = plus(sum, number(first + 1));
        if (count > 2) sum = plus(sum, plus(number(first + 2), number(first + 3)));
        return sum;
    };
    static_assert(MOST_WARPS == 16, "up to four fours");
    auto sum = sum_four(0);
    if (count > 4) sum = plus(sum, sum_four(4));
    if (count > 8) sum = plus(sum, plus(sum_four(8), sum_four(12)));
    return sum;
}

// The same in all lanes, which the compiler cannot see in a thread's number.
__device__ __forceinline__ int warp_number() {
    return __shfl_sync(0xffffffffu, threadIdx.x / WARP_LANES, 0);
}

}  // namespace oxl
