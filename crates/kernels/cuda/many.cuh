// What feeds products of many rows (linear_many.cu): their arguments, a ring of stages in shared memory, and the
// warps that fetch rows and weights and prepare scales.
#pragma once

#include "bulk.cuh"
#include "chunks.cuh"
#include "group_product.cuh"
#include "halves.cuh"
#include "linear.cuh"

struct LinearManyArgs {
    int32_t matrix_count;
    int32_t rows;
    int32_t row_stride;  // rows of a chunk in memory, a multiple of 256
    int32_t blocks;      // of K
    int32_t first;       // pair of an item and ROWS rows of this launch; a matrix' `first_item` counts items
    int32_t end;
    int32_t accumulate;  // 0: out = y; 1: out += store_scale * y
    float store_scale;
    int32_t stages;       // of the ring
    int32_t block_bytes;  // room of a block of weights in it
    int32_t gate;         // NOT_GATED, or ACTIVATION_.. other than erf's: of two matrices, gate and up, the
                          //   first's `out` receives activation(gate) * up in f16 [rows, out_features], a
                          //   multiple of 32
    int32_t reserved;
    LinearMatrix matrices[oxl::MOST_MATRICES];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace oxl {

constexpr int CLUSTER = 2;
constexpr int CONSUMERS = 8;
constexpr int MANY_THREADS = GROUP_THREADS + CONSUMERS * WARP_LANES;
constexpr int CTA_TILES = CONSUMERS / 2;
constexpr int ITEM_TILES = CLUSTER * CTA_TILES;
constexpr int CHUNK_BLOCKS = 2;
constexpr int CHUNK_ROW_BYTES = 128;
constexpr int MOST_STAGES = 16;

constexpr int NOT_GATED = -1;

// Room of a warp for sums of eight rows on their way out: no two lanes of a store meet in a bank.
constexpr int OUT_STRIDE = HALF_OUTPUTS + 4;
constexpr int OUT_FLOATS = 8 * OUT_STRIDE;

// Of a tile and block: what makes weights of its codes.
constexpr int SCALE_BYTES = 8 * 2 * sizeof(HalfScales);
constexpr int CHUNK_SCALE_BYTES = CTA_TILES * CHUNK_BLOCKS * SCALE_BYTES;

// What one stage of the ring holds: rows of a chunk, then scales of its blocks, then weights, tile by tile.
template <int ROWS>
struct Ring {
    static constexpr int x_bytes = ROWS * CHUNK_ROW_BYTES;

    uint32_t barriers;  // [MOST_STAGES] full, [MOST_STAGES] empty
    uint32_t place;
    int tile_bytes;  // of a chunk's weights
    int stages;
    int stage;
    uint32_t parity;

    __device__ __forceinline__ uint32_t full() const { return barriers + stage * BARRIER_BYTES; }
    __device__ __forceinline__ uint32_t empty() const {
        return barriers + (MOST_STAGES + stage) * BARRIER_BYTES;
    }
    __device__ __forceinline__ uint32_t x() const {
        return place + stage * (x_bytes + CHUNK_SCALE_BYTES + CTA_TILES * tile_bytes);
    }
    __device__ __forceinline__ uint32_t scales(int tile) const {
        return x() + x_bytes + tile * CHUNK_BLOCKS * SCALE_BYTES;
    }
    __device__ __forceinline__ uint32_t weights(int tile) const {
        return x() + x_bytes + CHUNK_SCALE_BYTES + tile * tile_bytes;
    }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full(), parity); }
    __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(), parity ^ 1); }
    __device__ __forceinline__ void advance() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The items of a cluster, and the CTA's share of the one it is at: a slot for each tile, half of them for each warp
// group. Where gate and up are multiplied, the first half are tiles of the gate and the others the same tiles of up.
template <int ROWS>
struct Items {
    const LinearManyArgs& args;
    int row_tiles;
    int rank;
    int index;

    __device__ __forceinline__ explicit Items(const LinearManyArgs& args)
        : args(args),
          row_tiles((args.rows + ROWS - 1) / ROWS),
          rank(blockIdx.x % CLUSTER),
          index(args.first + blockIdx.x / CLUSTER) {}

    __device__ __forceinline__ bool has_item() const { return index < args.end; }
    __device__ __forceinline__ void advance() { index += gridDim.x / CLUSTER; }
    __device__ __forceinline__ bool is_gated() const { return args.gate != NOT_GATED; }
    __device__ __forceinline__ int first_row() const { return index % row_tiles * ROWS; }

    __device__ __forceinline__ const LinearMatrix& target(int slot) const {
        if (is_gated()) return args.matrices[slot / (CTA_TILES / 2)];
        int matrix = 0;
#pragma unroll 1
        while (matrix + 1 < args.matrix_count &&
               index / row_tiles >= args.matrices[matrix + 1].first_item) {
            ++matrix;
        }
        return args.matrices[matrix];
    }
    // The slot's tile of its matrix, which may have fewer.
    __device__ __forceinline__ int tile(const LinearMatrix& target, int slot) const {
        const int item = index / row_tiles;
        if (is_gated()) {
            constexpr int tiles = CTA_TILES / 2;
            return (item * CLUSTER + rank) * tiles + slot % tiles;
        }
        return (item - target.first_item) * ITEM_TILES + rank * CTA_TILES + slot;
    }
};

// Bytes of a tile's weights in the chunk that begins with a block, and before which block chunks that have as many
// end.
__device__ __forceinline__ int chunk_bytes_at(const TileMatrix& matrix, int block, int& end) {
    int units = section_bits(matrix, block, end);
    if (end >= block + CHUNK_BLOCKS) {
        units *= 2;
    } else {
        int after;
        if (end < matrix.blocks) units += section_bits(matrix, end, after);
        end = block + CHUNK_BLOCKS;
    }
    return units * BLOCK_UNIT_BYTES;
}

// Fetches rows and weights of all chunks of the CTA's items. One warp, of which a lane has a slot.
template <int ROWS>
__device__ __forceinline__ void fetch(const LinearManyArgs& args, Ring<ROWS> ring, int lane) {
    constexpr int half_bytes = ring.x_bytes / CLUSTER;
    const int64_t x_stride = int64_t(args.row_stride) * CHUNK_ROW_BYTES;
    const int slot = lane % CTA_TILES;
    for (Items<ROWS> items(args); items.has_item(); items.advance()) {
        const LinearMatrix& target = items.target(slot);
        const TileMatrix& matrix = target.matrix;
        const int tile = items.tile(target, slot);
        const bool has_tile = lane < CTA_TILES && tile < matrix.tiles;
        const uint8_t* weights =
            matrix.weights + int64_t(has_tile ? tile : 0) * matrix.tile_units * BLOCK_UNIT_BYTES;
        const uint8_t* x = reinterpret_cast<const uint8_t*>(target.x) +
                           int64_t(items.first_row()) * CHUNK_ROW_BYTES + items.rank * half_bytes;
        int bytes = 0;
        int all_bytes = 0;
        int end = 0;
#pragma unroll 1
        for (int block = 0; block < args.blocks; block += CHUNK_BLOCKS) {
            if (block + CHUNK_BLOCKS > end) {
                bytes = has_tile ? chunk_bytes_at(matrix, block, end) : 0;
                all_bytes = __reduce_add_sync(0xffffffffu, bytes);
                end = __reduce_min_sync(0xffffffffu, has_tile ? end : args.blocks);
            }
            ring.wait_empty();
            if (lane == 0) {
                barrier_expect(ring.full(), ring.x_bytes + all_bytes);
                bulk_copy_to_both(ring.x() + items.rank * half_bytes, x, half_bytes, ring.full());
            }
            __syncwarp();
            if (has_tile) bulk_copy(ring.weights(slot), weights, bytes, ring.full());
            weights += bytes;
            x += x_stride;
            ring.advance();
        }
    }
}

// Prepares scales of all blocks of the CTA's items: a lane for each g of each slot.
template <int ROWS>
__device__ __forceinline__ void prepare_scales(const LinearManyArgs& args, Ring<ROWS> ring,
                                               int lane) {
    static_assert(CTA_TILES * 8 == WARP_LANES, "a lane for each g of each slot");
    const int slot = lane / 8;
    const int g = lane % 8;
    for (Items<ROWS> items(args); items.has_item(); items.advance()) {
        const LinearMatrix& target = items.target(slot);
        const TileMatrix& matrix = target.matrix;
        const int tile = min(items.tile(target, slot), matrix.tiles - 1);
        // Of the group that is next; groups follow each other.
        BlockInfo info = block_info(matrix, 0);
        RawScales raw = load_scales(matrix, tile, 0, g);
        HalfScales scales[2];
        int group_end = 0;
#pragma unroll 1
        for (int block = 0; block < args.blocks; block += CHUNK_BLOCKS) {
            ring.wait_empty();
#pragma unroll
            for (int i = 0; i < CHUNK_BLOCKS; ++i) {
                if (block + i == group_end && group_end < args.blocks) {
                    half_scales(matrix, raw, info, scales);
                    group_end = info.group_end();
                    raw = load_scales(matrix, tile, min(info.group() + 1, matrix.groups - 1), g);
                    info = block_info(matrix, min(group_end, args.blocks - 1));
                }
                const uint32_t to = ring.scales(slot) + i * SCALE_BYTES + g * sizeof(scales);
                scales[0].store(to);
                scales[1].store(to + sizeof(HalfScales));
            }
            barrier_arrive(ring.full());
            ring.advance();
        }
    }
}

}  // namespace oxl

#endif
