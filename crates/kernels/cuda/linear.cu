// y = store(W x + bias) for 1 to 8 rows and up to five matrices that share their rows, on tensor
// cores: mma.m16n8k16 with weights as A, activations as B, sums in fp32.
//
// Floor: every weight is read from memory once (0.5 bytes at 4 bits): 7.3 us for 4096 x 11008 at
// 3.1 TB/s. A multiprocessor's share of that is a 4-bit block of 1024 weights every 37 cycles, for
// which a warp issues 43 instructions (36 of them take weights apart, 4 multiply) and its share of
// what is done once a unit (units.cuh) or tile.
//
// There is one block of threads (CTA) a multiprocessor. It goes through an equal, contiguous share
// of all matrices' column tiles of 32 outputs, all its warps through one tile at a time. Activations of a
// warp's range lie in shared memory. Warps put their sums of a tile into shared memory and go on; those
// of several tiles are joined and stored at once.
//
// What does not depend on earlier kernels comes before the wait for them: tables, the first units of weights.
//
// Launch: grid = multiprocessors, at most a tile each; block = 32 * ranges; dynamic shared memory =
// ranges * (SLOTS * SLOT_BYTES + 64 * rows * range_blocks + 128 * rows * tile_buffers +
// 8 * matrices * range_units).
#include "units.cuh"

namespace oxl {

// Copies a warp's range and units of some of the matrices to shared memory: all at once, for each copy takes as
// long as memory takes to answer.
__device__ __forceinline__ void load_tables(const LinearArgs& args, int first, int last, int warp,
                                            int lane, int ranges, Unit* units, WarpRange* own) {
#pragma unroll 1
    for (int i = first; i <= last; ++i) {
        const uint4* table = args.matrices[i].matrix.range_table;
        const Unit* from =
            reinterpret_cast<const Unit*>(table + ranges) + warp * args.range_blocks;
        Unit* to = units + i * args.range_units;
        if (lane == 0) copy_async(shared_address(own + i), table + warp);
#pragma unroll 1
        for (int unit = lane; unit < args.range_units; unit += WARP_LANES) {
            copy_two_async(shared_address(to + unit), from + unit);
        }
    }
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
}

// Starts copying the activations of `count` blocks from `block` on to a warp's place for them: an earlier kernel has
// written them, and each takes as long as the second-level cache takes to answer. Those of the first units are a group
// of copies of their own and the rest another, the latest that the warp has asked for: the first unit is multiplied
// when there is one group on its way, as all units are, so that it does not wait for the rest.
__device__ __forceinline__ void fill_rows(const LinearArgs& args, const __half* x, int lane,
                                          int block, int count, char* place) {
    static_assert(SLOTS - 1 == 1, "groups on their way when a unit is multiplied");
    static_assert(unit_blocks(2) * 4 <= WARP_LANES, "the first unit's pieces are among the lanes' first");
    __syncwarp();
    const int stride = args.blocks * BLOCK_INPUTS;
    const int block_bytes = args.rows * ROW_BLOCK_BYTES;
    int piece = lane;
#pragma unroll 1
    for (int group = 0; group < 2; ++group) {
        const int end = group == 0 ? min(WARP_LANES, count * 4) : count * 4;
#pragma unroll 1
        for (; piece < end; piece += WARP_LANES) {
            const __half* at = x + block * BLOCK_INPUTS + piece * 8;
            const uint8_t* from = reinterpret_cast<const uint8_t*>(at);
            char* to = place + piece / 4 * block_bytes + piece % 4 * 16;
#pragma unroll 4
            for (int row = 0; row < args.rows; ++row) {
                copy_async(shared_address(to), from);
                from += stride * sizeof(__half);
                to += ROW_BLOCK_BYTES;
            }
        }
        commit_copies();
    }
}

// Where a row's sum of a local output lies among a warp's: no two lanes of a store meet in a bank.
__device__ __forceinline__ int sum_place(int row, int output) {
    return row * TILE_OUTPUTS + (output ^ (row / 2 % 4 * 8));
}

// Puts a lane's sums of up to 8 rows where `sum_place` says.
__device__ __forceinline__ void put_row_tile(const float (&sums)[2][4], int lane, int rows,
                                             float* places) {
    const int first_row = 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Both of a lane's rows change places alike.
        const int place = sum_place(first_row, 8 * i + lane / 4);
        if (first_row < rows) places[place] = sums[i / 2][i % 2 * 2];
        if (first_row + 1 < rows) places[place + TILE_OUTPUTS] = sums[i / 2][i % 2 * 2 + 1];
    }
}

// Places of results that a warp stores, one a lane: of every `ranges`-th row of the tiles in order.
struct Places {
    int tile;  // of those that are stored together
    int row;

    // Goes on to the warp's next row, `rows` each tile.
    __device__ __forceinline__ void advance(int by, int rows) {
        row += by;
        for (; row >= rows; row -= rows) ++tile;
    }
};

// Where a lane's output of a row is stored, and how.
struct Target {
    float* out;  // null: past the last output
    float scale;
    float bias;

    __device__ __forceinline__ Target() : out(nullptr), scale(0.0f), bias(0.0f) {}

    // Of a row of a tile of the launch, whichever matrix has it.
    __device__ __forceinline__ Target(const LinearArgs& args, int item, int row, int lane) {
        const LinearMatrix& target = args.matrices[matrix_of(args, item)];
        const int index = (item - target.first_item) * TILE_OUTPUTS + lane;
        const bool is_there = index < target.out_features;
        out = is_there ? target.out + int64_t(row) * target.out_features + index : nullptr;
        scale = target.matrix.scale;
        bias = target.bias == nullptr || out == nullptr ? 0.0f : __ldg(target.bias + index);
    }
};

// Joins and stores the sums of `tiles` items. `first` is the warp's first target, and `before` what is there, if
// `has_first` says so.
__device__ __forceinline__ void store_tiles(const LinearArgs& args, const float* sums, int item,
                                            int tiles, int warp, int lane, bool has_first,
                                            Target first, float before) {
    const int ranges = 1 << args.ranges_shift;
    const int sum_floats = args.rows * TILE_OUTPUTS;
    Places places = {0, 0};
    places.advance(warp, args.rows);
#pragma unroll 1
    for (; places.tile < tiles; places.advance(ranges, args.rows)) {
        const float* from =
            sums + places.tile * ranges * sum_floats + sum_place(places.row, lane);
        const float sum = sum_pairs(ranges, [&](int i) { return from[i * sum_floats]; });
        if (!has_first) {
            first = Target(args, item + places.tile, places.row, lane);
            if (args.accumulate && first.out != nullptr) before = *first.out;
        }
        if (first.out != nullptr) {
            float y = fmaf(first.scale, sum, first.bias);
            if (args.accumulate) y = fmaf(args.store_scale, y, before);
            *first.out = y;
        }
        has_first = false;
    }
}

__device__ __forceinline__ void linear_few(const LinearArgs& args) {
    constexpr int RING = SLOTS * SLOT_BYTES;
    DYNAMIC_SHARED(char, shared, 128);
    __shared__ __align__(16) WarpRange all_ranges[MOST_WARPS][MOST_MATRICES];
    dependency_trigger();
    const int warp = warp_number();
    const int lane = lane_number();
    const int ranges = 1 << args.ranges_shift;
    const int rows = args.rows;
    const int begin = args.blocks * warp >> args.ranges_shift;
    const int end = args.blocks * (warp + 1) >> args.ranges_shift;
    const int ctas = gridDim.x;
    const int cta = blockIdx.x;
    const int first_item = args.first_item + args.items * cta / ctas;
    const int item_end = args.first_item + args.items * (cta + 1) / ctas;

    const int block_bytes = rows * ROW_BLOCK_BYTES;
    char* ring = shared + warp * RING;
    char* places = shared + ranges * RING + warp * args.range_blocks * block_bytes;
    const int sum_floats = rows * TILE_OUTPUTS;
    float* all_sums =
        reinterpret_cast<float*>(shared + ranges * (RING + args.range_blocks * block_bytes));
    const int own_units = args.matrix_count * args.range_units;
    Unit* units =
        reinterpret_cast<Unit*>(all_sums + args.tile_buffers * ranges * sum_floats) +
        warp * own_units;
    int index = matrix_of(args, first_item);
    const int last_index = matrix_of(args, item_end - 1);
    load_tables(args, index, last_index, warp, lane, ranges, units, all_ranges[warp]);

    Stream<1> stream = {args, ring, units, all_ranges[warp], args.range_units, lane, item_end};
    stream.x.block_bytes = block_bytes;
    stream.slot = 0;
    stream.cursor.stride = 1;
    stream.start(first_item, index);
    // Known early, so that the first results, which are often the only ones, do not wait for it.
    Places first_place = {0, 0};
    first_place.advance(warp, rows);
    Target first;
    if (first_place.tile < min(args.tile_buffers, item_end - first_item)) {
        first = Target(args, first_item + first_place.tile, first_place.row, lane);
    }
    dependency_wait();

    const char* x_lane = places + min(lane / 4, rows - 1) * ROW_BLOCK_BYTES + lane % 4 * 16;
    // The activations that are there.
    const __half* x_source = nullptr;
    float* own_sums = all_sums + warp * sum_floats;
    int buffer = 0;
    bool has_first = true;
    float before = 0.0f;
    if (args.accumulate && first.out != nullptr) before = *first.out;
#pragma unroll 1
    for (int item = first_item; item < item_end;) {
        const LinearMatrix& target = args.matrices[index];
        const int matrix_end = target.first_item + target.matrix.tiles;
        const Unit* unit = units + index * args.range_units;
        const int unit_count = all_ranges[warp][index].units;
        if (x_source != target.x) {
            x_source = target.x;
            fill_rows(args, x_source, lane, begin, end - begin, places);
        }
        stream.multiply_range(unit, unit + unit_count, x_lane);
        put_row_tile(stream.sums[0], lane, rows, own_sums + buffer * ranges * sum_floats);
        ++item;
        if (++buffer == args.tile_buffers || item == item_end) {
            __syncthreads();
            store_tiles(args, all_sums, item - buffer, buffer, warp, lane, has_first, first, before);
            has_first = false;
            if (item < item_end) __syncthreads();
            buffer = 0;
        }
        if (item == matrix_end) ++index;
    }
}

}  // namespace oxl

// As if there were more threads, so that few registers are taken: beside a CTA there is room for those of the kernel
// that prepares the next product's rows, which otherwise starts late.
extern "C" __global__ void __launch_bounds__(640, 1)
    oxl_linear_few(const __grid_constant__ LinearArgs args) {
    oxl::linear_few(args);
}
