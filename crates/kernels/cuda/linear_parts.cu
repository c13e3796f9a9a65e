// y = store(W x + bias) for up to 32 rows and up to five matrices that share their rows, on tensor
// cores: mma.m16n8k16 with weights as A, activations as B, sums in fp32.
//
// Floor: every weight is read from memory once (0.5 bytes at 4 bits): 7.3 us for 4096 x 11008 at
// 3.1 TB/s. Per block of 1024 4-bit weights and 32 rows it issues 36 instructions that take weights apart, 16 products,
// 4 loads and 16 for a group's scales.
//
// K is cut into parts (parts.cuh). The sums of a tile's part are left in memory; whichever warp is the last to have done
// one of a tile's parts joins them in a fixed order.
//
// Launch: grid = 2^parts_shift * shares, a multiple; block = 32 * warps: 16 warps at most for up to 8 rows, 12 for
// more, of more than 16 rows 8 for other compute capabilities than 9.0; dynamic shared memory, with R rows up
// to the next multiple of 8, = warps * SLOTS * SLOT_BYTES + 64 * R * part_blocks + 8 * matrices * ranges of a part *
// range_units, and warps * 128 * R for two ranges of a part, twice that for four.
#include "parts.cuh"

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

    static constexpr bool IS_GATED = false;

    const LinearArgs& args;
    int written;  // the tile that is, and is not reported; negative: none

    static __device__ __forceinline__ constexpr int bytes(int) { return 0; }

    // Of the kernel's own shared memory: its address takes no registers.
    static __device__ __forceinline__ WarpRange* part_ranges(char*, int) {
        __shared__ __align__(16) WarpRange ranges[MOST_MATRICES];
        return ranges;
    }

    __device__ __forceinline__ TileReporter(const LinearArgs& args, const PartWarp&)
        : args(args), written(-1) {}

    __device__ __forceinline__ void meet() {}
    __device__ __forceinline__ void between() {}

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
    __device__ __forceinline__ void write(Sums<ROW_TILES>& sums, int item) {
        const int part = int(blockIdx.x) & ((1 << args.parts_shift) - 1);
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

    __device__ __forceinline__ void after(Sums<ROW_TILES>& sums, bool has_tile, int item) {
        int done = has_tile ? item : -1;
        if (args.parts_shift > 0) {
            const uint32_t arrived = report();
            if (has_tile) write(sums, item);
            const bool is_last = join_if_last(arrived, sums);
            const int before = written;
            written = done;
            done = is_last ? before : -1;
        }
        if (done >= 0) store_sums<ROW_TILES>(args, done, sums);
    }
};

}  // namespace oxl

// Up to 8 rows, whose activations `oxl_linear_few` has no room for. Registers as there.
extern "C" __global__ void __launch_bounds__(640, 1)
    oxl_linear_8(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<1, oxl::TileReporter<1>>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::DEALT_THREADS_OF_16, 1)
    oxl_linear_16(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<2, oxl::TileReporter<2>>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::THREADS_ABOVE_16, 1)
    oxl_linear_24(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<3, oxl::TileReporter<3>>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::THREADS_ABOVE_16, 1)
    oxl_linear_32(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<4, oxl::TileReporter<4>>(args);
}
