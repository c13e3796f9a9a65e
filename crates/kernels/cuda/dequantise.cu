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

// What a warp unpacks: neighbouring blocks of a tile.
struct Span {
    const TileMatrix& matrix;
    int tile;
    int lane;
    const uint8_t* next;  // the next block's weights
    __half* out;          // the lane's place in it
    int64_t stride;       // from an output to the next one
};

// Unpacks the span's next COUNT blocks, from `block` on, all of so many bits. All that is read is asked for before
// the first weight is written: memory that reads and writes in turn does neither as fast.
template <int BITS, int COUNT>
__device__ __forceinline__ void unpack_blocks(Span& span, int block) {
    const TileMatrix& matrix = span.matrix;
    LaneWeights weights[COUNT];
    BlockInfo infos[COUNT];
    RawScales raw[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        infos[i] = block_info(matrix, block + i);
        const MemoryReader reader = {span.next + i * BITS * BLOCK_UNIT_BYTES};
        take_weights<BITS>(reader, span.lane, weights[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        raw[i] = load_scales(matrix, span.tile, infos[i].group(), span.lane / 4);
    }
    const bool is_gptq = matrix.encoding == ENCODING_GPTQ;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        float scales[4];
        decode_scales(matrix, raw[i], infos[i], scales);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const __half2 scale = __float2half2_rn(scales[j]);
            const auto factor = reinterpret_cast<const uint32_t&>(scale);
            const uint32_t zero = is_gptq ? raw[i].zeros >> (8 * j) & 0xff : 1u << (BITS - 1);
            const int at = field_bit(BITS, j);
#pragma unroll
            for (uint32_t& pair : weights[i].pairs[j]) {
                if (BITS != BITS_FLOAT) {
                    pair = finished(pair | MAGIC, at, magic_offset(at, zero), factor);
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const auto& pairs = weights[i].pairs[j];
            *reinterpret_cast<uint4*>(span.out + 8 * j * span.stride + i * BLOCK_INPUTS) =
                make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
    span.next += COUNT * BITS * BLOCK_UNIT_BYTES;
    span.out += COUNT * BLOCK_INPUTS;
}

template <int COUNT>
__device__ __forceinline__ void unpack_any(Span& span, int block, int bits) {
    switch (bits) {
        case 2: unpack_blocks<2, COUNT>(span, block); break;
        case 3: unpack_blocks<3, COUNT>(span, block); break;
        case 4: unpack_blocks<4, COUNT>(span, block); break;
        case 5: unpack_blocks<5, COUNT>(span, block); break;
        case 6: unpack_blocks<6, COUNT>(span, block); break;
        case 8: unpack_blocks<8, COUNT>(span, block); break;
        default: unpack_blocks<BITS_FLOAT, COUNT>(span, block);
    }
}

}  // namespace oxl

// Grid: tiles * blocks / DEQUANTISE_BLOCKS warps in blocks of DEQUANTISE_WARPS. The weight is
// f16((code - zero) * scale), rounded once, as the formats define it; the matrix' own `scale` is
// left to the product.
extern "C" __global__ void __launch_bounds__(oxl::DEQUANTISE_WARPS* oxl::WARP_LANES, 2)
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
    const int64_t stride = int64_t(matrix.blocks) * BLOCK_INPUTS;
    Span span = {matrix,
                 tile,
                 lane,
                 matrix.weights + start * BLOCK_UNIT_BYTES,
                 args.out + (int64_t(local_tile) * TILE_OUTPUTS + lane / 4) * stride +
                     begin * BLOCK_INPUTS + 8 * (lane % 4),
                 stride};
    const int bits = block_info(matrix, begin).bits();
    // Widths never grow from one block to the next.
    if (end - begin == DEQUANTISE_BLOCKS && block_info(matrix, end - 1).bits() == bits) {
        unpack_any<DEQUANTISE_BLOCKS>(span, begin, bits);
        return;
    }
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
        unpack_any<1>(span, block, block_info(matrix, block).bits());
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
