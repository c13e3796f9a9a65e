// y = store(W x + bias) for 1 to 16 rows and up to five matrices that share their rows, on tensor
// cores: mma.m16n8k16 with weights as A, activations as B, sums in fp32.
//
// Floor: every weight is read from memory once (0.5 bytes at 4 bits): 7.3 us for 4096 x 11008 at
// 3.1 TB/s. A multiprocessor's share of that is a 4-bit block of 1024 weights every 37 cycles, for
// which a warp issues about 60 instructions: 36 of them take weights apart, 4 multiply.
//
// There is one block of threads (CTA) a multiprocessor. It goes through an equal, contiguous share
// of all matrices' column tiles of 32 outputs. K is cut into one range a warp, all as equal as
// blocks allow. Each warp streams the bytes of its range of one tile after the other through a
// ring of its own in shared memory (cp.async, up to eight stages of 512 bytes under way), across
// tiles and matrices without a stop; so it does with scales, four groups at a time and as many
// ahead. Activations of the range lie in shared memory, for as many blocks at a time as fit. The
// warps' sums of a tile meet in shared memory; a few warps join and store them while the others go
// on. The first stages and scales are asked for before the wait for the previous kernel.
//
// Launch: grid = multiprocessors, at most a tile each; block = 32 * ranges; dynamic shared memory =
// ranges * (RING_BYTES + 64 * rows * x_blocks + buffers * 128 * rows), of two buffers up to 8 rows
// and one above.
#include "linear.cuh"

namespace oxl {

// Groups whose scales a warp loads at a time, an entry a lane.
constexpr int SCALE_GROUPS = WARP_LANES / 8;

// The matrix that has a column tile of the launch.
__device__ __forceinline__ int matrix_of(const LinearArgs& args, int item) {
    int index = 0;
    while (index + 1 < args.matrix_count && item >= args.matrices[index + 1].first_item) ++index;
    return index;
}

// Fills in what a warp has to know of each matrix before it asks for weights, lane by lane, and one
// more that is empty.
__device__ __forceinline__ void begin_matrices(const LinearArgs& args, int lane, int item,
                                               int item_end, int begin, int end,
                                               WarpMatrix* own) {
    if (lane <= MOST_MATRICES) {
        WarpMatrix entry = {};
        if (lane < args.matrix_count) {
            const TileMatrix& matrix = args.matrices[lane].matrix;
            const int first_item = args.matrices[lane].first_item;
            const int first_unit = units_before(matrix, begin);
            const int bytes = (units_before(matrix, end) - first_unit) * BLOCK_UNIT_BYTES;
            entry.first = matrix.weights + int64_t(first_unit) * BLOCK_UNIT_BYTES;
            entry.tiles = min(item_end, first_item + matrix.tiles) - max(item, first_item);
            entry.bytes = entry.tiles > 0 ? bytes : 0;
            entry.skip = matrix.tile_units * BLOCK_UNIT_BYTES - whole_stages(bytes);
        }
        own[lane] = entry;
    }
    __syncwarp();
}

// The rest of it, from memory.
__device__ __forceinline__ void describe_matrices(const LinearArgs& args, int lane, int begin,
                                                  int end, WarpMatrix* own) {
    if (lane < args.matrix_count) {
        const TileMatrix& matrix = args.matrices[lane].matrix;
        own[lane].info = block_info(matrix, begin);
        own[lane].last_group = block_info(matrix, end - 1).group();
    }
    __syncwarp();
}

// The scales of the next groups, those of one group in eight lanes.
__device__ __forceinline__ RawScales load_some_scales(const TileMatrix& matrix, int tile, int group,
                                                      int lane) {
    if (tile * matrix.groups + group + lane / 8 >= matrix.tiles * matrix.groups) return {};
    return load_scales(matrix, tile, group, lane);
}

// A lane's activations of the next block, in shared memory: [block, row, 32].
struct SharedRows {
    const char* next;
    int rows;
    uint32_t second;  // from a lane's row of the first row tile to that of the second

    __device__ __forceinline__ uint4 of(int tile) const {
        return *reinterpret_cast<const uint4*>(next + tile * second);
    }
    __device__ __forceinline__ void advance() { next += rows * BLOCK_INPUTS * int(sizeof(__half)); }
};

// Copies the activations of `count` blocks from `block` on to a warp's place for them.
__device__ __forceinline__ void fill_rows(const LinearArgs& args, const LinearMatrix& target,
                                          int lane, int block, int count, char* place) {
    __syncwarp();
    const int stride = target.matrix.blocks * BLOCK_INPUTS;
    const int block_bytes = args.rows * BLOCK_INPUTS * sizeof(__half);
    for (int piece = lane; piece < count * 4; piece += WARP_LANES) {
        const __half* from = target.x + block * BLOCK_INPUTS + piece * 8;
        char* to = place + piece / 4 * block_bytes + piece % 4 * 16;
#pragma unroll 4
        for (int row = 0; row < args.rows; ++row) {
            *reinterpret_cast<uint4*>(to + row * BLOCK_INPUTS * sizeof(__half)) =
                load_activations(from + int64_t(row) * stride);
        }
    }
    __syncwarp();
}

// The sum of a row and output over all ranges of K.
__device__ __forceinline__ float sum_ranges(const float* from, int ranges, int stride) {
    float sum = 0.0f;
    for (int first = 0; first < ranges; first += RANGES_OF_SUM) {
        const int end = min(first + RANGES_OF_SUM, ranges);
        float part = 0.0f;
        for (int range = first; range < end; ++range) part += from[range * stride];
        sum += part;
    }
    return sum;
}

// Scales of SCALE_GROUPS groups in shared memory.
struct WarpScales {
    uint2 scales[WARP_LANES];
    uint32_t zeros[WARP_LANES];
};

// A warp's stream of scales.
struct ScaleStream {
    WarpScales* now;  // of SCALE_GROUPS groups from `first` on
    RawScales next;   // of what comes after them
    int first;

    __device__ __forceinline__ int entry(int group, int lane) const {
        return (group - first) * 8 + lane / 4;
    }
    __device__ __forceinline__ uint32_t zeros(int group, int lane) const {
        return now->zeros[entry(group, lane)];
    }
    __device__ __forceinline__ RawScales scales(int group, int lane) const {
        return {now->scales[entry(group, lane)], 0};
    }

    // Goes on to the groups of a tile from `group` on.
    __device__ __forceinline__ void advance(const LinearArgs& args, const WarpMatrix* own, int item,
                                            int item_end, int index, int group, int lane) {
        __syncwarp();
        now->scales[lane] = next.scales;
        now->zeros[lane] = next.zeros;
        __syncwarp();
        first = group;
        group += SCALE_GROUPS;
        if (group > own[index].last_group) {
            if (++item == item_end) return;
            index = matrix_of(args, item);
            group = own[index].info.group();
        }
        const LinearMatrix& target = args.matrices[index];
        next = load_some_scales(target.matrix, item - target.first_item, group, lane);
    }
};

template <int ROW_TILES>
__device__ __forceinline__ void linear(const LinearArgs& args) {
    // One buffer of sums is joined while the next is filled, where there is room.
    constexpr int BUFFERS = ROW_TILES == 1 ? 2 : 1;
    extern __shared__ __align__(128) char shared[];
    __shared__ WarpMatrix warp_matrices[MOST_WARPS][MOST_MATRICES + 1];
    __shared__ WarpScales warp_scales[MOST_WARPS];
    dependency_trigger();
    const int warp = warp_number();
    const int lane = lane_number();
    const int ranges = 1 << args.ranges_shift;
    const int rows = args.rows;
    const int blocks = args.matrices[0].matrix.blocks;
    const int begin = blocks * warp >> args.ranges_shift;
    const int end = blocks * (warp + 1) >> args.ranges_shift;
    int item = args.items * int(blockIdx.x) / int(gridDim.x);
    const int item_end = args.items * int(blockIdx.x + 1) / int(gridDim.x);
    WarpMatrix* own = warp_matrices[warp];
    begin_matrices(args, lane, item, item_end, begin, end, own);

    int index = matrix_of(args, item);
    const int tile = item - args.matrices[index].first_item;
    const int tile_bytes = args.matrices[index].matrix.tile_units * BLOCK_UNIT_BYTES;
    const uint8_t* source = own[index].first + int64_t(tile) * tile_bytes + lane * 16;
    WeightStream<true> stream = {
        source, shared + warp * RING_BYTES, own + index, own[index].bytes, own[index].tiles, 0, lane};
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) stream.issue(stage * STAGE_BYTES);
    describe_matrices(args, lane, begin, end, own);
    ScaleStream scale_stream = {warp_scales + warp, {}, 0};
    const int first_group = own[index].info.group();
    scale_stream.next = load_some_scales(args.matrices[index].matrix, tile, first_group, lane);
    const int block_bytes = rows * BLOCK_INPUTS * int(sizeof(__half));
    char* x_place = shared + ranges * RING_BYTES + warp * args.x_blocks * block_bytes;
    const uint32_t lane_row = min(lane / 4, rows - 1) * 64;
    const uint32_t second_row = min(lane / 4 + ROWS_OF_TILE, rows - 1) * 64;
    const char* x_lane = x_place + lane_row + lane % 4 * 16;
    float* sum_buffer =
        reinterpret_cast<float*>(shared + ranges * (RING_BYTES + args.x_blocks * block_bytes));
    const int sum_floats = rows * TILE_OUTPUTS;
    dependency_wait();

    // The matrix whose activations are there.
    int x_index = -1;
#pragma unroll 1
    for (; item < item_end; ++item) {
        index = matrix_of(args, item);
        const LinearMatrix& target = args.matrices[index];
        const TileMatrix& matrix = target.matrix;
        BlockInfo next_info = own[index].info;
        scale_stream.advance(args, own, item, item_end, index, next_info.group(), lane);
        Sums<ROW_TILES> sums = {};
        SharedRows activations = {x_lane, rows, second_row - lane_row};
        int x_end = min(begin + args.x_blocks, end);
        if (x_index < 0 || args.matrices[x_index].x != target.x || x_end < end) {
            x_index = index;
            fill_rows(args, target, lane, begin, x_end - begin, x_place);
        }
        int block = begin;
#pragma unroll 1
        while (block < end) {
            const BlockInfo info = next_info;
            const int group = info.group();
            const int group_end = min(info.group_end(), end);
            if (group_end < end) next_info = block_info(matrix, group_end);
            if (group - scale_stream.first == SCALE_GROUPS) {
                scale_stream.advance(args, own, item, item_end, index, group, lane);
            }
            const uint32_t zeros = scale_stream.zeros(group, lane);
            Sums<ROW_TILES> part = {};
#pragma unroll 1
            while (block < group_end) {
                if (block == x_end) {
                    x_end = min(block + args.x_blocks, end);
                    fill_rows(args, target, lane, block, x_end - block, x_place);
                    activations.next = x_lane;
                }
                const int run_end = min(group_end, x_end);
                multiply_run<ROW_TILES>(matrix.encoding, info.bits(), stream, activations, zeros,
                                        run_end - block, part);
                block = run_end;
            }
            float scales[4];
            decode_scales(matrix, scale_stream.scales(group, lane), info, scales);
            add_group<ROW_TILES>(scales, part, sums);
        }
        stream.end_range();

        // Turns of the buffers, and of the warps that store a tile's rows.
        float* all_sums = sum_buffer + item % BUFFERS * ranges * sum_floats;
        put_sums<ROW_TILES>(sums, lane, rows, all_sums + warp * sum_floats);
        __syncthreads();
        for (int row = (warp - item) & (ranges - 1); row < rows; row += ranges) {
            const float sum = sum_ranges(all_sums + sum_place(row, lane), ranges, sum_floats);
            const int tile = item - target.first_item;
            store(args, target, row, tile * TILE_OUTPUTS + lane, sum);
        }
        if constexpr (BUFFERS == 1) __syncthreads();
    }
}

}  // namespace oxl

// Up to 8 rows.
extern "C" __global__ void __launch_bounds__(512, 1)
    oxl_linear_8(const __grid_constant__ LinearArgs args) {
    oxl::linear<1>(args);
}

// Up to 16 rows.
extern "C" __global__ void __launch_bounds__(512, 1)
    oxl_linear_16(const __grid_constant__ LinearArgs args) {
    oxl::linear<2>(args);
}
