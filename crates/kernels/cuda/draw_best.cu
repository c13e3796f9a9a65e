// Looks at each row that is drawn from once, and takes the most likely token where the draw is
// greedy.
//
// Grid (slices, rows with logits); blocks beyond the step's draws end at once, so that one recorded
// launch serves any number of them. Each block looks at one slice of a row: it applies the draw's
// changes there (in place, with the old logits set aside), sums exponentials where the draw needs
// their sum, and notes the best token of each small group of tokens. The block that comes last to a
// row adds the slices up; a greedy draw is done then, and any other is left to `oxl_draw_random`.
// Nothing depends on which block comes last: slices are added up in one order.
//
// Floor: 4 bytes a logit from the L2 (the head has just written them): 32 rows of 128,256 are 16.4
// MB, 3 us; one row of 32,000 is the way to the L2 and back four times (logits, ticket, slices,
// result), about 2 us.
#include "draws.cuh"

namespace {

using namespace draws;

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

// The slice with the draw's changes applied, here and in `logits`.
__device__ __forceinline__ Pieces with_changes(const DrawArgs& args, const DrawSettings& settings,
                                               int slice, Pieces pieces, float* logits,
                                               Shared& shared) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        oxl::store_four(shared.logits, first_of(0, piece), SLICE, pieces.at[piece]);
    }
    __syncthreads();
    const LogitChange* changes = changes_of(args, settings);
    float* saved = args.saved + int64_t(blockIdx.y) * args.most_changes;
    for (uint32_t index = threadIdx.x; index < settings.change_count; index += THREADS) {
        const LogitChange change = changes[index];
        const int place = int(change.token_id) - slice * SLICE;
        if (change.token_id >= settings.drawable || place < 0 || place >= SLICE) continue;
        const float logit = shared.logits[place];
        const float new_logit = changed(settings, change, logit);
        saved[index] = logit;
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

struct Total {
    Maxima maxima;
    float mass;
};

// What the slices of a row say together.
__device__ __forceinline__ Total add_up(const DrawSlice* slices, int count, float scale,
                                        Partials& partials) {
    Maxima own = {0, 0};
    float mass = 0.0f;
    if (int(threadIdx.x) < count) {
        const DrawSlice* slice = slices + threadIdx.x;
        own = {__ldcg(&slice->best), __ldcg(&slice->is_faulty)};
        mass = __ldcg(&slice->mass);
    }
    const Maxima all = block_combined(own, partials.maxima);
    // Of a slice without tokens there is nothing to scale, and no number to scale it by.
    if (own.best != 0) {
        const float distance = __fsub_rn(logit_of(own.best), logit_of(all.best));
        mass = __fmul_rn(mass, expf(__fmul_rn(scale, distance)));
    }
    return {all, block_combined(mass, partials.sums)};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(draws::THREADS, 2)
    oxl_draw_best(const __grid_constant__ DrawArgs args) {
    __shared__ Shared shared;
    const int slice = blockIdx.x;
    const int64_t index = blockIdx.y;
    const int thread = threadIdx.x;
    oxl::dependency_trigger();
    oxl::dependency_wait();
    if (index >= args.header->count) return;
    const DrawSettings settings = settings_of(args, index);
    float* logits = args.logits + (args.header->first_row + index) * args.width;
    const float none = negative_infinity();

    Pieces pieces;
    Maxima maxima = {0, 0};
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int first = first_of(slice, piece);
        pieces.at[piece] = load_logits(logits, first, args.width);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Neither NaN nor infinity is below infinity.
            const bool is_below = pieces.at[piece].at[i] < -none;
            if (first + i < int(settings.drawable) && !is_below) maxima.is_faulty = 1;
        }
    }
    if (settings.change_count > 0) {
        pieces = with_changes(args, settings, slice, pieces, logits, shared);
    }
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int first = first_of(slice, piece);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i >= int(settings.drawable)) pieces.at[piece].at[i] = none;
            maxima.best = larger(maxima.best, ranked(pieces.at[piece].at[i], first + i));
        }
    }
    const float scale = mass_scale(settings);
    const bool is_greedy = settings.draw_scale == 0.0f;
    if (!is_greedy) {
        uint64_t group_best = maxima.best;
        for (int distance = 1; distance < args.group_lanes; distance *= 2) {
            group_best = larger(group_best, swapped(group_best, distance));
        }
        if (thread % args.group_lanes == 0) {
            const int64_t slice_index = index * args.slices_per_row + slice;
            const int groups = THREADS / args.group_lanes;
            args.group_bests[slice_index * groups + thread / args.group_lanes] = group_best;
        }
    }

    maxima = block_combined(maxima, shared.partials.maxima);
    float mass = 0.0f;
    if (scale > 0.0f) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float logit = pieces.at[piece].at[i];
                // NaN is no token.
                if (!(logit > none)) continue;
                const float distance = __fsub_rn(logit, logit_of(maxima.best));
                mass += expf(__fmul_rn(scale, distance));
            }
        }
        mass = block_combined(mass, shared.partials.sums);
    }
    DrawSlice* slices = args.slices + index * args.slices_per_row;
    if (thread == 0) slices[slice] = {maxima.best, mass, maxima.is_faulty};

    __threadfence();
    __syncthreads();
    if (thread == 0) {
        shared.is_last = atomicAdd(args.arrivals + index, 1u) == gridDim.x - 1;
        if (shared.is_last) args.arrivals[index] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!shared.is_last) return;
    const Total total = add_up(slices, args.slices_per_row, scale, shared.partials);
    const uint64_t best = total.maxima.is_faulty == 0 ? total.maxima.best : 0;
    if (thread == 0) args.summaries[index] = {best, total.mass, 0};
    if (best != 0 && !is_greedy) return;
    restore(args, settings, index, logits);
    if (thread == 0) {
        const uint32_t none_drawn = total.maxima.is_faulty != 0 ? NOT_FINITE : NOTHING_LEFT;
        args.drawn[index] = best != 0 ? id_of(best) : none_drawn;
    }
}
