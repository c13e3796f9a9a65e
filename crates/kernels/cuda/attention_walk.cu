// Attention of many rows of a sequence over the paged cache (attention.cuh defines a row's result).
//
// Floor: 4 * head_dim operations for each row, query head and visible token, on tensor cores. At
// 2,048 rows of 32 heads of 128 that is 34 billion: 55 us at the 620 TFLOP/s that mma.m16n8k16
// gives on an H100; scores, weights and folds take about 0.6 issue slots for each cycle of that,
// most of which another warp's products hide.
//
// A block takes 128 query heads of rows, a warp 32 of them (half of both for heads longer than
// 128), so that what is read from shared memory of keys and values serves 32 rows: with 16,
// shared memory would be slower than the tensor cores. A block walks through the tokens it sees, 64
// at a time, with one barrier for each tile; a warp passes over tiles that none of its rows sees.
// Tiles in shared memory have no padding: the 16-byte units of a row are permuted by its number
// (`unit_offset`), so that ldmatrix and the copies meet no bank twice.
#include "walk.cuh"

namespace {

using namespace oxl;

// One warp's query heads. A lane has four rows (two for long heads): g and g + 8 of every set.
template <int D>
struct WalkWarp {
    using W = Walk<D>;
    static constexpr int SETS = W::SETS;

    const AttendArgs& args;
    const Queries& queries;
    // The warp's queries in shared memory.
    uint32_t q;
    // Query heads of rows that there are from the warp's first one on; may be below zero.
    int heads;
    // Positions of the warp's first and last row.
    int first_position;
    int last_position;
    LaneStates states[SETS];
    float kept[SETS][D / 16][2][4];

    __device__ __forceinline__ WalkWarp(const AttendArgs& args, const Queries& queries,
                                        uint32_t q)
        : args(args), queries(queries) {
        const int first_m = threadIdx.x / WARP_LANES * W::WARP_HEADS;
        this->q = q + first_m * W::ROW_BYTES;
        first_position = queries.first_position + queries.row(args, first_m);
        heads = queries.rows * args.heads_per_tile - first_m;
        const int last_row = min(queries.row(args, first_m + W::WARP_HEADS - 1), queries.rows - 1);
        last_position = queries.first_position + last_row;
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            states[set] = {{nothing_seen(), nothing_seen()}};
#pragma unroll
            for (int i = 0; i < D / 2; ++i) kept[set][i / 8][i / 4 % 2][i % 4] = 0.0f;
        }
    }

    // Query head of the block: row g + 8 half of a set.
    __device__ __forceinline__ int head(int set, int half) const {
        const int thread = fresh_thread();
        const int first = thread / WARP_LANES * W::WARP_HEADS + thread % WARP_LANES / 4;
        return first + set * HEADS_OF_WARP + 8 * half;
    }

    // Whether a row of the warp sees a token of the tile.
    __device__ __forceinline__ bool sees(int tile) const {
        return heads > 0 && tile * TILE <= last_position &&
               tile * TILE + TILE > first_visible(args, first_position);
    }

    // Whether a row of the warp does not see a token of the tile.
    __device__ __forceinline__ bool is_masked(int tile) const {
        return tile * TILE + TILE > first_position + 1 ||
               tile * TILE < first_visible(args, last_position);
    }

    // Products of the warp's heads with the keys of a tile.
    __device__ __forceinline__ void multiply_keys(float (&s)[SETS][TILE / 8][4],
                                                  uint32_t keys) const {
        const int lane = fresh_thread() % WARP_LANES;
        // A row of queries or of keys, and the 16-byte unit that the lane reads of it: columns are
        // added to it without carries.
        const uint32_t queries = q + lane % 16 * W::ROW_BYTES;
        const uint32_t query_unit = (lane / 16 ^ lane % 8) * 16;
        keys += (lane / 16 * 8 + lane % 8) * W::ROW_BYTES;
        const uint32_t key_unit = (lane / 8 % 2 ^ lane % 8) * 16;
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            uint32_t a[SETS][4];
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
                const uint32_t rows = queries + set * HEADS_OF_WARP * W::ROW_BYTES;
                load_blocks(a[set], rows + (query_unit ^ step * 32));
            }
#pragma unroll
            for (int pair = 0; pair < TILE / 16; ++pair) {
                uint32_t b[4];
                load_blocks(b, keys + (key_unit ^ step * 32) + pair * 16 * W::ROW_BYTES);
#pragma unroll
                for (int set = 0; set < SETS; ++set) {
                    multiply_add(s[set][2 * pair], a[set], b[0], b[1]);
                    multiply_add(s[set][2 * pair + 1], a[set], b[2], b[3]);
                }
            }
        }
    }

    // Scores of products; minus infinity for tokens that a row does not see.
    __device__ __forceinline__ void score(float (&s)[SETS][TILE / 8][4], int tile) const {
#pragma unroll
        for (int i = 0; i < SETS * TILE / 2; ++i) {
            float& x = s[i / 32][i / 4 % 8][i % 4];
            x = __fmul_rn(x, args.score_factor);
        }
        if (args.cap_factor != 0.0f) {
#pragma unroll
            for (int i = 0; i < SETS * TILE / 2; ++i) {
                float& x = s[i / 32][i / 4 % 8][i % 4];
                x = capped_score(x, args.cap_factor);
            }
        }
        if (is_masked(tile)) mask(s, tile);
    }

    __device__ __forceinline__ void mask(float (&s)[SETS][TILE / 8][4], int tile) const {
        const int lane = fresh_thread() % WARP_LANES;
#pragma unroll
        for (int i = 0; i < 2 * SETS; ++i) {
            const int position = queries.first_position + queries.row(args, head(i / 2, i % 2));
            const int end = position + 1 - tile * TILE - lane % 4 * 2;
            const int first = first_visible(args, position) - tile * TILE - lane % 4 * 2;
            hide_tokens(s[i / 2], i % 2, first, end);
        }
    }

    // The weights of a tile, and what its parts of the result are folded with.
    __device__ __forceinline__ void attend_keys(uint32_t keys, int tile,
                                                uint32_t (&weights)[SETS][4][4],
                                                FoldFactors (&factors)[SETS][2]) {
        float s[SETS][TILE / 8][4] = {};
        multiply_keys(s, keys);
        score(s, tile);
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            RowState part[2] = {nothing_seen(), nothing_seen()};
            if (set * HEADS_OF_WARP < heads) {
                weigh_scores(s[set], part, weights[set]);
            } else {
#pragma unroll
                for (int i = 0; i < 16; ++i) weights[set][i / 4][i % 4] = 0;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                factors[set][half] = fold_state(states[set].rows[half], part[half]);
            }
        }
    }

    // Adds the tile's parts, sums over its tokens of weight * value, to what is kept.
    __device__ __forceinline__ void attend_values(uint32_t values,
                                                  const uint32_t (&weights)[SETS][4][4],
                                                  const FoldFactors (&factors)[SETS][2]) {
        const int lane = fresh_thread() % WARP_LANES;
        values += lane % 16 * W::ROW_BYTES;
        const uint32_t unit = (lane / 16 ^ lane % 8) * 16;
#pragma unroll
        for (int pair = 0; pair < D / 16; ++pair) {
            // Also keeps the compiler from loading so far ahead that registers run out.
            if (pair % 2 == 0 && pair * 16 >= args.head_dim) break;
            float part[SETS][2][4] = {};
#pragma unroll
            for (int step = 0; step < TILE / 16; ++step) {
                uint32_t b[4];
                load_blocks_transposed(
                    b, values + (unit ^ pair * 32) + step * 16 * W::ROW_BYTES);
#pragma unroll
                for (int set = 0; set < SETS; ++set) {
                    multiply_add(part[set][0], weights[set][step], b[0], b[1]);
                    multiply_add(part[set][1], weights[set][step], b[2], b[3]);
                }
            }
#pragma unroll
            for (int i = 0; i < SETS * 8; ++i) {
                float& x = kept[i / 8][pair][i / 4 % 2][i % 4];
                x = fold(x, part[i / 8][i / 4 % 2][i % 4], factors[i / 8][i % 4 / 2]);
            }
        }
    }

    // Calls `visit` with the place of every two neighbouring dimensions of a head in the result.
    template <typename Visit>
    __device__ __forceinline__ void each_pair(int set, int half, Visit visit) {
        const int m = head(set, half);
        if (!queries.has(args, m)) return;
        const int lane = fresh_thread() % WARP_LANES;
        float* out = args.out + queries.query(args, m) * args.head_dim;
#pragma unroll
        for (int part = 0; part < D / 32; ++part) {
            if (part * 32 >= args.head_dim) break;
#pragma unroll
            for (int n = part * 4; n < part * 4 + 4; ++n) {
                const int dimension = n * 8 + lane % 4 * 2;
                if (dimension < args.head_dim) {
                    float* two = &kept[set][n / 2][n % 2][half * 2];
                    visit(two, reinterpret_cast<float2*>(out + dimension));
                }
            }
        }
    }

    // Divides by the sums of weights, rotates back and writes.
    __device__ __forceinline__ void finish() {
        const bool is_rotated = args.value_format >= FORMAT_Q8;
        const int lane = fresh_thread() % WARP_LANES;
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const float inverses[2] = {__fdiv_rn(1.0f, states[set].rows[0].sum),
                                       __fdiv_rn(1.0f, states[set].rows[1].sum)};
#pragma unroll
            for (int group = 0; group < D / GROUP; ++group) {
                float x[4][4];
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const float value = kept[set][2 * group + i / 8][i / 4 % 2][i % 4];
                    x[i / 4][i % 4] = __fmul_rn(value, inverses[i % 4 / 2]);
                }
                if (is_rotated) rotate_fragment(x, lane);
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    kept[set][2 * group + i / 8][i / 4 % 2][i % 4] = x[i / 4][i % 4];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * SETS; ++i) {
            each_pair(i / 2, i % 2, [](float* two, float2* place) {
                *place = make_float2(two[0], two[1]);
            });
        }
    }
};

// A block's tiles on their way from pages to shared memory.
template <int D>
struct WalkTiles {
    using W = Walk<D>;

    const AttendArgs& args;
    const Block& block;
    // Page of the tile that is copied next.
    uint32_t page;

    __device__ __forceinline__ WalkTiles(const AttendArgs& args, const Block& block)
        : args(args), block(block) {
        look_up(block.span.first_token / TILE);
    }

    __device__ __forceinline__ WalkSource<D> keys() const {
        const HeadLayout layout = {args.key_format, args.head_dim};
        return {args.key_pages, layout, args.kv_heads, block.queries.kv_head};
    }

    __device__ __forceinline__ WalkSource<D> values() const {
        const HeadLayout layout = {args.value_format, args.head_dim};
        return {args.value_pages, layout, args.kv_heads, block.queries.kv_head};
    }

    __device__ __forceinline__ void look_up(int tile) {
        const int index = min(tile, block.span.last_tile) * TILE / PAGE_TOKENS;
        page = block.queries.page(index);
    }

    // Starts copying keys and values of a tile, and looks up the next one's page.
    __device__ __forceinline__ void fill(uint32_t stage, int tile) {
        keys().copy(stage, page, block.span, tile);
        values().copy(stage + keys().stage_bytes(), page, block.span, tile);
        look_up(tile + 1);
    }
};

// Starts copying the block's query heads.
template <int D>
__device__ __forceinline__ void copy_queries(const AttendArgs& args, const Queries& queries,
                                             uint32_t q) {
    using W = Walk<D>;
#pragma unroll 2
    for (int index = threadIdx.x; index < W::HEADS * W::UNITS; index += ATTEND_THREADS) {
        const int m = index / W::UNITS;
        const int unit = index % W::UNITS;
        const bool is_there = queries.has(args, m);
        const __half* row = args.queries + (is_there ? queries.query(args, m) * D : 0);
        copy_async(q + unit_offset<D>(m, unit), row + unit * 8, is_there);
    }
}

// Grid: tiles * kv_heads * head_tiles blocks.
template <int D>
__device__ __forceinline__ void attend_walk(const AttendArgs& args) {
    DYNAMIC_SHARED(uint8_t, dynamic_shared, 128);
    using W = Walk<D>;
    // Later rows see more: the blocks of all their heads start first.
    const int blocks_of_tile = args.kv_heads * args.head_tiles;
    Block& block = *reinterpret_cast<Block*>(dynamic_shared);
    if (threadIdx.x == 0) {
        const Queries queries(args, (gridDim.x - 1 - blockIdx.x) / blocks_of_tile,
                              blockIdx.x % blocks_of_tile);
        block = {queries, Span(args, queries)};
    }
    __syncthreads();
    const Queries& queries = block.queries;
    // Launches of few rows have a block for every row, and may have fewer tiles.
    if (queries.rows == 0) return;
    const Span& span = block.span;
    WalkTiles<D> tiles(args, block);
    const bool is_quantised = args.key_format >= FORMAT_Q8;
    // Offsets in shared memory.
    constexpr int QUERIES = BLOCK_BYTES;
    constexpr int DECODED = QUERIES + W::QUERY_BYTES;
    constexpr int DECODED_VALUES = DECODED + (W::DECODED_TILES - 1) * W::TILE_BYTES;
    const int stages = DECODED + (is_quantised ? W::DECODED_TILES * W::TILE_BYTES : 0);
    int stage = stages;
    const uint32_t base = shared_address(dynamic_shared);

    const int first_tile = span.first_token / TILE;
    const bool is_old = (first_tile + 1) * TILE <= queries.old_tokens;
    if (is_old) tiles.fill(base + stage, first_tile);
    dependency_wait();
    dependency_trigger();
    copy_queries<D>(args, queries, base + QUERIES);
    if (!is_old) tiles.fill(base + stage, first_tile);
    commit_copies();
    WalkWarp<D> warp(args, queries, base + QUERIES);

#pragma unroll 1
    for (int tile = first_tile; tile <= span.last_tile; ++tile) {
        copies_wait(0);
        __syncthreads();
        const int this_stage = stage;
        // All are past the tile before, whose stage is free now.
        if (args.slots > 1) {
            stage = 2 * stages + args.slot_bytes - stage;
            if (tile < span.last_tile) {
                tiles.fill(base + stage, tile + 1);
                commit_copies();
            }
        }
        int keys = this_stage;
        int values = this_stage + tiles.keys().stage_bytes();
        if (is_quantised) {
            tiles.keys().decode(dynamic_shared + keys, dynamic_shared + DECODED, span, tile);
            keys = DECODED;
            if (W::DECODED_TILES == 2) {
                tiles.values().decode(dynamic_shared + values, dynamic_shared + DECODED_VALUES,
                                      span, tile);
                values = DECODED_VALUES;
            }
            __syncthreads();
        }
        const bool sees = warp.sees(tile);
        uint32_t weights[W::SETS][4][4];
        FoldFactors factors[W::SETS][2];
        if (sees) warp.attend_keys(base + keys, tile, weights, factors);
        // Keeps the compiler from mixing the two, for which it has too few registers.
        __syncwarp();
        if (W::DECODED_TILES == 1 && is_quantised) {
            __syncthreads();
            tiles.values().decode(dynamic_shared + values, dynamic_shared + DECODED_VALUES, span,
                                  tile);
            values = DECODED_VALUES;
            __syncthreads();
        }
        if (sees) warp.attend_values(base + values, weights, factors);
        if (args.slots == 1 && tile < span.last_tile) {
            __syncthreads();
            tiles.fill(base + stage, tile + 1);
            commit_copies();
        }
    }
    warp.finish();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128, 2)
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
