// What the kernels that multiply weights as they are stored have in common: their arguments and the
// sums of a warp; and the stream of weights of the one for more rows.
//
// Order of sums: within a group in the tensor core (weights less their zero point, exact in
// fp16), groups in order with acc += scale * part, ranges of K in order by fours, then these
// parts in order. All of it depends on the matrix and the device alone: a row's bits do not depend on
// the other rows nor on their number, and so not on the kernel either.
#pragma once

#include "tiles.cuh"

namespace oxl {

constexpr int MOST_MATRICES = 5;

// Ranges of K that are summed before others join.
constexpr int RANGES_OF_SUM = 4;

constexpr int ROWS_OF_TILE = 8;

// Warps of a block of threads, at most.
constexpr int MOST_WARPS = 16;

// Bytes that one commit group of the ring holds, and all of them.
constexpr int STAGE_BYTES = 16 * WARP_LANES;
constexpr int STAGES = 8;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;

}  // namespace oxl

// One matrix of a launch.
struct LinearMatrix {
    oxl::TileMatrix matrix;
    const __half* x;     // [rows, 32 * blocks], in the matrix' packed order
    const float* bias;   // [out_features], or null
    float* out;          // [rows, out_features]
    int32_t out_features;
    int32_t first_item;     // of the launch: column tiles, or CTAs of `oxl_linear_32`
    int32_t first_counter;  // of its groups of tiles; only with split > 1
    int32_t first_partial;  // of its tiles * split; only with split > 1
};

// All matrices have the same number of blocks. Scalars come first: parameters that lie together are
// fetched together.
struct LinearArgs {
    float* partials;     // [tiles * split of all matrices, PARTIAL_FLOATS]
    uint32_t* counters;  // zero before and after every launch
    int32_t matrix_count;
    int32_t rows;
    int32_t accumulate;  // 0: out = y; 1: out += store_scale * y
    float store_scale;
    int32_t ranges_shift;  // K is cut into 2^ranges_shift ranges
    int32_t items;         // column tiles of all matrices
    int32_t blocks;        // of K
    int32_t x_blocks;      // of K, that a warp's place for activations holds
    int32_t range_blocks;  // of the longest range
    int32_t tile_buffers;  // tiles whose sums have room in shared memory
    int32_t split_shift;   // of `oxl_linear_32`: 2^split_shift CTAs share a tile's K
    int32_t reserved;
    LinearMatrix matrices[oxl::MOST_MATRICES];
};

namespace oxl {

__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Activations: written by an earlier kernel of the step, so neither hoisted above the wait for
// it nor read through the read-only path.
__device__ __forceinline__ uint4 load_activations(const __half* address) {
    uint4 value;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// The bytes of a warp's range of a tile on their way through its ring.
struct WeightStream {
    const uint8_t* source;  // what this lane copies next
    char* ring;             // RING_BYTES of shared memory
    int left;               // bytes of the range that have not been asked for
    uint32_t consumed;      // bytes that have been multiplied; a ring more has been asked for
    int lane;

    // Asks for one more stage, to where `freed` bytes were; past the end for an empty one, so that
    // stages can be counted.
    __device__ __forceinline__ void issue(uint32_t freed) {
        if (lane * 16 < left) {
            const uint32_t place = static_cast<uint32_t>(
                __cvta_generic_to_shared(ring + (freed & (RING_BYTES - STAGE_BYTES)) + lane * 16));
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(source)
                         : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        source += STAGE_BYTES;
        left -= STAGE_BYTES;
    }

    // Waits for the next block, of BITS bits.
    template <int BITS>
    __device__ __forceinline__ void wait() const {
        // Stages that the block may end in, counted from the first that is not refilled. Blocks
        // of other widths may start anywhere in a stage.
        constexpr int bytes = BITS * BLOCK_UNIT_BYTES;
        constexpr int last_start = BITS == BITS_FLOAT ? 0 : STAGE_BYTES - BLOCK_UNIT_BYTES;
        constexpr int needed = (last_start + bytes + STAGE_BYTES - 1) / STAGE_BYTES;
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - needed) : "memory");
        __syncwarp();
    }

    // Gives the block's place to later bytes.
    template <int BITS>
    __device__ __forceinline__ void release() {
        constexpr int bytes = BITS * BLOCK_UNIT_BYTES;
        const uint32_t freed = consumed;
        consumed += bytes;
        __syncwarp();
#pragma unroll 1
        for (int stage = 0; stage < bytes / STAGE_BYTES; ++stage) {
            issue(freed + stage * STAGE_BYTES);
        }
        if constexpr (bytes % STAGE_BYTES != 0) {
            constexpr int rest = bytes % STAGE_BYTES;
            if (freed % STAGE_BYTES + rest >= STAGE_BYTES) issue(consumed - STAGE_BYTES);
        }
    }

    // Words of the next block, by their byte in it.
    template <typename Words>
    __device__ __forceinline__ Words read(int byte) const {
        return *reinterpret_cast<const Words*>(ring + ((consumed + byte) & (RING_BYTES - 1)));
    }
    __device__ __forceinline__ uint4 quad(int byte) const { return read<uint4>(byte); }
    __device__ __forceinline__ uint2 two(int byte) const { return read<uint2>(byte); }
    __device__ __forceinline__ uint32_t one(int byte) const { return read<uint32_t>(byte); }
};

// Sums of a lane: [row tile][m-tile][fragment], the fragment's rows 2 t and 2 t + 1 of output
// 16 m + g, then of output 16 m + g + 8.
template <int ROW_TILES>
using Sums = float[ROW_TILES][2][4];

// part += weights * activations over one block and 8 rows.
__device__ __forceinline__ void multiply_block(const LaneWeights& weights, const uint4& x,
                                               float (&part)[2][4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const auto& low = weights.pairs[2 * m];
        const auto& high = weights.pairs[2 * m + 1];
        multiply(part[m], low[0], high[0], low[1], high[1], x.x, x.y);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const auto& low = weights.pairs[2 * m];
        const auto& high = weights.pairs[2 * m + 1];
        multiply(part[m], low[2], high[2], low[3], high[3], x.z, x.w);
    }
}

// part += weights * activations over the next `blocks` blocks, of one group.
template <int BITS, bool ZEROED, int ROW_TILES, typename Stream, typename Activations>
__device__ __forceinline__ void multiply_blocks(Stream& stream, Activations& activations,
                                                uint32_t zeros, int blocks,
                                                Sums<ROW_TILES>& part) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
        stream.template wait<BITS>();
        LaneWeights weights;
        if constexpr (ZEROED) {
            take_zeroed(stream, stream.lane, zeros, weights);
        } else {
            take_weights<BITS>(stream, stream.lane, weights);
        }
        stream.template release<BITS>();
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            multiply_block(weights, activations.of(tile), part[tile]);
        }
        activations.advance();
    }
}

// The same for blocks of `bits` bits.
template <int ROW_TILES, typename Stream, typename Activations>
__device__ __forceinline__ void multiply_run(int encoding, int bits, Stream& stream,
                                             Activations& activations, uint32_t zeros, int blocks,
                                             Sums<ROW_TILES>& part) {
    if (encoding == ENCODING_GPTQ) {
        multiply_blocks<4, true>(stream, activations, zeros, blocks, part);
        return;
    }
    switch (bits) {
        case 2:
            multiply_blocks<2, false>(stream, activations, 0, blocks, part);
            break;
        case 3:
            multiply_blocks<3, false>(stream, activations, 0, blocks, part);
            break;
        case 4:
            multiply_blocks<4, false>(stream, activations, 0, blocks, part);
            break;
        case 5:
            multiply_blocks<5, false>(stream, activations, 0, blocks, part);
            break;
        case 6:
            multiply_blocks<6, false>(stream, activations, 0, blocks, part);
            break;
        case 8:
            multiply_blocks<8, false>(stream, activations, 0, blocks, part);
            break;
        default:
            multiply_blocks<BITS_FLOAT, false>(stream, activations, 0, blocks, part);
    }
}

// sums += scales * part
template <int ROW_TILES>
__device__ __forceinline__ void add_group(const float (&scales)[4], const Sums<ROW_TILES>& part,
                                          Sums<ROW_TILES>& sums) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& sum = sums[tile][m][i];
                sum = fmaf(scales[2 * m + i / 2], part[tile][m][i], sum);
            }
        }
    }
}

// Where a row's sum of a local output lies among a warp's: no two lanes of a store meet in a bank.
__device__ __forceinline__ int sum_place(int row, int output) {
    return row * TILE_OUTPUTS + (output ^ (row / 2 % 4 * 8));
}

template <int ROW_TILES>
__device__ __forceinline__ void put_sums(const Sums<ROW_TILES>& sums, int lane, int rows,
                                         float* places) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = tile * ROWS_OF_TILE + 2 * (lane % 4) + i % 2;
            if (row >= rows) continue;
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const int output = 16 * m + 8 * (i / 2) + lane / 4;
                places[sum_place(row, output)] = sums[tile][m][i];
            }
        }
    }
}

__device__ __forceinline__ void store(const LinearArgs& args, const LinearMatrix& target, int row,
                                      int output, float sum) {
    if (output >= target.out_features) return;
    const float bias = target.bias == nullptr ? 0.0f : __ldg(target.bias + output);
    const float y = fmaf(target.matrix.scale, sum, bias);
    float* out = target.out + int64_t(row) * target.out_features + output;
    *out = args.accumulate ? fmaf(args.store_scale, y, *out) : y;
}

// The same in all lanes, which the compiler cannot see in a thread's number.
__device__ __forceinline__ int warp_number() {
    return __shfl_sync(0xffffffffu, threadIdx.x / WARP_LANES, 0);
}

__device__ __forceinline__ int lane_number() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

}  // namespace oxl
