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
//
// Quantised tiles stay codes in shared memory, which lanes make operands of (codes.cuh).
#include "split_rows.cuh"

namespace {

using namespace oxl;

// Row length of a tile's weights in shared memory.
constexpr int WEIGHT_STRIDE = TILE + PADDING;
// What a block's shared memory begins with. The queries, fp16 [HEADS_OF_WARP, D + PADDING] or as
// many rows as there are, come next, then the weights of a tile, fp16 [HEADS_OF_WARP, WEIGHT_STRIDE],
// which take the place of queries that registers hold: of fp16's. Then the step's heads as they come, f32
// [heads, head_dim], and the tiles.
template <int D, bool IS_CODES>
struct SplitShared {
    float largest[ATTEND_WARPS][HEADS_OF_WARP];
    float sums[HEADS_OF_WARP];
    // Of a block that is alone: states over the pieces before, which all warps compute alike.
    RowState wholes[ATTEND_WARPS][HEADS_OF_WARP];
    int is_last;
    int unused[15];
    // The row's own key and value.
    FreshRow<D, IS_CODES> fresh[2];
};
static_assert(sizeof(SplitShared<64, false>) % 128 == 0, "tiles are aligned");
static_assert(sizeof(SplitShared<64, true>) == sizeof(SplitShared<64, false>), "one for the host");

// One block's share of a tile of rows: its pieces, every `step`-th from `first_piece` on.
template <int D, bool IS_CODES>
struct SplitBlock {
    static constexpr int STRIDE = D + PADDING;
    // Dimensions of the result that a warp has, in pairs of eight.
    static constexpr int PAIRS = D / ATTEND_WARPS / 16;
    // Of codes, neighbouring dimensions that are one column of as many products.
    static constexpr int COLUMN = 2 * PAIRS;

    const AttendArgs& args;
    const Queries& queries;
    const Span& span;
    SplitShared<D, IS_CODES>& shared;
    __half* shared_weights;
    int warp;
    int lane;
    // Where the lane's row of queries begins, and, unless tiles are codes, what is there.
    uint32_t query_place;
    uint32_t q[IS_CODES ? 1 : D / 16][4];

    // Over so many rows of queries, fp16 [query_rows, STRIDE].
    __device__ __forceinline__ SplitBlock(const AttendArgs& args, const Queries& queries,
                                          const Span& span,
                                          SplitShared<D, IS_CODES>& shared, __half* query_rows,
                                          int rows)
        : args(args),
          queries(queries),
          span(span),
          shared(shared),
          shared_weights(query_rows + (IS_CODES ? rows * STRIDE : 0)) {
        warp = threadIdx.x / WARP_LANES;
        lane = threadIdx.x % WARP_LANES;
        // The last row stands for those that there are not.
        const int row = min(lane % 16, rows - 1);
        query_place = shared_address(query_rows + row * STRIDE + lane / 16 * 8);
    }

    // Once the queries are there.
    __device__ __forceinline__ void take_queries() {
        if constexpr (!IS_CODES) {
#pragma unroll
            for (int step = 0; step < D / 16; ++step) load_blocks(q[step], query_place + step * 32);
        }
    }

    __device__ __forceinline__ void begin_piece(LaneStates& states,
                                                float (&kept)[PAIRS][2][4]) const {
        states = {{nothing_seen(), nothing_seen()}};
#pragma unroll
        for (int i = 0; i < PAIRS * 8; ++i) kept[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }

    // Products of all heads with the keys of the warp's 16 tokens.
    __device__ __forceinline__ void multiply_keys(float (&s)[2][4], const uint8_t* keys) const {
        if constexpr (!IS_CODES) {
            const __half* rows = reinterpret_cast<const __half*>(keys) + warp * 16 * STRIDE;
            const uint32_t place = place_of_keys(rows, STRIDE, lane);
#pragma unroll
            for (int step = 0; step < D / 16; ++step) {
                uint32_t b[4];
                load_blocks(b, place + step * 32);
                multiply_add(s[0], q[step], b[0], b[1]);
                multiply_add(s[1], q[step], b[2], b[3]);
            }
        } else if (args.key_format == FORMAT_Q4) {
            multiply_codes<FORMAT_Q4>(s, keys);
        } else {
            multiply_codes<FORMAT_Q8>(s, keys);
        }
    }

    template <int FORMAT>
    __device__ __forceinline__ void multiply_codes(float (&s)[2][4], const uint8_t* keys) const {
        using Operands = KeyOperands<FORMAT>;
        const StoredTile stored = {{FORMAT, args.head_dim}};
        const int row_bytes = stored.row_bytes();
        const int scale_bytes = stored.scale_bytes();
        const int token = warp * 16 + lane / 4;
        uint32_t codes = shared_address(keys + token * row_bytes);
        uint32_t scales = shared_address(keys + stored.scales_at() + token * scale_bytes);
        uint32_t query = query_place;
        const uint32_t selector = Operands::of_lane(lane % 4);
#pragma unroll 1
        for (int first = 0; first < args.head_dim; first += GROUP) {
            uint32_t a[2][4];
            load_blocks(a[0], query);
            load_blocks(a[1], query + 32);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const Operands of(codes + n * 8 * row_bytes,
                                  load_shared_half(scales + n * 8 * scale_bytes), selector);
                multiply_add(s[n], a[0], of.b[0][0], of.b[0][1]);
                multiply_add(s[n], a[1], of.b[1][0], of.b[1][1]);
            }
            codes += Operands::GROUP_BYTES;
            scales += 2;
            query += 64;
        }
    }

    // Scores of all heads over the warp's tokens of a tile, and their largest for the others.
    __device__ __forceinline__ void score(float (&s)[2][4], const uint8_t* keys, int tile,
                                          int quarters) {
        if (warp < quarters) multiply_keys(s, keys);
#pragma unroll
        for (int n = 0; n < 2; ++n) products_to_scores(s[n], args);
        const int last_seen_by_all = queries.first_position;
        if (args.window > 0 || (tile + 1) * TILE - 1 > last_seen_by_all) mask(s, tile);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (i == 1 && !has_upper()) break;
            float largest = minus_infinity();
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                largest = fmaxf(largest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            }
            largest = largest_of_row(largest);
            if (lane % 4 == 0) shared.largest[warp][lane / 4 + 8 * i] = largest;
        }
    }

    // Whether there are query heads from 8 on: what is found for those that there are not is nobody's.
    __device__ __forceinline__ bool has_upper() const {
        return queries.rows * args.heads_per_tile > 8;
    }

    // Replaces scores of tokens that a row does not see by minus infinity.
    __device__ __forceinline__ void mask(float (&s)[2][4], int tile) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int position = queries.first_position + queries.row(args, lane / 4 + 8 * i);
            const int first = first_visible(args, position);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int column = 0; column < 2; ++column) {
                    const int token =
                        tile * TILE + warp * 16 + n * 8 + lane % 4 * 2 + column;
                    if (token > position || token < first) s[n][2 * i + column] = minus_infinity();
                }
            }
        }
    }

    // Puts the weights of all heads and tokens of the tile into shared memory, and the rows' largest scores into `part`.
    __device__ __forceinline__ void share_weights(const float (&s)[2][4], RowState (&part)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            part[i] = nothing_seen();
            if (i == 1 && !has_upper()) break;
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
    }

    // The weights of 16 tokens from there.
    __device__ __forceinline__ void take_weights(uint32_t (&weights)[4], int step) const {
        load_a(weights, shared_weights, WEIGHT_STRIDE, step * 16, lane);
    }

    // Folds the tile at the ring's oldest stage into the piece, and has the keys of a later one copied over its own.
    __device__ __forceinline__ void attend_tile(const TileRing<D, IS_CODES>& ring, int tile,
                                                LaneStates& states,
                                                float (&kept)[PAIRS][2][4]) {
        const int quarters = (min(TILE, span.end_token - tile * TILE) + 15) / 16;
        float s[2][4] = {};
        score(s, ring.stage(), tile, quarters);
        __syncthreads();
        ring.fill_keys();
        RowState part[2];
        share_weights(s, part);
        const uint8_t* values = ring.stage() + ring.values_offset();
        if constexpr (!IS_CODES) {
            fold_halves(kept, states, part, reinterpret_cast<const __half*>(values), quarters);
        } else if (args.value_format == FORMAT_Q4) {
            fold_codes<FORMAT_Q4>(kept, states, part, values, quarters);
        } else {
            fold_codes<FORMAT_Q8>(kept, states, part, values, quarters);
        }
    }

    // Adds the tile's part of the warp's dimensions to what is kept, and to the states of rows. `part`: the tile's largest
    // scores.
    __device__ __forceinline__ void fold_halves(float (&kept)[PAIRS][2][4], LaneStates& states,
                                                RowState (&part)[2], const __half* values,
                                                int quarters) const {
        const uint32_t place = place_of_values(values + warp * PAIRS * 16, STRIDE, lane);
        float sums[4] = {};
        float products[2 * PAIRS][4] = {};
#pragma unroll 2
        for (int step = 0; step < quarters; ++step) {
            uint32_t weights[4];
            take_weights(weights, step);
            multiply_add(sums, weights, ONES, ONES);
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                uint32_t b[4];
                load_blocks_transposed(b, place + step * 16 * STRIDE * 2 + pair * 32);
                multiply_add(products[2 * pair], weights, b[0], b[1]);
                multiply_add(products[2 * pair + 1], weights, b[2], b[3]);
            }
        }
        fold_products(kept, states, part, sums, products);
    }

    // The same of codes: product j has dimension j of each column. One loop of few instructions, since most launches have
    // no more than a tile for a block, for which each of them comes from far away.
    template <int FORMAT>
    __device__ __forceinline__ void fold_codes(float (&kept)[PAIRS][2][4], LaneStates& states,
                                               RowState (&part)[2], const uint8_t* values,
                                               int quarters) const {
        using Pairs = ValuePairs<FORMAT, COLUMN>;
        const StoredTile stored = {{FORMAT, args.head_dim}};
        const int row_bytes = stored.row_bytes();
        const int scale_bytes = stored.scale_bytes();
        // Of dimensions that there are: others' sums are nobody's.
        const int column = min(int(threadIdx.x) / 4, args.head_dim / COLUMN - 1);
        const int token = lane % 4 * 2;
        uint32_t codes = shared_address(values + token * row_bytes + column * Pairs::BYTES);
        uint32_t scales = shared_address(values + stored.scales_at() + token * scale_bytes +
                                         column * COLUMN / GROUP * 2);
        float sums[4] = {};
        float products[COLUMN][4] = {};
#pragma unroll 1
        for (int step = 0; step < quarters; ++step) {
            uint32_t weights[4];
            take_weights(weights, step);
            multiply_add(sums, weights, ONES, ONES);
            uint32_t b[2][COLUMN];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t first = load_shared_half(scales + 8 * i * scale_bytes);
                const uint32_t second = load_shared_half(scales + (8 * i + 1) * scale_bytes);
                const Pairs of(codes + 8 * i * row_bytes, row_bytes,
                               __byte_perm(first, second, 0x5410));
#pragma unroll
                for (int j = 0; j < COLUMN; ++j) b[i][j] = of.pairs[j];
            }
#pragma unroll
            for (int j = 0; j < COLUMN; ++j) multiply_add(products[j], weights, b[0][j], b[1][j]);
            codes += 16 * row_bytes;
            scales += 16 * scale_bytes;
        }
        fold_products(kept, states, part, sums, products);
    }

    // Folds a tile's sums of weights, and their products with values, into the piece.
    __device__ __forceinline__ void fold_products(float (&kept)[PAIRS][2][4], LaneStates& states,
                                                  RowState (&part)[2], const float (&sums)[4],
                                                  const float (&products)[2 * PAIRS][4]) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // fp16 folds all sixteen rows, as it was measured.
            if (IS_CODES && i == 1 && !has_upper()) break;
            part[i].sum = sums[2 * i];
            const FoldFactors factors = fold_state(states.rows[i], part[i]);
#pragma unroll
            for (int j = 0; j < 2 * PAIRS; ++j) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    float& whole = kept[j / 2][j % 2][2 * i + n];
                    whole = fold(whole, products[j][2 * i + n], factors);
                }
            }
        }
    }

    // Calls `visit` with every two neighbouring dimensions that the lane has of query head 8 i + lane / 4, and with
    // their place in a row of f32.
    template <typename Kept, typename Visit>
    __device__ __forceinline__ void each_pair(Kept& kept, int i, float* row, Visit visit) const {
        const int first = IS_CODES ? (warp * 8 + lane % 4 * 2) * COLUMN
                                   : warp * PAIRS * 16 + lane % 4 * 2;
        const int end = args.head_dim - first;
        row += first;
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int at = IS_CODES ? n * COLUMN + 2 * pair : pair * 16 + n * 8;
                if (at >= end) continue;
                float2* place = reinterpret_cast<float2*>(row + at);
                if (IS_CODES) {
                    visit(kept[pair][0][2 * i + n], kept[pair][1][2 * i + n], place);
                } else {
                    visit(kept[pair][n][2 * i], kept[pair][n][2 * i + 1], place);
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
            each_pair(kept, i, to(m), [](float first, float second, float2* place) {
                *place = make_float2(first, second);
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
            each_pair(kept, i, row, [&](float& first, float& second, float2* place) {
                fold_in_place(first, second, place, factors, is_first);
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

// Writes what copies do not bring to a tile's stage: the row's own token, where `has_own` says that the tile has it, and, as
// not a number times a weight of zero is none either, zeros for the scales of values of tokens that are before what rows
// see. (Of those behind, and of fp16, copies have made zeros.)
template <int D, bool IS_CODES>
__device__ __forceinline__ void complete_tile(const Queries& queries, const Span& span, int tile,
                                              bool has_own,
                                              const FreshRow<D, IS_CODES> (&fresh)[2],
                                              const TileRing<D, IS_CODES>& ring) {
    const int unseen = IS_CODES ? span.first_token - tile * TILE : 0;
    // Copies of other threads bring what is there of these scales.
    if (IS_CODES && (has_own || unseen > 0)) __syncthreads();
    if (has_own) {
        const int which = threadIdx.x / (ATTEND_THREADS / 2);
        fresh[which].insert(ring.stage() + (which == 0 ? 0 : ring.values_offset()),
                            which == 0 ? ring.keys() : ring.values(),
                            queries.first_position % TILE, threadIdx.x % (ATTEND_THREADS / 2));
    }
    if (unseen <= 0) return;
    const StoredTile stored = {ring.values()};
    uint8_t* scales = ring.stage() + ring.values_offset() + stored.scales_at();
#pragma unroll 1
    for (int at = threadIdx.x * 2; at < unseen * stored.scale_bytes();
         at += ATTEND_THREADS * 2) {
        *reinterpret_cast<__half*>(scales + at) = __half();
    }
}

// Grid: (tiles, kv_heads * head_tiles, blocks that share a tile's pieces).
template <int D, bool IS_CODES>
__device__ __forceinline__ void attend_split(const AttendSplitArgs& all) {
    DYNAMIC_SHARED(uint8_t, dynamic_shared, 128);
    using Block = SplitBlock<D, IS_CODES>;
    using Shared = SplitShared<D, IS_CODES>;
    touch_arguments(all);
    dependency_trigger();
    const AttendArgs& args = all.attend;
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    __half* q = reinterpret_cast<__half*>(dynamic_shared + sizeof(Shared));
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
    TileRing<D, IS_CODES> ring(args, queries, span,
                                is_fresh ? queries.first_position : span.end_token,
                                dynamic_shared + all.tiles_at, first_piece, share.sharers);
    const int query_rows = is_fresh ? queries.heads : HEADS_OF_WARP;
    Block block(args, queries, span, shared, q, query_rows);
    LaneStates states;
    float kept[Block::PAIRS][2][4];
    int piece = first_piece;
    int tile = span.first_tile_of(piece);
    // The first turns only start copies, and all of them one that is needed later.
#pragma unroll 1
    for (int turn = 1 - args.slots; piece <= span.last_piece; ++turn) {
        if (turn <= 0) ring.fill_keys();
        ring.fill_values();
        if (turn < 0) continue;
        if (turn == 0) {
            prepare_queries<D, IS_CODES>(all, queries, has_own, shared.fresh, q, places);
            block.take_queries();
            block.begin_piece(states, kept);
        }
        ring.wait();
        complete_tile(queries, span, tile, is_fresh && tile == span.last_tile, shared.fresh, ring);
        __syncthreads();
        block.attend_tile(ring, tile, states, kept);
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
        block.begin_piece(states, kept);
    }

    uint8_t* memory = dynamic_shared + all.tiles_at;
    if (is_alone) {
        block.put_whole(reinterpret_cast<float*>(memory), states, kept);
        write_whole<D, IS_CODES>(all, queries, memory, shared.sums);
        return;
    }
    if (!is_last_sharer(args, share.sharers, shared.is_last)) return;
    write_folded<D, IS_CODES>(all, queries, share.pieces, memory, ring.bytes(), shared.sums);
}

}  // namespace

// Registers for a block of 128 threads beside a product's CTA (linear.cu), so that pages are on their way while
// queries, keys and values are still being multiplied.
extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_split_64(const __grid_constant__ AttendSplitArgs args) {
    attend_split<64, false>(args);
}

extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_split_128(const __grid_constant__ AttendSplitArgs args) {
    attend_split<128, false>(args);
}

extern "C" __global__ void __launch_bounds__(128, 2)
oxl_attend_split_256(const __grid_constant__ AttendSplitArgs args) {
    attend_split<256, false>(args);
}

extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_codes_64(const __grid_constant__ AttendSplitArgs args) {
    attend_split<64, true>(args);
}

extern "C" __global__ void __launch_bounds__(128, 4)
oxl_attend_codes_128(const __grid_constant__ AttendSplitArgs args) {
    attend_split<128, true>(args);
}

extern "C" __global__ void __launch_bounds__(128, 2)
oxl_attend_codes_256(const __grid_constant__ AttendSplitArgs args) {
    attend_split<256, true>(args);
}
