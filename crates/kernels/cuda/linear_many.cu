// y = store(W x + bias) for many rows: weights are taken apart on their way from shared memory to the tensor
// cores, so that they are read as they are stored and never written as fp16.
//
// Floor: 2 rows K N operations; the library's products of fp16 give 650 to 780 TFLOP/s on an H100, whose power is
// the limit. What a warp takes apart serves all rows of its block of threads, the more the better.
//
// A cluster of two blocks of threads (CTAs) goes through *items*, each of which is 256 outputs (eight column tiles, four a
// CTA, half of one a warp) and ROWS rows. One warp of each CTA fetches what is multiplied, 64 inputs at a time (a *chunk*: two
// blocks of weights), into a ring in shared memory: weights for its own CTA, half of the rows for both. One warp prepares
// scales. Two groups of four warps take weights apart and multiply them: while a chunk's products go on, the next
// chunk is taken apart. Neighbouring clusters have other rows and the same weights.
//
// A weight is f16((code - zero) * scale) here, as `oxl_dequantise` makes it, and a sum goes through K in order.
//
// Rows lie in chunks: f16 [chunks, rows rounded up, 64], in which the 16-byte pieces of row r are at
// piece ^ r % 8, and the inputs of a block as `chunk_place` says. Compute capability 9.0 alone; others
// do not have these kernels.
#include "linear.cuh"

#include "bulk.cuh"
#include "chunks.cuh"
#include "group_product.cuh"
#include "halves.cuh"
#include "rows.cuh"

struct LinearManyArgs {
    int32_t matrix_count;
    int32_t rows;
    int32_t row_stride;  // rows of a chunk in memory, a multiple of 256
    int32_t blocks;      // of K
    int32_t items;       // of all matrices and the same rows: `first_item` of a matrix counts these
    int32_t accumulate;  // 0: out = y; 1: out += store_scale * y
    float store_scale;
    int32_t stages;       // of the ring
    int32_t block_bytes;  // room of a block of weights in it
    int32_t gate;         // NOT_GATED, or ACTIVATION_.. other than erf's: of two matrices, gate and up, the
                          //   first's `out` receives activation(gate) * up in f16 [rows, out_features], a
                          //   multiple of 32
    LinearMatrix matrices[oxl::MOST_MATRICES];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace oxl {

constexpr int CLUSTER = 2;
constexpr int CONSUMERS = 8;
constexpr int GROUP_THREADS = 128;
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

// What one stage of the ring holds: rows of a chunk, then scales of its blocks, then weights, one tile after the other.
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
          index(blockIdx.x / CLUSTER) {}

    __device__ __forceinline__ bool has_item() const { return index < args.items * row_tiles; }
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
            __syncwarp();
            if (lane == 0) barrier_arrive(ring.full());
            ring.advance();
        }
    }
}

// A lane's weights of a chunk.
using ChunkWeights = HalfWeights[CHUNK_BLOCKS];

// Where a lane's half of a tile lies in a chunk.
struct ChunkPlace {
    uint32_t weights;
    uint32_t scales;
    int half;
    int lane;
};

// Takes a block apart that begins so many bytes after the chunk's first, and is its `i`-th.
template <int BITS>
__device__ __forceinline__ void take_block(const ChunkPlace& place, int bytes, int i,
                                           HalfWeights& weights) {
    HalfScales scales;
    scales.load(place.scales + i * SCALE_BYTES);
    take_half<BITS>(place.weights + bytes, place.lane, place.half, weights);
    finish_half<BITS>(scales, weights);
}

// The same where only a call knows the bits; none for what is not there.
__device__ __forceinline__ void take_any_block(int bits, const ChunkPlace& place, int bytes, int i,
                                               HalfWeights& weights) {
    switch (bits) {
        case 2: take_block<2>(place, bytes, i, weights); break;
        case 3: take_block<3>(place, bytes, i, weights); break;
        case 4: take_block<4>(place, bytes, i, weights); break;
        case 5: take_block<5>(place, bytes, i, weights); break;
        case 6: take_block<6>(place, bytes, i, weights); break;
        case 8: take_block<8>(place, bytes, i, weights); break;
        case BITS_FLOAT: take_block<BITS_FLOAT>(place, bytes, i, weights); break;
        default: weights = {};
    }
}

// Takes a chunk apart whose blocks have so many bits.
template <int BITS>
__device__ __forceinline__ void take_both(const ChunkPlace& place, ChunkWeights& weights) {
#pragma unroll
    for (int i = 0; i < CHUNK_BLOCKS; ++i) {
        take_block<BITS>(place, i * BITS * BLOCK_UNIT_BYTES, i, weights[i]);
    }
}

// The same where only a call knows them. `second` is 0 where there is no second block.
__device__ __forceinline__ void take_chunk(int first, int second, const ChunkPlace& place,
                                           ChunkWeights& weights) {
    // Comparisons take less time than a table of where to go.
    if (first != second) {
        take_any_block(first, place, 0, 0, weights[0]);
        take_any_block(second, place, first * BLOCK_UNIT_BYTES, 1, weights[1]);
    } else if (first == 4) {
        take_both<4>(place, weights);
    } else if (first == 5) {
        take_both<5>(place, weights);
    } else if (first == 3) {
        take_both<3>(place, weights);
    } else if (first == 6) {
        take_both<6>(place, weights);
    } else if (first == 2) {
        take_both<2>(place, weights);
    } else if (first == 8) {
        take_both<8>(place, weights);
    } else {
        take_both<BITS_FLOAT>(place, weights);
    }
}

// Starts the products of a chunk with its rows, as a group.
template <int ROWS>
__device__ __forceinline__ void start_products(const ChunkWeights& weights, uint32_t x, bool adds,
                                               float (&sums)[ROWS / 2]) {
    group_fence();
    const uint64_t all_rows = describe_rows(x);
#pragma unroll
    for (int step = 0; step < 2 * CHUNK_BLOCKS; ++step) {
        const auto& pairs = weights[step / 2].pairs;
        const int first = 2 * (step % 2);
        GroupProduct<ROWS>::start(sums, pairs[0][first], pairs[1][first], pairs[0][first + 1],
                                  pairs[1][first + 1], all_rows + next_inputs(step),
                                  adds || step > 0);
    }
    group_commit();
}

// Says to both CTAs that a warp has read a stage: each has fetched half of the rows.
__device__ __forceinline__ void release(uint32_t barrier, int lane) {
    if (lane < CLUSTER) barrier_arrive_at(barrier, lane);
}

// Multiplies an item: one of the warps of a group. While products of a chunk go on, the next one is taken apart.
template <int ROWS>
__device__ __forceinline__ void multiply_item(const TileMatrix& matrix, Ring<ROWS>& ring, int warp,
                                              int lane, float (&sums)[ROWS / 2]) {
    constexpr int SETS = 2;
    const int blocks = matrix.blocks;
    const int half = warp % 2;
    const uint32_t own_scales = (lane / 4 * 2 + half) * sizeof(HalfScales);
    ChunkWeights weights[SETS];
    uint32_t busy = 0;
    int end = 0;
    int bits = 0;
#pragma unroll 1
    for (int start = 0; start < blocks; start += SETS * CHUNK_BLOCKS) {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int block = start + set * CHUNK_BLOCKS;
            if (block < blocks) {
                if (block >= end) bits = section_bits(matrix, block, end);
                int second = bits;
                if (block + 1 >= end) {
                    second = block + 1 < blocks ? section_bits(matrix, block + 1, end) : 0;
                }
                ring.wait_full();
                const ChunkPlace place = {ring.weights(warp / 2), ring.scales(warp / 2) + own_scales,
                                          half, lane};
                take_chunk(bits, second, place, weights[set]);
                bits = second;
                start_products<ROWS>(weights[set], ring.x(), block > 0, sums);
                // The chunk before is done then: its weights may be written again, and its rows.
                group_wait<1>();
                if (busy != 0) release(busy, lane);
                busy = ring.empty();
                ring.advance();
            }
        }
    }
    group_wait<0>();
    release(busy, lane);
}

// Adds to memory without waiting for what is there.
__device__ __forceinline__ void add_four(float* to, const float4& y) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     __cvta_generic_to_global(to)),
                 "f"(y.x), "f"(y.y), "f"(y.z), "f"(y.w)
                 : "memory");
}

// Outputs of a row to where they belong: four, or as many as there are. Each is added to once, so that
// there is one order of additions.
__device__ __forceinline__ void store_four(const LinearManyArgs& args, float* out, int there,
                                           bool is_wide, const float4& y) {
    if (is_wide) {
        if (args.accumulate) {
            add_four(out, y);
        } else {
            *reinterpret_cast<float4*>(out) = y;
        }
        return;
    }
    const float each[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i < there) out[i] = args.accumulate ? out[i] + each[i] : each[i];
    }
}

// What makes results of a warp's sums: their factor, and the biases of its outputs g and g + 8.
struct Finish {
    float scale;
    float bias[2];

    // Of the half of a tile that begins at output `first`.
    __device__ __forceinline__ Finish(const LinearMatrix& target, int first, int lane,
                                      float factor) {
        scale = target.matrix.scale * factor;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int output = first + 8 * i + lane / 4;
            const bool has_bias = target.bias != nullptr && output < target.out_features;
            bias[i] = has_bias ? __ldg(target.bias + output) * factor : 0.0f;
        }
    }

    // Puts results of eight rows into a buffer, OUT_STRIDE floats to a row.
    template <int COUNT>
    __device__ __forceinline__ void put(const float (&sums)[COUNT], int eight, int lane,
                                        float* buffer) const {
        float* to = buffer + lane % 4 * 2 * OUT_STRIDE + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            to[8 * i] = fmaf(scale, sums[4 * eight + 2 * i], bias[i]);
            to[8 * i + OUT_STRIDE] = fmaf(scale, sums[4 * eight + 2 * i + 1], bias[i]);
        }
    }
};

// A lane's four results of eight rows in a buffer, of row lane / 4.
__device__ __forceinline__ float4 four_of(const float* buffer, int lane) {
    return *reinterpret_cast<const float4*>(buffer + lane / 4 * OUT_STRIDE + lane % 4 * 4);
}

// A warp's sums of its half of a tile to where they belong, by way of shared memory: eight rows at a time.
template <int ROWS>
__device__ __forceinline__ void store_sums(const LinearManyArgs& args, const LinearMatrix& target,
                                           int first, int first_row, int lane, float* room,
                                           const float (&sums)[ROWS / 2]) {
    const int width = target.out_features;
    const Finish finish(target, first, lane, args.accumulate ? args.store_scale : 1.0f);
    const int output = first + lane % 4 * 4;
    const int there = width - output;
    const bool is_wide = width % 4 == 0;
    int row = first_row + lane / 4;
    float* out = target.out + int64_t(row) * width + output;
#pragma unroll
    for (int eight = 0; eight < ROWS / 8; ++eight) {
        // Two buffers, so that lanes meet once.
        float* buffer = room + eight % 2 * OUT_FLOATS;
        finish.put(sums, eight, lane, buffer);
        __syncwarp();
        const float4 y = four_of(buffer, lane);
        if (row < args.rows && there > 0) store_four(args, out, there, is_wide, y);
        row += 8;
        out += 8 * width;
    }
}

// Waits for the warp that has the same tile of the other of gate and up.
__device__ __forceinline__ void meet_partner(int warp) {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + warp % (CONSUMERS / 2)) : "memory");
}

// Stores activation(gate) * up of a half of a tile: two warps, one of which has sums of the gate and the other of up,
// put theirs into their rooms, 16 rows at a time, and each takes eight rows of both.
template <int ROWS>
__device__ __forceinline__ void store_gated(const LinearManyArgs& args, const LinearMatrix& target,
                                            int first, int first_row, int warp, int lane,
                                            float* rooms, const float (&sums)[ROWS / 2]) {
    constexpr int ROOM_FLOATS = 2 * OUT_FLOATS;
    const LinearMatrix& gate = args.matrices[0];
    const int group = warp / (CONSUMERS / 2);
    float* room = rooms + warp * ROOM_FLOATS;
    const float* gate_room = rooms + warp % (CONSUMERS / 2) * ROOM_FLOATS + group * OUT_FLOATS;
    const float* up_room = gate_room + CONSUMERS / 2 * ROOM_FLOATS;
    const Finish finish(target, first, lane, 1.0f);
    int row = first_row + 8 * group + lane / 4;
    __half* out = reinterpret_cast<__half*>(gate.out) + int64_t(row) * gate.out_features + first +
                  lane % 4 * 4;
#pragma unroll
    for (int eight = 0; eight < ROWS / 8; eight += 2) {
        finish.put(sums, eight, lane, room);
        finish.put(sums, eight + 1, lane, room + OUT_FLOATS);
        meet_partner(warp);
        const float4 g = four_of(gate_room, lane);
        const float4 u = four_of(up_room, lane);
        meet_partner(warp);
        const auto gated = [&](float x, float y) { return __fmul_rn(activate_by_exponent(args.gate, x), y); };
        const __half2 low = clamped_half2(gated(g.x, u.x), gated(g.y, u.y));
        const __half2 high = clamped_half2(gated(g.z, u.z), gated(g.w, u.w));
        if (row < args.rows) {
            *reinterpret_cast<uint2*>(out) = make_uint2(reinterpret_cast<const uint32_t&>(low),
                                                        reinterpret_cast<const uint32_t&>(high));
        }
        row += 16;
        out += 16 * int64_t(gate.out_features);
    }
}

// Multiplies all of the CTA's items. Eight warps.
template <int ROWS>
__device__ __forceinline__ void consume(const LinearManyArgs& args, Ring<ROWS> ring, int warp,
                                        int lane, float* rooms) {
    const int slot = warp / 2;
    for (Items<ROWS> items(args); items.has_item(); items.advance()) {
        const LinearMatrix& target = items.target(slot);
        float sums[ROWS / 2];
        // A warp past the last tile multiplies what lies in the ring: its group needs it.
        multiply_item<ROWS>(target.matrix, ring, warp, lane, sums);
        const int tile = items.tile(target, slot);
        if (tile >= target.matrix.tiles) continue;
        const int first = tile * TILE_OUTPUTS + warp % 2 * HALF_OUTPUTS;
        if (items.is_gated()) {
            store_gated<ROWS>(args, target, first, items.first_row(), warp, lane, rooms, sums);
        } else {
            float* room = rooms + warp * 2 * OUT_FLOATS;
            store_sums<ROWS>(args, target, first, items.first_row(), lane, room, sums);
        }
    }
}

template <int ROWS>
__device__ __forceinline__ void multiply_many(const LinearManyArgs& args) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * MOST_STAGES];
    __shared__ __align__(16) float rooms[CONSUMERS * 2 * OUT_FLOATS];
    const int warp = warp_number();
    const int lane = lane_number();
    const Ring<ROWS> ring = {shared_place(barriers),
                             (shared_place(shared) + 1023) & ~1023u,
                             CHUNK_BLOCKS * args.block_bytes,
                             args.stages,
                             0,
                             0};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < args.stages; ++stage) {
            // Full: what is fetched, and scales. Empty: the consumers of both CTAs.
            barrier_init(ring.barriers + stage * BARRIER_BYTES, 2);
            barrier_init(ring.barriers + (MOST_STAGES + stage) * BARRIER_BYTES, CLUSTER * CONSUMERS);
        }
        barriers_are_made();
    }
    cluster_meet();
    dependency_trigger();
    dependency_wait();
    if (warp < CONSUMERS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<ROWS>(args, ring, warp, lane, rooms);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == CONSUMERS) {
            fetch<ROWS>(args, ring, lane);
        } else if (warp == CONSUMERS + 1) {
            prepare_scales<ROWS>(args, ring, lane);
        }
    }
    // Until then the other CTA may still write here.
    __syncwarp();
    cluster_meet();
}

}  // namespace oxl

// Grid: multiprocessors, in clusters of two, at most one cluster a pair of an item and ROWS rows. Dynamic shared memory:
// 1,024 bytes and `stages` times ROWS * 128 + 2,048 + 8 * block_bytes.
extern "C" __global__ void __cluster_dims__(oxl::CLUSTER, 1, 1)
    __launch_bounds__(oxl::MANY_THREADS, 1)
        oxl_linear_many_64(const __grid_constant__ LinearManyArgs args) {
    oxl::multiply_many<64>(args);
}

extern "C" __global__ void __cluster_dims__(oxl::CLUSTER, 1, 1)
    __launch_bounds__(oxl::MANY_THREADS, 1)
        oxl_linear_many_128(const __grid_constant__ LinearManyArgs args) {
    oxl::multiply_many<128>(args);
}

extern "C" __global__ void __cluster_dims__(oxl::CLUSTER, 1, 1)
    __launch_bounds__(oxl::MANY_THREADS, 1)
        oxl_linear_many_256(const __grid_constant__ LinearManyArgs args) {
    oxl::multiply_many<256>(args);
}

#endif
