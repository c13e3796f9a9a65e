// Looks at each row of logits once, and takes the most likely token of the rows that are greedy.
//
// Grid (slices, rows). Each block looks at one slice of a row: it applies the row's changes there
// (in place, with the old logits set aside), sums exponentials, and notes the best token of each
// small group of tokens. The block that comes last to a row adds the slices up; a greedy row is
// done then, and any other is left to `oxl_sample_draw`. Nothing depends on which block comes
// last: slices are added up in one order.
//
// Floor: 4 bytes a logit from the L2 (the head has just written them): 32 rows of 128,256 are 16.4
// MB, 3 us; one row of 32,000 is the way to the L2 and back four times (logits, ticket, slices,
// the token's logit), about 2 us.
#include "sampling.cuh"

namespace {

using namespace sampling;

struct Shared {
    // The slice, so that a change finds its place.
    float logits[SLICE];
    Partials partials;
    uint32_t is_last;
};

// A slice's logits in this thread.
struct Pieces {
    Four at[PIECES];
};

__device__ __forceinline__ int first_of(int slice, int piece) {
    return slice * SLICE + piece * PIECE + 4 * int(threadIdx.x);
}

// The slice with the row's changes applied, here and in `logits`.
__device__ __forceinline__ Pieces with_changes(const SampleArgs& args, const SampleRow& row,
                                               int slice, Pieces pieces, float* logits,
                                               Shared& shared) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int first = first_of(0, piece);
        oxl::store_four(shared.logits, first, SLICE, pieces.at[piece]);
    }
    __syncthreads();
    for (uint32_t index = threadIdx.x; index < row.change_count; index += THREADS) {
        const SampleChange change = args.changes[row.first_change + index];
        const int place = int(change.token_id) - slice * SLICE;
        if (change.token_id >= uint32_t(args.drawable) || place < 0 || place >= SLICE) continue;
        const float logit = shared.logits[place];
        const float new_logit = changed(row, change, logit);
        args.saved[row.first_change + index] = logit;
        shared.logits[place] = new_logit;
        logits[change.token_id] = new_logit;
    }
    __syncthreads();
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        pieces.at[piece] = oxl::load_four(shared.logits, first_of(0, piece), SLICE);
    }
    return pieces;
}

// What the slices of a row say together.
__device__ __forceinline__ SampleSummary add_up(const SampleSlice* slices, int count, float scale,
                                                Partials& partials) {
    Maxima own = {0, negative_infinity(), 0};
    Sums sums = {0.0f, 0.0f};
    if (int(threadIdx.x) < count) {
        const SampleSlice* slice = slices + threadIdx.x;
        own = {__ldcg(&slice->best), __ldcg(&slice->raw_max), __ldcg(&slice->is_faulty)};
        sums = {__ldcg(&slice->raw_sum), __ldcg(&slice->mass)};
    }
    const Maxima all = block_combined(own, partials.maxima);
    // Of a slice without logits there is nothing to scale, and no number to scale it by.
    if (sums.raw != 0.0f) sums.raw = __fmul_rn(sums.raw, expf(own.raw_max - all.raw_max));
    if (own.best != 0) {
        const float distance = __fsub_rn(logit_of(own.best), logit_of(all.best));
        sums.mass = __fmul_rn(sums.mass, expf(__fmul_rn(scale, distance)));
    }
    sums = block_combined(sums, partials.sums);
    const double log_sum = double(all.raw_max) + log(double(sums.raw));
    return {all.is_faulty == 0 ? all.best : 0, log_sum, sums.mass, 0};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(sampling::THREADS, 2)
    oxl_sample_look(const __grid_constant__ SampleArgs args) {
    __shared__ Shared shared;
    const int slice = blockIdx.x;
    const int64_t row_index = blockIdx.y;
    const int thread = threadIdx.x;
    float* logits = args.logits + row_index * args.width;
    const float none = negative_infinity();
    oxl::dependency_trigger();
    oxl::dependency_wait();
    const SampleRow row = args.rows[row_index];

    Pieces raw;
    Maxima maxima = {0, none, 0};
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int first = first_of(slice, piece);
        raw.at[piece] = load_logits(logits, first, args.width);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& logit = raw.at[piece].at[i];
            if (first + i >= args.columns) logit = none;
            maxima.raw_max = fmaxf(maxima.raw_max, logit);
            // Neither NaN nor infinity is below infinity.
            if (first + i < args.drawable && !(logit < -none)) maxima.is_faulty = 1;
        }
    }
    Pieces pieces = raw;
    if (row.change_count > 0) pieces = with_changes(args, row, slice, raw, logits, shared);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int first = first_of(slice, piece);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i >= args.drawable) pieces.at[piece].at[i] = none;
            maxima.best = larger(maxima.best, ranked(pieces.at[piece].at[i], first + i));
        }
    }
    uint64_t group_best = maxima.best;
    for (int distance = 1; distance < args.group_lanes; distance *= 2) {
        group_best = larger(group_best, swapped(group_best, distance));
    }
    if (thread % args.group_lanes == 0) {
        const int64_t slice_index = row_index * args.slices_per_row + slice;
        const int64_t group = slice_index * (THREADS / args.group_lanes) + thread / args.group_lanes;
        args.group_bests[group] = group_best;
    }

    maxima = block_combined(maxima, shared.partials.maxima);
    const float scale = mass_scale(row);
    Sums sums = {0.0f, 0.0f};
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // NaN goes through.
            const float logit = raw.at[piece].at[i];
            if (logit != none) sums.raw += expf(logit - maxima.raw_max);
            const float changed_logit = pieces.at[piece].at[i];
            if (scale > 0.0f && changed_logit > none) {
                const float distance = __fsub_rn(changed_logit, logit_of(maxima.best));
                sums.mass += expf(__fmul_rn(scale, distance));
            }
        }
    }
    sums = block_combined(sums, shared.partials.sums);
    SampleSlice* slices = args.slices + row_index * args.slices_per_row;
    if (thread == 0) {
        slices[slice] = {maxima.best, maxima.raw_max, sums.raw, sums.mass, maxima.is_faulty};
    }

    __threadfence();
    __syncthreads();
    if (thread == 0) {
        shared.is_last = atomicAdd(args.arrivals + row_index, 1u) == gridDim.x - 1;
        if (shared.is_last) args.arrivals[row_index] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!shared.is_last) return;
    const SampleSummary summary = add_up(slices, args.slices_per_row, scale, shared.partials);
    if (thread == 0) args.summaries[row_index] = summary;
    if (summary.best != 0 && row.draw_scale > 0.0f) return;
    restore(args, row, logits);
    __syncthreads();
    if (thread == 0) finish(args, row_index, summary.best, summary.log_sum);
}
