// y = store(W x + bias) for 1 to 32 rows and up to five matrices that share their rows, on tensor
// cores: mma.m16n8k16 with weights as A, activations as B, sums in fp32.
//
// Floor: every weight is read from memory once (0.5 bytes at 4 bits): 7.3 us for 4096 x 11008 at
// 3.1 TB/s. Beside it a warp issues, for a 4-bit block of 1024 weights, one shared 16-byte load of
// weights, one global of activations a row tile (first or second level cache), 36 integer and fp16
// operations and 4 mma a row tile.
//
// A block of threads (CTA) computes one column tile of 32 outputs (up to 8 rows) or four (more
// rows) over all of K or one of `split` parts of it. Each warp has one tile and a contiguous range
// of K, all ranges of a matrix as equal as blocks allow; it streams the bytes of its range through
// a ring of its own in shared memory (cp.async, up to eight stages of 512 bytes under way)
// whatever widths the range is made of. The first stages are asked for before the wait for the
// previous kernel: weights do not depend on it. Several tiles a CTA are for the activations: 32
// rows are four times a tile's 4-bit weights, and are then read from the second-level cache once
// for four tiles, whose warps find them in the first level.
//
// Order of sums: within a group in the tensor core (weights less their zero point, exact in
// fp16), groups in order with acc += scale * part, ranges in order by fours, fours in order within
// a part of K of the one-tile division, then these parts in order. All of it depends on the matrix
// alone: a row's bits do not depend on the other rows nor on their number.
//
// Launch: grid = all matrices' CTAs, one matrix after the other; block = 32 * the largest number of
// warps; dynamic shared memory = warps * RING_BYTES.
#include "tiles.cuh"

namespace oxl {

constexpr int MOST_MATRICES = 5;

// Column tiles of a CTA for more than 8 rows.
constexpr int WIDE_TILES = 4;

// Ranges of K that are summed before others join.
constexpr int RANGES_OF_SUM = 4;

constexpr int ROWS_OF_TILE = 8;

// Bytes that one commit group of the ring holds, and all of them.
constexpr int STAGE_BYTES = 16 * WARP_LANES;
constexpr int STAGES = 8;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;

// Floats of one tile's partial sums: 32 rows, the most of one launch.
constexpr int PARTIAL_FLOATS = 32 * TILE_OUTPUTS;
static_assert(PARTIAL_FLOATS * sizeof(float) <= RING_BYTES, "a warp's sums go into its ring");

}  // namespace oxl

// One matrix of a launch.
struct LinearMatrix {
    oxl::TileMatrix matrix;
    const __half* x;     // [rows, 32 * blocks], in the matrix' packed order
    const float* bias;   // [out_features], or null
    float* out;          // [rows, out_features]
    int32_t out_features;
    int32_t first_cta;      // of the grid
    int32_t split_shift;    // 2^split_shift CTAs share a tile's K
    int32_t ranges_shift;   // 2^ranges_shift ranges of K in a CTA, a warp for each and each tile
    int32_t sum_parts;      // of the split, that are summed before others join
    int32_t first_counter;  // of its tiles or groups of tiles; only with split > 1
    int32_t first_partial;  // of its tiles * split; only with split > 1
    int32_t reserved;
};

struct LinearArgs {
    LinearMatrix matrices[oxl::MOST_MATRICES];
    float* partials;     // [tiles * split of all matrices, PARTIAL_FLOATS]
    uint32_t* counters;  // zero before and after every launch
    int32_t matrix_count;
    int32_t rows;
    int32_t accumulate;  // 0: out = y; 1: out += store_scale * y
    float store_scale;
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

// The bytes of a warp's range, on their way through its ring.
struct WeightStream {
    const uint8_t* source;  // what this lane copies next
    char* ring;             // RING_BYTES of shared memory
    uint32_t length;        // of the range
    uint32_t asked;         // bytes of the range that have been asked for, whole stages
    uint32_t consumed;      // bytes that have been multiplied
    int lane;

    __device__ __forceinline__ WeightStream(const uint8_t* range, uint32_t length, char* ring,
                                            int lane)
        : source(range + lane * 16), ring(ring), length(length), asked(0), consumed(0), lane(lane) {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) issue();
    }

    // Asks for one more stage; past the end for an empty one, so that stages can be counted.
    __device__ __forceinline__ void issue() {
        if (asked + lane * 16 < length) {
            const uint32_t place = static_cast<uint32_t>(
                __cvta_generic_to_shared(ring + (asked & (RING_BYTES - 1)) + lane * 16));
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(source)
                         : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        asked += STAGE_BYTES;
        source += STAGE_BYTES;
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
        consumed += bytes;
        __syncwarp();
#pragma unroll
        for (int stage = 0; stage < bytes / STAGE_BYTES; ++stage) issue();
        if constexpr (bytes % STAGE_BYTES != 0) {
            if (consumed + RING_BYTES - asked >= STAGE_BYTES) issue();
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

// A lane's activations of one block and the following ones.
template <int ROW_TILES>
struct Activations {
    // Blocks that are loaded ahead: as far as registers go, to cover the second-level cache.
    static constexpr int AHEAD = ROW_TILES == 1 ? 2 : 1;

    const __half* next[ROW_TILES];  // of the next block to load
    int remaining;                  // blocks to load
    uint4 values[AHEAD][ROW_TILES];

    // Rows past the last are read as the last: their sums are not stored.
    __device__ __forceinline__ Activations(const LinearMatrix& target, int row_count, int lane,
                                           int begin, int end)
        : remaining(end - begin) {
        const int stride = target.matrix.blocks * BLOCK_INPUTS;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            const int row = min(tile * ROWS_OF_TILE + lane / 4, row_count - 1);
            next[tile] = target.x + int64_t(row) * stride + begin * BLOCK_INPUTS + 8 * (lane % 4);
        }
#pragma unroll
        for (int slot = 0; slot < AHEAD; ++slot) load(slot);
    }

    __device__ __forceinline__ void load(int slot) {
        if (remaining > 0) {
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                values[slot][tile] = load_activations(next[tile]);
                next[tile] += BLOCK_INPUTS;
            }
        }
        --remaining;
    }

    // Moves on to the next block.
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int slot = 0; slot + 1 < AHEAD; ++slot) {
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) values[slot][tile] = values[slot + 1][tile];
        }
        load(AHEAD - 1);
    }
};

// Sums of a lane: [row tile][m-tile][fragment], the fragment's rows 2 t and 2 t + 1 of output
// 16 m + g, then of output 16 m + g + 8.
template <int ROW_TILES>
using Sums = float[ROW_TILES][2][4];

// part += weights * activations over the next `blocks` blocks, of one group.
template <int BITS, bool ZEROED, int ROW_TILES>
__device__ __forceinline__ void multiply_blocks(WeightStream& stream,
                                                Activations<ROW_TILES>& activations, int lane,
                                                uint32_t zeros, int blocks,
                                                Sums<ROW_TILES>& part) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
        stream.wait<BITS>();
        LaneWeights weights;
        if constexpr (ZEROED) {
            take_zeroed(stream, lane, zeros, weights);
        } else {
            take_weights<BITS>(stream, lane, weights);
        }
        stream.release<BITS>();
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            const uint4 x = activations.values[0][tile];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const auto& low = weights.pairs[2 * m];
                const auto& high = weights.pairs[2 * m + 1];
                multiply(part[tile][m], low[0], high[0], low[1], high[1], x.x, x.y);
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const auto& low = weights.pairs[2 * m];
                const auto& high = weights.pairs[2 * m + 1];
                multiply(part[tile][m], low[2], high[2], low[3], high[3], x.z, x.w);
            }
        }
        activations.advance();
    }
}

// The sums of one warp over its range of K, in fixed order.
template <int ROW_TILES>
__device__ __forceinline__ void multiply_range(const LinearMatrix& target, int tile, int lane,
                                               int row_count, int begin, int end, char* ring,
                                               Sums<ROW_TILES>& sums) {
    const TileMatrix& matrix = target.matrix;
    const int first_unit = units_before(matrix, begin);
    const int unit_count = units_before(matrix, end) - first_unit;
    const int64_t start = int64_t(tile) * matrix.tile_units + first_unit;
    WeightStream stream(matrix.weights + start * BLOCK_UNIT_BYTES, unit_count * BLOCK_UNIT_BYTES,
                        ring, lane);
    BlockInfo next_info = {};
    RawScales next_scales = {};
    if (begin < end) {
        next_info = block_info(matrix, begin);
        next_scales = load_scales(matrix, tile, next_info.group(), lane / 4);
    }
    dependency_wait();
    Activations<ROW_TILES> activations(target, row_count, lane, begin, end);
    int block = begin;
#pragma unroll 1
    while (block < end) {
        const BlockInfo info = next_info;
        const RawScales raw = next_scales;
        const int group_end = min(info.group_end(), end);
        if (group_end < end) {
            next_info = block_info(matrix, group_end);
            next_scales = load_scales(matrix, tile, info.group() + 1, lane / 4);
        }
        Sums<ROW_TILES> part = {};
        auto& x = activations;
        const int count = group_end - block;
        if (matrix.encoding == ENCODING_GPTQ) {
            multiply_blocks<4, true>(stream, x, lane, raw.zeros, count, part);
        } else {
            switch (info.bits()) {
                case 2:
                    multiply_blocks<2, false>(stream, x, lane, 0, count, part);
                    break;
                case 3:
                    multiply_blocks<3, false>(stream, x, lane, 0, count, part);
                    break;
                case 4:
                    multiply_blocks<4, false>(stream, x, lane, 0, count, part);
                    break;
                case 5:
                    multiply_blocks<5, false>(stream, x, lane, 0, count, part);
                    break;
                case 6:
                    multiply_blocks<6, false>(stream, x, lane, 0, count, part);
                    break;
                case 8:
                    multiply_blocks<8, false>(stream, x, lane, 0, count, part);
                    break;
                default:
                    multiply_blocks<BITS_FLOAT, false>(stream, x, lane, 0, count, part);
            }
        }
        float scales[4];
        decode_scales(matrix, raw, info, scales);
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = sums[row_tile][m][i];
                    sum = fmaf(scales[2 * m + i / 2], part[row_tile][m][i], sum);
                }
            }
        }
        block = group_end;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
}

// Where a row's sum of a local output lies in a warp's ring: no two lanes of a store meet in a
// bank.
__device__ __forceinline__ int sum_place(int row, int output) {
    return row * TILE_OUTPUTS + (output ^ (row / 2 % 4 * 8));
}

template <int ROW_TILES>
__device__ __forceinline__ void put_sums(const Sums<ROW_TILES>& sums, int lane, float* places) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = tile * ROWS_OF_TILE + 2 * (lane % 4) + i % 2;
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

// Whether this CTA is the last of its tile's parts to come here. The counter is zero again
// afterwards.
__device__ __forceinline__ bool is_last_part(uint32_t* counter, int parts) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(counter, 1) == parts - 1;
        if (is_last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

// The sum of a row and output over a CTA's ranges of K, whose warps' rings are neighbours.
__device__ __forceinline__ float sum_ranges(const float* from, int ranges) {
    float sum = 0.0f;
    for (int first = 0; first < ranges; first += RANGES_OF_SUM) {
        const int end = min(first + RANGES_OF_SUM, ranges);
        float part = 0.0f;
        for (int range = first; range < end; ++range) {
            part += from[range * (RING_BYTES / sizeof(float))];
        }
        sum += part;
    }
    return sum;
}

// The same over the CTAs of a split.
__device__ __forceinline__ float sum_split(const float* from, int split, int sum_parts) {
    float sum = 0.0f;
    for (int first = 0; first < split; first += sum_parts) {
        float part = 0.0f;
        for (int other = first; other < first + sum_parts; ++other) {
            part += __ldcg(from + other * PARTIAL_FLOATS);
        }
        sum += part;
    }
    return sum;
}

template <int ROW_TILES, int TILES>
__device__ __forceinline__ void linear(const LinearArgs& args) {
    extern __shared__ __align__(128) char rings[];
    dependency_trigger();
    const int cta = blockIdx.x;
    int index = 0;
    while (index + 1 < args.matrix_count && cta >= args.matrices[index + 1].first_cta) ++index;
    const LinearMatrix& target = args.matrices[index];
    // Powers of two: divisions would delay the first loads.
    const int split = 1 << target.split_shift;
    const int ranges = 1 << target.ranges_shift;
    const int group = (cta - target.first_cta) >> target.split_shift;
    const int part = (cta - target.first_cta) & (split - 1);
    const int first_tile = group * TILES;
    const int tiles = min(TILES, target.matrix.tiles - first_tile);
    // The same in all lanes, which the compiler cannot see in a thread's number.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP_LANES, 0);
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));

    if (warp < tiles * ranges) {
        const int shift = target.split_shift + target.ranges_shift;
        const int range = part * ranges + (warp & (ranges - 1));
        const int begin = target.matrix.blocks * range >> shift;
        const int end = target.matrix.blocks * (range + 1) >> shift;
        char* ring = rings + warp * RING_BYTES;
        Sums<ROW_TILES> sums = {};
        const int tile = first_tile + (warp >> target.ranges_shift);
        multiply_range<ROW_TILES>(target, tile, lane, args.rows, begin, end, ring, sums);
        put_sums<ROW_TILES>(sums, lane, reinterpret_cast<float*>(ring));
    } else {
        dependency_wait();
    }
    __syncthreads();

    // Sums of the CTA: [tile, row, output].
    const int tile_places = args.rows * TILE_OUTPUTS;
    const int places = tiles * tile_places;
    float* partials = args.partials;
    if (split > 1) partials += int64_t(target.first_partial + first_tile * split) * PARTIAL_FLOATS;
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
        const int tile = TILES == 1 ? 0 : place / tile_places;
        const int local = place - tile * tile_places;
        const int row = local / TILE_OUTPUTS;
        const int output = local % TILE_OUTPUTS;
        const float* ring = reinterpret_cast<const float*>(rings + tile * ranges * RING_BYTES);
        const float sum = sum_ranges(ring + sum_place(row, output), ranges);
        if (split > 1) {
            __stcg(partials + (tile * split + part) * PARTIAL_FLOATS + local, sum);
        } else {
            store(args, target, row, (first_tile + tile) * TILE_OUTPUTS + output, sum);
        }
    }
    if (split == 1) return;
    if (!is_last_part(args.counters + target.first_counter + group, split)) return;
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
        const int tile = TILES == 1 ? 0 : place / tile_places;
        const int local = place - tile * tile_places;
        const float* from = partials + tile * split * PARTIAL_FLOATS + local;
        const float sum = sum_split(from, split, target.sum_parts);
        const int output = (first_tile + tile) * TILE_OUTPUTS + local % TILE_OUTPUTS;
        store(args, target, local / TILE_OUTPUTS, output, sum);
    }
}

}  // namespace oxl

// Up to 8, 16 and 32 rows.
extern "C" __global__ void __launch_bounds__(512, 1)
    oxl_linear_8(const __grid_constant__ LinearArgs args) {
    oxl::linear<1, 1>(args);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    oxl_linear_16(const __grid_constant__ LinearArgs args) {
    oxl::linear<2, oxl::WIDE_TILES>(args);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    oxl_linear_32(const __grid_constant__ LinearArgs args) {
    oxl::linear<4, oxl::WIDE_TILES>(args);
}
