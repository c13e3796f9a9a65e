// y = store(W x + bias) of 9 to 32 rows as `oxl_linear_..` of linear_parts.cu, with a tile's sums joined within a cluster of
// blocks of threads (CTAs): of compute capability 9.0.
//
// A cluster's CTAs have the eight parts of K and the same column tiles. A warp that has done a tile's part sends each
// CTA its eighth of the sums, straight into that CTA's shared memory, where the warp of the same number joins all parts'
// and stores them. So no sums go through memory, nobody fences or counts, and all CTAs store. A tile is joined in the
// middle of the next one, when its sums have long arrived and the registers of sums are free.
//
// Of up to 16 rows gate and up can be gated as in linear.cu: a warp has the same tiles of both. Of more rows that takes
// longer than the kernel that it saves (on an H100).
//
// Launch: clusters of 8 CTAs, as many as the GPU runs at once, at most a tile each; block = 32 * warps, 12 warps at most;
// `parts_shift` 3, `ranges_shift` 4; dynamic shared memory, with R rows up to the next multiple of 8,
// = warps * (SLOTS * SLOT_BYTES + 256 * R + 16) + 64 * R * part_blocks + 16 * matrices * range_units + 80, and 16 * R for
// each of a cluster's tiles of gate.
#include "bulk.cuh"
#include "parts.cuh"
#include "rows.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace oxl {

constexpr int CLUSTER_PARTS = 8;

// One, two or four that lie together in shared memory.
template <int COUNT>
__device__ __forceinline__ void load_floats(uint32_t place, float (&x)[COUNT]) {
    uint32_t words[COUNT];
    if constexpr (COUNT == 4) {
        load_shared(place, words[0], words[1], words[2], words[3]);
    } else if constexpr (COUNT == 2) {
        load_shared(place, words[0], words[1]);
    } else {
        load_shared(place, words[0]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = __uint_as_float(words[i]);
}

// A warp's part in joining tiles. `OWN` of a lane's sums of a tile are joined here, those from `rank * OWN` on.
// GATED: what is joined of gate waits in shared memory for the same of up.
template <int ROW_TILES, bool GATED = false>
struct ClusterExchange {
    static constexpr bool IS_GATED = GATED;
    static constexpr int OWN = 8 * ROW_TILES / CLUSTER_PARTS;
    // Sums that are sent and loaded together.
    static constexpr int TOGETHER = OWN == 3 ? 1 : OWN;
    static constexpr int STEP_BYTES = WARP_LANES * TOGETHER * sizeof(float);
    static constexpr int PART_BYTES = OWN / TOGETHER * STEP_BYTES;
    static constexpr int TILE_BYTES = CLUSTER_PARTS * PART_BYTES;

    const LinearArgs& args;
    uint32_t sums_place;  // the warp's: [parts][OWN / TOGETHER][lanes][TOGETHER]
    uint32_t are_there;   // barrier: all parts' sums of a tile
    uint32_t are_taken;   // barrier: all CTAs have taken what the warp has sent last
    int rank;
    int first_tile;       // of gate, of the cluster
    float* gates;         // [tiles of gate, OWN, lanes]
    int item;             // what was sent last
    uint32_t count;       // of tiles sent

    static __device__ __forceinline__ constexpr int bytes(int warps) {
        return warps * (TILE_BYTES + 2 * BARRIER_BYTES) + MOST_MATRICES * int(sizeof(WarpRange));
    }

    static __device__ __forceinline__ WarpRange* part_ranges(char* memory, int warps) {
        return reinterpret_cast<WarpRange*>(memory + warps * (TILE_BYTES + 2 * BARRIER_BYTES));
    }

    __device__ __forceinline__ ClusterExchange(const LinearArgs& args, const PartWarp& own)
        : args(args),
          sums_place(shared_address(own.memory + own.warp * TILE_BYTES)),
          are_there(shared_address(own.memory + blockDim.x / WARP_LANES * TILE_BYTES +
                                   own.warp * 2 * BARRIER_BYTES)),
          are_taken(are_there + BARRIER_BYTES),
          rank(own.part),
          first_tile(own.first_item - args.first_item),
          gates(reinterpret_cast<float*>(own.rest)),
          item(0),
          count(0) {
        if (lane_number() == 0) {
            barrier_init(are_there, 1);
            barrier_init(are_taken, CLUSTER_PARTS);
            barriers_are_made();
        }
    }

    // Waits until all CTAs of the cluster have made their barriers.
    __device__ __forceinline__ void meet() {
        cluster_meet();
        expect();
    }

    // Announces a tile's sums, some of which may be there already.
    __device__ __forceinline__ void expect() {
        if (lane_number() == 0) barrier_expect(are_there, TILE_BYTES);
    }

    // Joins the tile before.
    __device__ __forceinline__ void between() {
        if (count == 0) return;
        join();
        expect();
        if (lane_number() < CLUSTER_PARTS) barrier_arrive_at(are_taken, lane_number());
    }

    __device__ __forceinline__ void after(const Sums<ROW_TILES>& sums, bool has_tile, int done) {
        if (has_tile) {
            if (count > 0) barrier_wait(are_taken, (count - 1) & 1);
            send(sums);
            item = done;
            ++count;
        } else if (count > 0) {
            // Nobody waits to be told: the other CTAs may have ended.
            join();
        }
    }

    __device__ __forceinline__ void send(const Sums<ROW_TILES>& sums) const {
        const uint32_t own_place = sums_place + rank * PART_BYTES + lane_number() * TOGETHER * sizeof(float);
#pragma unroll
        for (int to = 0; to < CLUSTER_PARTS; ++to) {
            const uint32_t place = cluster_address(own_place, to);
            const uint32_t barrier = cluster_address(are_there, to);
#pragma unroll
            for (int step = 0; step < OWN / TOGETHER; ++step) {
                float together[TOGETHER];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    const int of_lane = to * OWN + step * TOGETHER + i;
                    together[i] = sums[of_lane / 8][of_lane / 4 % 2][of_lane % 4];
                }
                send_async(place + step * STEP_BYTES, together, barrier);
            }
        }
    }

    // Waits for all parts of the tile that was sent last, and stores what the CTA has of it; of gate it is kept.
    __device__ __forceinline__ void join() const {
        const LinearMatrix& target = args.matrices[matrix_of(args, item)];
        const int lane = lane_number();
        const int tile = item - target.first_item;
        const int first = tile * TILE_OUTPUTS + lane / 4;
        const uint32_t* places = IS_GATED ? args.gated_places : nullptr;
        int at[OWN];  // where it is stored; negative: nowhere
        float before[OWN];
        float bias[OWN];
        // All are loaded before any is stored, and asked for before the wait.
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            // As `Sums` has them.
            const int of_lane = rank * OWN + i;
            const int row = of_lane / 8 * ROWS_OF_TILE + lane % 4 * 2 + of_lane % 2;
            const int output = first + of_lane / 4 % 2 * 16 + of_lane / 2 % 2 * 8;
            const bool is_there = row < args.rows && output < target.out_features;
            const int place = places != nullptr && is_there ? int(__ldg(places + output)) : output;
            at[i] = is_there ? row * target.out_features + place : -1;
            bias[i] = is_there && target.bias != nullptr ? __ldg(target.bias + output) : 0.0f;
            before[i] = !IS_GATED && is_there && args.accumulate ? target.out[at[i]] : 0.0f;
        }
        const float store_scale = args.accumulate ? args.store_scale : 1.0f;
        barrier_wait(are_there, (count - 1) & 1);
#pragma unroll
        for (int step = 0; step < OWN / TOGETHER; ++step) {
            float parts[CLUSTER_PARTS][TOGETHER];
#pragma unroll
            for (int part = 0; part < CLUSTER_PARTS; ++part) {
                load_floats(sums_place + part * PART_BYTES + step * STEP_BYTES + lane * TOGETHER * sizeof(float),
                            parts[part]);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const int own = step * TOGETHER + i;
                const float sum = sum_pairs(CLUSTER_PARTS, [&](int part) { return parts[part][i]; });
                const float y = fmaf(target.matrix.scale, sum, bias[own]);
                if constexpr (IS_GATED) {
                    // The lane's own: nobody else reads it.
                    float* gate = gates + ((tile - first_tile) * OWN + own) * WARP_LANES + lane;
                    if (target.first_item == args.first_item) {
                        *gate = y;
                    } else if (at[own] >= 0) {
                        const float product = gated_product(args.gate, *gate, y);
                        args.gated[at[own]] = __low2half(clamped_half2(product, 0.0f));
                    }
                } else {
                    if (at[own] >= 0) target.out[at[own]] = fmaf(store_scale, y, before[own]);
                }
            }
        }
        __syncwarp();
    }
};

}  // namespace oxl

// Bounds as of linear_parts.cu's kernels.
extern "C" __global__ void __cluster_dims__(oxl::CLUSTER_PARTS, 1, 1) __launch_bounds__(512, 1)
    oxl_linear_cluster_16(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<2, oxl::ClusterExchange<2>>(args);
}

extern "C" __global__ void __cluster_dims__(oxl::CLUSTER_PARTS, 1, 1) __launch_bounds__(384, 1)
    oxl_linear_cluster_24(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<3, oxl::ClusterExchange<3>>(args);
}

extern "C" __global__ void __cluster_dims__(oxl::CLUSTER_PARTS, 1, 1) __launch_bounds__(384, 1)
    oxl_linear_cluster_32(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<4, oxl::ClusterExchange<4>>(args);
}

// Of gate and up, two matrices of as many outputs, whole tiles of them: activation(gate) * up.
extern "C" __global__ void __cluster_dims__(oxl::CLUSTER_PARTS, 1, 1) __launch_bounds__(512, 1)
    oxl_linear_cluster_gated_16(const __grid_constant__ LinearArgs args) {
    oxl::linear_parts<2, oxl::ClusterExchange<2, true>>(args);
}

#endif
