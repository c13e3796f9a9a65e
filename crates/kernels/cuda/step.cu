// The inputs of a step, from one packed copy to where the step's kernels expect them.
//
// Bytes: the packed inputs are read and written once, angles written once; all of it is a few
// hundred kilobytes at most, so the kernel costs its launch.
#include "common.cuh"

struct StepRope {
    // f32 [pairs]: radians a position.
    const float* inverse_frequencies;
    // Multiplies cosine and sine.
    float attention_factor;
    int32_t pairs;
};

constexpr int MOST_ROPES = 4;

struct BeginStepArgs {
    // u32: [rows] token ids, [rows] positions, [rows] sequences, [logit_rows] rows whose logits
    // are wanted, [sequences, pages] page tables, [rows, 8] attention's tiles.
    const uint32_t* packed;
    uint32_t* token_ids;
    uint32_t* positions;
    uint32_t* row_sequences;
    uint32_t* logit_rows;
    // [sequences, table_stride]
    uint32_t* page_tables;
    // [rows, 8]
    uint32_t* tiles;
    // f32 [ropes, angle_rows, 2, angle_pairs]: cosines, then sines.
    float* angles;
    StepRope ropes[MOST_ROPES];
    int32_t rows;
    int32_t logit_row_count;
    int32_t sequences;
    int32_t pages;
    int32_t table_stride;
    int32_t rope_count;
    int32_t angle_rows;
    int32_t angle_pairs;
};

namespace {

__device__ __forceinline__ void begin_step(const BeginStepArgs& args) {
    const int index = blockIdx.x;
    const uint32_t* positions = args.packed + args.rows;
    const uint32_t* logit_rows = args.packed + 3 * args.rows;
    const uint32_t* tables = logit_rows + args.logit_row_count;
    if (index < args.sequences) {
        for (int page = threadIdx.x; page < args.pages; page += blockDim.x) {
            const int64_t from = int64_t(index) * args.pages + page;
            args.page_tables[int64_t(index) * args.table_stride + page] = tables[from];
        }
    }
    if (index >= args.rows) return;
    const uint32_t* tiles = tables + int64_t(args.sequences) * args.pages;
    if (threadIdx.x < 8) {
        args.tiles[8 * index + threadIdx.x] = tiles[8 * index + threadIdx.x];
    }
    const uint32_t position = positions[index];
    if (threadIdx.x == 0) {
        args.token_ids[index] = args.packed[index];
        args.positions[index] = position;
        args.row_sequences[index] = args.packed[2 * args.rows + index];
        if (index < args.logit_row_count) args.logit_rows[index] = logit_rows[index];
    }
    for (int rope = 0; rope < args.rope_count; ++rope) {
        const StepRope& r = args.ropes[rope];
        float* cosines =
            args.angles + (int64_t(rope) * args.angle_rows + index) * 2 * args.angle_pairs;
        float* sines = cosines + args.angle_pairs;
        for (int pair = threadIdx.x; pair < r.pairs; pair += blockDim.x) {
            // The angle is defined as an f32 product; its cosine is then taken in f64, since
            // angles reach tens of thousands. In multiples of pi, whose reduction is exact; the
            // product's own rounding is below 1e-10 of a turn.
            constexpr double INVERSE_PI = 0.31830988618379067154;
            const double angle = __fmul_rn(float(position), r.inverse_frequencies[pair]);
            double sine, cosine;
            sincospi(angle * INVERSE_PI, &sine, &cosine);
            cosines[pair] = float(cosine) * r.attention_factor;
            sines[pair] = float(sine) * r.attention_factor;
        }
    }
}

}  // namespace

// One block a row or sequence, whichever there are more of.
//
// Lets the next kernel start only when all is written, so that every kernel of the step may read its
// inputs before its own wait (through the second-level cache: the first may hold older ones).
extern "C" __global__ void oxl_begin_step(const __grid_constant__ BeginStepArgs args) {
    oxl::dependency_wait();
    begin_step(args);
    __threadfence();
    oxl::dependency_trigger();
}
