// What the kernels of sampling share: a row's settings, the order of tokens, sums over a block.
#pragma once

#include "rows.cuh"

// How a row is drawn.
struct SampleRow {
    // The draw, in 0..1.
    double random;
    // 1 / temperature as it acts before the cuts: 1 where temperature comes last.
    float cut_scale;
    // 1 / temperature of the draw. 0: the most likely token is taken.
    float draw_scale;
    // Keep the smallest set of most likely tokens with this share; off unless in 0..1.
    float top_p;
    // Drop tokens below this share of the best one's probability; 0: off.
    float min_p;
    float repetition_penalty;
    float frequency_penalty;
    float presence_penalty;
    // Keep this many, at most 1,024; 0: off.
    uint32_t top_k;
    // Its changes in SampleArgs::changes.
    uint32_t first_change;
    uint32_t change_count;
};

// A token whose logit is changed; a row names no token twice.
struct SampleChange {
    uint32_t token_id;
    // Share of the penalty of its newest occurrence: 1 in range, 0 if it did not occur.
    float strongest;
    // Shares of all its occurrences together.
    float total;
    // Added at last; negative infinity forbids the token.
    float bias;
};

struct Sampled {
    // 0xffffffff: a logit that might be drawn is NaN or positive infinity, or none is finite.
    uint32_t token_id;
    // ln of its probability by the unchanged logits.
    float logprob;
};

// What a slice tells the block that sums its row up.
struct SampleSlice {
    // Its best token (see `ranked`), 0 if it has none.
    uint64_t best;
    // The largest logit, and the sum of exp(logit - largest), of the unchanged row.
    float raw_max;
    float raw_sum;
    // The sum of exp(scale (logit - best)) over the tokens that can be drawn.
    float mass;
    uint32_t is_faulty;
};

// What the slices of a row say together.
struct SampleSummary {
    // The row's best token, 0 where none can be drawn or a logit is faulty.
    uint64_t best;
    // ln of the sum of exp(logit), of the unchanged row.
    double log_sum;
    // As in SampleSlice.
    float mass;
    uint32_t reserved;
};

struct SampleArgs {
    // f32 [rows, width]; the same afterwards.
    float* logits;
    // [rows]
    const SampleRow* rows;
    const SampleChange* changes;
    // f32, one for each change: scratch.
    float* saved;
    // [rows, slices]: scratch.
    SampleSlice* slices;
    // [rows, slices, groups of a slice]: scratch.
    uint64_t* group_bests;
    // [rows]: zeros, before and after.
    uint32_t* arrivals;
    // [rows]: scratch.
    SampleSummary* summaries;
    // [rows]
    Sampled* sampled;
    int32_t width;
    // Columns that the log probability counts.
    int32_t columns;
    // Ids below are drawn; at most `columns`.
    int32_t drawable;
    // `width` in slices of 4,096, rounded up; at most THREADS.
    int32_t slices_per_row;
    // Neighbouring threads whose tokens are one group: 4, 8, 16 or 32, so that a row has at most
    // THREADS * OWN_GROUPS groups.
    int32_t group_lanes;
    int32_t reserved;
};

namespace sampling {

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
constexpr uint32_t NO_TOKEN = 0xffffffffu;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct Maxima {
    uint64_t best;
    float raw_max;
    uint32_t is_faulty;
};

struct Sums {
    float raw;
    float mass;
};

// Shared memory of the sums over a block.
struct Partials {
    Maxima maxima[WARPS];
    Sums sums[WARPS];
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
    return {larger(a.best, b.best), fmaxf(a.raw_max, b.raw_max), a.is_faulty | b.is_faulty};
}

__device__ __forceinline__ Sums combined(const Sums& a, const Sums& b) {
    return {a.raw + b.raw, a.mass + b.mass};
}

__device__ __forceinline__ uint64_t combined(uint64_t a, uint64_t b) { return a + b; }

__device__ __forceinline__ uint64_t swapped(uint64_t x, int distance) {
    return __shfl_xor_sync(ALL_LANES, x, distance);
}

__device__ __forceinline__ Maxima swapped(const Maxima& x, int distance) {
    return {swapped(x.best, distance), __shfl_xor_sync(ALL_LANES, x.raw_max, distance),
            __shfl_xor_sync(ALL_LANES, x.is_faulty, distance)};
}

__device__ __forceinline__ Sums swapped(const Sums& x, int distance) {
    return {__shfl_xor_sync(ALL_LANES, x.raw, distance),
            __shfl_xor_sync(ALL_LANES, x.mass, distance)};
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

// A logit after penalties and bias, rounded as on the host.
__device__ __forceinline__ float changed(const SampleRow& row, const SampleChange& change,
                                         float logit) {
    const float fading = __fmul_rn(__fsub_rn(1.0f, row.repetition_penalty),
                                   __fsub_rn(1.0f, change.strongest));
    const float repetition = __fadd_rn(row.repetition_penalty, fading);
    logit = __fmul_rn(logit, logit > 0.0f ? __fdiv_rn(1.0f, repetition) : repetition);
    logit = __fsub_rn(logit, __fmul_rn(row.presence_penalty, change.strongest));
    logit = __fsub_rn(logit, __fmul_rn(row.frequency_penalty, change.total));
    logit = __fadd_rn(logit, change.bias);
    // A penalty below 1 can push a huge logit over the edge.
    return fminf(logit, 3.402823466e38f);
}

__device__ __forceinline__ bool cuts_by_share(const SampleRow& row) {
    return row.top_p > 0.0f && row.top_p < 1.0f;
}

__device__ __forceinline__ bool cuts(const SampleRow& row) {
    return row.top_k > 0 || cuts_by_share(row) || row.min_p > 0.0f;
}

// Gives a row its unchanged logits back.
__device__ __forceinline__ void restore(const SampleArgs& args, const SampleRow& row,
                                        float* logits) {
    for (uint32_t index = threadIdx.x; index < row.change_count; index += THREADS) {
        const uint32_t token_id = args.changes[row.first_change + index].token_id;
        if (token_id < uint32_t(args.drawable)) {
            logits[token_id] = __ldcg(args.saved + row.first_change + index);
        }
    }
}

// A row's result; its logits are restored. Of one thread.
__device__ __forceinline__ void finish(const SampleArgs& args, int64_t row_index, uint64_t drawn,
                                       double log_sum) {
    Sampled sampled = {NO_TOKEN, 0.0f};
    if (drawn != 0) {
        sampled.token_id = id_of(drawn);
        const float logit = __ldcg(args.logits + row_index * args.width + sampled.token_id);
        sampled.logprob = float(double(logit) - log_sum);
    }
    args.sampled[row_index] = sampled;
}

// The scale at which the mass of all tokens is needed, 0 if it is not.
__device__ __forceinline__ float mass_scale(const SampleRow& row) {
    if (!cuts(row)) return row.draw_scale;
    return row.top_k == 0 && cuts_by_share(row) ? row.cut_scale : 0.0f;
}

}  // namespace sampling
