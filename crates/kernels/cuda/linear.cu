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
// Gate and up can be gated here: a CTA has the same tiles of both, and stores their product as fp16 where the linear that
// reads it wants it.
//
// Launch: grid = multiprocessors, at most a tile each; block = 32 * ranges; dynamic shared memory =
// ranges * (SLOTS * SLOT_BYTES + 64 * rows * range_blocks + 128 * rows * tile_buffers +
// 8 * matrices * range_units), and if it is gated 128 * (rows + 1) for each of a CTA's tiles of gate.
#include "rows.cuh"
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

// The column tiles of a CTA by number: an equal, contiguous share of the launch's items; or the same share of gate's and
// of up's, whose tiles follow each other.
struct Share {
    int first;  // item
    int count;
    int gates;  // how many before those of up; all if nothing is gated
    int skip;   // items between the last of those and the first of up

    template <bool IS_GATED>
    static __device__ __forceinline__ Share of(const LinearArgs& args) {
        const int ctas = gridDim.x;
        const int cta = blockIdx.x;
        const int items = IS_GATED ? args.items / 2 : args.items;
        const int first = items * cta / ctas;
        const int count = items * (cta + 1) / ctas - first;
        return {args.first_item + first, IS_GATED ? 2 * count : count, count, IS_GATED ? items - count : 0};
    }

    __device__ __forceinline__ int item(int number) const {
        return first + number + (number < gates ? 0 : skip);
    }
};

// What gate and up leave in shared memory until they meet.
struct GatedPlaces {
    float* gates;      // [gates, rows, TILE_OUTPUTS], each lane's own
    uint32_t* places;  // [gates, TILE_OUTPUTS]: where activation(gate) * up goes

    __device__ __forceinline__ void load(const LinearArgs& args, const Share& share) {
        const int first = share.first * TILE_OUTPUTS;
        for (int i = threadIdx.x; i < share.gates * TILE_OUTPUTS; i += blockDim.x) {
            places[i] = args.gated_places == nullptr ? first + i : __ldg(args.gated_places + first + i);
        }
    }
};

// Joins the sums of `tiles` tiles from `number` on. Those of gate wait for those of up, and activation(gate) * up is
// stored. A row of a tile belongs to one warp, of gate as of up.
__device__ __forceinline__ void store_gated(const LinearArgs& args, const float* sums, const Share& share,
                                            const GatedPlaces& gated, int number, int tiles, int warp,
                                            int lane) {
    const int ranges = 1 << args.ranges_shift;
    const int sum_floats = args.rows * TILE_OUTPUTS;
    const int width = args.matrices[0].out_features;
#pragma unroll 1
    for (int index = 0; index < 2; ++index) {
        const LinearMatrix& target = args.matrices[index];
        const int first_tile = index * share.gates;
        const int first = (max(number, first_tile) - first_tile) * args.rows;
        const int end = (min(number + tiles, first_tile + share.gates) - first_tile) * args.rows;
#pragma unroll 1
        for (int i = first + ((warp - first) & (ranges - 1)); i < end; i += ranges) {
            const int tile = i / args.rows;
            const int row = i - tile * args.rows;
            const float* from =
                sums + (first_tile + tile - number) * ranges * sum_floats + sum_place(row, lane);
            const float sum = sum_pairs(ranges, [&](int range) { return from[range * sum_floats]; });
            const int output = (share.first + tile) * TILE_OUTPUTS + lane;
            const float bias = target.bias == nullptr ? 0.0f : __ldg(target.bias + output);
            const float y = fmaf(target.matrix.scale, sum, bias);
            float* gate = gated.gates + i * TILE_OUTPUTS + lane;
            if (index == 0) {
                *gate = y;
                continue;
            }
            const float product = gated_product(args.gate, *gate, y);
            __half* out = args.gated + int64_t(row) * width;
            out[gated.places[tile * TILE_OUTPUTS + lane]] = __low2half(clamped_half2(product, 0.0f));
        }
    }
}

template <bool IS_GATED>
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
    const Share share = Share::of<IS_GATED>(args);
    const int item_end = share.item(share.count - 1) + 1;

    const int block_bytes = rows * ROW_BLOCK_BYTES;
    char* ring = shared + warp * RING;
    char* places = shared + ranges * RING + warp * args.range_blocks * block_bytes;
    const int sum_floats = rows * TILE_OUTPUTS;
    float* all_sums =
        reinterpret_cast<float*>(shared + ranges * (RING + args.range_blocks * block_bytes));
    const int own_units = args.matrix_count * args.range_units;
    Unit* all_units = reinterpret_cast<Unit*>(all_sums + args.tile_buffers * ranges * sum_floats);
    Unit* units = all_units + warp * own_units;
    int index = matrix_of(args, share.first);
    const int last_index = matrix_of(args, item_end - 1);
    load_tables(args, index, last_index, warp, lane, ranges, units, all_ranges[warp]);

    Stream<1, IS_GATED> stream = {args, ring, units, all_ranges[warp], args.range_units, lane, item_end};
    stream.x.block_bytes = block_bytes;
    stream.slot = 0;
    stream.cursor.stride = 1;
    stream.gate_end = share.first + share.gates;
    stream.skip = share.skip;
    stream.start(share.first, index);
    // Known early, so that the first results, which are often the only ones, do not wait for it.
    Places first_place = {0, 0};
    Target first;
    GatedPlaces gated = {};
    if constexpr (IS_GATED) {
        gated.gates = reinterpret_cast<float*>(all_units + ranges * own_units);
        gated.places = reinterpret_cast<uint32_t*>(gated.gates + share.gates * sum_floats);
        gated.load(args, share);
    } else {
        first_place.advance(warp, rows);
        if (first_place.tile < min(args.tile_buffers, share.count)) {
            first = Target(args, share.first + first_place.tile, first_place.row, lane);
        }
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
    for (int number = 0; number < share.count;) {
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
        ++number;
        if (++buffer == args.tile_buffers || number == share.count) {
            __syncthreads();
            const int done = number - buffer;
            if constexpr (IS_GATED) {
                store_gated(args, all_sums, share, gated, done, buffer, warp, lane);
            } else {
                store_tiles(args, all_sums, share.first + done, buffer, warp, lane, has_first, first,
                            before);
            }
            has_first = false;
            if (number < share.count) __syncthreads();
            buffer = 0;
        }
        if (share.item(number) >= matrix_end) ++index;
    }
}

}  // namespace oxl

// As if there were more threads, so that few registers are taken: beside a CTA there is room for those of the kernel
// that prepares the next product's rows, which otherwise starts late.
extern "C" __global__ void __launch_bounds__(640, 1)
    oxl_linear_few(const __grid_constant__ LinearArgs args) {
    oxl::linear_few<false>(args);
}

// Of gate and up, two matrices of as many outputs, whole tiles of them: activation(gate) * up.
extern "C" __global__ void __launch_bounds__(640, 1)
    oxl_linear_few_gated(const __grid_constant__ LinearArgs args) {
    oxl::linear_few<true>(args);
}
