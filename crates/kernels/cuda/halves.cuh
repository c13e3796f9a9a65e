// How a warp takes half of a column tile's weights apart (tiles.cuh): the outputs {g, g + 8} or
// {g + 16, g + 24}, which are one A operand of 16 x 16 a step.
//
// Fields of the second half are shifted to where those of the first lie, so that both are taken apart alike.
#pragma once

#include "bulk.cuh"
#include "tiles.cuh"

namespace oxl {

constexpr int HALF_OUTPUTS = TILE_OUTPUTS / 2;

// A lane's weights of half a block: pairs of outputs g and g + 8 of the half.
struct HalfWeights {
    uint32_t pairs[2][4];
};

// The bit of a half word at which codes of a half's output g + 8 i begin.
__device__ __forceinline__ constexpr int half_field_bit(int bits, int i) {
    return bits >= 8 ? 0 : bits >= 4 ? 4 * i : 2 * i;
}

// What makes weights of the codes of a lane's two outputs, for both halves of a word.
struct HalfScales {
    uint32_t offsets[2];
    uint32_t factors[2];

    __device__ __forceinline__ void store(uint32_t place) const {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(offsets[0]),
                     "r"(offsets[1]), "r"(factors[0]), "r"(factors[1])
                     : "memory");
    }
    __device__ __forceinline__ void load(uint32_t place) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(offsets[0]), "=r"(offsets[1]), "=r"(factors[0]), "=r"(factors[1])
                     : "r"(place));
    }
};

// Of both halves of a group.
__device__ __forceinline__ void half_scales(const TileMatrix& matrix, int bits, RawScales raw,
                                            BlockInfo info, HalfScales (&halves)[2]) {
    float scales[4];
    decode_scales(matrix, raw, info, scales);
    const bool is_gptq = matrix.encoding == ENCODING_GPTQ;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t zero = is_gptq ? raw.zeros >> (8 * i) & 0xff : 1u << (bits - 1);
        halves[i / 2].offsets[i % 2] = magic_offset(half_field_bit(bits, i % 2), zero);
        const __half2 factor = __float2half2_rn(scales[i]);
        halves[i / 2].factors[i % 2] = reinterpret_cast<const uint32_t&>(factor);
    }
}

__device__ __forceinline__ uint4 load_quad(uint32_t place) {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(place));
    return words;
}

__device__ __forceinline__ uint2 load_two(uint32_t place) {
    uint2 words;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.x), "=r"(words.y)
                 : "r"(place));
    return words;
}

__device__ __forceinline__ uint32_t load_one(uint32_t place) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(place));
    return word;
}

// The codes of a lane in 1024 + code 2^f, f = `half_field_bit`, of `BITS` 2 to 6. `place`: of the block in shared
// memory.
template <int BITS>
__device__ __forceinline__ void take_half_planes(uint32_t place, int lane, int half,
                                                 HalfWeights& weights) {
    constexpr int low_bits = BITS >= 4 ? 4 : 2;
    constexpr int high_bits = BITS - low_bits;
    const uint32_t high_place = place + low_bits * BLOCK_UNIT_BYTES;
    uint32_t low[2];
    uint32_t high = 0;
    if constexpr (low_bits == 4) {
        const uint2 words = load_two(place + lane * 16 + half * 8);
        low[0] = words.x;
        low[1] = words.y;
    } else {
        const uint2 words = load_two(place + lane * 8);
        low[0] = words.x >> (4 * half);
        low[1] = words.y >> (4 * half);
    }
    if constexpr (high_bits == 2) {
        high = load_one(high_place + lane * 8 + half * 4);
    } else if constexpr (high_bits == 1) {
        high = load_one(high_place + lane * 4) >> (low_bits == 4 ? 2 * half : 4 * half);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const int step = p / 2;
            const int to = half_field_bit(BITS, i);
            const int at = 8 * (p % 2) + to;
            uint32_t pair = moved_fields(low[step], low_bits, at, to, MAGIC);
            if constexpr (high_bits == 2) {
                pair |= moved_fields(high, 2, at + 2 * step, to + low_bits);
            } else if constexpr (high_bits == 1) {
                pair |= moved_fields(high, 1, at + step, to + low_bits);
            }
            weights.pairs[i][p] = pair;
        }
    }
}

// The same of every width; with 16 bits the weights themselves.
template <int BITS>
__device__ __forceinline__ void take_half(uint32_t place, int lane, int half,
                                          HalfWeights& weights) {
    if constexpr (BITS == BITS_FLOAT) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4 words = load_quad(place + ((2 * half + i) * WARP_LANES + lane) * 16);
            weights.pairs[i][0] = words.x;
            weights.pairs[i][1] = words.y;
            weights.pairs[i][2] = words.z;
            weights.pairs[i][3] = words.w;
        }
    } else if constexpr (BITS == 8) {
        const uint4 words = load_quad(place + (half * WARP_LANES + lane) * 16);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int p = 0; p < 8; ++p) {
            weights.pairs[p / 4][p % 4] =
                __byte_perm(word[p / 2], MAGIC, p % 2 == 0 ? 0x5150 : 0x5352);
        }
    } else {
        take_half_planes<BITS>(place, lane, half, weights);
    }
}

// Codes become weights, as `finish_weights` says.
template <int BITS>
__device__ __forceinline__ void finish_half(const HalfScales& scales, HalfWeights& weights) {
    if constexpr (BITS != BITS_FLOAT) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (uint32_t& pair : weights.pairs[i]) {
                pair = finished(pair, half_field_bit(BITS, i), scales.offsets[i], scales.factors[i]);
            }
        }
    }
}

}  // namespace oxl
