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
        store_shared(place, offsets[0], offsets[1], factors[0], factors[1]);
    }
    __device__ __forceinline__ void load(uint32_t place) {
        load_shared(place, offsets[0], offsets[1], factors[0], factors[1]);
    }
};

// EXL2's scales f16((e + 1)^2 m) of the outputs g + 16 h and g + 16 h + 8, in the halves of a word: (e + 1)^2 is
// exact in fp16, so that there is one rounding.
__device__ __forceinline__ uint32_t exl2_factors(uint32_t codes, int h, uint32_t largest) {
    constexpr uint32_t MINUS_1023 = 0xe3fee3feu;
    codes >>= 8 * h;
    const uint32_t two = (codes & 0xf) | (codes << 12 & 0xf0000);
    const uint32_t root = add(two | MAGIC, MINUS_1023);
    return times(times(root, root), largest);
}

// What makes weights of the codes of both halves of a lane's outputs in one group. Few instructions: whoever runs
// this takes turns with warps that multiply.
__device__ __forceinline__ void half_scales(const TileMatrix& matrix, RawScales raw, BlockInfo info,
                                            HalfScales (&halves)[2]) {
    const int bits = info.bits();
    const bool is_gptq = matrix.encoding == ENCODING_GPTQ;
    const uint32_t largest = __byte_perm(info.end_and_scale, 0, 0x3232);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint32_t stored = h == 0 ? raw.scales.x : raw.scales.y;
        const uint32_t two = is_gptq ? stored : exl2_factors(raw.scales.x, h, largest);
        halves[h].factors[0] = __byte_perm(two, 0, 0x1010);
        halves[h].factors[1] = __byte_perm(two, 0, 0x3232);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t own_zero = raw.zeros >> (16 * h + 8 * i) & 0xff;
            const uint32_t zero = is_gptq ? own_zero : 1u << (bits - 1);
            halves[h].offsets[i] = magic_offset(half_field_bit(bits, i), zero);
        }
    }
}

__device__ __forceinline__ uint4 load_quad(uint32_t place) {
    uint4 words;
    load_shared(place, words.x, words.y, words.z, words.w);
    return words;
}

__device__ __forceinline__ uint2 load_two(uint32_t place) {
    uint2 words;
    load_shared(place, words.x, words.y);
    return words;
}

__device__ __forceinline__ uint32_t load_one(uint32_t place) {
    uint32_t word;
    load_shared(place, word);
    return word;
}

// `moved_fields` beside bits of another number: one operation after the shift, which the compiler makes two of
// where it knows the number.
__device__ __forceinline__ uint32_t moved_fields(uint32_t word, int bits, int from, int to,
                                                 uint32_t beside) {
    word = from < to ? word << (to - from) : word >> (from - to);
    return masked_beside(word, in_halves((1u << bits) - 1, to), beside);
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

// Codes become weights (`finished`).
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
