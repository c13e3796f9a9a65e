// Weights as files store them to the tile layout (tiles.cuh), at load.
//
// Sources are page-locked memory of the host, read over the bus as they are, each 128-byte piece
// once (GPTQ with act-order: up to eight times): no second copy of them on the device. Floor: the
// bus, about 50 GB/s; the host's copies into the page-locked memory are slower.
//
// One warp repacks one block of one tile; blocks of threads are warps * 32, grids one-dimensional.
#include "tiles.cuh"

namespace oxl {

constexpr int REPACK_WARPS = 4;

// Codes of a lane's weights: [output g + 8 i][input 8 t + j].
using LaneCodes = uint32_t[4][8];

// A plane's field of pair p of the codes, for a word's bit `at`.
__device__ __forceinline__ uint32_t pair_field(const uint32_t (&codes)[8], int p, int shift,
                                               uint32_t mask, int at) {
    const uint32_t even = codes[2 * p] >> shift & mask;
    const uint32_t odd = codes[2 * p + 1] >> shift & mask;
    return (even | odd << 16) << at;
}

template <int BITS>
__device__ __forceinline__ void put_planes(const LaneCodes& codes, int lane, uint8_t* block) {
    constexpr int low_bits = BITS >= 4 ? 4 : 2;
    constexpr int high_bits = BITS - low_bits;
    constexpr uint32_t low_mask = (1u << low_bits) - 1;
    constexpr uint32_t high_mask = (1u << high_bits) - 1;
    uint32_t low[4] = {};
    uint32_t high[2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const int step = p / 2;
            const int at = 8 * (p % 2) + field_bit(BITS, i);
            const int word = low_bits == 4 ? 2 * (i / 2) + step : step;
            low[word] |= pair_field(codes[i], p, 0, low_mask, at);
            if (high_bits == 2) {
                high[i / 2] |= pair_field(codes[i], p, low_bits, high_mask, at + 2 * step);
            } else if (high_bits == 1) {
                high[0] |= pair_field(codes[i], p, low_bits, high_mask, at + word);
            }
        }
    }
    if constexpr (low_bits == 4) {
        reinterpret_cast<uint4*>(block)[lane] = make_uint4(low[0], low[1], low[2], low[3]);
    } else {
        reinterpret_cast<uint2*>(block)[lane] = make_uint2(low[0], low[1]);
    }
    uint8_t* high_plane = block + low_bits * BLOCK_UNIT_BYTES;
    if constexpr (high_bits == 2) {
        reinterpret_cast<uint2*>(high_plane)[lane] = make_uint2(high[0], high[1]);
    } else if constexpr (high_bits == 1) {
        reinterpret_cast<uint32_t*>(high_plane)[lane] = high[0];
    }
}

__device__ __forceinline__ void put_bytes(const LaneCodes& codes, int lane, uint8_t* block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t words[4] = {};
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            words[k / 4] |= codes[2 * half + k / 8][k % 8] << (8 * (k % 4));
        }
        reinterpret_cast<uint4*>(block)[half * WARP_LANES + lane] =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Words of a block as files have them: each column of 32 inputs is a stream of BITS words.
template <int BITS>
__device__ __forceinline__ void repack_words(const uint32_t* words, int columns, int column,
                                             uint32_t (*staged)[TILE_OUTPUTS], int lane,
                                             uint8_t* block) {
#pragma unroll
    for (int word = 0; word < BITS; ++word) {
        staged[word][lane] = words[int64_t(word) * columns + column + lane];
    }
    __syncwarp();
    LaneCodes codes;
    constexpr uint32_t mask = (1u << BITS) - 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int output = lane / 4 + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int bit = (8 * (lane % 4) + j) * BITS;
            // The last code ends in the last word: its upper neighbour is not there, nor needed.
            const uint32_t low = staged[bit / 32][output];
            const uint32_t high = staged[min(bit / 32 + 1, BITS - 1)][output];
            codes[i][j] = __funnelshift_r(low, high, bit % 32) & mask;
        }
    }
    if constexpr (BITS == 8) {
        put_bytes(codes, lane, block);
    } else {
        put_planes<BITS>(codes, lane, block);
    }
}

}  // namespace oxl

// Some blocks of one width of an EXL2 matrix.
struct RepackExl2Args {
    const uint32_t* words;  // [blocks * bits, columns]
    uint8_t* weights;       // of the first block in the first tile
    int64_t tile_bytes;
    int32_t columns;        // N, a multiple of 32
    int32_t blocks;
    int32_t bits;
    int32_t reserved;
};

extern "C" __global__ void __launch_bounds__(oxl::REPACK_WARPS* oxl::WARP_LANES)
    oxl_repack_exl2(const __grid_constant__ RepackExl2Args args) {
    using namespace oxl;
    __shared__ uint32_t staged[REPACK_WARPS][8][TILE_OUTPUTS];
    dependency_wait();
    const int tiles = args.columns / TILE_OUTPUTS;
    const int warp = threadIdx.x / WARP_LANES;
    const int lane = threadIdx.x % WARP_LANES;
    const int64_t unit = int64_t(blockIdx.x) * REPACK_WARPS + warp;
    const int block = static_cast<int>(unit / tiles);
    const int tile = static_cast<int>(unit % tiles);
    if (block >= args.blocks) return;
    const uint32_t* words = args.words + int64_t(block) * args.bits * args.columns;
    const int column = tile * TILE_OUTPUTS;
    uint8_t* to =
        args.weights + tile * args.tile_bytes + int64_t(block) * args.bits * BLOCK_UNIT_BYTES;
    switch (args.bits) {
        case 2: repack_words<2>(words, args.columns, column, staged[warp], lane, to); break;
        case 3: repack_words<3>(words, args.columns, column, staged[warp], lane, to); break;
        case 4: repack_words<4>(words, args.columns, column, staged[warp], lane, to); break;
        case 5: repack_words<5>(words, args.columns, column, staged[warp], lane, to); break;
        case 6: repack_words<6>(words, args.columns, column, staged[warp], lane, to); break;
        default: repack_words<8>(words, args.columns, column, staged[warp], lane, to);
    }
}

// The codes of some tiles of a GPTQ matrix.
struct RepackGptqArgs {
    const uint32_t* words;        // [8-input rows, columns]: input k is nibble k % 8 of row k / 8
    const uint32_t* permutation;  // [K]: the input at each packed place; null: in order
    uint8_t* weights;             // of the first tile
    int64_t tile_bytes;
    int32_t columns;              // of these tiles; the last may have fewer than 32
    int32_t blocks;
};

extern "C" __global__ void __launch_bounds__(oxl::REPACK_WARPS* oxl::WARP_LANES)
    oxl_repack_gptq(const __grid_constant__ RepackGptqArgs args) {
    using namespace oxl;
    __shared__ uint8_t staged[REPACK_WARPS][BLOCK_INPUTS][TILE_OUTPUTS];
    dependency_wait();
    const int tiles = (args.columns + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    const int warp = threadIdx.x / WARP_LANES;
    const int lane = threadIdx.x % WARP_LANES;
    const int64_t unit = int64_t(blockIdx.x) * REPACK_WARPS + warp;
    const int block = static_cast<int>(unit / tiles);
    const int tile = static_cast<int>(unit % tiles);
    if (block >= args.blocks) return;
    const int column = tile * TILE_OUTPUTS + lane;
    int held = -1;
    uint32_t word = 0;
    for (int k = 0; k < BLOCK_INPUTS; ++k) {
        const int place = block * BLOCK_INPUTS + k;
        const int input = args.permutation == nullptr ? place : args.permutation[place];
        if (input / 8 != held && column < args.columns) {
            held = input / 8;
            word = args.words[int64_t(held) * args.columns + column];
        }
        staged[warp][k][lane] = word >> (4 * (input % 8)) & 15;
    }
    __syncwarp();
    LaneCodes codes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            codes[i][j] = staged[warp][8 * (lane % 4) + j][lane / 4 + 8 * i];
        }
    }
    put_planes<4>(codes, lane,
                  args.weights + tile * args.tile_bytes + int64_t(block) * 4 * BLOCK_UNIT_BYTES);
}

// Some tiles of a matrix of floats.
struct RepackFloatArgs {
    const void* values;  // [rows, width]
    uint8_t* weights;    // of the first tile
    uint32_t* largest;   // receives the largest magnitude of all values, as f32 bits
    int64_t tile_bytes;
    int32_t rows;        // outputs; zeros from there to the next multiple of 32
    int32_t width;       // inputs; zeros likewise
    int32_t type;        // 0: fp16, 1: bf16, 2: f32
    float factor;        // of all values, a power of two that brings them into fp16's range
};

namespace oxl {

__device__ __forceinline__ float load_float(const void* values, int64_t index, int type) {
    if (type == 0) return __half2float(static_cast<const __half*>(values)[index]);
    if (type == 1) {
        return __uint_as_float(uint32_t(static_cast<const uint16_t*>(values)[index]) << 16);
    }
    return static_cast<const float*>(values)[index];
}

}  // namespace oxl

extern "C" __global__ void __launch_bounds__(oxl::REPACK_WARPS* oxl::WARP_LANES)
    oxl_repack_float(const __grid_constant__ RepackFloatArgs args) {
    using namespace oxl;
    dependency_wait();
    const int tiles = (args.rows + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    const int blocks = (args.width + BLOCK_INPUTS - 1) / BLOCK_INPUTS;
    const int lane = threadIdx.x % WARP_LANES;
    const int64_t unit = int64_t(blockIdx.x) * REPACK_WARPS + threadIdx.x / WARP_LANES;
    // Neighbouring warps have neighbouring inputs: a row is read as one stream.
    const int tile = static_cast<int>(unit / blocks);
    const int block = static_cast<int>(unit % blocks);
    if (tile >= tiles) return;
    uint4* to = reinterpret_cast<uint4*>(args.weights + tile * args.tile_bytes +
                                         int64_t(block) * BITS_FLOAT * BLOCK_UNIT_BYTES);
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = tile * TILE_OUTPUTS + lane / 4 + 8 * i;
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int input = block * BLOCK_INPUTS + 8 * (lane % 4) + j;
            float value = 0.0f;
            if (row < args.rows && input < args.width) {
                value = load_float(args.values, int64_t(row) * args.width + input, args.type);
            }
            // As integers, magnitudes are ordered, infinity and no-numbers above all.
            largest = max(largest, __float_as_uint(value) & 0x7fffffff);
            const uint32_t half = __half_as_ushort(__float2half_rn(value * args.factor));
            words[j / 2] = j % 2 == 0 ? half : words[j / 2] | half << 16;
        }
        to[i * WARP_LANES + lane] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) atomicMax(args.largest, largest);
}

// EXL2's scale codes of some groups.
struct RepackExl2ScalesArgs {
    const uint32_t* words;  // [group_count, tiles * 4]: column n is nibble n % 8 of word n / 8
    uint16_t* scales;       // [tiles, groups, 8], from the first of these groups on
    int32_t group_count;
    int32_t groups;         // of the matrix
    int32_t tiles;
    int32_t reserved;
};

// One thread an entry; 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    oxl_repack_exl2_scales(const __grid_constant__ RepackExl2ScalesArgs args) {
    oxl::dependency_wait();
    const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const int g = index % 8;
    const int tile = index / 8 % args.tiles;
    const int group = static_cast<int>(index / 8 / args.tiles);
    if (group >= args.group_count) return;
    const uint32_t* words = args.words + (int64_t(group) * args.tiles + tile) * 4;
    uint32_t entry = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) entry |= (words[i] >> (4 * g) & 15) << (4 * i);
    args.scales[(int64_t(tile) * args.groups + group) * 8 + g] = static_cast<uint16_t>(entry);
}

// GPTQ's scales and zero points of some groups.
struct RepackGptqScalesArgs {
    const __half* scales;         // [group_count, columns]
    const uint32_t* zero_words;   // [group_count, columns / 8]
    uint2* tile_scales;           // fp16 [tiles, groups, 8, 4], from the first of these groups on
    uint32_t* tile_zeros;         // u8 likewise
    int32_t zero_offset;          // added to stored zero points
    int32_t group_count;
    int32_t groups;               // of the matrix
    int32_t columns;              // N, a multiple of 8
};

// One thread an entry; 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    oxl_repack_gptq_scales(const __grid_constant__ RepackGptqScalesArgs args) {
    using namespace oxl;
    dependency_wait();
    const int tiles = (args.columns + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const int g = index % 8;
    const int tile = index / 8 % tiles;
    const int group = static_cast<int>(index / 8 / tiles);
    if (group >= args.group_count) return;
    uint32_t halves[4];
    uint32_t zeros = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int column = tile * TILE_OUTPUTS + g + 8 * i;
        halves[i] = 0;
        if (column < args.columns) {
            halves[i] = __half_as_ushort(args.scales[int64_t(group) * args.columns + column]);
            const uint32_t word =
                args.zero_words[int64_t(group) * (args.columns / 8) + column / 8];
            zeros |= ((word >> (4 * (column % 8)) & 15) + args.zero_offset) << (8 * i);
        }
    }
    const int64_t entry = (int64_t(tile) * args.groups + group) * 8 + g;
    args.tile_scales[entry] = make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
    args.tile_zeros[entry] = zeros;
}
