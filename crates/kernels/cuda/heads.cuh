// How a head of a query or a key is normed and rotated before it is used or kept.
//
// One warp a head: lane i holds elements i, i + 32, ... as PARTS numbers, zeros from head_dim on.
// Who prepares a head does not change its bits: sums are trees over the same lanes, and what the
// compiler could join or not, the code says.
#pragma once

#include "pages.cuh"
#include "rows.cuh"

namespace oxl {

// How elements form pairs: 2 is interleaved.
constexpr int32_t ROPE_NONE = 0;
constexpr int32_t ROPE_HALVES = 1;

// How one kind of heads is normed.
struct HeadNorm {
    // f32 [head_dim] of this head; null: not normed.
    const float* weight;
    float epsilon;
    // NORM_RMS or NORM_LAYER.
    int32_t kind;
};

template <int PARTS>
__device__ __forceinline__ void normalize(float (&x)[PARTS], HeadNorm norm, int head_dim,
                                          int lane) {
    float mean = 0.0f;
    if (norm.kind == NORM_LAYER) {
        float sum = 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) sum = __fadd_rn(sum, x[part]);
        mean = __fdiv_rn(warp_sum(sum), float(head_dim));
    }
    float squares = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const float difference = __fsub_rn(x[part], mean);
        if (part * GROUP + lane < head_dim) squares = __fmaf_rn(difference, difference, squares);
    }
    const float mean_square = __fdiv_rn(warp_sum(squares), float(head_dim));
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean_square, norm.epsilon)));
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int element = part * GROUP + lane;
        if (element < head_dim) {
            const float scaled = __fmul_rn(__fsub_rn(x[part], mean), scale);
            x[part] = __fmul_rn(scaled, norm.weight[element]);
        }
    }
}

// How heads are rotated.
struct RopePairs {
    int32_t style;
    // Rotated pairs of a head.
    int32_t pairs;
};

// The cosines and sines of the lane's elements in one row.
template <int PARTS>
struct RowAngles {
    float cosines[PARTS];
    float sines[PARTS];

    // From f32 [2, angle_pairs]: cosines, then sines.
    __device__ __forceinline__ void load(const float* row, int angle_pairs, RopePairs rope,
                                         int lane) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int element = part * GROUP + lane;
            if (element < 2 * rope.pairs) {
                const bool is_second = element >= rope.pairs;
                const int pair = rope.style == ROPE_HALVES
                                     ? element - (is_second ? rope.pairs : 0)
                                     : element / 2;
                cosines[part] = __ldcg(row + pair);
                sines[part] = __ldcg(row + angle_pairs + pair);
            }
        }
    }
};

// Rotates the pairs of a head, which shared memory holds too: each element needs its partner.
template <int PARTS>
__device__ __forceinline__ void rotate_pairs(float (&x)[PARTS], const float* head,
                                             const RowAngles<PARTS>& angles, RopePairs rope,
                                             int lane) {
    const bool halves = rope.style == ROPE_HALVES;
    const int distance = halves ? rope.pairs : 1;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int element = part * GROUP + lane;
        if (element < 2 * rope.pairs) {
            const bool is_first = halves ? element < rope.pairs : element % 2 == 0;
            const float other = head[is_first ? element + distance : element - distance];
            const float along = __fmul_rn(x[part], angles.cosines[part]);
            const float across = __fmul_rn(other, angles.sines[part]);
            x[part] = is_first ? __fsub_rn(along, across) : __fadd_rn(along, across);
        }
    }
}

// A query's element as fp16; not a number stays none.
__device__ __forceinline__ __half limited_half(float x) {
    return __float2half_rn(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

}  // namespace oxl
