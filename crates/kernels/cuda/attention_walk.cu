// Attention of many rows of a sequence over the paged cache (attention.cuh defines a row's result).
//
// Floor: 4 * head_dim operations for each row, query head and visible token, on tensor cores. A
// block takes 64 query heads of rows, a warp 16 of them, and walks through the tokens.
#include "attention.cuh"

namespace {

using namespace oxl;

// Query heads of rows that a block takes where it walks through many rows' tokens.
constexpr int HEADS_OF_BLOCK = ATTEND_WARPS * HEADS_OF_WARP;

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
