// The tile layout to plain fp16 [outputs, inputs], for products with many rows by a library; and
// what the library leaves to be done.
//
// Floor: 2 bytes written a weight and the stored bits read: 2.5 bytes at 4 bits, 36 us for
// 4096 x 11008 at 3.1 TB/s.
#include "tiles.cuh"

struct DequantiseArgs {
    oxl::TileMatrix matrix;
    __half* out;         // [32 * tiles, 32 * blocks], in packed order
    int32_t first_tile;
    int32_t tiles;
};

namespace oxl {

constexpr int DEQUANTISE_WARPS = 8;
// Neighbouring blocks of a tile that one warp takes.
constexpr int DEQUANTISE_BLOCKS = 4;

// Words of a block in memory, by their byte in it.
struct MemoryReader {
    const uint8_t* block;

    __device__ __forceinline__ uint4 quad(int byte) const {
        return __ldcs(reinterpret_cast<const uint4*>(block + byte));
    }
    __device__ __forceinline__ uint2 two(int byte) const {
        return __ldcs(reinterpret_cast<const uint2*>(block + byte));
    }
    __device__ __forceinline__ uint32_t one(int byte) const {
        return __ldcs(reinterpret_cast<const unsigned int*>(block + byte));
    }
};

// (code - zero) of a pair of codes that begin at bit `at`: 1024 + code 2^at, exactly, is brought down to
// it in one operation.
__device__ __forceinline__ uint32_t centred(uint32_t pair, int at, uint32_t zero) {
    const uint32_t factor = (15u - at) << 10;
    const uint32_t offset = 0xe400u - (uint32_t(at) << 10) + (zero << at);
    uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(result)
        : "r"(pair | 0x64006400u), "r"(factor * 0x10001u), "r"(offset * 0x10001u));
    return result;
}

// The weights of a lane before their scale. `zeros`: those of its outputs, in bytes.
template <int BITS>
__device__ __forceinline__ void take_centred(uint32_t zeros, const MemoryReader& reader, int lane,
                                             LaneWeights& weights) {
    take_weights<BITS>(reader, lane, weights);
    if constexpr (BITS != BITS_FLOAT) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (uint32_t& pair : weights.pairs[i]) {
                pair = centred(pair, field_bit(BITS, i), zeros >> (8 * i) & 0xff);
            }
        }
    }
}

__device__ __forceinline__ void take_any(const TileMatrix& matrix, int bits, uint32_t zeros,
                                         const MemoryReader& reader, int lane,
                                         LaneWeights& weights) {
    if (matrix.encoding == ENCODING_GPTQ) {
        take_centred<4>(zeros, reader, lane, weights);
        return;
    }
    switch (bits) {
        case 2: take_centred<2>(0x02020202u, reader, lane, weights); break;
        case 3: take_centred<3>(0x04040404u, reader, lane, weights); break;
        case 4: take_centred<4>(0x08080808u, reader, lane, weights); break;
        case 5: take_centred<5>(0x10101010u, reader, lane, weights); break;
        case 6: take_centred<6>(0x20202020u, reader, lane, weights); break;
        case 8: take_centred<8>(0x80808080u, reader, lane, weights); break;
        default: take_centred<BITS_FLOAT>(0, reader, lane, weights);
    }
}

}  // namespace oxl

// Grid: tiles * blocks / DEQUANTISE_BLOCKS warps in blocks of DEQUANTISE_WARPS. The weight is
// f16((code - zero) * scale), rounded once, as the formats define it; the matrix' own `scale` is
// left to the product.
extern "C" __global__ void __launch_bounds__(oxl::DEQUANTISE_WARPS* oxl::WARP_LANES)
    oxl_dequantise(const __grid_constant__ DequantiseArgs args) {
    using namespace oxl;
    dependency_trigger();
    const TileMatrix& matrix = args.matrix;
    const int spans = (matrix.blocks + DEQUANTISE_BLOCKS - 1) / DEQUANTISE_BLOCKS;
    const int lane = threadIdx.x % WARP_LANES;
    const int unit = blockIdx.x * DEQUANTISE_WARPS + threadIdx.x / WARP_LANES;
    const int local_tile = unit / spans;
    const int tile = args.first_tile + local_tile;
    const int begin = unit % spans * DEQUANTISE_BLOCKS;
    const int end = min(begin + DEQUANTISE_BLOCKS, matrix.blocks);
    // The scratch may still be read by the product before.
    dependency_wait();
    if (local_tile >= args.tiles) return;
    const int64_t start = int64_t(tile) * matrix.tile_units + units_before(matrix, begin);
    const uint8_t* next = matrix.weights + start * BLOCK_UNIT_BYTES;
    const int64_t stride = int64_t(matrix.blocks) * BLOCK_INPUTS;
    __half* out = args.out + (int64_t(local_tile) * TILE_OUTPUTS + lane / 4) * stride +
                  begin * BLOCK_INPUTS + 8 * (lane % 4);
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
        const BlockInfo info = block_info(matrix, block);
        const RawScales raw = load_scales(matrix, tile, info.group(), lane / 4);
        LaneWeights weights;
        take_any(matrix, info.bits(), raw.zeros, {next}, lane, weights);
        float scales[4];
        decode_scales(matrix, raw, info, scales);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const __half2 scale = __float2half2_rn(scales[i]);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                auto& pair = reinterpret_cast<__half2&>(weights.pairs[i][p]);
                pair = __hmul2(pair, scale);
            }
            const auto& pairs = weights.pairs[i];
            *reinterpret_cast<uint4*>(out + 8 * i * stride) =
                make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        next += info.bits() * BLOCK_UNIT_BYTES;
        out += BLOCK_INPUTS;
    }
}

struct AddBiasArgs {
    const float* bias;  // [width]
    float* out;         // [rows, width]
    int32_t rows;
    int32_t width;
    float scale;
    int32_t reserved;
};

// out += scale * bias, in every row. Blocks of 256 threads: [columns / 256, rows].
extern "C" __global__ void __launch_bounds__(256)
    oxl_add_bias(const __grid_constant__ AddBiasArgs args) {
    oxl::dependency_trigger();
    const int column = blockIdx.x * 256 + threadIdx.x;
    oxl::dependency_wait();
    if (column >= args.width) return;
    for (int row = blockIdx.y; row < args.rows; row += gridDim.y) {
        float* out = args.out + int64_t(row) * args.width + column;
        *out = fmaf(args.scale, args.bias[column], *out);
    }
}
