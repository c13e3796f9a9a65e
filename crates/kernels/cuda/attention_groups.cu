// Attention of many rows of a sequence over pages of fp16, by warp groups (attention.cuh defines a row's result):
// what `attention_walk.cu` does, on compute capability 9.0 alone.
//
// Floor: 4 * head_dim operations for each row, query head and visible token, on tensor cores. At 2,048 rows of 32
// heads of 128 that is 34 billion: 45 us at 760 TFLOP/s. For a tile of 64 tokens a warp issues about 500 instructions
// beside its products, which take its tensor core 512 cycles; what hides them is the other group's products, and the
// own ones with values.
//
// A block takes 128 query heads of rows, each of two groups of four warps 64 of them, and walks through the tokens it
// sees, 64 at a time. A third group brings tiles to a ring in shared memory. A group passes over tiles that none of
// its rows sees. Rows in shared memory are 128 bytes, whose 16-byte units are permuted by their number, and longer
// heads lie in several columns of such rows.
#include "bulk.cuh"
#include "group_product.cuh"
#include "walk.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace oxl {

// Groups that multiply, and query heads of each.
constexpr int GROUPS = 2;
constexpr int GROUP_HEADS = 64;

constexpr int STAGES = 4;

// Of a row in shared memory.
constexpr int COLUMN_BYTES = 128;

template <int D>
struct GroupExtents {
    static constexpr int UNITS = D / 8;
    static constexpr int TILE_BYTES = TILE * D * 2;
    static constexpr int STAGE_BYTES = 2 * TILE_BYTES;
    static constexpr int QUERY_BYTES = GROUPS * GROUP_HEADS * D * 2;
};

// Where a 16-byte unit of a row lies among 64 rows.
__device__ __forceinline__ int place_of_unit(int row, int unit) {
    return unit / 8 * (TILE * COLUMN_BYTES) + row * COLUMN_BYTES + (unit % 8 ^ row % 8) * 16;
}

// Barriers of a block, in shared memory.
struct GroupBarriers {
    uint64_t queries;
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
};

// Brings what a block reads to shared memory: one group.
template <int D>
struct TileFetcher {
    using E = GroupExtents<D>;

    const AttendArgs& args;
    const Block& block;
    GroupBarriers& barriers;
    uint32_t stages;  // where they lie
    uint32_t page;    // of the tile that is copied next

    __device__ __forceinline__ void look_up(int tile) {
        const int index = min(tile, block.span.last_tile) * TILE / PAGE_TOKENS;
        page = block.queries.page(index);
    }

    __device__ __forceinline__ void copy_rows(uint32_t to, const uint8_t* pages, int tile) const {
        const HeadLayout layout = {FORMAT_F16, args.head_dim};
        const int vector_bytes = layout.vector_bytes();
        const uint8_t* from = head_page(pages, layout, args.kv_heads, page, block.queries.kv_head) +
                              tile * TILE % PAGE_TOKENS * vector_bytes;
        const int first = block.span.first_token - tile * TILE;
        const int end = block.span.end_token - tile * TILE;
        // A thread has the same unit of several rows.
        constexpr int PASS_ROWS = GROUP_THREADS / E::UNITS;
        static_assert(PASS_ROWS % 8 == 0, "whose numbers permute it alike");
        const int row = threadIdx.x / E::UNITS;
        const int unit = threadIdx.x % E::UNITS;
        const bool has_unit = unit * 16 < vector_bytes;
        to += place_of_unit(row, unit);
        from += row * vector_bytes + unit * 16;
#pragma unroll 4
        for (int pass = 0; pass < TILE; pass += PASS_ROWS) {
            const bool is_read = has_unit && row + pass >= first && row + pass < end;
            copy_async(to + pass * COLUMN_BYTES, from + pass * vector_bytes, is_read);
        }
    }

    // Starts copying a tile's keys and values, and looks up the next one's page.
    __device__ __forceinline__ void fill(int stage, int tile) {
        const uint32_t to = stages + stage * E::STAGE_BYTES;
        copy_rows(to, args.key_pages, tile);
        copy_rows(to + E::TILE_BYTES, args.value_pages, tile);
        commit_copies();
        look_up(tile + 1);
    }

    __device__ __forceinline__ void fill_queries(uint32_t to) const {
        const Queries& queries = block.queries;
#pragma unroll 2
        for (int index = threadIdx.x; index < GROUPS * GROUP_HEADS * E::UNITS; index += GROUP_THREADS) {
            const int m = index / E::UNITS;
            const int unit = index % E::UNITS;
            const bool is_there = queries.has(args, m);
            const __half* row = args.queries + (is_there ? queries.query(args, m) * D : 0);
            const int group = m / GROUP_HEADS;
            copy_async(to + group * (E::QUERY_BYTES / GROUPS) + place_of_unit(m % GROUP_HEADS, unit), row + unit * 8,
                       is_there);
        }
        commit_copies();
    }

    // Says that what was copied is there.
    __device__ __forceinline__ void report(uint64_t& barrier) const {
        show_to_tensor_cores();
        barrier_arrive(shared_address(&barrier));
    }

    __device__ __forceinline__ void run(uint32_t queries) {
        const Span& span = block.span;
        const int first_tile = span.first_token / TILE;
        look_up(first_tile);
        const bool is_old = (first_tile + 1) * TILE <= block.queries.old_tokens;
        if (is_old) fill(0, first_tile);
        dependency_wait();
        fill_queries(queries);
        if (!is_old) fill(0, first_tile);
        copies_wait(0);
        report(barriers.queries);
        report(barriers.full[0]);
        // A tile is reported once the next one is on its way.
        int stage = 0;
        int before = -1;
        uint32_t parity = 0;
#pragma unroll 1
        for (int tile = first_tile + 1; tile <= span.last_tile; ++tile) {
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
            barrier_wait(shared_address(&barriers.empty[stage]), parity ^ 1);
            fill(stage, tile);
            if (before >= 0) {
                copies_wait(1);
                report(barriers.full[before]);
            }
            before = stage;
        }
        if (before >= 0) {
            copies_wait(0);
            report(barriers.full[before]);
        }
    }
};

// A lane's products of a tile: four of every eight tokens.
using Products = float[TILE / 2];

// A lane's weights of a tile as the a operand, and what the tile's part is folded with.
struct Weighed {
    uint32_t weights[TILE / 16][4];
    FoldFactors factors[2];
};

// A warp's 16 query heads. A lane has two rows, g and g + 8.
template <int D>
struct GroupWarp {
    using E = GroupExtents<D>;

    const AttendArgs& args;
    const Queries& queries;
    uint32_t q;     // the group's queries
    int first_m;    // the warp's first query head of the block
    int positions[2];
    int firsts[2];  // visible positions
    // Of the group: all its warps take part in a product.
    int group_first;
    int group_last;
    bool has_rows;
    LaneStates states;
    float kept[D / 2];

    __device__ __forceinline__ GroupWarp(const AttendArgs& args, const Queries& queries, uint32_t q,
                                         int group, int warp, int lane)
        : args(args), queries(queries), q(q), first_m(group * GROUP_HEADS + warp * HEADS_OF_WARP) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            positions[i] = queries.first_position + queries.row(args, first_m + lane / 4 + 8 * i);
            firsts[i] = first_visible(args, positions[i]);
        }
        const int first = group * GROUP_HEADS;
        has_rows = first < queries.rows * args.heads_per_tile;
        group_first = queries.first_position + queries.row(args, first);
        group_last = queries.first_position + min(queries.row(args, first + GROUP_HEADS - 1), queries.rows - 1);
        states = {{nothing_seen(), nothing_seen()}};
#pragma unroll
        for (float& x : kept) x = 0.0f;
    }

    // The tiles that a row of the group sees, among all that a row of the block does: from the first to the last.
    __device__ __forceinline__ int first_tile(const Span& span) const {
        return has_rows ? max(first_visible(args, group_first), span.first_token) / TILE : span.last_tile + 1;
    }
    __device__ __forceinline__ int last_tile(const Span& span) const {
        return has_rows ? min(group_last / TILE, span.last_tile) : span.last_tile;
    }

    // Whether a row of the group does not see a token of the tile.
    __device__ __forceinline__ bool is_masked(int tile) const {
        return tile * TILE + TILE > group_first + 1 || tile * TILE < first_visible(args, group_last);
    }

    // Starts the products of the group's heads with the keys of a tile.
    __device__ __forceinline__ void start_keys(Products& s, uint32_t keys) const {
        const uint64_t a = describe_rows(q);
        const uint64_t b = describe_rows(keys);
        group_fence();
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            const uint64_t next = next_inputs(step % 4) + step / 4 * (TILE * COLUMN_BYTES / 16);
            start_shared_product(s, a + next, b + next, step > 0);
        }
        group_commit();
    }

    // Starts the sums over a tile's tokens of weight * value.
    __device__ __forceinline__ void start_values(const Weighed& weighed, uint32_t values, float (&part)[D / 2]) const {
        const uint64_t b = describe_columns(values, TILE * COLUMN_BYTES);
        group_fence();
#pragma unroll
        for (int step = 0; step < TILE / 16; ++step) {
            const auto& a = weighed.weights[step];
            GroupProduct<D, B_COLUMNS>::start(part, a[0], a[1], a[2], a[3], b + next_rows(step), step > 0);
        }
        group_commit();
    }

    // Makes weights of a tile's products, and takes note of them.
    __device__ __forceinline__ void weigh(const Products& products, int tile, int lane, Weighed& weighed) {
        float s[TILE / 8][4];
#pragma unroll
        for (int i = 0; i < TILE / 2; ++i) s[i / 4][i % 4] = __fmul_rn(products[i], args.score_factor);
        if (args.cap_factor != 0.0f) {
#pragma unroll
            for (int i = 0; i < TILE / 2; ++i) s[i / 4][i % 4] = capped_score(s[i / 4][i % 4], args.cap_factor);
        }
        if (is_masked(tile)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int end = positions[half] + 1 - tile * TILE - lane % 4 * 2;
                const int first = firsts[half] - tile * TILE - lane % 4 * 2;
                hide_tokens(s, half, first, end);
            }
        }
        RowState part[2] = {nothing_seen(), nothing_seen()};
        weigh_scores(s, part, weighed.weights);
#pragma unroll
        for (int half = 0; half < 2; ++half) weighed.factors[half] = fold_state(states.rows[half], part[half]);
    }

    __device__ __forceinline__ void fold_tile(const Weighed& weighed, const float (&part)[D / 2]) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) kept[i] = fold(kept[i], part[i], weighed.factors[i / 2 % 2]);
    }

    // Divides by the sums of weights and writes.
    __device__ __forceinline__ void finish(int lane) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int m = first_m + lane / 4 + 8 * half;
            if (!queries.has(args, m)) continue;
            const float inverse = __fdiv_rn(1.0f, states.rows[half].sum);
            float* out = args.out + queries.query(args, m) * args.head_dim + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float2 two = make_float2(__fmul_rn(kept[4 * n + 2 * half], inverse),
                                               __fmul_rn(kept[4 * n + 2 * half + 1], inverse));
                if (n * 8 < args.head_dim) *reinterpret_cast<float2*>(out + n * 8) = two;
            }
        }
    }
};

// The same address, of which the compiler does not know how it was made: it would make it anew each time.
__device__ __forceinline__ uint32_t kept_address(uint32_t address) {
    asm volatile("" : "+r"(address));
    return address;
}

// Where a group is in the ring.
template <int D>
struct TileReader {
    using E = GroupExtents<D>;

    uint32_t barriers;
    uint32_t stages;
    int stage;
    uint32_t parity;

    __device__ __forceinline__ uint32_t keys() const { return stages + stage * E::STAGE_BYTES; }
    __device__ __forceinline__ uint32_t values() const { return keys() + E::TILE_BYTES; }
    __device__ __forceinline__ void wait() const {
        barrier_wait(barriers + (1 + stage) * BARRIER_BYTES, parity);
    }
    __device__ __forceinline__ void release() const {
        barrier_arrive(barriers + (1 + STAGES + stage) * BARRIER_BYTES);
    }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    // Goes past a tile that the group does not see.
    __device__ __forceinline__ void pass() {
        wait();
        release();
        advance();
    }
};

// Attends to all tiles that the block's rows see: one of the warps of a group.
template <int D>
__device__ __forceinline__ void attend_tiles(GroupWarp<D>& own, TileReader<D>& reader, const Span& span, int lane) {
    int tile = span.first_token / TILE;
    const int first_tile = own.first_tile(span);
    const int last_tile = own.last_tile(span);
#pragma unroll 1
    for (; tile < first_tile; ++tile) reader.pass();
    if (tile <= last_tile) {
        // While a tile's values are summed, the next one's products are weighed.
        Products products;
        Weighed weighed;
        reader.wait();
        own.start_keys(products, reader.keys());
        group_wait<0>();
        own.weigh(products, tile, lane, weighed);
        const auto fold_last = [&](const Weighed& weighed) {
            float part[D / 2];
            own.start_values(weighed, reader.values(), part);
            group_wait<0>();
            reader.release();
            reader.advance();
            own.fold_tile(weighed, part);
        };
        const auto step = [&](int tile, const Weighed& weighed, Weighed& next) {
            float part[D / 2];
            const TileReader<D> before = reader;
            reader.advance();
            reader.wait();
            own.start_keys(products, reader.keys());
            own.start_values(weighed, before.values(), part);
            group_wait<1>();
            own.weigh(products, tile, lane, next);
            group_wait<0>();
            before.release();
            own.fold_tile(weighed, part);
        };
        // Weights are written while tensor cores still read those before, which the compiler believes of two names only.
        Weighed next;
#pragma unroll 1
        for (++tile; tile < last_tile; tile += 2) {
            step(tile, weighed, next);
            step(tile + 1, next, weighed);
        }
        if (tile == last_tile) {
            step(tile, weighed, next);
            fold_last(next);
        } else {
            fold_last(weighed);
        }
        tile = last_tile + 1;
    }
#pragma unroll 1
    for (; tile <= span.last_tile; ++tile) reader.pass();
}

// Grid: tiles * kv_heads * head_tiles blocks.
template <int D>
__device__ __forceinline__ void attend_groups(const AttendArgs& args) {
    using E = GroupExtents<D>;
    DYNAMIC_SHARED(uint8_t, dynamic_shared, 1024);
    __shared__ __align__(alignof(Block)) uint8_t block_bytes[sizeof(Block)];
    __shared__ GroupBarriers barriers;
    Block& block = *reinterpret_cast<Block*>(block_bytes);
    // Later rows see more: the blocks of all their heads start first.
    const int blocks_of_tile = args.kv_heads * args.head_tiles;
    if (threadIdx.x == 0) {
        const Queries queries(args, (gridDim.x - 1 - blockIdx.x) / blocks_of_tile, blockIdx.x % blocks_of_tile);
        block = {queries, Span(args, queries)};
        barrier_init(shared_address(&barriers.queries), GROUP_THREADS);
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared_address(&barriers.full[stage]), GROUP_THREADS);
            barrier_init(shared_address(&barriers.empty[stage]), GROUPS * GROUP_THREADS);
        }
        barriers_are_made();
    }
    __syncthreads();
    const Queries& queries = block.queries;
    if (queries.rows == 0) return;
    dependency_trigger();
    const Span& span = block.span;
    const uint32_t base = (shared_address(dynamic_shared) + 1023) & ~1023u;
    const uint32_t stages = base + E::QUERY_BYTES;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP_LANES, 0);
    if (warp < 4) {
        give_registers<40>();
        TileFetcher<D> fetcher = {args, block, barriers, stages, 0};
        fetcher.run(base);
        return;
    }
    take_registers<232>();
    // What the results overwrite, earlier kernels may still read.
    dependency_wait();
    const int group = warp / 4 - 1;
    const int lane = threadIdx.x % WARP_LANES;
    GroupWarp<D> own(args, queries, base + group * (E::QUERY_BYTES / GROUPS), group, warp % 4, lane);
    barrier_wait(shared_address(&barriers.queries), 0);
    TileReader<D> reader = {kept_address(shared_address(&barriers)), stages, 0, 0};
    attend_tiles(own, reader, span, lane);
    own.finish(lane);
}

}  // namespace oxl

// Dynamic shared memory: 1,024 bytes, 256 * D of queries and four stages of 256 * D.
extern "C" __global__ void __launch_bounds__((oxl::GROUPS + 1) * oxl::GROUP_THREADS, 1)
    oxl_attend_groups_64(const __grid_constant__ AttendArgs args) {
    oxl::attend_groups<64>(args);
}

extern "C" __global__ void __launch_bounds__((oxl::GROUPS + 1) * oxl::GROUP_THREADS, 1)
    oxl_attend_groups_128(const __grid_constant__ AttendArgs args) {
    oxl::attend_groups<128>(args);
}

#endif
