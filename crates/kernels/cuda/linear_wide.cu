// y = store(W x + bias) for up to 32 rows and up to five matrices that share their rows, on tensor
// cores: mma.m16n8k16 with weights as A, activations as B, sums in fp32.
//
// Floor: every weight is read from memory once (0.5 bytes at 4 bits): 7.3 us for 4096 x 11008 at
// 3.1 TB/s. 32 rows of activations are four times a tile's 4-bit weights. So a block of threads
// (CTA) has four column tiles: activations come from the second-level cache once for four tiles,
// whose warps find them in the first level.
//
// Each warp has one tile and one of the CTA's ranges of K, up to four at a time: a *part* of K. A
// CTA has one part, or all of them one after the other where there are tiles enough. The first
// stages of weights are asked for before the wait for the previous kernel.
//
// Launch: grid = all matrices' CTAs, one matrix after the other; block = 512; dynamic shared
// memory = 16 * RING_BYTES + 4 * PARTIAL_FLOATS * sizeof(float).
#include "linear.cuh"

namespace oxl {

// Column tiles of a CTA.
constexpr int WIDE_TILES = 4;

// 32 rows.
constexpr int ROW_TILES = 4;

// Floats of one tile's partial sums.
constexpr int PARTIAL_FLOATS = ROW_TILES * ROWS_OF_TILE * TILE_OUTPUTS;
static_assert(PARTIAL_FLOATS * sizeof(float) <= RING_BYTES, "a warp's sums go into its ring");

// Whether a block's activations are loaded while the one before is multiplied: where the
// compiler finds registers for it, which on 8.0 it does not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr bool LOADS_AHEAD = false;
#else
constexpr bool LOADS_AHEAD = true;
#endif

// A lane's activations of a range's blocks, one block after the other.
struct GlobalRows {
    const __half* next[ROW_TILES];  // of the next block to load
    uint4 values[LOADS_AHEAD ? ROW_TILES : 1];

    // Rows past the last are read as the last: their sums are not stored. What is loaded past the
    // range, up to a block past the activations' end, is not used; there is other scratch.
    __device__ __forceinline__ GlobalRows(const LinearMatrix& target, int row_count, int lane,
                                          int begin) {
        const int stride = target.matrix.blocks * BLOCK_INPUTS;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            const int row = min(tile * ROWS_OF_TILE + lane / 4, row_count - 1);
            next[tile] = target.x + int64_t(row) * stride + begin * BLOCK_INPUTS + 8 * (lane % 4);
        }
        if constexpr (LOADS_AHEAD) advance();
    }

    __device__ __forceinline__ uint4 of(int tile) const {
        if constexpr (LOADS_AHEAD) return values[tile];
        return load_activations(next[tile]);
    }

    // Moves on to the next block.
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            if constexpr (LOADS_AHEAD) values[tile] = load_activations(next[tile]);
            next[tile] += BLOCK_INPUTS;
        }
    }
};

// The sums of one warp over a range of K, in fixed order.
__device__ __forceinline__ void multiply_range(const LinearArgs& args, const LinearMatrix& target,
                                               int tile, int lane, int begin, int end, char* ring,
                                               Sums<ROW_TILES>& sums) {
    const TileMatrix& matrix = target.matrix;
    const int first_unit = units_before(matrix, begin);
    const int bytes = (units_before(matrix, end) - first_unit) * BLOCK_UNIT_BYTES;
    const int64_t start = int64_t(tile) * matrix.tile_units + first_unit;
    const uint8_t* source = matrix.weights + start * BLOCK_UNIT_BYTES + lane * 16;
    WeightStream stream = {source, ring, bytes, 0, lane};
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) stream.issue(stage * STAGE_BYTES);
    BlockInfo next_info = {};
    RawScales next_scales = {};
    if (begin < end) {
        next_info = block_info(matrix, begin);
        next_scales = load_scales(matrix, tile, next_info.group(), lane / 4);
    }
    dependency_wait();
    GlobalRows activations(target, args.rows, lane, begin);
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
        multiply_run<ROW_TILES>(matrix.encoding, info.bits(), stream, activations, raw.zeros,
                                group_end - block, part);
        float scales[4];
        decode_scales(matrix, raw, info, scales);
        add_group<ROW_TILES>(scales, part, sums);
        block = group_end;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
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

// The sum of a row and output over a part of K, whose warps' rings are neighbours.
__device__ __forceinline__ float sum_ranges(const float* from, int ranges) {
    float part = 0.0f;
    for (int range = 0; range < ranges; ++range) {
        part += from[range * (RING_BYTES / sizeof(float))];
    }
    return part;
}

__device__ __forceinline__ void linear_wide(const LinearArgs& args) {
    extern __shared__ __align__(128) char rings[];
    dependency_trigger();
    const int cta = blockIdx.x;
    int index = 0;
    while (index + 1 < args.matrix_count && cta >= args.matrices[index + 1].first_item) ++index;
    const LinearMatrix& target = args.matrices[index];
    // Powers of two: divisions would delay the first loads.
    constexpr int most_shift = 2;
    static_assert(1 << most_shift == RANGES_OF_SUM, "the ranges of a part");
    const int ranges_shift = min(args.ranges_shift, most_shift);
    const int ranges = 1 << ranges_shift;
    const int split = 1 << args.split_shift;
    const int group = (cta - target.first_item) >> args.split_shift;
    const int parts = 1 << (args.ranges_shift - ranges_shift);
    const int first_part = (cta - target.first_item) & (split - 1);
    const int parts_end = split == 1 ? parts : first_part + 1;
    const int first_tile = group * WIDE_TILES;
    const int tiles = min(WIDE_TILES, target.matrix.tiles - first_tile);
    const int tile_places = args.rows * TILE_OUTPUTS;
    const int places = tiles * tile_places;
    // [tile, row, output]; each place is read and written by one thread.
    float* totals = reinterpret_cast<float*>(rings + MOST_WARPS * RING_BYTES);

#pragma unroll 1
    for (int part = first_part; part < parts_end; ++part) {
        const int warp = warp_number();
        const int lane = lane_number();
        if (warp < tiles * ranges) {
            const int range = part * ranges + (warp & (ranges - 1));
            const int begin = target.matrix.blocks * range >> args.ranges_shift;
            const int end = target.matrix.blocks * (range + 1) >> args.ranges_shift;
            char* ring = rings + warp * RING_BYTES;
            Sums<ROW_TILES> sums = {};
            const int tile = first_tile + (warp >> ranges_shift);
            multiply_range(args, target, tile, lane, begin, end, ring, sums);
            put_sums<ROW_TILES>(sums, lane, args.rows, reinterpret_cast<float*>(ring));
        } else {
            dependency_wait();
        }
        __syncthreads();
        for (int place = threadIdx.x; place < places; place += blockDim.x) {
            const int tile = place / tile_places;
            const int local = place - tile * tile_places;
            const int from = sum_place(local / TILE_OUTPUTS, local % TILE_OUTPUTS);
            const float* ring = reinterpret_cast<const float*>(rings + tile * ranges * RING_BYTES);
            const float before = part == first_part ? 0.0f : totals[place];
            totals[place] = before + sum_ranges(ring + from, ranges);
        }
        __syncthreads();
    }

    float* partials = args.partials;
    if (split > 1) partials += int64_t(target.first_partial + first_tile * split) * PARTIAL_FLOATS;
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
        const int tile = place / tile_places;
        const int local = place - tile * tile_places;
        if (split > 1) {
            __stcg(partials + (tile * split + first_part) * PARTIAL_FLOATS + local, totals[place]);
        } else {
            const int output = (first_tile + tile) * TILE_OUTPUTS + local % TILE_OUTPUTS;
            store(args, target, local / TILE_OUTPUTS, output, totals[place]);
        }
    }
    if (split == 1) return;
    if (!is_last_part(args.counters + target.first_counter + group, split)) return;
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
        const int tile = place / tile_places;
        const int local = place - tile * tile_places;
        const float* from = partials + tile * split * PARTIAL_FLOATS + local;
        float sum = 0.0f;
        for (int part = 0; part < split; ++part) sum += __ldcg(from + part * PARTIAL_FLOATS);
        const int output = (first_tile + tile) * TILE_OUTPUTS + local % TILE_OUTPUTS;
        store(args, target, local / TILE_OUTPUTS, output, sum);
    }
}

}  // namespace oxl

extern "C" __global__ void __launch_bounds__(512, 1)
    oxl_linear_32(const __grid_constant__ LinearArgs args) {
    oxl::linear_wide(args);
}
