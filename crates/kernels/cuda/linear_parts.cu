// y = store(W x + bias) for up to 32 rows and up to five matrices that share their rows, on tensor
// cores: mma.m16n8k16 with weights as A, activations as B, sums in fp32.
//
// Floor: every weight is read from memory once (0.5 bytes at 4 bits): 7.3 us for 4096 x 11008 at
// 3.1 TB/s. 32 rows of activations are four times a tile's 4-bit weights, so they must not be
// fetched for every tile. That is what decides how the work is divided: K is cut into *parts* of up to
// four ranges, so short that their activations of all rows lie in a multiprocessor's shared memory. A
// block of threads (CTA) has one part and goes through an equal, contiguous share of all column tiles; each
// warp multiplies tiles of its own, with nobody to wait for. Per block of 1024 4-bit weights and 32 rows
// it issues 36 instructions that take weights apart, 16 products, 4 loads and 16 for a group's scales.
//
// The sums of a tile's part are left in memory; whichever warp is the last to have done one of a tile's parts
// joins them in a fixed order.
//
// Launch: grid = 2^parts_shift * shares, a multiple; block = 32 * warps: 16 warps at most for up to 8 rows, 12 for
// more, of more than 16 rows 8 for other compute capabilities than 9.0; dynamic shared memory, with R rows up
// to the next multiple of 8, = warps * SLOTS * SLOT_BYTES + 64 * R * part_blocks + 8 * matrices * ranges of a part *
// range_units, and warps * 128 * R for two ranges of a part, twice that for four.
#include "units.cuh"

namespace oxl {

// Threads of a CTA of more than 16 rows: as many as the compiler finds registers for. And for how many registers are
// dealt out with 9 to 16 rows: more than the 384 that there are, if few registers are worth it (see linear.cu)
// and it finds enough.
#if defined(OXL_EMULATED) || defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int THREADS_ABOVE_16 = 384;
constexpr int DEALT_THREADS_OF_16 = 512;
#else
constexpr int THREADS_ABOVE_16 = 256;
constexpr int DEALT_THREADS_OF_16 = 384;
#endif

// What all warps of a CTA multiply of the tiles of `count` matrices from `first` on: units of all the part's ranges. A
// warp brings those of one range of a matrix, so that memory is waited for once, by all.
__device__ __forceinline__ void load_parts(const LinearArgs& args, int first, int count,
                                           int first_range, int ranges, Unit* units,
                                           int matrix_units, WarpRange* parts) {
    const int lane = lane_number();
    const int warps = blockDim.x / WARP_LANES;
#pragma unroll 1
    for (int task = warp_number(); task < count * ranges; task += warps) {
        const int index = first + task / ranges;
        const int own = task % ranges;
        const uint4* table = args.matrices[index].matrix.range_table;
        const uint2* from = reinterpret_cast<const uint2*>(table + (1 << args.ranges_shift)) +
                            (first_range + own) * args.range_blocks;
        const uint4 range = __ldg(table + first_range + min(lane, ranges - 1));
        const uint2 unit = __ldg(from + min(lane, args.range_blocks - 1));
        WarpRange sum = {0, int(__shfl_sync(0xffffffffu, range.y, 0)), 0, 0};
        uint2* to = nullptr;
        int own_units = 0;
#pragma unroll 1
        for (int i = 0; i < ranges; ++i) {
            const int here = int(__shfl_sync(0xffffffffu, range.x, i));
            if (i == own) {
                to = reinterpret_cast<uint2*>(units + index * matrix_units + sum.units);
                own_units = here;
            }
            sum.units += here;
            sum.bytes += int(__shfl_sync(0xffffffffu, range.z, i));
        }
        if (lane < own_units) to[lane] = unit;
#pragma unroll 1
        for (int i = lane + WARP_LANES; i < own_units; i += WARP_LANES) to[i] = __ldg(from + i);
        if (own == 0 && lane == 0) parts[index] = sum;
    }
}

// Copies the activations of a part, whose blocks are counted here: there are no registers to keep them in. Rows past
// the last are copies of the last: their sums are not stored.
template <int ROWS>
__device__ __forceinline__ void copy_rows(const LinearArgs& args, const __half* x, int part,
                                          char* places) {
    const int block = args.blocks * part >> args.parts_shift;
    const int count = (args.blocks * (part + 1) >> args.parts_shift) - block;
    const int stride = args.blocks * BLOCK_INPUTS;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(x + block * BLOCK_INPUTS);
#pragma unroll 4
    for (int piece = threadIdx.x; piece < count * ROWS * 4; piece += blockDim.x) {
        const int row = piece / 4 % ROWS;
        const int64_t at = int64_t(min(row, args.rows - 1)) * stride * sizeof(__half) +
                           piece / (4 * ROWS) * ROW_BLOCK_BYTES + piece % 4 * PIECE_BYTES;
        copy_async(shared_address(places + piece * PIECE_BYTES), from + at);
    }
    commit_copies();
    wait_for_copies<0>();
}

// A warp's sums in memory: float4 [fours, lanes].
template <int ROW_TILES>
struct SumsInMemory {
    static constexpr int FOURS = 2 * ROW_TILES;

    // `visit(float4 of the sums, its place)`, for the lane that `first` is the place of.
    template <typename Four, typename Visit>
    static __device__ __forceinline__ void each(Sums<ROW_TILES>& sums, Four* first, Visit visit) {
#pragma unroll
        for (int i = 0; i < FOURS; ++i) visit(sums[i / 2][i % 2], first + i * WARP_LANES);
    }
};

__device__ __forceinline__ float4 four_of(const float (&sums)[4]) {
    return make_float4(sums[0], sums[1], sums[2], sums[3]);
}

__device__ __forceinline__ void set_four(float (&sums)[4], const float4& four) {
    sums[0] = four.x;
    sums[1] = four.y;
    sums[2] = four.z;
    sums[3] = four.w;
}

// Takes note of the sums of range `number` of a part; those of the last become the part's. Sums of pairs,
// and of pairs of pairs, wait in shared memory for their neighbours: `waiting` is the lane's place there.
template <int ROW_TILES>
__device__ __forceinline__ void take_range(Sums<ROW_TILES>& sums, int number, int ranges,
                                           float4* waiting) {
    using Memory = SumsInMemory<ROW_TILES>;
#pragma unroll 1
    for (int left = number; left % 2 == 1; left /= 2) {
        Memory::each(sums, waiting, [](float(&four)[4], const float4* place) {
            set_four(four, plus(*place, four_of(four)));
        });
        waiting += Memory::FOURS * WARP_LANES;
    }
    if (number < ranges - 1) {
        Memory::each(sums, waiting, [](float(&four)[4], float4* place) { *place = four_of(four); });
    }
}

// Stores a lane's sums of a tile.
template <int ROW_TILES>
__device__ __forceinline__ void store_sums(const LinearArgs& args, int item,
                                           const Sums<ROW_TILES>& sums) {
    const LinearMatrix& target = args.matrices[matrix_of(args, item)];
    // Asked for here, so that what depends on it does not take registers all along.
    const int lane = lane_number();
    const int first = (item - target.first_item) * TILE_OUTPUTS + lane / 4;
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool has_bias = target.bias != nullptr && first + 8 * i < target.out_features;
        bias[i] = has_bias ? __ldg(target.bias + first + 8 * i) : 0.0f;
    }
    const auto each_place = [&](auto visit) {
#pragma unroll
        for (int at = 0; at < 2 * ROW_TILES; ++at) {
            const int row_tile = at / 2;
            const int second = at % 2;
            const int row = row_tile * ROWS_OF_TILE + lane % 4 * 2 + second;
            float* out = target.out + int64_t(row) * target.out_features + first;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool is_there = row < args.rows && first + 8 * i < target.out_features;
                const float sum = sums[row_tile][i / 2][i % 2 * 2 + second];
                visit(4 * at + i, sum, out + 8 * i, is_there);
            }
        }
    };
    // All are loaded before any is stored: the compiler would have each load wait for the store before it, and each
    // takes as long as all.
    float before[8 * ROW_TILES] = {};
    if (args.accumulate) {
        each_place([&](int place, float, const float* out, bool is_there) {
            before[place] = is_there ? *out : 0.0f;
        });
    }
    const float store_scale = args.accumulate ? args.store_scale : 1.0f;
    each_place([&](int place, float sum, float* out, bool is_there) {
        const float y = fmaf(target.matrix.scale, sum, bias[place % 4]);
        if (is_there) *out = fmaf(store_scale, y, before[place]);
    });
}

// What a warp leaves for others, and joins of theirs. A tile is reported when the warp has done its next
// one: then its sums have long been written.
template <int ROW_TILES>
struct TileReporter {
    using Memory = SumsInMemory<ROW_TILES>;

    const LinearArgs& args;
    int written;  // the tile that is, and is not reported; negative: none

    // The lane's place for a tile's sums of a part.
    __device__ __forceinline__ float4* sums_of(int item, int part) const {
        const int64_t index = (int64_t(item - args.first_item) << args.parts_shift) + part;
        float4* partials = reinterpret_cast<float4*>(args.partials);
        return partials + index * (Memory::FOURS * WARP_LANES) + lane_number();
    }

    // Reports the tile before: how many parts of it had been reported, in lane 0.
    __device__ __forceinline__ uint32_t report() {
        uint32_t arrived = 0;
        __syncwarp();
        if (lane_number() == 0 && written >= 0) {
            __threadfence();
            arrived = atomicAdd(args.counters + written - args.first_item, 1u);
        }
        return arrived;
    }

    // Writes the sums of a part of the tile just done.
    __device__ __forceinline__ void write(Sums<ROW_TILES>& sums, int part, int item) {
        Memory::each(sums, sums_of(item, part),
                     [](float(&four)[4], float4* place) { __stcg(place, four_of(four)); });
    }

    // Adds so many parts' sums of the tile before: without a branch, so that several are loaded at once.
    template <int PARTS>
    __device__ __forceinline__ void join_parts(int first, Sums<ROW_TILES>& sums) const {
        const float4* from = sums_of(written, first);
#pragma unroll
        for (int i = 0; i < Memory::FOURS; ++i) {
            const float4 sum = sum_pairs(PARTS, [&](int part) {
                return __ldcg(from + (part * Memory::FOURS + i) * WARP_LANES);
            });
            auto& four = sums[i / 2][i % 2];
            set_four(four, plus(four_of(four), sum));
        }
    }

    // Joins all parts' sums of the tile before if this warp's were the last; tells whether.
    __device__ __forceinline__ bool join_if_last(uint32_t arrived, Sums<ROW_TILES>& sums) const {
        const uint32_t parts = 1u << args.parts_shift;
        if (__shfl_sync(0xffffffffu, arrived, 0) != parts - 1) return false;
        __threadfence();
        clear<ROW_TILES>(sums);
        if (parts == 2) {
            join_parts<2>(0, sums);
        } else if (parts == 4) {
            join_parts<4>(0, sums);
        } else {
            // Two times eight are summed as sixteen would be.
#pragma unroll 1
            for (int first = 0; first < int(parts); first += 8) join_parts<8>(first, sums);
        }
        if (lane_number() == 0) args.counters[written - args.first_item] = 0;
        return true;
    }
};

// The sums of a tile over the part, in `stream.sums`.
template <int ROW_TILES>
__device__ __forceinline__ void multiply_part(Stream<ROW_TILES>& stream, const Unit* unit,
                                              const Unit* units_end, int ranges,
                                              const char* x_lane, float4* waiting) {
    stream.x.next = x_lane;
    clear<ROW_TILES>(stream.sums);
    int range = 0;
#pragma unroll 1
    while (unit != units_end) {
        const Unit* run_end = stream.multiply(unit);
        if (ends_range(run_end[-1].shape)) {
            take_range<ROW_TILES>(stream.sums, range, ranges, waiting);
            if (++range < ranges) clear<ROW_TILES>(stream.sums);
        }
        unit = run_end;
    }
}

// The first tile from `item` on whose matrix multiplies other rows than `item`'s, or `item_end`.
__device__ __forceinline__ int end_of_rows(const LinearArgs& args, int item, int item_end) {
    int index = matrix_of(args, item);
    const __half* rows = args.matrices[index].x;
#pragma unroll 1
    do {
        item = args.matrices[index].first_item + args.matrices[index].matrix.tiles;
        ++index;
    } while (item < item_end && args.matrices[index].x == rows);
    return min(item, item_end);
}

template <int ROW_TILES>
__device__ __forceinline__ void linear_parts(const LinearArgs& args) {
    constexpr int ROWS = ROW_TILES * ROWS_OF_TILE;
    constexpr int BLOCK_BYTES = ROWS * ROW_BLOCK_BYTES;
    DYNAMIC_SHARED(char, shared, 128);
    __shared__ __align__(16) WarpRange part_of[MOST_MATRICES];
    dependency_trigger();
    const int warp = warp_number();
    const int lane = lane_number();
    const int warps = blockDim.x / WARP_LANES;
    const int part = int(blockIdx.x) & ((1 << args.parts_shift) - 1);
    const int share = int(blockIdx.x) >> args.parts_shift;
    const int shares = int(gridDim.x) >> args.parts_shift;
    const int first_item = args.first_item + args.items * share / shares;
    const int item_end = args.first_item + args.items * (share + 1) / shares;
    const int ranges = 1 << (args.ranges_shift - args.parts_shift);

    // Sums that wait for their neighbours: of one, two or no ranges.
    const int warp_fours = ranges / 2 * SumsInMemory<ROW_TILES>::FOURS * WARP_LANES;
    float4* all_waiting = reinterpret_cast<float4*>(shared + warps * SLOTS * SLOT_BYTES);
    char* x = reinterpret_cast<char*>(all_waiting + warps * warp_fours);
    Unit* units = reinterpret_cast<Unit*>(x + args.part_blocks * BLOCK_BYTES);
    const int matrix_units = ranges * args.range_units;
    const int first_index = matrix_of(args, first_item);
    int matrix_end = first_index;
#pragma unroll 1
    do {
        ++matrix_end;
    } while (matrix_end < args.matrix_count && args.matrices[matrix_end].first_item < item_end);
    load_parts(args, first_index, matrix_end - first_index, part * ranges, ranges, units,
               matrix_units, part_of);
    __syncthreads();
    char* ring = shared + warp * SLOTS * SLOT_BYTES;
    Stream<ROW_TILES> stream = {args, ring, units, part_of, matrix_units, lane, item_end};
    stream.x.block_bytes = BLOCK_BYTES;
    stream.slot = 0;
    stream.cursor.stride = warps;
    int item = first_item + warp;
    stream.start(item, first_index);
    dependency_wait();

    const char* x_lane = x + lane * PIECE_BYTES;
    float4* waiting = all_waiting + warp * warp_fours + lane;
    TileReporter<ROW_TILES> reporter = {args, -1};
    // The end of the tiles whose activations are there.
    int x_end = first_item;
    // Once for each of the warp's tiles, and once more to report the last.
#pragma unroll 1
    for (;; item += warps) {
        while (item >= x_end && x_end < item_end) {
            // Not before all are past the activations that are there.
            if (x_end != first_item) __syncthreads();
            const __half* rows = args.matrices[matrix_of(args, x_end)].x;
            copy_rows<ROWS>(args, rows, part, x);
            __syncthreads();
            x_end = end_of_rows(args, x_end, item_end);
        }
        const bool has_tile = item < item_end;
        if (has_tile) {
            const int index = matrix_of(args, item);
            const Unit* unit = units + index * matrix_units;
            multiply_part(stream, unit, unit + part_of[index].units, ranges, x_lane, waiting);
        }
        int done = has_tile ? item : -1;
        if (args.parts_shift > 0) {
            const uint32_t arrived = reporter.report();
            if (has_tile) reporter.write(stream.sums, part, item);
            const bool is_last = reporter.join_if_last(arrived, stream.sums);
            const int before = reporter.written;
            reporter.written = done;
            done = is_last ? before : -1;
        }
        if (done >= 0) store_sums<ROW_TILES>(args, done, stream.sums);
        if (!has_tile) return;
    }
}

}  // namespace oxl

// Up to 8 rows, whose activations `oxl_linear_few` has no room for. Registers as there.
extern "C" __global__ void __launch_bounds__(640, 1)
    oxl_linear_8(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<1>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::DEALT_THREADS_OF_16, 1)
    oxl_linear_16(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<2>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::THREADS_ABOVE_16, 1)
    oxl_linear_24(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<3>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::THREADS_ABOVE_16, 1)
    oxl_linear_32(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<4>(args);
}
