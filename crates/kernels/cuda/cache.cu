// Norms and rotates the heads of queries and keys, and stores keys and values in their pages.
//
// Bytes: queries, keys and values are read once (f32), fp16 queries and the stored vectors
// written once: well under a megabyte for 64 rows, so the kernel costs its launch in decode; 41 us at
// 3.1 TB/s for 2,048 rows of 64 query heads and 8 kv heads of 128.
// A warp takes some neighbouring heads of a row, one after the other: more of them where there are many rows, so
// that what is the same for all heads is looked up less often. Lane i holds elements i, i + 32, ... of a head.
#include "heads.cuh"

struct CacheArgs {
    // f32 [rows, heads, head_dim]; overwritten with what attention needs where `queries_f16` is
    // null.
    float* queries;
    // f32 [rows, kv_heads, head_dim]
    const float* keys;
    // f32 [rows, kv_heads, head_dim]
    const float* values;
    // fp16 [rows, heads, padded_head_dim], zeros from head_dim on; or null.
    __half* queries_f16;
    // [pages, kv_heads] of the key format's blocks.
    uint8_t* key_pages;
    // [pages, kv_heads] of the value format's blocks.
    uint8_t* value_pages;
    // f32 [heads, head_dim] and [kv_heads, head_dim]; null: not normed.
    const float* query_weight;
    const float* key_weight;
    // f32 [rows, 2, angle_pairs]: cosines, then sines.
    const float* angles;
    // u32 [rows]
    const uint32_t* positions;
    // u32 [rows]
    const uint32_t* row_sequences;
    // u32 [sequences, table_stride]
    const uint32_t* page_tables;
    float query_epsilon;
    float key_epsilon;
    int32_t rows;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t padded_head_dim;
    int32_t key_format;
    int32_t value_format;
    // NORM_RMS or NORM_LAYER.
    int32_t query_norm;
    int32_t key_norm;
    int32_t rope_style;
    int32_t rope_pairs;
    int32_t angle_pairs;
    int32_t table_stride;
    // Heads that a warp takes, of queries, keys and values in this order.
    int32_t heads_of_warp;
};

namespace {

using namespace oxl;

constexpr int WARPS = 4;

// Which head of a row, counted from its first query head on: queries, keys, values.
struct HeadOfRow {
    int head;
    bool is_query;
    bool is_key;

    __device__ __forceinline__ HeadOfRow(const CacheArgs& args, int index) : head(index) {
        is_query = head < args.heads;
        if (!is_query) head -= args.heads;
        is_key = !is_query && head < args.kv_heads;
        if (!is_query && !is_key) head -= args.kv_heads;
    }

    // Its first element among those of its kind.
    __device__ __forceinline__ int64_t place(const CacheArgs& args, int row) const {
        return (int64_t(row) * (is_query ? args.heads : args.kv_heads) + head) * args.head_dim;
    }

    template <int PARTS>
    __device__ __forceinline__ void load(const CacheArgs& args, int row, int lane,
                                         float (&x)[PARTS]) const {
        const float* all = is_query ? args.queries : is_key ? args.keys : args.values;
        const float* source = all + place(args, row);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int element = part * GROUP + lane;
            x[part] = element < args.head_dim ? source[element] : 0.0f;
        }
    }
};

// A warp's row, and what all of its heads need, of up to PARTS groups of elements.
template <int PARTS>
struct CacheRow {
    const CacheArgs& args;
    int row;
    int lane;
    int position;
    uint32_t page;
    RopePairs rope;
    RowAngles<PARTS> angles;
    // Room for a head.
    float* shared;

    // Norms, rotates and stores a head. All lanes of a warp take part.
    __device__ __forceinline__ void keep(const HeadOfRow& which, float (&x)[PARTS]) const {
        const int head_dim = args.head_dim;
        if (which.is_query || which.is_key) {
            const float* weights = which.is_query ? args.query_weight : args.key_weight;
            if (weights != nullptr) {
                const HeadNorm norm = {weights + which.head * head_dim,
                                       which.is_query ? args.query_epsilon : args.key_epsilon,
                                       which.is_query ? args.query_norm : args.key_norm};
                normalize(x, norm, head_dim, lane);
            }
            if (args.rope_style != ROPE_NONE) {
                __syncwarp();
#pragma unroll
                for (int part = 0; part < PARTS; ++part) shared[part * GROUP + lane] = x[part];
                __syncwarp();
                rotate_pairs(x, shared, angles, rope, lane);
            }
        }
        const bool is_value = !which.is_query && !which.is_key;
        const HeadLayout layout = {is_value ? args.value_format : args.key_format, head_dim};
        if (layout.is_quantised()) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                if (part * GROUP < head_dim) x[part] = rotate_group(x[part], lane);
            }
        }
        if (which.is_query) {
            keep_query(which, x);
            return;
        }
        uint8_t* pages = which.is_key ? args.key_pages : args.value_pages;
        uint8_t* block = head_page(pages, layout, args.kv_heads, page, which.head);
        // From shared memory, so that one copy of the code that encodes serves all groups.
        __syncwarp();
#pragma unroll
        for (int part = 0; part < PARTS; ++part) shared[part * GROUP + lane] = x[part];
#pragma unroll 1
        for (int part = 0; part * GROUP < head_dim; ++part) {
            const float element = shared[part * GROUP + lane];
            store_group(block, layout, position % PAGE_TOKENS, part, element, lane, true);
        }
    }

    __device__ __forceinline__ void keep_query(const HeadOfRow& which,
                                               const float (&x)[PARTS]) const {
        const int64_t head = int64_t(row) * args.heads + which.head;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int element = part * GROUP + lane;
            if (args.queries_f16 == nullptr) {
                if (element < args.head_dim) args.queries[head * args.head_dim + element] = x[part];
            } else if (element < args.padded_head_dim) {
                args.queries_f16[head * args.padded_head_dim + element] = limited_half(x[part]);
            }
        }
    }
};

template <int PARTS>
__device__ __forceinline__ void cache(const CacheArgs& args) {
    __shared__ float heads_of_warps[WARPS][PARTS * GROUP];
    const int warp = threadIdx.x / WARP_LANES;
    const int lane = threadIdx.x % WARP_LANES;
    const int heads_of_row = args.heads + 2 * args.kv_heads;
    const int tasks_of_row = (heads_of_row + args.heads_of_warp - 1) / args.heads_of_warp;
    // 32 bits: a division of 64 costs as much as a head's arithmetic.
    const uint32_t task = blockIdx.x * WARPS + warp;
    const int row = min(int(task / tasks_of_row), args.rows - 1);
    const bool has_task = task < uint32_t(args.rows) * tasks_of_row;
    const int first = int(task % tasks_of_row) * args.heads_of_warp;
    const int end = min(first + args.heads_of_warp, heads_of_row);

    // The step's inputs are there before the wait (step.cu).
    const int position = int(__ldcg(args.positions + row));
    const int64_t table = int64_t(__ldcg(args.row_sequences + row)) * args.table_stride;
    const uint32_t page = __ldcg(args.page_tables + table + position / PAGE_TOKENS);
    const RopePairs rope = {args.rope_style, args.rope_pairs};
    CacheRow<PARTS> of_row = {args, row, lane, position, page, rope, {}, heads_of_warps[warp]};
    if (args.rope_style != ROPE_NONE && first < args.heads + args.kv_heads) {
        const float* angles = args.angles + int64_t(row) * 2 * args.angle_pairs;
        of_row.angles.load(angles, args.angle_pairs, rope, lane);
    }
    dependency_wait();
    dependency_trigger();
    if (!has_task) return;

    HeadOfRow which(args, first);
    float x[PARTS];
    which.load(args, row, lane, x);
#pragma unroll 1
    for (int index = first; index < end; ++index) {
        // The next one is on its way meanwhile.
        const HeadOfRow next(args, min(index + 1, end - 1));
        float ahead[PARTS];
        next.load(args, row, lane, ahead);
        of_row.keep(which, x);
        which = next;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) x[part] = ahead[part];
    }
}

}  // namespace

// Grid: a warp for every `heads_of_warp` heads of rows of heads + 2 * kv_heads; 128 threads.
extern "C" __global__ void __launch_bounds__(128)
oxl_cache_128(const __grid_constant__ CacheArgs args) {
    cache<128 / GROUP>(args);
}

// The same for heads of more than 128 dimensions.
extern "C" __global__ void __launch_bounds__(128)
oxl_cache_256(const __grid_constant__ CacheArgs args) {
    cache<256 / GROUP>(args);
}
