// Norms and rotates the heads of queries and keys, and stores keys and values in their pages.
//
// Bytes: queries, keys and values are read once (f32), fp16 queries and the stored vectors
// written once: well under a megabyte for 64 rows, so the kernel costs its launch in decode.
// One warp a head of a row; lane i holds elements i, i + 32, ... of the head.
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
    int32_t unused;
};

namespace {

using namespace oxl;

constexpr int WARPS = 4;
constexpr int MOST_HEAD_DIM = 256;
constexpr int PARTS = MOST_HEAD_DIM / GROUP;

}  // namespace

// Grid: a warp for each of rows * (heads + 2 * kv_heads) heads; 128 threads.
extern "C" __global__ void __launch_bounds__(128)
oxl_cache(const __grid_constant__ CacheArgs args) {
    __shared__ float heads_of_warps[WARPS][MOST_HEAD_DIM];
    const int warp = threadIdx.x / WARP_LANES;
    const int lane = threadIdx.x % WARP_LANES;
    const int heads_of_row = args.heads + 2 * args.kv_heads;
    // 32 bits: a division of 64 costs as much as a head's arithmetic.
    const uint32_t task = blockIdx.x * WARPS + warp;
    const int row = min(int(task / heads_of_row), args.rows - 1);
    const bool has_task = task < uint32_t(args.rows) * heads_of_row;
    int head = int(task % heads_of_row);
    const bool is_query = head < args.heads;
    if (!is_query) head -= args.heads;
    const bool is_key = !is_query && head < args.kv_heads;
    if (!is_query && !is_key) head -= args.kv_heads;

    // The step's inputs are there before the wait (step.cu).
    const int position = int(__ldcg(args.positions + row));
    const int64_t table = int64_t(__ldcg(args.row_sequences + row)) * args.table_stride;
    const uint32_t page = __ldcg(args.page_tables + table + position / PAGE_TOKENS);
    RowAngles<PARTS> angles;
    const RopePairs rope = {args.rope_style, args.rope_pairs};
    if (args.rope_style != ROPE_NONE && (is_query || is_key)) {
        const float* of_row = args.angles + int64_t(row) * 2 * args.angle_pairs;
        angles.load(of_row, args.angle_pairs, rope, lane);
    }
    dependency_wait();
    dependency_trigger();
    if (!has_task) return;

    const int head_dim = args.head_dim;
    const int64_t from =
        (int64_t(row) * (is_query ? args.heads : args.kv_heads) + head) * head_dim;
    const float* source = (is_query ? args.queries : is_key ? args.keys : args.values) + from;
    float x[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int element = part * GROUP + lane;
        x[part] = element < head_dim ? source[element] : 0.0f;
    }
    if (is_query || is_key) {
        const float* weights = is_query ? args.query_weight : args.key_weight;
        if (weights != nullptr) {
            const HeadNorm norm = {weights + head * head_dim,
                                   is_query ? args.query_epsilon : args.key_epsilon,
                                   is_query ? args.query_norm : args.key_norm};
            normalize(x, norm, head_dim, lane);
        }
        if (args.rope_style != ROPE_NONE) {
            float* shared = heads_of_warps[warp];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) shared[part * GROUP + lane] = x[part];
            __syncwarp();
            rotate_pairs(x, shared, angles, rope, lane);
        }
    }
    const HeadLayout layout = {is_query || is_key ? args.key_format : args.value_format, head_dim};
    if (layout.is_quantised()) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (part * GROUP < head_dim) x[part] = rotate_group(x[part], lane);
        }
    }
    if (is_query) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int element = part * GROUP + lane;
            if (args.queries_f16 == nullptr) {
                if (element < head_dim) args.queries[from + element] = x[part];
            } else if (element < args.padded_head_dim) {
                const int64_t to =
                    (int64_t(row) * args.heads + head) * args.padded_head_dim + element;
                args.queries_f16[to] = limited_half(x[part]);
            }
        }
        return;
    }
    uint8_t* pages = is_key ? args.key_pages : args.value_pages;
    uint8_t* block = head_page(pages, layout, args.kv_heads, page, head);
    // From shared memory, so that one copy of the code that encodes serves all groups.
    __syncwarp();
#pragma unroll
    for (int part = 0; part < PARTS; ++part) heads_of_warps[warp][part * GROUP + lane] = x[part];
#pragma unroll 1
    for (int part = 0; part * GROUP < head_dim; ++part) {
        const float element = heads_of_warps[warp][part * GROUP + lane];
        store_group(block, layout, position % PAGE_TOKENS, part, element, lane, true);
    }
}
