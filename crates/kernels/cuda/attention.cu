// Attention of a step's rows over the paged cache (attention.cuh defines what a row's result is).
//
// `oxl_attend_split_*`: few rows of a sequence. Floor: the bytes of keys and values that the rows
// see, read once, for all query heads of a kv head together. A sequence is split among blocks;
// the last one to finish folds the pieces. The grid does not depend on lengths, which are read on
// the device: a captured launch serves any positions.
//
// `oxl_attend_walk_*`: many rows of a sequence. Floor: 4 * head_dim operations for each row,
// query head and visible token, on tensor cores. A block takes 64 query heads of rows, a warp 16
// of them, and walks through the tokens.
//
// Against exact arithmetic on what the cache holds: queries, weights and decoded values are
// rounded to fp16 (2^-11 of each), sums are f32. The error of the result is below 2e-3 of its
// largest element for scores up to a few units, and grows with the scores (a rounded query
// moves a score by 2^-12 of the sum of its products' magnitudes, about): 1e-2 where scores reach
// 30.
#include "attention.cuh"

namespace {

using namespace oxl;

// Query heads that a warp multiplies at once.
constexpr int HEADS_OF_WARP = 16;
// Query heads of rows that a block takes where it walks through many rows' tokens.
constexpr int HEADS_OF_BLOCK = ATTEND_WARPS * HEADS_OF_WARP;

// Row length of a tile's weights in shared memory.
constexpr int WEIGHT_STRIDE = TILE + PADDING;

// Two fp16 ones.
constexpr uint32_t ONES = 0x3c003c00u;

// The state of the two rows of a lane, g and g + 8.
struct LaneStates {
    RowState rows[2];
};

// Adds the tile's parts of 16 dimensions, sum over tokens of weight * value, to what is kept.
__device__ __forceinline__ void fold_values(float (&kept)[2][4], const uint32_t (&weights)[4][4],
                                            const __half* values, int stride, int dimension,
                                            const FoldFactors (&factors)[2], int lane) {
    float part[2][4] = {};
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) {
        uint32_t b[4];
        load_values(b, values, stride, step * 16, dimension, lane);
        multiply_add(part[0], weights[step], b[0], b[1]);
        multiply_add(part[1], weights[step], b[2], b[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[n][i] = fold(kept[n][i], part[n][i], factors[i / 2]);
    }
}

// The sums of the rows' weights: products with ones, in the order of the values' sums.
__device__ __forceinline__ void sum_weights(RowState (&part)[2],
                                            const uint32_t (&weights)[4][4]) {
    float sums[4] = {};
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) multiply_add(sums, weights[step], ONES, ONES);
    part[0].sum = sums[0];
    part[1].sum = sums[2];
}

// The largest of a row's scores, which the four lanes of a row hold.
__device__ __forceinline__ float largest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Replaces products by scores; of tokens that a row does not see, by minus infinity. `token` is
// the position of the first of the lane's two columns.
__device__ __forceinline__ void products_to_scores(float (&s)[4], const AttendArgs& args, int token,
                                                   const int (&positions)[2],
                                                   const int (&firsts)[2], bool is_masked) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float score = score_of(s[i], args.score_factor, args.cap_factor);
        const int at = token + i % 2;
        const bool is_seen = !is_masked || (at <= positions[i / 2] && at >= firsts[i / 2]);
        s[i] = is_seen ? score : minus_infinity();
    }
}

// Writes a row's result: x holds dimensions lane, lane + 32, ...
template <int D>
__device__ __forceinline__ void write_row(float (&x)[D / GROUP], float sum, float* out,
                                          const AttendArgs& args, int lane) {
    const float inverse = __fdiv_rn(1.0f, sum);
    const bool is_rotated = args.value_format >= FORMAT_Q8;
#pragma unroll
    for (int part = 0; part < D / GROUP; ++part) {
        const int dimension = part * GROUP + lane;
        x[part] = __fmul_rn(x[part], inverse);
        if (is_rotated && part * GROUP < args.head_dim) x[part] = rotate_group(x[part], lane);
        if (dimension < args.head_dim) out[dimension] = x[part];
    }
}

// Shared memory of the kernel that splits, before its ring.
struct SplitShared {
    __half weights[HEADS_OF_WARP * WEIGHT_STRIDE];
    float largest[ATTEND_WARPS][HEADS_OF_WARP];
    float sums[HEADS_OF_WARP];
    int is_last;
    int unused[15];
};
static_assert(sizeof(SplitShared) % 128 == 0, "tiles are aligned");

// One block's share of a tile of rows: its pieces, every `step`-th from `first_piece` on.
template <int D>
struct SplitBlock {
    static constexpr int STRIDE = D + PADDING;
    // Dimensions of the result that a warp has, in pairs of eight.
    static constexpr int PAIRS = D / ATTEND_WARPS / 16;

    const AttendArgs& args;
    const Queries& queries;
    const Span& span;
    SplitShared& shared;
    int warp;
    int lane;
    // Positions of rows g and g + 8, and what they see from.
    int positions[2];
    int firsts[2];
    uint32_t q[D / 16][4];

    __device__ __forceinline__ SplitBlock(const AttendArgs& args, const Queries& queries,
                                          const Span& span, SplitShared& shared)
        : args(args), queries(queries), span(span), shared(shared) {
        warp = threadIdx.x / WARP_LANES;
        lane = threadIdx.x % WARP_LANES;
        const uint32_t* rows[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i;
            const bool is_there = queries.has(args, m);
            const __half* row = args.queries + queries.query(args, m) * D;
            rows[i] = is_there ? reinterpret_cast<const uint32_t*>(row) : nullptr;
            positions[i] = queries.first_position + queries.row(args, m);
            firsts[i] = first_visible(args, positions[i]);
        }
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int pair = step * 8 + i / 2 * 4 + lane % 4;
                q[step][i] = rows[i % 2] != nullptr ? rows[i % 2][pair] : 0u;
            }
        }
    }

    // Scores of all heads over the warp's 16 tokens of a tile, and their largest for the others.
    __device__ __forceinline__ void score(float (&s)[2][4], const __half* keys, int tile) {
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            if (step * 16 < args.head_dim) {
                uint32_t b[4];
                load_keys(b, keys, STRIDE, warp * 16, step * 16, lane);
                multiply_add(s[0], q[step], b[0], b[1]);
                multiply_add(s[1], q[step], b[2], b[3]);
            }
        }
        float largest[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int token = tile * TILE + warp * 16 + n * 8 + lane % 4 * 2;
            products_to_scores(s[n], args, token, positions, firsts, true);
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
                                                     uint32_t (&weights)[4][4]) {
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
                __half* to = shared.weights + m * WEIGHT_STRIDE + token;
                *reinterpret_cast<uint32_t*>(to) = pair;
            }
        }
        __syncthreads();
#pragma unroll
        for (int step = 0; step < TILE / 16; ++step) {
            load_a(weights[step], shared.weights, WEIGHT_STRIDE, step * 16, lane);
        }
        sum_weights(part, weights);
    }

    // Folds a tile into the piece.
    __device__ __forceinline__ void attend_tile(TileRing<D>& ring, int tile, LaneStates& states,
                                                float (&kept)[PAIRS][2][4]) {
        float s[2][4] = {};
        score(s, ring.next(queries, span, ring.keys, tile), tile);
        const __half* values = ring.next(queries, span, ring.values, tile);
        RowState part[2];
        uint32_t weights[4][4];
        exchange_weights(s, part, weights);
        FoldFactors factors[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) factors[i] = fold_state(states.rows[i], part[i]);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            const int dimension = (warp * PAIRS + pair) * 16;
            if (dimension < args.head_dim) {
                fold_values(kept[pair], weights, values, STRIDE, dimension, factors, lane);
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
};

// Where a piece's part of query head m lies: index into [partial_rows, heads, most_pieces].
__device__ __forceinline__ int64_t partial_index(const AttendArgs& args, const Queries& queries,
                                                 int m, int piece) {
    return queries.partial(args, m) * args.most_pieces + piece;
}

// Folds the pieces of all of the tile's query heads and writes their results.
template <int D>
__device__ __forceinline__ void fold_pieces(const AttendArgs& args, const Queries& queries,
                                            int pieces, int warp, int lane) {
    for (int m = warp; m < HEADS_OF_WARP; m += ATTEND_WARPS) {
        if (!queries.has(args, m)) continue;
        const int64_t index = partial_index(args, queries, m, 0);
        const float2* states = reinterpret_cast<const float2*>(args.partial_state) + index;
        const float* parts = args.partial_out + index * D + lane;
        RowState state = nothing_seen();
        float x[D / GROUP] = {};
#pragma unroll 4
        for (int piece = 0; piece < pieces; ++piece) {
            const float2 part = __ldcg(states + piece);
            const FoldFactors factors = fold_state(state, {part.x, part.y});
#pragma unroll
            for (int i = 0; i < D / GROUP; ++i) {
                x[i] = fold(x[i], __ldcg(parts + int64_t(piece) * D + i * GROUP), factors);
            }
        }
        float* out = args.out + queries.query(args, m) * args.head_dim;
        write_row<D>(x, state.sum, out, args, lane);
    }
}

// Grid: (tiles, kv_heads * head_tiles, blocks that share a tile's pieces).
template <int D>
__device__ __forceinline__ void attend_split(const AttendArgs& args) {
    extern __shared__ __align__(128) uint8_t dynamic_shared[];
    SplitShared& shared = *reinterpret_cast<SplitShared*>(dynamic_shared);
    const Queries queries(args, blockIdx.x, blockIdx.y);
    // Launches of few rows have a block for every row, and may have fewer tiles.
    if (queries.rows == 0) return;
    const Span span(args, queries);
    const int pieces = span.last_piece - span.first_piece + 1;
    const int sharers = min(pieces, int(gridDim.z));
    if (int(blockIdx.z) >= sharers) return;
    const bool is_alone = sharers == 1;

    TileRing<D> ring(args, queries, span, dynamic_shared + sizeof(SplitShared),
                     span.first_piece + blockIdx.z, sharers);
    ring.start(queries, span);
    SplitBlock<D> block(args, queries, span, shared);
    LaneStates whole = {{nothing_seen(), nothing_seen()}};
    float result[SplitBlock<D>::PAIRS][2][4] = {};
    for (int piece = span.first_piece + blockIdx.z; piece <= span.last_piece; piece += sharers) {
        LaneStates states = {{nothing_seen(), nothing_seen()}};
        float kept[SplitBlock<D>::PAIRS][2][4] = {};
        const int last_tile = span.last_tile_of(piece);
        for (int tile = span.first_tile_of(piece); tile <= last_tile; ++tile) {
            block.attend_tile(ring, tile, states, kept);
        }
        if (is_alone) {
            FoldFactors factors[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) factors[i] = fold_state(whole.rows[i], states.rows[i]);
#pragma unroll
            for (int i = 0; i < SplitBlock<D>::PAIRS * 8; ++i) {
                float& x = result[i / 8][i / 4 % 2][i % 4];
                x = fold(x, kept[i / 8][i / 4 % 2][i % 4], factors[i % 4 / 2]);
            }
            continue;
        }
        const int index = piece - span.first_piece;
        block.write(kept, [&](int m) {
            return args.partial_out + partial_index(args, queries, m, index) * D;
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = block.lane / 4 + 8 * i;
            if (block.warp == 0 && block.lane % 4 == 0 && queries.has(args, m)) {
                float* state = args.partial_state + partial_index(args, queries, m, index) * 2;
                *reinterpret_cast<float2*>(state) =
                    make_float2(states.rows[i].largest, states.rows[i].sum);
            }
        }
    }

    if (is_alone) {
        // The result's own place carries it from the lanes that have it to those that finish it.
        block.write(result, [&](int m) {
            return args.out + queries.query(args, m) * args.head_dim;
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = block.lane / 4 + 8 * i;
            if (block.warp == 0 && block.lane % 4 == 0) shared.sums[m] = whole.rows[i].sum;
        }
        __syncthreads();
        for (int m = block.warp; m < HEADS_OF_WARP; m += ATTEND_WARPS) {
            if (!queries.has(args, m)) continue;
            float* out = args.out + queries.query(args, m) * args.head_dim;
            float x[D / GROUP];
#pragma unroll
            for (int i = 0; i < D / GROUP; ++i) {
                const int dimension = i * GROUP + block.lane;
                x[i] = dimension < args.head_dim ? out[dimension] : 0.0f;
            }
            write_row<D>(x, shared.sums[m], out, args, block.lane);
        }
        return;
    }
    // The last block to come here sees what all have written.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t* counter = args.counters + blockIdx.x * gridDim.y + blockIdx.y;
        shared.is_last = atomicAdd(counter, 1) == sharers - 1;
        if (shared.is_last) *counter = 0;
    }
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    fold_pieces<D>(args, queries, pieces, block.warp, block.lane);
}

// Rotates groups of 32 dimensions back, where lane (g, t) holds dimensions 8 n + 2 t and + 1 of
// row g as x[n][0..2], of row g + 8 as x[n][2..4]: in the order of `rotate_group`.
__device__ __forceinline__ void rotate_fragment(float (&x)[4][4], int lane) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const float first = x[n][i];
            const float second = x[n][i + 1];
            x[n][i] = __fadd_rn(first, second);
            x[n][i + 1] = __fsub_rn(first, second);
        }
    }
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float& mine = x[i / 4][i % 4];
            const float other = __shfl_xor_sync(0xffffffffu, mine, distance);
            mine = (lane & distance) == 0 ? __fadd_rn(mine, other) : __fsub_rn(other, mine);
        }
    }
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if ((n & distance) != 0) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float first = x[n][i];
                const float second = x[n + distance][i];
                x[n][i] = __fadd_rn(first, second);
                x[n + distance][i] = __fsub_rn(first, second);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i / 4][i % 4] = __fmul_rn(x[i / 4][i % 4], 0.17677669f);
}

// Shared bytes of the queries of a block that walks.
template <int D>
constexpr int QUERY_BYTES = HEADS_OF_BLOCK * (D + PADDING) * 2;

// One warp's 16 query heads in a block that walks.
template <int D>
struct BlockWarp {
    static constexpr int STRIDE = D + PADDING;

    const AttendArgs& args;
    const Queries& queries;
    const __half* q;
    int lane;
    int first_m;
    int positions[2];
    int firsts[2];
    // f32 rows of the result, or null where there is none.
    float* out[2];
    float kept[D / 16][2][4];

    __device__ __forceinline__ BlockWarp(const AttendArgs& args, const Queries& queries,
                                         const __half* q, int warp, int lane)
        : args(args), queries(queries), lane(lane), kept() {
        first_m = warp * HEADS_OF_WARP;
        this->q = q + first_m * STRIDE;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = first_m + lane / 4 + 8 * i;
            positions[i] = queries.first_position + queries.row(args, m);
            firsts[i] = first_visible(args, positions[i]);
            out[i] = queries.has(args, m) ? args.out + queries.query(args, m) * args.head_dim
                                          : nullptr;
        }
    }

    // Scores of the warp's heads over a tile, and the largest of each.
    __device__ __forceinline__ void score(float (&s)[TILE / 8][4], RowState (&part)[2],
                                          const __half* keys, int tile, bool is_masked) const {
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            if (step * 16 >= args.head_dim) break;
            uint32_t a[4];
            load_a(a, q, STRIDE, step * 16, lane);
#pragma unroll
            for (int pair = 0; pair < TILE / 16; ++pair) {
                uint32_t b[4];
                load_keys(b, keys, STRIDE, pair * 16, step * 16, lane);
                multiply_add(s[2 * pair], a, b[0], b[1]);
                multiply_add(s[2 * pair + 1], a, b[2], b[3]);
            }
        }
        float largest[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
            const int token = tile * TILE + n * 8 + lane % 4 * 2;
            products_to_scores(s[n], args, token, positions, firsts, is_masked);
#pragma unroll
            for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], s[n][i]);
        }
        part[0].largest = largest_of_row(largest[0]);
        part[1].largest = largest_of_row(largest[1]);
    }

    // Weights as the a operand: what the lane has of the scores is what it needs of them.
    __device__ __forceinline__ void weigh(const float (&s)[TILE / 8][4], RowState (&part)[2],
                                          uint32_t (&weights)[4][4]) const {
        const float bases[2] = {finite_base(part[0].largest), finite_base(part[1].largest)};
#pragma unroll
        for (int step = 0; step < TILE / 16; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&two)[4] = s[2 * step + i / 2];
                const int row = i % 2;
                weights[step][i] = weights_of(two[2 * row], two[2 * row + 1], bases[row]);
            }
        }
        sum_weights(part, weights);
    }

    __device__ __forceinline__ void attend_values(const uint32_t (&weights)[4][4],
                                                  const RowState (&part)[2], LaneStates& states,
                                                  const __half* values) {
        FoldFactors factors[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) factors[i] = fold_state(states.rows[i], part[i]);
#pragma unroll
        for (int pair = 0; pair < D / 16; ++pair) {
            if (pair * 16 >= args.head_dim) break;
            fold_values(kept[pair], weights, values, STRIDE, pair * 16, factors, lane);
        }
    }

    // Calls `visit` with the place of every two neighbouring dimensions in the result.
    template <typename Visit>
    __device__ __forceinline__ void each_pair(Visit visit) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (out[i] == nullptr) continue;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const int dimension = n * 8 + lane % 4 * 2;
                if (dimension < args.head_dim) {
                    float* two = &kept[n / 2][n % 2][2 * i];
                    visit(i, two, reinterpret_cast<float2*>(out[i] + dimension));
                }
            }
        }
    }

    // Folds the piece into the pieces before it, which lie where the result will.
    __device__ __forceinline__ void fold_piece(LaneStates& whole, const LaneStates& states,
                                               bool is_first) {
        FoldFactors factors[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) factors[i] = fold_state(whole.rows[i], states.rows[i]);
        each_pair([&](int i, float* two, float2* place) {
            const float2 before = is_first ? make_float2(0.0f, 0.0f) : *place;
            two[0] = fold(before.x, two[0], factors[i]);
            two[1] = fold(before.y, two[1], factors[i]);
            *place = make_float2(two[0], two[1]);
        });
    }

    // Divides by the sums of weights, rotates back and writes.
    __device__ __forceinline__ void finish(const LaneStates& whole) {
        const float inverses[2] = {__fdiv_rn(1.0f, whole.rows[0].sum),
                                   __fdiv_rn(1.0f, whole.rows[1].sum)};
        const bool is_rotated = args.value_format >= FORMAT_Q8;
#pragma unroll
        for (int group = 0; group < D / GROUP; ++group) {
            float x[4][4];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float value = kept[2 * group + i / 8][i / 4 % 2][i % 4];
                x[i / 4][i % 4] = __fmul_rn(value, inverses[i % 4 / 2]);
            }
            if (is_rotated) rotate_fragment(x, lane);
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                kept[2 * group + i / 8][i / 4 % 2][i % 4] = x[i / 4][i % 4];
            }
        }
        each_pair([&](int, float* two, float2* place) { *place = make_float2(two[0], two[1]); });
    }
};

// Grid: (tiles, kv_heads * head_tiles).
template <int D>
__device__ __forceinline__ void attend_walk(const AttendArgs& args) {
    extern __shared__ __align__(128) uint8_t dynamic_shared[];
    constexpr int STRIDE = D + PADDING;
    // Later rows see more: their blocks start first.
    const Queries queries(args, gridDim.x - 1 - blockIdx.x, blockIdx.y);
    const Span span(args, queries);
    TileRing<D> ring(args, queries, span, dynamic_shared + QUERY_BYTES<D>, span.first_piece, 1);
    ring.start(queries, span);
    __half* q = reinterpret_cast<__half*>(dynamic_shared);
    for (int index = threadIdx.x; index < HEADS_OF_BLOCK * (D / 8); index += ATTEND_THREADS) {
        const int m = index / (D / 8);
        const int unit = index % (D / 8);
        uint4 elements = {0, 0, 0, 0};
        if (queries.has(args, m)) {
            const __half* row = args.queries + queries.query(args, m) * D;
            elements = reinterpret_cast<const uint4*>(row)[unit];
        }
        *reinterpret_cast<uint4*>(q + m * STRIDE + unit * 8) = elements;
    }
    BlockWarp<D> warp(args, queries, q, threadIdx.x / WARP_LANES, threadIdx.x % WARP_LANES);

    // Where a piece is one tile, tiles are folded into the result; elsewhere into a piece, which
    // is folded into the result then.
    const bool has_pieces = span.piece_tiles > 1;
    // Tokens that every row sees.
    const int common_first = first_visible(args, span.end_token - 1);
    const int common_end = queries.first_position + 1;
    LaneStates whole = {{nothing_seen(), nothing_seen()}};
    LaneStates states = {{nothing_seen(), nothing_seen()}};
    for (int piece = span.first_piece; piece <= span.last_piece; ++piece) {
        const int last_tile = span.last_tile_of(piece);
        for (int tile = span.first_tile_of(piece); tile <= last_tile; ++tile) {
            const bool is_masked =
                tile * TILE < common_first || tile * TILE + TILE > common_end;
            RowState part[2];
            uint32_t weights[4][4];
            {
                float s[TILE / 8][4] = {};
                warp.score(s, part, ring.next(queries, span, ring.keys, tile), tile, is_masked);
                warp.weigh(s, part, weights);
            }
            const __half* values = ring.next(queries, span, ring.values, tile);
            warp.attend_values(weights, part, states, values);
        }
        if (has_pieces) {
            warp.fold_piece(whole, states, piece == span.first_piece);
            if (piece < span.last_piece) {
                states = {{nothing_seen(), nothing_seen()}};
#pragma unroll
                for (int i = 0; i < D / 2; ++i) warp.kept[i / 8][i / 4 % 2][i % 4] = 0.0f;
            }
        }
    }
    if (!has_pieces) whole = states;
    warp.finish(whole);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_split_64(const __grid_constant__ AttendArgs args) {
    attend_split<64>(args);
}

extern "C" __global__ void __launch_bounds__(128, 3)
oxl_attend_split_128(const __grid_constant__ AttendArgs args) {
    attend_split<128>(args);
}

extern "C" __global__ void __launch_bounds__(128, 2)
oxl_attend_split_256(const __grid_constant__ AttendArgs args) {
    attend_split<256>(args);
}

extern "C" __global__ void __launch_bounds__(128, 3)
oxl_attend_walk_64(const __grid_constant__ AttendArgs args) {
    attend_walk<64>(args);
}

extern "C" __global__ void __launch_bounds__(128, 2)
oxl_attend_walk_128(const __grid_constant__ AttendArgs args) {
    attend_walk<128>(args);
}

extern "C" __global__ void __launch_bounds__(128, 1)
oxl_attend_walk_256(const __grid_constant__ AttendArgs args) {
    attend_walk<256>(args);
}
