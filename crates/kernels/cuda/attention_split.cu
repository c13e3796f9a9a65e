// Attention of few rows of a sequence over the paged cache (attention.cuh defines a row's result).
//
// Floor: the bytes of keys and values that the rows see, read once, for all query heads of a kv
// head together. A sequence of more than a few tiles is split among blocks; the last one to finish
// folds the pieces. The grid does not depend on lengths, which are read on the device: a captured
// launch serves any positions.
//
// Where every sequence has one row in the step, the kernel also does what `oxl_cache_...` does
// elsewhere: each block norms and rotates its query heads; the one that has the row's own token among
// its pieces norms, rotates and stores its key and value, and attends to them as they will be read
// back. All else that a block reads is older than the step and on its way before the wait.
#include "split_results.cuh"

namespace {

using namespace oxl;

// Row length of a tile's weights in shared memory.
constexpr int WEIGHT_STRIDE = TILE + PADDING;
// What a block's shared memory begins with. The queries, fp16 [HEADS_OF_WARP, D + PADDING] or as
// many rows as there are, come next; when they are in registers, the weights of a tile, fp16
// [HEADS_OF_WARP, WEIGHT_STRIDE], take their place. Then the step's heads as they come, f32
// [heads, head_dim], and the tiles.
template <int D>
struct SplitShared {
    float largest[ATTEND_WARPS][HEADS_OF_WARP];
    float sums[HEADS_OF_WARP];
    // Of a block that is alone: states over the pieces before, which all warps compute alike.
    RowState wholes[ATTEND_WARPS][HEADS_OF_WARP];
    int is_last;
    int unused[15];
    // The row's own key and value as they will be decoded.
    __half fresh[2][D];
};
static_assert(sizeof(SplitShared<64>) % 128 == 0, "tiles are aligned");

// One block's share of a tile of rows: its pieces, every `step`-th from `first_piece` on.
template <int D>
struct SplitBlock {
    static constexpr int STRIDE = D + PADDING;
    // Dimensions of the result that a warp has, in pairs of eight.
    static constexpr int PAIRS = D / ATTEND_WARPS / 16;

    const AttendArgs& args;
    const Queries& queries;
    const Span& span;
    SplitShared<D>& shared;
    __half* shared_weights;
    int warp;
    int lane;
    // Positions of rows g and g + 8, and what they see from.
    int positions[2];
    int firsts[2];
    uint32_t q[D / 16][4];

    __device__ __forceinline__ SplitBlock(const AttendArgs& args, const Queries& queries,
                                          const Span& span, SplitShared<D>& shared,
                                          __half* shared_weights)
        : args(args),
          queries(queries),
          span(span),
          shared(shared),
          shared_weights(shared_weights) {
        warp = threadIdx.x / WARP_LANES;
        lane = threadIdx.x % WARP_LANES;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            positions[i] = queries.first_position + queries.row(args, lane / 4 + 8 * i);
            firsts[i] = first_visible(args, positions[i]);
        }
    }

    // From fp16 [rows, STRIDE] in shared memory; the last row stands for those that there are not.
    __device__ __forceinline__ void take_queries(const __half* from, int rows) {
        const __half* row = from + min(lane % 16, rows - 1) * STRIDE + lane / 16 * 8;
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            load_blocks(q[step], shared_address(row + step * 16));
        }
    }

    // Scores of all heads over the warp's 16 tokens of a tile, and their largest for the others.
    __device__ __forceinline__ void score(float (&s)[2][4], const __half* keys, int tile,
                                          int quarters) {
        if (warp < quarters) {
#pragma unroll
            for (int step = 0; step < D / 16; ++step) {
                if (step * 16 < args.head_dim) {
                    uint32_t b[4];
                    load_keys(b, keys, STRIDE, warp * 16, step * 16, lane);
                    multiply_add(s[0], q[step], b[0], b[1]);
                    multiply_add(s[1], q[step], b[2], b[3]);
                }
            }
        }
        float largest[2] = {minus_infinity(), minus_infinity()};
        const bool is_masked =
            args.window > 0 || (tile + 1) * TILE > queries.first_position + 1;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int token = tile * TILE + warp * 16 + n * 8 + lane % 4 * 2;
            products_to_scores(s[n], args, token, positions, firsts, is_masked);
#pragma unroll
            for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], s[n][i]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            largest[i] = largest_of_row(largest[i]);
            if (lane % 4 == 0) shared.largest[warp][lane / 4 + 8 * i] = largest[i];
        }
    }

    // Weights of all heads and tokens of the tile, by way of shared memory.
    __device__ __forceinline__ void exchange_weights(const float (&s)[2][4], RowState (&part)[2],
                                                     uint32_t (&weights)[4][4], int quarters) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i;
            float largest = shared.largest[0][m];
#pragma unroll
            for (int other = 1; other < ATTEND_WARPS; ++other) {
                largest = fmaxf(largest, shared.largest[other][m]);
            }
            part[i].largest = largest;
            const float base = finite_base(largest);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int token = warp * 16 + n * 8 + lane % 4 * 2;
                const uint32_t pair = weights_of(s[n][2 * i], s[n][2 * i + 1], base);
                __half* to = shared_weights + m * WEIGHT_STRIDE + token;
                *reinterpret_cast<uint32_t*>(to) = pair;
            }
        }
        __syncthreads();
#pragma unroll
        for (int step = 0; step < TILE / 16; ++step) {
            if (step < quarters) {
                load_a(weights[step], shared_weights, WEIGHT_STRIDE, step * 16, lane);
            }
        }
        sum_weights(part, weights, quarters);
    }

    // Folds a tile, whose values follow its keys, into the piece. Calls `when_scored` when the keys
    // are no longer needed.
    template <typename WhenScored>
    __device__ __forceinline__ void attend_tile(const __half* keys, int tile, LaneStates& states,
                                                float (&kept)[PAIRS][2][4],
                                                WhenScored when_scored) {
        const int quarters = (min(TILE, span.end_token - tile * TILE) + 15) / 16;
        float s[2][4] = {};
        score(s, keys, tile, quarters);
        __syncthreads();
        when_scored();
        RowState part[2];
        uint32_t weights[4][4] = {};
        exchange_weights(s, part, weights, quarters);
        FoldFactors factors[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) factors[i] = fold_state(states.rows[i], part[i]);
        const __half* values = keys + TILE * STRIDE;
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            const int dimension = (warp * PAIRS + pair) * 16;
            if (dimension < args.head_dim) {
                fold_values(kept[pair], weights, values, STRIDE, dimension, quarters, factors,
                            lane);
            }
        }
    }

    // Calls `visit` with every two neighbouring dimensions that the lane has of query head 8 i + lane / 4, and with
    // their place in a row of f32.
    template <typename Kept, typename Visit>
    __device__ __forceinline__ void each_pair(Kept& kept, int i, float* row, Visit visit) const {
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int dimension = (warp * PAIRS + pair) * 16 + n * 8 + lane % 4 * 2;
                if (dimension < args.head_dim) {
                    visit(&kept[pair][n][2 * i], reinterpret_cast<float2*>(row + dimension));
                }
            }
        }
    }

    // Writes what the lane has of the result to rows of f32 that start at `to(m)`.
    template <typename Rows>
    __device__ __forceinline__ void write(const float (&kept)[PAIRS][2][4], Rows to) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i;
            if (!queries.has(args, m)) continue;
            each_pair(kept, i, to(m), [](const float* two, float2* place) {
                *place = make_float2(two[0], two[1]);
            });
        }
    }

    // Folds a piece into the pieces before it, which lie where f32 results go, and keeps the whole.
    __device__ __forceinline__ void fold_piece(LaneStates& states, float (&kept)[PAIRS][2][4],
                                               bool is_first) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i;
            RowState whole = is_first ? nothing_seen() : shared.wholes[warp][m];
            const FoldFactors factors = fold_state(whole, states.rows[i]);
            states.rows[i] = whole;
            // All lanes of a row write the same, after they all have read.
            __syncwarp();
            shared.wholes[warp][m] = whole;
            if (!queries.has(args, m)) continue;
            float* row = args.out + queries.query(args, m) * args.head_dim;
            each_pair(kept, i, row, [&](float* two, float2* place) {
                fold_in_place(two, place, factors, is_first);
            });
        }
    }

    // Puts the whole into shared memory, where tiles were, all of which have been used.
    __device__ __forceinline__ void put_whole(float* results, const LaneStates& states,
                                                const float (&kept)[PAIRS][2][4]) {
        write(kept, [&](int m) { return results + m * RESULT_STRIDE<D>; });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i;
            if (warp == 0 && lane % 4 == 0) shared.sums[m] = states.rows[i].sum;
        }
    }

    // Writes a piece's part for the block that folds all.
    __device__ __forceinline__ void write_piece(int piece, const LaneStates& states,
                                                const float (&kept)[PAIRS][2][4]) const {
        write(kept, [&](int m) {
            return args.partial_out + partial_index(args, queries, m, piece) * D;
        });
        if (warp != 0 || lane % 4 != 0) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i;
            if (!queries.has(args, m)) continue;
            float* state = args.partial_state + partial_index(args, queries, m, piece) * 2;
            *reinterpret_cast<float2*>(state) =
                make_float2(states.rows[i].largest, states.rows[i].sum);
        }
    }
};

// Query heads of rows that `oxl_cache_...` has prepared, as fp16 [HEADS_OF_WARP, STRIDE].
template <int D>
__device__ __forceinline__ void copy_queries(const AttendArgs& args, const Queries& queries,
                                             __half* q) {
    constexpr int UNITS = D / 8;
#pragma unroll 1
    for (int index = threadIdx.x; index < HEADS_OF_WARP * UNITS; index += ATTEND_THREADS) {
        const int m = index / UNITS;
        const int unit = index % UNITS;
        uint4 eight = {0, 0, 0, 0};
        if (queries.has(args, m)) {
            const __half* row = args.queries + queries.query(args, m) * D;
            eight = __ldcg(reinterpret_cast<const uint4*>(row) + unit);
        }
        *reinterpret_cast<uint4*>(q + m * (D + PADDING) + unit * 8) = eight;
    }
}

// Brings the tile's query heads to `q`, prepared, and where `has_own` says so, the row's own key and
// value to shared memory and their page. Where the step's heads were, `places` of all threads wait for the end.
template <int D, bool IS_DIRECT>
__device__ __forceinline__ void prepare_queries(const AttendSplitArgs& all,
                                                const Queries& queries, bool has_own,
                                                SplitShared<D>& shared, __half* q,
                                                const uint4& places) {
    if (all.heads.is_fresh != 0) {
        float* staging = reinterpret_cast<float*>(staging_of(all));
        RowHeads<D, IS_DIRECT> heads(all, queries, has_own);
        dependency_wait();
        heads.load(staging);
        __syncthreads();
        heads.prepare(staging, q, shared.fresh);
    } else {
        copy_queries<D>(all.attend, queries, q);
    }
    __syncthreads();
    if (has_places<D>(all, queries)) {
        reinterpret_cast<uint4*>(staging_of(all))[threadIdx.x] = places;
    }
}

// Whether this block is the last of those that share a tile of rows to come here: it sees what all
// have written.
__device__ __forceinline__ bool is_last_sharer(const AttendArgs& args, int sharers,
                                               int& is_last) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        int32_t* counter = args.counters + blockIdx.x * gridDim.y + blockIdx.y;
        is_last = atomicAdd(counter, 1) == sharers - 1;
        if (is_last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return is_last != 0;
}

// Grid: (tiles, kv_heads * head_tiles, blocks that share a tile's pieces).
template <int D, bool IS_DIRECT>
__device__ __forceinline__ void attend_split(const AttendSplitArgs& all) {
    DYNAMIC_SHARED(uint8_t, dynamic_shared, 128);
    using Block = SplitBlock<D>;
    touch_arguments(all);
    dependency_trigger();
    const AttendArgs& args = all.attend;
    SplitShared<D>& shared = *reinterpret_cast<SplitShared<D>*>(dynamic_shared);
    __half* q = reinterpret_cast<__half*>(dynamic_shared + sizeof(SplitShared<D>));
    const Queries queries(args, blockIdx.x, blockIdx.y);
    // Launches of few rows have a block for every row, and may have fewer tiles.
    if (queries.rows == 0) return;
    const Span span(args, queries);
    const Share share(span, all.tiles_alone);
    if (int(blockIdx.z) >= share.sharers) return;
    const bool is_alone = share.sharers == 1;
    const bool is_fresh = all.heads.is_fresh != 0;
    const bool has_own =
        is_fresh && (share.pieces - 1 - int(blockIdx.z)) % share.sharers == 0;

    // What no kernel of the step writes.
    uint4 places = {};
    if (all.ordered_out != nullptr) places = Piece<D>(threadIdx.x).places(all, queries);
    if (!is_fresh) dependency_wait();
    const int first_piece = span.first_piece + blockIdx.z;
    TileRing<D, IS_DIRECT> ring(args, queries, span,
                                is_fresh ? queries.first_position : span.end_token,
                                dynamic_shared + all.tiles_at, first_piece, share.sharers);
    Block block(args, queries, span, shared, q);
    LaneStates states = {{nothing_seen(), nothing_seen()}};
    float kept[Block::PAIRS][2][4] = {};
    int piece = first_piece;
    int tile = span.first_tile_of(piece);
    // The first turns only start copies, and all of them one that is needed later.
#pragma unroll 1
    for (int turn = 1 - args.slots; piece <= span.last_piece; ++turn) {
        if (turn <= 0) ring.fill_keys();
        if (turn <= 0 || IS_DIRECT) ring.fill_values();
        if (turn < 0) continue;
        if (turn == 0) {
            prepare_queries<D, IS_DIRECT>(all, queries, has_own, shared, q, places);
            block.take_queries(q, is_fresh ? queries.heads : HEADS_OF_WARP);
        }
        const __half* keys = ring.next(tile, [&](__half* rows) {
            constexpr int UNITS = D / 8;
            if (!is_fresh || tile != span.last_tile || threadIdx.x >= 2 * UNITS) return;
            const int which = threadIdx.x / UNITS;
            const int unit = threadIdx.x % UNITS;
            const int row = which * TILE + queries.first_position % TILE;
            *reinterpret_cast<uint4*>(rows + row * Block::STRIDE + unit * 8) =
                *reinterpret_cast<const uint4*>(shared.fresh[which] + unit * 8);
        });
        block.attend_tile(keys, tile, states, kept, [&] {
            if (IS_DIRECT) ring.fill_keys();
        });
        // What the tile and its weights lay in is used again.
        __syncthreads();
        if (++tile <= span.last_tile_of(piece)) continue;
        const int written = piece - span.first_piece;
        piece += share.sharers;
        tile = span.first_tile_of(piece);
        if (is_alone) {
            // Where a piece is one tile, tiles have been folded as pieces are.
            if (span.piece_tiles == 1) continue;
            block.fold_piece(states, kept, written == 0);
            if (piece > span.last_piece) continue;
        } else {
            block.write_piece(written, states, kept);
        }
        states = {{nothing_seen(), nothing_seen()}};
#pragma unroll
        for (int i = 0; i < Block::PAIRS * 8; ++i) kept[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }

    uint8_t* memory = dynamic_shared + all.tiles_at;
    if (is_alone) {
        block.put_whole(reinterpret_cast<float*>(memory), states, kept);
        write_whole<D, IS_DIRECT>(all, queries, memory, shared.sums);
        return;
    }
    if (!is_last_sharer(args, share.sharers, shared.is_last)) return;
    write_folded<D, IS_DIRECT>(all, queries, share.pieces, memory, ring.bytes(), shared.sums);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_split_64(const __grid_constant__ AttendSplitArgs args) {
    attend_split<64, false>(args);
}

extern "C" __global__ void __launch_bounds__(128, 3)
oxl_attend_split_128(const __grid_constant__ AttendSplitArgs args) {
    attend_split<128, false>(args);
}

extern "C" __global__ void __launch_bounds__(128, 2)
oxl_attend_split_256(const __grid_constant__ AttendSplitArgs args) {
    attend_split<256, false>(args);
}

// Registers for a block of 128 threads beside a product's CTA (linear.cu), so that pages are on their way while
// queries, keys and values are still being multiplied.
extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_direct_64(const __grid_constant__ AttendSplitArgs args) {
    attend_split<64, true>(args);
}

extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_direct_128(const __grid_constant__ AttendSplitArgs args) {
    attend_split<128, true>(args);
}

extern "C" __global__ void __launch_bounds__(128, 2)
oxl_attend_direct_256(const __grid_constant__ AttendSplitArgs args) {
    attend_split<256, true>(args);
}
