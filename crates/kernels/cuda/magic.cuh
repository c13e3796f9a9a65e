// How bit fields become fp16 numbers without a conversion: a code below the bits of 1024, at bit f of a half, is
// 1024 + code 2^f.
#pragma once

#include "common.cuh"

namespace oxl {

// 1024 in both halves of a word: a code beside it, at bit f, makes 1024 + code 2^f.
constexpr uint32_t MAGIC = 0x64006400u;

// What brings 1024 + code 2^f down to code - zero, once it is multiplied by 2^-f: for both halves of a word.
__device__ __forceinline__ constexpr uint32_t magic_offset(int f, uint32_t zero) {
    return (0xe400u - (uint32_t(f) << 10) + (zero << f)) * 0x10001u;
}

// A pair of 1024 + code 2^f as weights: f16((code - zero) * scale), rounded once, as the formats define it. The
// matrix' own `scale` is left to the product.
__device__ __forceinline__ uint32_t finished(uint32_t pair, int f, uint32_t offset,
                                             uint32_t factor) {
    const uint32_t down = ((15u - f) << 10) * 0x10001u;
    return times(times_plus(pair, down, offset), factor);
}

}  // namespace oxl
