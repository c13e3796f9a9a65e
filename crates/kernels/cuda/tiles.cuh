// The one layout of linear weights on the device, and how a warp takes them apart.
//
// A matrix of N outputs x K inputs (inputs in packed order) is cut into *column tiles* of 32
// outputs. Within a tile all *blocks* of 32 inputs follow each other without gaps, and tiles
// follow each other, so that a warp that multiplies a range of a tile's blocks streams one range
// of memory. A block of b bits is 1024 weights in 128 b bytes.
//
// Lane l = 4 g + t of the warp that multiplies a block holds the weights of the outputs
// {g, g + 8, g + 16, g + 24} (i = 0..3 below) for the inputs 8 t .. 8 t + 7 of the block (j below):
// what mma.m16n8k16 wants of it as the A operand. The order of k within a block is free as long
// as A and B agree: step s (0, 1) of a block multiplies inputs 8 t + 4 s + {0, 1} as the
// fragments' first pair and {2, 3} as the second, so that a lane's B fragments of a whole block
// are the 16 bytes x16[row g][32 block + 8 t ..].
//
// Widths that do not divide a word are split into planes, each lane-major (lane l's bytes of a
// plane of s bytes a lane are s l .. s l + s - 1), the larger plane first; it holds the low bits:
//   8 bit   16 + 16 bytes   half h has outputs i = 2 h, 2 h + 1: byte 8 (i % 2) + j
//   6 bit   16 + 8 bytes    4-bit plane, then 2-bit plane (bits 4 and 5)
//   5 bit   16 + 4 bytes    4-bit plane, then 1-bit plane (bit 4)
//   4 bit   16 bytes        4-bit plane
//   3 bit   8 + 4 bytes     2-bit plane, then 1-bit plane (bit 2)
//   2 bit   8 bytes         2-bit plane
//   fp16    4 x 16 bytes    piece i has output i: eight halves in order of j
// Pairs of neighbouring inputs (2 p, 2 p + 1) lie in the two halves of a word, p = 2 s + h:
//   4-bit plane              word 2 (i / 2) + s: bits 8 h + 4 (i % 2) of each half
//   2-bit plane              word s:             bits 8 h + 2 i
//   2-bit plane over 4 bits  word i / 2:         bits 8 h + 4 (i % 2) + 2 s
//   1-bit plane over 4 bits  the word:           bit 8 h + 4 (i % 2) + 2 (i / 2) + s
//   1-bit plane over 2 bits  the word:           bit 8 h + 2 i + s
// so that a pair becomes two fp16 numbers by masks and shifts that many pairs share: with all else
// masked away, a code whose lowest bit is bit f of its half, and its highest below bit 10, is the
// subnormal number code * 2^(f - 24). Less its zero point it is still one, exactly, and tensor cores
// multiply such numbers as fast as others. All codes of an output have the same f, `field_bit`, so
// that whoever scales an output's sum takes the power of two off.
#pragma once

#include "magic.cuh"

namespace oxl {

// Outputs of a column tile; inputs of a block.
constexpr int TILE_OUTPUTS = 32;
constexpr int BLOCK_INPUTS = 32;

// Bytes of a block of one bit.
constexpr int BLOCK_UNIT_BYTES = BLOCK_INPUTS * TILE_OUTPUTS / 8;

// Bits of a block of fp16 weights.
constexpr int BITS_FLOAT = 16;

// Sections of one width that a quantised matrix may have: 8, 6, 5, 4, 3 and 2 bits in this order.
constexpr int SECTIONS = 6;

__device__ __forceinline__ constexpr int bits_of_section(int section) {
    return section == 0 ? 8 : 7 - section;
}

// How the scales of a matrix are stored.
constexpr int ENCODING_EXL2 = 0;
constexpr int ENCODING_GPTQ = 1;
constexpr int ENCODING_FLOAT = 2;

// One block of a matrix, for all tiles; `block_table` has one for each.
struct BlockInfo {
    uint32_t group_and_bits;  // group | bits << 24
    uint32_t end_and_scale;   // first block past the group | EXL2's m_g (fp16 bits) << 16

    __device__ __forceinline__ int group() const { return group_and_bits & 0xffffff; }
    __device__ __forceinline__ int bits() const { return group_and_bits >> 24; }
    __device__ __forceinline__ int group_end() const { return end_and_scale & 0xffff; }
    __device__ __forceinline__ float largest_scale() const {
        return __half2float(__ushort_as_half(end_and_scale >> 16));
    }
};

// A matrix in the tile layout. `TileMatrix` of `layout.rs`.
struct TileMatrix {
    const uint8_t* weights;      // [tiles, tile_units * BLOCK_UNIT_BYTES]
    const void* scales;          // EXL2: u16 [tiles, groups, 8]: entry g has the codes of outputs
                                 //   g + 8 i at bits 4 i; GPTQ: fp16 [tiles, groups, 8, 4]: entry
                                 //   [g, i] is output g + 8 i's; float: unused
    const uint32_t* zeros;       // GPTQ: u8 [tiles, groups, 8, 4] likewise; else unused
    const uint2* block_table;    // BlockInfo [blocks]
    const uint4* range_table;    // for units.cuh: WarpRange [ranges], then Unit [ranges, longest
                                 //   range's blocks], of which a range uses the first ones
    int32_t blocks;              // K / 32
    int32_t groups;
    int32_t tiles;               // N / 32, rounded up
    int32_t tile_units;          // bytes of a tile / BLOCK_UNIT_BYTES
    int32_t section_ends[SECTIONS];  // in blocks; unused for floats
    int32_t encoding;
    float scale;                 // multiplies the whole matrix (1 but for floats)
};

// Units of BLOCK_UNIT_BYTES in a tile before `block`.
__device__ __forceinline__ int units_before(const TileMatrix& matrix, int block) {
    if (matrix.encoding == ENCODING_FLOAT) {
        return block * BITS_FLOAT;
    }
    int units = 0;
    int start = 0;
#pragma unroll
    for (int i = 0; i < SECTIONS; ++i) {
        const int end = matrix.section_ends[i];
        units += bits_of_section(i) * (min(block, end) - min(block, start));
        start = end;
    }
    return units;
}

// Bits of a block, and where the blocks of so many end.
__device__ __forceinline__ int section_bits(const TileMatrix& matrix, int block, int& end) {
    end = matrix.blocks;
    if (matrix.encoding == ENCODING_FLOAT) return BITS_FLOAT;
    int found = bits_of_section(SECTIONS - 1);
#pragma unroll
    for (int i = SECTIONS - 2; i >= 0; --i) {
        if (block < matrix.section_ends[i]) {
            found = bits_of_section(i);
            end = matrix.section_ends[i];
        }
    }
    return found;
}

__device__ __forceinline__ BlockInfo block_info(const TileMatrix& matrix, int block) {
    const uint2 info = __ldg(matrix.block_table + block);
    return {info.x, info.y};
}

// The scales of a lane's four outputs in one group, as they are stored: loaded early, decoded
// when they are needed.
struct RawScales {
    uint2 scales;
    uint32_t zeros;
};

__device__ __forceinline__ RawScales load_scales(const TileMatrix& matrix, int tile, int group,
                                                 int g) {
    RawScales raw = {};
    const int index = (tile * matrix.groups + group) * 8 + g;
    if (matrix.encoding == ENCODING_EXL2) {
        raw.scales.x = __ldg(static_cast<const uint16_t*>(matrix.scales) + index);
    } else if (matrix.encoding == ENCODING_GPTQ) {
        raw.scales = __ldg(static_cast<const uint2*>(matrix.scales) + index);
        raw.zeros = __ldg(matrix.zeros + index);
    }
    return raw;
}

// The four scales in f32: EXL2's s = f16((e + 1)^2 m) is formed exactly and rounded once.
__device__ __forceinline__ void decode_scales(const TileMatrix& matrix, RawScales raw,
                                              BlockInfo info, float (&scales)[4]) {
    if (matrix.encoding == ENCODING_EXL2) {
        const float largest = info.largest_scale();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float root = static_cast<float>(((raw.scales.x >> (4 * i)) & 15) + 1);
            scales[i] = __half2float(__float2half_rn(root * root * largest));
        }
    } else if (matrix.encoding == ENCODING_GPTQ) {
        const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.scales.x));
        const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.scales.y));
        scales[0] = low.x;
        scales[1] = low.y;
        scales[2] = high.x;
        scales[3] = high.y;
    } else {
        scales[0] = scales[1] = scales[2] = scales[3] = 1.0f;
    }
}

// A lane's codes of one block as A fragments: `pairs[i][p]` is output i's pair p, times
// 2^(field_bit - 24), so that the fragments of m-tile m in step s are pairs[2m][2s],
// pairs[2m+1][2s], pairs[2m][2s+1], pairs[2m+1][2s+1].
struct LaneWeights {
    uint32_t pairs[4][4];
};

// The bit of a half at which the codes of output g + 8 i begin. Folds to a constant.
__device__ __forceinline__ constexpr int field_bit(int bits, int i) {
    return bits >= 8 ? 0 : bits >= 4 ? 4 * (i % 2) : 2 * i;
}

// A value of bits from bit `at` on, in both halves. Folds to a constant.
__device__ __forceinline__ constexpr uint32_t in_halves(uint32_t value, int at) {
    return (value << at) * 0x10001u;
}

// The fields of `bits` bits at bit `from` of both halves of a word, at bit `to`.
__device__ __forceinline__ uint32_t moved_fields(uint32_t word, int bits, int from, int to) {
    word = from < to ? word << (to - from) : word >> (from - to);
    return word & in_halves((1u << bits) - 1, to);
}

// Adds a number to each of an output's codes, exactly: of subnormal numbers the sum is one.
__device__ __forceinline__ void add_zeros(const uint32_t (&zeros)[4], LaneWeights& weights) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (uint32_t& pair : weights.pairs[i]) pair = add(pair, zeros[i]);
    }
}

// The codes of a lane, `bits` of 2 to 6. `reader` reads words of the block by their byte in it.
template <int BITS, typename Reader>
__device__ __forceinline__ void take_planes(const Reader& reader, int lane, LaneWeights& weights) {
    constexpr int low_bits = BITS >= 4 ? 4 : 2;
    constexpr int high_bits = BITS - low_bits;
    uint32_t low[4];
    uint32_t high[2] = {};
    constexpr int high_start = low_bits * BLOCK_UNIT_BYTES;
    if constexpr (low_bits == 4) {
        const uint4 words = reader.quad(lane * 16);
        low[0] = words.x;
        low[1] = words.y;
        low[2] = words.z;
        low[3] = words.w;
    } else {
        const uint2 words = reader.two(lane * 8);
        low[0] = words.x;
        low[1] = words.y;
    }
    if constexpr (high_bits == 2) {
        const uint2 words = reader.two(high_start + lane * 8);
        high[0] = words.x;
        high[1] = words.y;
    } else if constexpr (high_bits == 1) {
        high[0] = reader.one(high_start + lane * 4);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const int step = p / 2;
            const int to = field_bit(BITS, i);
            const int at = 8 * (p % 2) + to;
            const int word = low_bits == 4 ? 2 * (i / 2) + step : step;
            uint32_t pair = moved_fields(low[word], low_bits, at, to);
            if constexpr (high_bits == 2) {
                pair |= moved_fields(high[i / 2], 2, at + 2 * step, to + low_bits);
            } else if constexpr (high_bits == 1) {
                pair |= moved_fields(high[0], 1, at + word, to + low_bits);
            }
            weights.pairs[i][p] = pair;
        }
    }
}

// The codes of a lane with 8 bits.
template <typename Reader>
__device__ __forceinline__ void take_bytes(const Reader& reader, int lane, LaneWeights& weights) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 words = reader.quad(half * 16 * WARP_LANES + lane * 16);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int p = 0; p < 8; ++p) {
            weights.pairs[2 * half + p / 4][p % 4] =
                __byte_perm(word[p / 2], 0, p % 2 == 0 ? 0x4140 : 0x4342);
        }
    }
}

// The weights of a lane in fp16.
template <typename Reader>
__device__ __forceinline__ void take_halves(const Reader& reader, int lane, LaneWeights& weights) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 words = reader.quad(i * 16 * WARP_LANES + lane * 16);
        weights.pairs[i][0] = words.x;
        weights.pairs[i][1] = words.y;
        weights.pairs[i][2] = words.z;
        weights.pairs[i][3] = words.w;
    }
}

// The codes of a lane before their zero point and scale, for a block of `BITS` bits; with 16 the
// weights themselves.
template <int BITS, typename Reader>
__device__ __forceinline__ void take_weights(const Reader& reader, int lane, LaneWeights& weights) {
    if constexpr (BITS == BITS_FLOAT) {
        take_halves(reader, lane, weights);
    } else if constexpr (BITS == 8) {
        take_bytes(reader, lane, weights);
    } else {
        take_planes<BITS>(reader, lane, weights);
    }
}

}  // namespace oxl
