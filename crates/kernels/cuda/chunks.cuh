// Rows of activations in chunks of 64 inputs, as `linear_many.cu` multiplies them.
#pragma once

#include "common.cuh"

namespace oxl {

constexpr int CHUNK_INPUTS = 64;

// The input at a stored place, and the place of an input: both are this exchange within a block of 32 (tiles.cuh).
// A lane of a warp has inputs 8 t .. 8 t + 7 in pairs p, where the tensor core's A has pairs p of all t after each
// other.
__device__ __forceinline__ constexpr int chunk_place(int at) {
    return (at & ~31) | (at & 1) | (at >> 1 & 3) << 3 | (at >> 3 & 3) << 1;
}

// Where the stored place `at` of a row lies, in halves, in rows that are `row_stride` to a chunk.
__device__ __forceinline__ int64_t chunk_offset(int row, int at, int row_stride) {
    const int piece = (at >> 3 & 7) ^ (row & 7);
    return (int64_t(at / CHUNK_INPUTS) * row_stride + row) * CHUNK_INPUTS + piece * 8 + (at & 7);
}

}  // namespace oxl
