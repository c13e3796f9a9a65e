// y = store(W x + bias) for many rows: weights are taken apart on their way from shared memory to the tensor
// cores, so that they are read as they are stored and never written as fp16.
//
// Floor: 2 rows K N operations; the library's products of fp16 give 650 to 780 TFLOP/s on an H100, whose power is
// the limit. Beside a block's products (4 x 128 rows: 512 cycles of a multiprocessor's tensor cores for both warp
// groups) a warp issues about 90 instructions for taking it apart, and there are two warps a scheduler.
//
// A block of threads (CTA) goes through *items*, each of which is 256 outputs (eight column tiles, one a warp) and
// ROWS rows. One warp fetches what is multiplied, 64 inputs at a time (a *chunk*: two blocks of weights), into a ring in shared
// memory; two groups of four warps take weights apart and multiply them. While one block's products go on, the next block is
// taken apart, and where that takes long the other group's go on. Neighbouring CTAs have other rows and the same weights.
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

struct LinearManyArgs {
    int32_t matrix_count;
    int32_t rows;
    int32_t row_stride;  // rows of a chunk in memory, a multiple of 128
    int32_t blocks;      // of K
    int32_t items;       // of all matrices, rows apart: `first_item` of a matrix counts these
    int32_t accumulate;  // 0: out = y; 1: out += store_scale * y
    float store_scale;
    int32_t stages;       // of the ring
    int32_t block_bytes;  // room of a block of weights in it
    int32_t reserved;
    LinearMatrix matrices[oxl::MOST_MATRICES];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace oxl {

constexpr int CONSUMERS = 8;
constexpr int GROUP_THREADS = 128;
constexpr int MANY_THREADS = GROUP_THREADS + CONSUMERS * WARP_LANES;
constexpr int CHUNK_BLOCKS = 2;
constexpr int CHUNK_ROW_BYTES = 128;

// Room of a warp for sums of eight rows on their way out: no two lanes of a store meet in a bank.
constexpr int OUT_STRIDE = TILE_OUTPUTS + 4;
constexpr int OUT_FLOATS = 8 * OUT_STRIDE;

constexpr int MOST_STAGES = 16;

// Warps that prepare scales: a thread for each g of each tile.
constexpr int SCALERS = CONSUMERS * 8 / WARP_LANES;

// Of a tile and block: what makes weights of its codes, 32 bytes for each g.
constexpr int SCALE_BYTES = 8 * sizeof(WeightScales);
constexpr int CHUNK_SCALE_BYTES = CONSUMERS * CHUNK_BLOCKS * SCALE_BYTES;

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
        return place + stage * (x_bytes + CHUNK_SCALE_BYTES + CONSUMERS * tile_bytes);
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

// One item of a CTA.
template <int ROWS>
struct Item {
    const LinearMatrix& target;
    int first_tile;
    int first_row;

    static __device__ __forceinline__ int matrix_of(const LinearManyArgs& args, int item) {
        int index = 0;
#pragma unroll 1
        while (index + 1 < args.matrix_count && item >= args.matrices[index + 1].first_item) {
            ++index;
        }
        return index;
    }

    __device__ __forceinline__ Item(const LinearManyArgs& args, int index, int row_tiles)
        : target(args.matrices[matrix_of(args, index / row_tiles)]),
          first_tile((index / row_tiles - target.first_item) * CONSUMERS),
          first_row(index % row_tiles * ROWS) {}
};

// Fetches rows and weights of all chunks of the CTA's items. One warp.
template <int ROWS>
__device__ __forceinline__ void fetch(const LinearManyArgs& args, Ring<ROWS> ring, int lane) {
    const int row_tiles = (args.rows + ROWS - 1) / ROWS;
    const int64_t chunk_bytes = int64_t(args.row_stride) * CHUNK_ROW_BYTES;
    for (int index = blockIdx.x; index < args.items * row_tiles; index += gridDim.x) {
        const Item<ROWS> item(args, index, row_tiles);
        const TileMatrix& matrix = item.target.matrix;
        const int tiles = min(CONSUMERS, matrix.tiles - item.first_tile);
        const bool has_tile = lane < tiles;
        const int tile = item.first_tile + (has_tile ? lane : 0);
        const uint8_t* weights = matrix.weights + int64_t(tile) * matrix.tile_units * BLOCK_UNIT_BYTES;
        const uint8_t* x = reinterpret_cast<const uint8_t*>(item.target.x) +
                           int64_t(item.first_row) * CHUNK_ROW_BYTES;
#pragma unroll 1
        for (int block = 0; block < args.blocks; block += CHUNK_BLOCKS) {
            const int end = min(block + CHUNK_BLOCKS, args.blocks);
            const int begin_units = units_before(matrix, block);
            const int bytes = (units_before(matrix, end) - begin_units) * BLOCK_UNIT_BYTES;
            ring.wait_empty();
            if (lane == 0) {
                barrier_expect(ring.full(), ring.x_bytes + tiles * bytes);
                bulk_copy(ring.x(), x, ring.x_bytes, ring.full());
            }
            __syncwarp();
            if (has_tile) {
                bulk_copy(ring.weights(lane), weights + int64_t(begin_units) * BLOCK_UNIT_BYTES, bytes,
                          ring.full());
            }
            x += chunk_bytes;
            ring.advance();
        }
    }
}

// Scales of all blocks of the CTA's items, by as many threads as there are tiles and rows g of them.
template <int ROWS>
__device__ __forceinline__ void prepare_scales(const LinearManyArgs& args, Ring<ROWS> ring,
                                               int thread) {
    const int row_tiles = (args.rows + ROWS - 1) / ROWS;
    const int g = thread % 8;
    for (int index = blockIdx.x; index < args.items * row_tiles; index += gridDim.x) {
        const Item<ROWS> item(args, index, row_tiles);
        const TileMatrix& matrix = item.target.matrix;
        const int tile = min(item.first_tile + thread / 8, matrix.tiles - 1);
        // Of the group that is next; groups follow each other.
        BlockInfo info = block_info(matrix, 0);
        RawScales raw = load_scales(matrix, tile, 0, g);
        WeightScales scales;
        int group_end = 0;
#pragma unroll 1
        for (int block = 0; block < args.blocks; block += CHUNK_BLOCKS) {
            ring.wait_empty();
#pragma unroll
            for (int i = 0; i < CHUNK_BLOCKS; ++i) {
                if (block + i == group_end && group_end < args.blocks) {
                    scales = weight_scales(matrix, info.bits(), raw, info);
                    group_end = info.group_end();
                    raw = load_scales(matrix, tile, min(info.group() + 1, matrix.groups - 1), g);
                    info = block_info(matrix, min(group_end, args.blocks - 1));
                }
                const uint32_t to = ring.scales(thread / 8) + i * SCALE_BYTES + g * sizeof(scales);
                const auto store = [to](int at, const uint32_t(&four)[4]) {
                    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + at),
                                 "r"(four[0]), "r"(four[1]), "r"(four[2]), "r"(four[3])
                                 : "memory");
                };
                store(0, scales.offsets);
                store(16, scales.factors);
            }
            __syncwarp();
            if (thread % WARP_LANES == 0) barrier_arrive(ring.full());
            ring.advance();
        }
    }
}

// Words of a block in shared memory, by their byte in it.
struct PlaceReader {
    uint32_t place;

    __device__ __forceinline__ uint4 quad(int byte) const {
        uint4 words;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                     : "r"(place + byte));
        return words;
    }
    __device__ __forceinline__ uint2 two(int byte) const {
        uint2 words;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(words.x), "=r"(words.y)
                     : "r"(place + byte));
        return words;
    }
    __device__ __forceinline__ uint32_t one(int byte) const {
        uint32_t word;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(place + byte));
        return word;
    }
};

// A lane's weights of a chunk.
using ChunkWeights = LaneWeights[CHUNK_BLOCKS];

// Takes a block apart that lies at `place`, with scales at `scale_place`.
template <int BITS>
__device__ __forceinline__ void take_apart(uint32_t place, uint32_t scale_place, int lane,
                                           LaneWeights& weights) {
    WeightScales scales;
    const auto load = [scale_place](int at, uint32_t(&four)[4]) {
        const uint4 words = PlaceReader{scale_place}.quad(at);
        four[0] = words.x;
        four[1] = words.y;
        four[2] = words.z;
        four[3] = words.w;
    };
    load(0, scales.offsets);
    load(16, scales.factors);
    take_weights<BITS, true>(PlaceReader{place}, lane, weights);
    finish_weights<BITS>(scales, weights);
}

__device__ __forceinline__ void take_apart(int bits, uint32_t place, uint32_t scale_place, int lane,
                                           LaneWeights& weights) {
    switch (bits) {
        case 2: take_apart<2>(place, scale_place, lane, weights); break;
        case 3: take_apart<3>(place, scale_place, lane, weights); break;
        case 4: take_apart<4>(place, scale_place, lane, weights); break;
        case 5: take_apart<5>(place, scale_place, lane, weights); break;
        case 6: take_apart<6>(place, scale_place, lane, weights); break;
        case 8: take_apart<8>(place, scale_place, lane, weights); break;
        case BITS_FLOAT: take_apart<BITS_FLOAT>(place, scale_place, lane, weights); break;
        default: weights = {};
    }
}

// Takes a chunk apart whose blocks have so many bits.
template <int BITS>
__device__ __forceinline__ void take_both(uint32_t place, uint32_t scale_place, int lane,
                                          ChunkWeights& weights) {
#pragma unroll
    for (int i = 0; i < CHUNK_BLOCKS; ++i) {
        take_apart<BITS>(place + i * BITS * BLOCK_UNIT_BYTES, scale_place + i * SCALE_BYTES, lane,
                         weights[i]);
    }
}

// The same where only a call knows them. `second` is 0 where there is no second block.
__device__ __forceinline__ void take_chunk(int first, int second, uint32_t place,
                                           uint32_t scale_place, int lane, ChunkWeights& weights) {
    // Comparisons take less time than a table of where to go.
    if (first != second) {
        take_apart(first, place, scale_place, lane, weights[0]);
        take_apart(second, place + first * BLOCK_UNIT_BYTES, scale_place + SCALE_BYTES, lane,
                   weights[1]);
    } else if (first == 4) {
        take_both<4>(place, scale_place, lane, weights);
    } else if (first == 5) {
        take_both<5>(place, scale_place, lane, weights);
    } else if (first == 3) {
        take_both<3>(place, scale_place, lane, weights);
    } else if (first == 6) {
        take_both<6>(place, scale_place, lane, weights);
    } else if (first == 2) {
        take_both<2>(place, scale_place, lane, weights);
    } else if (first == 8) {
        take_both<8>(place, scale_place, lane, weights);
    } else {
        take_both<BITS_FLOAT>(place, scale_place, lane, weights);
    }
}

// Starts the products of a chunk with its rows, as a group.
template <int ROWS>
__device__ __forceinline__ void start_products(const ChunkWeights& weights, uint32_t x, bool adds,
                                               float (&sums)[2][ROWS / 2]) {
    group_fence();
    const uint64_t all_rows = describe_rows(x);
#pragma unroll
    for (int step = 0; step < 2 * CHUNK_BLOCKS; ++step) {
        const uint64_t rows = all_rows + next_inputs(step);
        const auto& pairs = weights[step / 2].pairs;
        const int first = 2 * (step % 2);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            GroupProduct<ROWS>::start(sums[m], pairs[2 * m][first], pairs[2 * m + 1][first],
                                      pairs[2 * m][first + 1], pairs[2 * m + 1][first + 1], rows,
                                      adds || step > 0);
        }
    }
    group_commit();
}

// Multiplies an item: one of the warps of a group. While products of a chunk go on, the next one is taken apart.
template <int ROWS>
__device__ __forceinline__ void multiply_item(const TileMatrix& matrix, Ring<ROWS>& ring, int warp,
                                              int lane, float (&sums)[2][ROWS / 2]) {
    constexpr int SETS = 2;
    const int blocks = matrix.blocks;
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
                take_chunk(bits, second, ring.weights(warp),
                           ring.scales(warp) + lane / 4 * sizeof(WeightScales), lane, weights[set]);
                bits = second;
                start_products<ROWS>(weights[set], ring.x(), block > 0, sums);
                // The chunk before is done then: its weights may be written again, and its rows.
                group_wait<1>();
                if (busy != 0 && lane == 0) barrier_arrive(busy);
                busy = ring.empty();
                ring.advance();
            }
        }
    }
    group_wait<0>();
    if (lane == 0) barrier_arrive(busy);
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

// A warp's sums of its tile's outputs to where they belong, by way of shared memory: eight rows at a time,
// lines of 32 outputs each.
template <int ROWS>
__device__ __forceinline__ void store_sums(const LinearManyArgs& args, const Item<ROWS>& item,
                                           int tile, int lane, float* room,
                                           const float (&sums)[2][ROWS / 2]) {
    const LinearMatrix& target = item.target;
    const int width = target.out_features;
    const int first = tile * TILE_OUTPUTS;
    const float factor = args.accumulate ? args.store_scale : 1.0f;
    const float scale = target.matrix.scale * factor;
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int output = first + 8 * i + lane / 4;
        const bool has_bias = target.bias != nullptr && output < width;
        bias[i] = has_bias ? __ldg(target.bias + output) * factor : 0.0f;
    }
    const int output = first + lane % 8 * 4;
    const int there = width - output;
    const bool is_wide = width % 4 == 0;
    int row = item.first_row + lane / 8;
    float* out = target.out + int64_t(row) * width + output;
#pragma unroll
    for (int eight = 0; eight < ROWS / 8; ++eight) {
        // Two buffers, so that lanes meet once.
        float* buffer = room + eight % 2 * OUT_FLOATS;
        float* to = buffer + lane % 4 * 2 * OUT_STRIDE + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* pair = sums[i / 2] + 4 * eight + i % 2 * 2;
            to[8 * i] = fmaf(scale, pair[0], bias[i]);
            to[8 * i + OUT_STRIDE] = fmaf(scale, pair[1], bias[i]);
        }
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* from = buffer + (4 * half + lane / 8) * OUT_STRIDE + lane % 8 * 4;
            const float4 y = *reinterpret_cast<const float4*>(from);
            if (row < args.rows && there > 0) store_four(args, out, there, is_wide, y);
            row += 4;
            out += 4 * width;
        }
    }
}

// Multiplies all of the CTA's items. Eight warps.
template <int ROWS>
__device__ __forceinline__ void consume(const LinearManyArgs& args, Ring<ROWS> ring, int warp,
                                        int lane, float* room) {
    const int row_tiles = (args.rows + ROWS - 1) / ROWS;
    for (int index = blockIdx.x; index < args.items * row_tiles; index += gridDim.x) {
        const Item<ROWS> item(args, index, row_tiles);
        const TileMatrix& matrix = item.target.matrix;
        // A warp past the last tile multiplies what lies in the ring: its group needs it.
        float sums[2][ROWS / 2];
        multiply_item<ROWS>(matrix, ring, warp, lane, sums);
        const int tile = item.first_tile + warp;
        if (tile < matrix.tiles) store_sums<ROWS>(args, item, tile, lane, room, sums);
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
            barrier_init(ring.barriers + stage * BARRIER_BYTES, 1 + SCALERS);
            barrier_init(ring.barriers + (MOST_STAGES + stage) * BARRIER_BYTES, CONSUMERS);
        }
        barriers_are_made();
    }
    __syncthreads();
    dependency_trigger();
    dependency_wait();
    if (warp < CONSUMERS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<ROWS>(args, ring, warp, lane, rooms + warp * 2 * OUT_FLOATS);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == CONSUMERS) {
            fetch<ROWS>(args, ring, lane);
        } else if (warp <= CONSUMERS + SCALERS) {
            prepare_scales<ROWS>(args, ring, threadIdx.x - (CONSUMERS + 1) * WARP_LANES);
        }
    }
}

}  // namespace oxl

// Grid: multiprocessors, at most one a pair of an item and ROWS rows. Dynamic shared memory: 1,024 bytes and `stages` times ROWS * 128 + 4,096 + 16 * block_bytes.
extern "C" __global__ void __launch_bounds__(oxl::MANY_THREADS, 1)
    oxl_linear_many_64(const __grid_constant__ LinearManyArgs args) {
    oxl::multiply_many<64>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::MANY_THREADS, 1)
    oxl_linear_many_128(const __grid_constant__ LinearManyArgs args) {
    oxl::multiply_many<128>(args);
}

#endif
