// Attention of few rows of a sequence over the paged cache (attention.cuh defines a row's result).
//
// Floor: the bytes of keys and values that the rows see, read once, for all query heads of a kv
// head together. A sequence is split among blocks; the last one to finish folds the pieces. The
// grid does not depend on lengths, which are read on the device: a captured launch serves any
// positions.
#include "attention.cuh"

namespace {

using namespace oxl;

// Row length of a tile's weights in shared memory.
constexpr int WEIGHT_STRIDE = TILE + PADDING;

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
