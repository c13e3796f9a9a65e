// Attention of few rows of a sequence over the paged cache (attention.cuh defines a row's result).
//
// Floor: the bytes of keys and values that the rows see, read once, for all query heads of a kv
// head together. A sequence of more than a few tiles is split among blocks; the last one to finish
// folds the pieces. The grid does not depend on lengths, which are read on the device: a captured
// launch serves any positions.
//
// Where every sequence has one row in the step, the kernel also does what `oxl_cache` does
// elsewhere: each block norms and rotates its query heads; the one that has the row's own token among
// its pieces norms, rotates and stores its key and value, and attends to them as they will be read
// back. All else that a block reads is older than the step and on its way before the wait.
#include "split.cuh"

namespace {

using namespace oxl;

// Row length of a tile's weights in shared memory.
constexpr int WEIGHT_STRIDE = TILE + PADDING;
// Row length of results in shared memory, where a tile was.
template <int D>
constexpr int RESULT_STRIDE = D + PADDING;

// What a block's shared memory begins with. The queries, fp16 [HEADS_OF_WARP, D + PADDING] or as
// many rows as there are, come next; when they are in registers, the weights of a tile, fp16
// [HEADS_OF_WARP, WEIGHT_STRIDE], take their place. Then the step's heads as they come, f32
// [heads, head_dim], and the tiles.
template <int D>
struct SplitShared {
    float largest[ATTEND_WARPS][HEADS_OF_WARP];
    float sums[HEADS_OF_WARP];
    int is_last;
    int unused[15];
    // The row's own key and value as they will be decoded.
    __half fresh[2][D];
};
static_assert(sizeof(SplitShared<64>) % 128 == 0, "tiles are aligned");

// The four elements that the lane has of a group of 32, rotated as `rotate_group` does: lane i has
// 4 (i % 8) + 0..4.
__device__ __forceinline__ void rotate_four(float (&x)[4], int lane) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if ((i & distance) != 0) continue;
            const float first = x[i];
            const float second = x[i + distance];
            x[i] = __fadd_rn(first, second);
            x[i + distance] = __fsub_rn(first, second);
        }
    }
#pragma unroll
    for (int distance = 1; distance <= 4; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float other = __shfl_xor_sync(0xffffffffu, x[i], distance);
            x[i] = (lane & distance) == 0 ? __fadd_rn(x[i], other) : __fsub_rn(other, x[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __fmul_rn(x[i], 0.17677669f);
}

// Where a piece's part of query head m lies: index into [partial_rows, heads, most_pieces].
__device__ __forceinline__ int64_t partial_index(const AttendArgs& args, const Queries& queries,
                                                 int m, int piece) {
    return queries.partial(args, m) * args.most_pieces + piece;
}

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
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int token = tile * TILE + warp * 16 + n * 8 + lane % 4 * 2;
            products_to_scores(s[n], args, token, positions, firsts);
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

    // Writes what the lane has of the result to rows of f32 that start at `to(m)`.
    template <typename Rows>
    __device__ __forceinline__ void write(const float (&kept)[PAIRS][2][4], Rows to) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i;
            if (!queries.has(args, m)) continue;
            float* row = to(m);
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int dimension = (warp * PAIRS + pair) * 16 + n * 8 + lane % 4 * 2;
                    if (dimension < args.head_dim) {
                        *reinterpret_cast<float2*>(row + dimension) =
                            make_float2(kept[pair][n][2 * i], kept[pair][n][2 * i + 1]);
                    }
                }
            }
        }
    }

    // Folds a piece into the whole.
    static __device__ __forceinline__ void fold_piece(LaneStates& whole,
                                                      float (&result)[PAIRS][2][4],
                                                      const LaneStates& states,
                                                      const float (&kept)[PAIRS][2][4]) {
        FoldFactors factors[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) factors[i] = fold_state(whole.rows[i], states.rows[i]);
#pragma unroll
        for (int i = 0; i < PAIRS * 8; ++i) {
            float& x = result[i / 8][i / 4 % 2][i % 4];
            x = fold(x, kept[i / 8][i / 4 % 2][i % 4], factors[i % 4 / 2]);
        }
    }

    // Writes the whole to shared memory, where tiles were, all of which have been used.
    __device__ __forceinline__ void write_whole(float* results, const LaneStates& whole,
                                                const float (&result)[PAIRS][2][4]) {
        write(result, [&](int m) { return results + m * RESULT_STRIDE<D>; });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i;
            if (warp == 0 && lane % 4 == 0) shared.sums[m] = whole.rows[i].sum;
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

// Four dimensions of query head m, from `quad` on, folded from all pieces; returns the sum of
// weights.
template <int D>
__device__ __forceinline__ float fold_pieces(float (&x)[4], const AttendArgs& args,
                                             const Queries& queries, int pieces, int m,
                                             int quad) {
    // Pieces whose parts are on their way together.
    constexpr int AHEAD = 16;
    const int64_t index = partial_index(args, queries, m, 0);
    const float2* states = reinterpret_cast<const float2*>(args.partial_state) + index;
    const float4* parts = reinterpret_cast<const float4*>(args.partial_out + index * D + quad);
    RowState state = nothing_seen();
#pragma unroll 1
    for (int first = 0; first < pieces; first += AHEAD) {
        float2 part_states[AHEAD];
        float4 loaded[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int piece = min(first + i, pieces - 1);
            part_states[i] = __ldcg(states + piece);
            loaded[i] = __ldcg(parts + piece * (D / 4));
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (first + i >= pieces) break;
            const FoldFactors factors =
                fold_state(state, {part_states[i].x, part_states[i].y});
            x[0] = fold(x[0], loaded[i].x, factors);
            x[1] = fold(x[1], loaded[i].y, factors);
            x[2] = fold(x[2], loaded[i].z, factors);
            x[3] = fold(x[3], loaded[i].w, factors);
        }
    }
    return state.sum;
}

// Four dimensions of a query head's result, which a thread stores.
template <int D>
struct Piece {
    static constexpr int QUADS = D / 4;
    int m;
    int quad;

    __device__ __forceinline__ explicit Piece(int index)
        : m(index / QUADS), quad(index % QUADS * 4) {}

    // Where they go in the linear's order.
    __device__ __forceinline__ uint4 places(const AttendSplitArgs& all,
                                            const Queries& queries) const {
        const AttendArgs& args = all.attend;
        const int head = queries.first_head + queries.head(args, m);
        const uint32_t first = head * args.head_dim + quad;
        if (all.out_places == nullptr) return {first, first + 1, first + 2, first + 3};
        const bool is_there = queries.has(args, m) && quad < args.head_dim;
        return __ldg(reinterpret_cast<const uint4*>(all.out_places + (is_there ? first : 0)));
    }

    // Stores them there.
    __device__ __forceinline__ void store(const AttendSplitArgs& all, const Queries& queries,
                                          const float (&x)[4], const uint4& places) const {
        const AttendArgs& args = all.attend;
        if (quad >= args.head_dim) return;
        const int64_t row = queries.first_row + queries.row(args, m);
        __half* out = all.ordered_out + row * args.heads * args.head_dim;
        const __half2 low = clamped_half2(x[0], x[1]);
        const __half2 high = clamped_half2(x[2], x[3]);
        out[places.x] = __low2half(low);
        out[places.y] = __high2half(low);
        out[places.z] = __low2half(high);
        out[places.w] = __high2half(high);
    }
};

// Writes the results of all of the tile's query heads, four dimensions a lane: from f32
// [HEADS_OF_WARP, RESULT_STRIDE] and `sums`, or, where `results` is null, from all pieces' parts. `places` are
// those of the thread's first piece, if results are stored in a linear's order.
template <int D, bool IS_DIRECT>
__device__ __forceinline__ void write_results(const AttendSplitArgs& all, const Queries& queries,
                                              const float* results, const float* sums,
                                              int pieces, uint4 places) {
    const AttendArgs& args = all.attend;
    constexpr int QUADS = Piece<D>::QUADS;
    const int lane = threadIdx.x % WARP_LANES;
    const int items = queries.rows * args.heads_per_tile * QUADS;
#pragma unroll 1
    for (int first = threadIdx.x - lane; first < items; first += ATTEND_THREADS) {
        const Piece<D> own(first + lane);
        const int m = own.m;
        const int quad = own.quad;
        const bool is_there = queries.has(args, m);
        float x[4] = {};
        float sum = 1.0f;
        if (is_there && results != nullptr) {
            const float4 four =
                *reinterpret_cast<const float4*>(results + m * RESULT_STRIDE<D> + quad);
            x[0] = four.x;
            x[1] = four.y;
            x[2] = four.z;
            x[3] = four.w;
            sum = sums[m];
        } else if (is_there) {
            sum = fold_pieces<D>(x, args, queries, pieces, m, quad);
        }
        const float inverse = __fdiv_rn(1.0f, sum);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = __fmul_rn(x[i], inverse);
        if (layout_of<IS_DIRECT>(args, true).is_quantised()) rotate_four(x, lane);
        if (!is_there) continue;
        if (all.ordered_out != nullptr) {
            if (first >= ATTEND_THREADS) places = own.places(all, queries);
            own.store(all, queries, x, places);
            continue;
        }
        float* out = args.out + queries.query(args, m) * args.head_dim + quad;
        if (quad < args.head_dim) *reinterpret_cast<float2*>(out) = make_float2(x[0], x[1]);
        if (quad + 2 < args.head_dim) {
            *reinterpret_cast<float2*>(out + 2) = make_float2(x[2], x[3]);
        }
    }
}

// Query heads of rows that `oxl_cache` has prepared, as fp16 [HEADS_OF_WARP, STRIDE].
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
// value to shared memory and their page.
template <int D, bool IS_DIRECT>
__device__ __forceinline__ void prepare_queries(const AttendSplitArgs& all,
                                                const Queries& queries, bool has_own,
                                                SplitShared<D>& shared, __half* q) {
    if (all.heads.is_fresh != 0) {
        extern __shared__ __align__(128) uint8_t dynamic_shared[];
        float* staging = reinterpret_cast<float*>(dynamic_shared + all.staging_at);
        RowHeads<D, IS_DIRECT> heads(all, queries, has_own);
        dependency_wait();
        heads.load(staging);
        __syncthreads();
        heads.prepare(staging, q, shared.fresh);
    } else {
        copy_queries<D>(all.attend, queries, q);
    }
    __syncthreads();
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
    extern __shared__ __align__(128) uint8_t dynamic_shared[];
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
    LaneStates whole = {{nothing_seen(), nothing_seen()}};
    float result[Block::PAIRS][2][4] = {};
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
            prepare_queries<D, IS_DIRECT>(all, queries, has_own, shared, q);
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
        if (is_alone) {
            Block::fold_piece(whole, result, states, kept);
        } else {
            block.write_piece(piece - span.first_piece, states, kept);
        }
        piece += share.sharers;
        tile = span.first_tile_of(piece);
        states = {{nothing_seen(), nothing_seen()}};
#pragma unroll
        for (int i = 0; i < Block::PAIRS * 8; ++i) kept[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }

    float* results = nullptr;
    if (is_alone) {
        results = reinterpret_cast<float*>(dynamic_shared + all.tiles_at);
        block.write_whole(results, whole, result);
        __syncthreads();
    } else if (!is_last_sharer(args, share.sharers, shared.is_last)) {
        return;
    }
    write_results<D, IS_DIRECT>(all, queries, results, shared.sums, share.pieces, places);
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

extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_direct_64(const __grid_constant__ AttendSplitArgs args) {
    attend_split<64, true>(args);
}

extern "C" __global__ void __launch_bounds__(128, 3)
oxl_attend_direct_128(const __grid_constant__ AttendSplitArgs args) {
    attend_split<128, true>(args);
}

extern "C" __global__ void __launch_bounds__(128, 2)
oxl_attend_direct_256(const __grid_constant__ AttendSplitArgs args) {
    attend_split<256, true>(args);
}
