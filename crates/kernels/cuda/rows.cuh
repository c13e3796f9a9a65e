// What the row-wise kernels share: loads of four, sums over a block, activations.
//
// A number depends on its own row alone, and kernels that compute the same one give the same
// bits: wherever the compiler could join a product and a sum or not, the code says which.
#pragma once

#include "common.cuh"

namespace oxl {

constexpr int NORM_RMS = 0;
constexpr int NORM_LAYER = 1;

constexpr int ACTIVATION_SILU = 0;
constexpr int ACTIVATION_GELU_TANH = 1;
constexpr int ACTIVATION_GELU_ERF = 2;

// Most threads of a block that owns a row.
constexpr int MOST_ROW_THREADS = 1024;

// The standard's macro is missing under NVRTC.
__device__ __forceinline__ float negative_infinity() {
    return __int_as_float(int(0xff800000u));
}

struct Four {
    float at[4];
};

// Elements `first..first + 4` of `row`, zeros from `width` on. `first` is a multiple of 4, and
// the row begins at a multiple of 16 bytes if its width is one of four elements.
__device__ __forceinline__ Four load_four(const float* row, int first, int width) {
    Four four = {};
    if (width % 4 == 0) {
        if (first < width) {
            const float4 loaded = *reinterpret_cast<const float4*>(row + first);
            four = {{loaded.x, loaded.y, loaded.z, loaded.w}};
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i < width) four.at[i] = row[first + i];
        }
    }
    return four;
}

// The way back of `load_four`.
__device__ __forceinline__ void store_four(float* row, int first, int width, const Four& four) {
    if (width % 4 == 0) {
        if (first < width) {
            *reinterpret_cast<float4*>(row + first) =
                make_float4(four.at[0], four.at[1], four.at[2], four.at[3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i < width) row[first + i] = four.at[i];
        }
    }
}

// The sum of all lanes' numbers, in every lane: always the same tree.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = WARP_LANES / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    }
    return x;
}

// The sum of all threads' numbers, in every thread; passes one barrier. `partials` is shared
// memory of this sum alone. The order depends on the number of threads, whole warps, alone.
__device__ __forceinline__ float block_sum(float x, float (&partials)[WARP_LANES]) {
    const int lane = threadIdx.x % WARP_LANES;
    const int warp = threadIdx.x / WARP_LANES;
    x = warp_sum(x);
    if (lane == 0) partials[warp] = x;
    __syncthreads();
    // Every warp adds the warps' sums for itself, which saves a second barrier.
    return warp_sum(lane < int(blockDim.x) / WARP_LANES ? partials[lane] : 0.0f);
}

// 1 / sqrt(mean square + epsilon), within 3 units in the last place.
__device__ __forceinline__ float norm_scale(float square_sum, float inverse_width, float epsilon) {
    return rsqrtf(__fmaf_rn(square_sum, inverse_width, epsilon));
}

// What rounds to infinity comes back to the largest number; NaN passes.
__device__ __forceinline__ __half2 clamped_half2(float low, float high) {
    const __half2 most = __float2half2_rn(65504.0f);
    return __hmax2_nan(__hmin2_nan(__floats2half2_rn(low, high), most), __hneg2(most));
}

// SiLU and GELU's tanh, as the reference defines them: x times a number from 0 to 1 that does not cancel.
__device__ __forceinline__ float activate_by_exponent(int activation, float x) {
    float exponent = -x;
    if (activation == ACTIVATION_GELU_TANH) {
        // 0.5 (1 + tanh z) = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
        constexpr float MINUS_2_SQRT_2_OVER_PI = -1.5957691f;
        const float square = __fmul_rn(x, x);
        const float inner = __fmul_rn(x, __fmaf_rn(0.044715f, square, 1.0f));
        exponent = __fmul_rn(MINUS_2_SQRT_2_OVER_PI, inner);
    }
    // An infinite power gives -0, as it should.
    return __fdividef(x, __fadd_rn(1.0f, expf(exponent)));
}

// Any of them; erf's likewise.
__device__ __forceinline__ float activate(int activation, float x) {
    if (activation == ACTIVATION_GELU_ERF) {
        constexpr float INVERSE_SQRT_2 = 0.70710678f;
        return __fmul_rn(__fmul_rn(0.5f, x), erfcf(__fmul_rn(-INVERSE_SQRT_2, x)));
    }
    return activate_by_exponent(activation, x);
}

// activation(gate) * up, of other activations than erf's. What products leave gated is this.
__device__ __forceinline__ float gated_product(int activation, float gate, float up) {
    return __fmul_rn(activate_by_exponent(activation, gate), up);
}

}  // namespace oxl
