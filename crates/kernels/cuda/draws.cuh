// What the kernels of draws share: a draw's settings, the order of tokens, sums over a block.
//
// `oxllama_backend::Draw` defines what a draw gives. Settings and changes lie where each step's
// inputs are copied to, so that a recorded step reads new ones.
#pragma once

#include "rows.cuh"

// The step's draws; as many `DrawSettings` follow.
struct DrawHeader {
    uint32_t count;
    // The row of logits that the first one is drawn from; the others follow.
    uint32_t first_row;
    // Where the changes are, in words from here.
    uint32_t changes_at;
    uint32_t reserved;
};

// `oxllama_backend::Draw`.
struct DrawSettings {
    double random;
    float cut_scale;
    // 0: the most likely token is taken.
    float draw_scale;
    // Off unless in 0..1.
    float top_p;
    float min_p;
    float repetition_penalty;
    float frequency_penalty;
    float presence_penalty;
    // At most 1,024; 0: off.
    uint32_t top_k;
    // Ids below are drawn.
    uint32_t drawable;
    uint32_t first_change;
    // At most DrawArgs::most_changes.
    uint32_t change_count;
    uint32_t reserved;
};

// `oxllama_backend::LogitChange`; a draw names no token twice.
struct LogitChange {
    uint32_t token_id;
    float strongest;
    float total;
    float bias;
};

// What a slice tells the block that sums its row up.
struct DrawSlice {
    // Its best token (see `ranked`), 0 if it has none.
    uint64_t best;
    // The sum of exp(scale (logit - best)) over the tokens that can be drawn.
    float mass;
    uint32_t is_faulty;
};

// What the slices of a row say together.
struct DrawSummary {
    // The row's best token; 0: the draw has ended, nothing can be drawn.
    uint64_t best;
    // As in DrawSlice.
    float mass;
    uint32_t reserved;
};

struct DrawArgs {
    // f32 [rows, width]; the same afterwards.
    float* logits;
    const DrawHeader* header;
    // f32 [draws, most_changes]: scratch.
    float* saved;
    // [draws, slices]: scratch.
    DrawSlice* slices;
    // [draws, slices, groups of a slice]: scratch.
    uint64_t* group_bests;
    // [draws]: zeros, before and after.
    uint32_t* arrivals;
    // [draws]: scratch.
    DrawSummary* summaries;
    // [draws]: tokens, or NOT_FINITE or NOTHING_LEFT.
    uint32_t* drawn;
    int32_t width;
    // `width` in slices of 4,096, rounded up; at most THREADS.
    int32_t slices_per_row;
    // Neighbouring threads whose tokens are one group: 4, 8, 16 or 32, so that a row has at most
    // THREADS * OWN_GROUPS groups.
    int32_t group_lanes;
    int32_t most_changes;
};

namespace draws {

using oxl::Four;
using oxl::WARP_LANES;
using oxl::negative_infinity;

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP_LANES;
// Pieces of four logits a thread and slice.
constexpr int PIECES = 2;
constexpr int PIECE = 4 * THREADS;
constexpr int SLICE = PIECES * PIECE;
// Groups of a row whose bests one thread looks at.
constexpr int OWN_GROUPS = 4;
// Drawn where a logit that may be drawn is NaN or positive infinity; where none is finite.
constexpr uint32_t NOT_FINITE = 0xffffffffu;
constexpr uint32_t NOTHING_LEFT = 0xfffffffeu;
// No place in a row.
constexpr uint32_t NOWHERE = 0xffffffffu;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct Maxima {
    uint64_t best;
    uint32_t is_faulty;
};

// Shared memory of the sums over a block.
struct Partials {
    Maxima maxima[WARPS];
    float sums[WARPS];
    uint64_t words[WARPS];
    uint32_t counts[WARPS];
};

// A number that is larger the more likely the token: by logit, equal ones by falling id. 0 for
// what can never be drawn.
__device__ __forceinline__ uint64_t ranked(float logit, int token_id) {
    if (!(logit > negative_infinity())) return 0;
    // Adding 0 takes -0 for 0, as comparisons do.
    const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t(rising) << 32 | (0xffffffffu - uint32_t(token_id));
}

__device__ __forceinline__ float logit_of(uint64_t token) {
    const uint32_t rising = uint32_t(token >> 32);
    return __uint_as_float(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

__device__ __forceinline__ uint32_t id_of(uint64_t token) {
    return 0xffffffffu - uint32_t(token);
}

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

__device__ __forceinline__ Maxima combined(const Maxima& a, const Maxima& b) {
    return {larger(a.best, b.best), a.is_faulty | b.is_faulty};
}

__device__ __forceinline__ float combined(float a, float b) { return a + b; }

__device__ __forceinline__ uint64_t combined(uint64_t a, uint64_t b) { return a + b; }

__device__ __forceinline__ uint64_t swapped(uint64_t x, int distance) {
    return __shfl_xor_sync(ALL_LANES, x, distance);
}

__device__ __forceinline__ Maxima swapped(const Maxima& x, int distance) {
    return {swapped(x.best, distance), __shfl_xor_sync(ALL_LANES, x.is_faulty, distance)};
}

__device__ __forceinline__ float swapped(float x, int distance) {
    return __shfl_xor_sync(ALL_LANES, x, distance);
}

// All threads' values combined, in every thread, always in the same tree.
template <typename T>
__device__ __forceinline__ T block_combined(T x, T (&partials)[WARPS]) {
    const int lane = threadIdx.x % WARP_LANES;
#pragma unroll
    for (int distance = WARP_LANES / 2; distance > 0; distance /= 2) {
        x = combined(x, swapped(x, distance));
    }
    if (lane == 0) partials[threadIdx.x / WARP_LANES] = x;
    __syncthreads();
    x = partials[lane % WARPS];
#pragma unroll
    for (int distance = WARPS / 2; distance > 0; distance /= 2) {
        x = combined(x, swapped(x, distance));
    }
    __syncthreads();
    return x;
}

__device__ __forceinline__ uint32_t block_count(uint32_t count, Partials& partials) {
    const int lane = threadIdx.x % WARP_LANES;
    count = __reduce_add_sync(ALL_LANES, count);
    if (lane == 0) partials.counts[threadIdx.x / WARP_LANES] = count;
    __syncthreads();
    count = __reduce_add_sync(ALL_LANES, lane < WARPS ? partials.counts[lane] : 0);
    __syncthreads();
    return count;
}

// The smallest of all threads' numbers.
__device__ __forceinline__ uint32_t block_least(uint32_t x, Partials& partials) {
    const int lane = threadIdx.x % WARP_LANES;
    x = __reduce_min_sync(ALL_LANES, x);
    if (lane == 0) partials.counts[threadIdx.x / WARP_LANES] = x;
    __syncthreads();
    x = __reduce_min_sync(ALL_LANES, partials.counts[lane % WARPS]);
    __syncthreads();
    return x;
}

// The sum of the numbers of all threads up to this one; `total`: of all.
__device__ __forceinline__ uint64_t block_scan(uint64_t x, uint64_t& total, Partials& partials) {
    const int lane = threadIdx.x % WARP_LANES;
    const int warp = threadIdx.x / WARP_LANES;
#pragma unroll
    for (int distance = 1; distance < WARP_LANES; distance *= 2) {
        const uint64_t before = __shfl_up_sync(ALL_LANES, x, distance);
        if (lane >= distance) x += before;
    }
    if (lane == WARP_LANES - 1) partials.words[warp] = x;
    __syncthreads();
    total = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) {
        if (other == warp) x += total;
        total += partials.words[other];
    }
    __syncthreads();
    return x;
}

// Logits `first..first + 4`, negative infinity from `width` on. From the L2: other blocks have
// changed some.
__device__ __forceinline__ Four load_logits(const float* row, int first, int width) {
    const float none = negative_infinity();
    if (width % 4 == 0) {
        if (first >= width) return {{none, none, none, none}};
        const float4 loaded = __ldcg(reinterpret_cast<const float4*>(row + first));
        return {{loaded.x, loaded.y, loaded.z, loaded.w}};
    }
    Four four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.at[i] = first + i < width ? __ldcg(row + first + i) : none;
    return four;
}

// The settings of the draw at `index`.
__device__ __forceinline__ const DrawSettings& settings_of(const DrawArgs& args, int64_t index) {
    return reinterpret_cast<const DrawSettings*>(args.header + 1)[index];
}

// A draw's own changes.
__device__ __forceinline__ const LogitChange* changes_of(const DrawArgs& args,
                                                         const DrawSettings& settings) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(args.header);
    const uint32_t* changes = words + args.header->changes_at;
    return reinterpret_cast<const LogitChange*>(changes) + settings.first_change;
}

// A logit after its change, rounded as the definition says.
__device__ __forceinline__ float changed(const DrawSettings& settings, const LogitChange& change,
                                         float logit) {
    if (change.total > 0.0f) {
        const float penalty = settings.repetition_penalty;
        const float fading =
            __fmul_rn(__fsub_rn(1.0f, penalty), __fsub_rn(1.0f, change.strongest));
        const float repetition = __fadd_rn(penalty, fading);
        logit = __fmul_rn(logit, logit > 0.0f ? __fdiv_rn(1.0f, repetition) : repetition);
        logit = __fsub_rn(logit, __fmul_rn(settings.presence_penalty, change.strongest));
        logit = __fsub_rn(logit, __fmul_rn(settings.frequency_penalty, change.total));
    }
    logit = __fadd_rn(logit, change.bias);
    // A penalty below 1 can push a huge logit over the edge.
    return fminf(logit, 3.402823466e38f);
}

__device__ __forceinline__ bool cuts_by_share(const DrawSettings& settings) {
    return settings.top_p > 0.0f && settings.top_p < 1.0f;
}

__device__ __forceinline__ bool cuts(const DrawSettings& settings) {
    return settings.top_k > 0 || cuts_by_share(settings) || settings.min_p > 0.0f;
}

// Gives a row its unchanged logits back.
__device__ __forceinline__ void restore(const DrawArgs& args, const DrawSettings& settings,
                                        int64_t index, float* logits) {
    const LogitChange* changes = changes_of(args, settings);
    const float* saved = args.saved + index * args.most_changes;
    for (uint32_t place = threadIdx.x; place < settings.change_count; place += THREADS) {
        const uint32_t token_id = changes[place].token_id;
        if (token_id < settings.drawable) logits[token_id] = __ldcg(saved + place);
    }
}

// The scale at which the mass of all tokens is needed, 0 if it is not.
__device__ __forceinline__ float mass_scale(const DrawSettings& settings) {
    if (!cuts(settings)) return settings.draw_scale;
    if (settings.draw_scale == 0.0f || settings.top_k > 0) return 0.0f;
    return cuts_by_share(settings) ? settings.cut_scale : 0.0f;
}

}  // namespace draws
