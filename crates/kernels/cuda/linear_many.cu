// y = store(W x + bias) for many rows: weights are taken apart on their way from shared memory to the tensor
// cores, so that they are read as they are stored and never written as fp16.
//
// Floor: 2 rows K N operations; the library's products of fp16 give 650 to 780 TFLOP/s on an H100, whose power is
// the limit. What a warp takes apart serves all rows of its block of threads, the more the better.
//
// A cluster of two blocks of threads (CTAs) goes through *items*, each of which is 256 outputs (eight column tiles,
// four a CTA, half of one a warp) and ROWS rows. One warp of each CTA fetches what is multiplied, 64 inputs at a
// time (a *chunk*: two blocks of weights), into a ring in shared memory: weights for its own CTA, half of the rows
// for both. One warp prepares scales. Two groups of four warps take weights apart and multiply them: while a
// chunk's products go on, the next chunk is taken apart. Neighbouring clusters have other rows and the same weights.
//
// A weight is f16((code - zero) * scale) here, as `oxl_dequantise` makes it, and a sum goes through K in order.
//
// Rows lie in chunks: f16 [chunks, rows rounded up, 64], in which the 16-byte pieces of row r are at
// piece ^ r % 8, and the inputs of a block as `chunk_place` says. Compute capability 9.0 alone; others
// do not have these kernels.
#include "many.cuh"

#include "group_product.cuh"
#include "rows.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace oxl {

// A lane's weights of a chunk.
using ChunkWeights = HalfWeights[CHUNK_BLOCKS];

// Where a lane's half of a tile lies in a chunk.
struct ChunkPlace {
    uint32_t weights;
    uint32_t scales;
    int half;
    int lane;
};

// Takes a block apart that begins so many bytes after the chunk's first, and is its `i`-th.
template <int BITS>
__device__ __forceinline__ void take_block(const ChunkPlace& place, int bytes, int i,
                                           HalfWeights& weights) {
    HalfScales scales;
    scales.load(place.scales + i * SCALE_BYTES);
    take_half<BITS>(place.weights + bytes, place.lane, place.half, weights);
    finish_half<BITS>(scales, weights);
}

// The same where only a call knows the bits; none for what is not there.
__device__ __forceinline__ void take_any_block(int bits, const ChunkPlace& place, int bytes, int i,
                                               HalfWeights& weights) {
    switch (bits) {
        case 2: take_block<2>(place, bytes, i, weights); break;
        case 3: take_block<3>(place, bytes, i, weights); break;
        case 4: take_block<4>(place, bytes, i, weights); break;
        case 5: take_block<5>(place, bytes, i, weights); break;
        case 6: take_block<6>(place, bytes, i, weights); break;
        case 8: take_block<8>(place, bytes, i, weights); break;
        case BITS_FLOAT: take_block<BITS_FLOAT>(place, bytes, i, weights); break;
        default: weights = {};
    }
}

// Takes a chunk apart whose blocks have so many bits.
template <int BITS>
__device__ __forceinline__ void take_both(const ChunkPlace& place, ChunkWeights& weights) {
#pragma unroll
    for (int i = 0; i < CHUNK_BLOCKS; ++i) {
        take_block<BITS>(place, i * BITS * BLOCK_UNIT_BYTES, i, weights[i]);
    }
}

// The same where only a call knows them. `second` is 0 where there is no second block.
__device__ __forceinline__ void take_chunk(int first, int second, const ChunkPlace& place,
                                           ChunkWeights& weights) {
    // Comparisons take less time than a table of where to go.
    if (first != second) {
        take_any_block(first, place, 0, 0, weights[0]);
        take_any_block(second, place, first * BLOCK_UNIT_BYTES, 1, weights[1]);
    } else if (first == 4) {
        take_both<4>(place, weights);
    } else if (first == 5) {
        take_both<5>(place, weights);
    } else if (first == 3) {
        take_both<3>(place, weights);
    } else if (first == 6) {
        take_both<6>(place, weights);
    } else if (first == 2) {
        take_both<2>(place, weights);
    } else if (first == 8) {
        take_both<8>(place, weights);
    } else {
        take_both<BITS_FLOAT>(place, weights);
    }
}

// Starts the products of a chunk with its rows, as a group.
template <int ROWS>
__device__ __forceinline__ void start_products(const ChunkWeights& weights, uint32_t x, bool adds,
                                               float (&sums)[ROWS / 2]) {
    group_fence();
    const uint64_t all_rows = describe_rows(x);
#pragma unroll
    for (int step = 0; step < 2 * CHUNK_BLOCKS; ++step) {
        const auto& pairs = weights[step / 2].pairs;
        const int first = 2 * (step % 2);
        GroupProduct<ROWS>::start(sums, pairs[0][first], pairs[1][first], pairs[0][first + 1],
                                  pairs[1][first + 1], all_rows + next_inputs(step),
                                  adds || step > 0);
    }
    group_commit();
}

// Says to both CTAs that a warp has read a stage: each has fetched half of the rows. What threads of the own CTA
// write there (scales) must wait for every lane, and compute-sanitizer believes no other's word.
__device__ __forceinline__ void release(uint32_t barrier, int lane, int rank) {
    barrier_arrive(barrier);
    if (lane == 0) barrier_arrive_at(barrier, rank ^ 1);
}

// Multiplies an item: one of the warps of a group. While products of a chunk go on, the next one is taken apart.
template <int ROWS>
__device__ __forceinline__ void multiply_item(const TileMatrix& matrix, Ring<ROWS>& ring, int rank,
                                              int warp, int lane, float (&sums)[ROWS / 2]) {
    constexpr int SETS = 2;
    const int blocks = matrix.blocks;
    const int half = warp % 2;
    const uint32_t own_scales = (lane / 4 * 2 + half) * sizeof(HalfScales);
    ChunkWeights weights[SETS];
    uint32_t busy = 0;
    int end = 0;
    int bits = 0;
#pragma unroll 1
    for (int start = 0; start < blocks; start += SETS * CHUNK_BLOCKS) {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int block = start + set * CHUNK_BLOCKS;
            if (block < blocks) {
                if (block >= end) bits = section_bits(matrix, block, end);
                int second = bits;
                if (block + 1 >= end) {
                    second = block + 1 < blocks ? section_bits(matrix, block + 1, end) : 0;
                }
                ring.wait_full();
                const ChunkPlace place = {ring.weights(warp / 2), ring.scales(warp / 2) + own_scales,
                                          half, lane};
                take_chunk(bits, second, place, weights[set]);
                bits = second;
                start_products<ROWS>(weights[set], ring.x(), block > 0, sums);
                // The chunk before is done then: its weights may be written again, and its rows.
                group_wait<1>();
                if (busy != 0) release(busy, lane, rank);
                busy = ring.empty();
                ring.advance();
            }
        }
    }
    group_wait<0>();
    release(busy, lane, rank);
}

// Outputs of a row to where they belong: four, or as many as there are. Each is added to once, so that
// there is one order of additions.
__device__ __forceinline__ void store_four(const LinearManyArgs& args, float* out, int there,
                                           bool is_wide, const float4& y) {
    if (is_wide) {
        if (args.accumulate) {
            add_four(out, y);
        } else {
            *reinterpret_cast<float4*>(out) = y;
        }
        return;
    }
    const float each[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i < there) out[i] = args.accumulate ? out[i] + each[i] : each[i];
    }
}

// What makes results of a warp's sums: their factor, and the biases of its outputs g and g + 8.
struct Finish {
    float scale;
    float bias[2];

    // Of the half of a tile that begins at output `first`.
    __device__ __forceinline__ Finish(const LinearMatrix& target, int first, int lane,
                                      float factor) {
        scale = target.matrix.scale * factor;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int output = first + 8 * i + lane / 4;
            const bool has_bias = target.bias != nullptr && output < target.out_features;
            bias[i] = has_bias ? __ldg(target.bias + output) * factor : 0.0f;
        }
    }

    // Puts results of eight rows into a buffer, OUT_STRIDE floats to a row.
    template <int COUNT>
    __device__ __forceinline__ void put(const float (&sums)[COUNT], int eight, int lane,
                                        float* buffer) const {
        float* to = buffer + lane % 4 * 2 * OUT_STRIDE + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            to[8 * i] = fmaf(scale, sums[4 * eight + 2 * i], bias[i]);
            to[8 * i + OUT_STRIDE] = fmaf(scale, sums[4 * eight + 2 * i + 1], bias[i]);
        }
    }
};

// A lane's four results of eight rows in a buffer, of row lane / 4.
__device__ __forceinline__ float4 four_of(const float* buffer, int lane) {
    return *reinterpret_cast<const float4*>(buffer + lane / 4 * OUT_STRIDE + lane % 4 * 4);
}

// A warp's sums of its half of a tile to where they belong, by way of shared memory: eight rows at a time.
template <int ROWS>
__device__ __forceinline__ void store_sums(const LinearManyArgs& args, const LinearMatrix& target,
                                           int first, int first_row, int lane, float* room,
                                           const float (&sums)[ROWS / 2]) {
    const int width = target.out_features;
    const Finish finish(target, first, lane, args.accumulate ? args.store_scale : 1.0f);
    const int output = first + lane % 4 * 4;
    const int there = width - output;
    const bool is_wide = width % 4 == 0;
    int row = first_row + lane / 4;
    float* out = target.out + int64_t(row) * width + output;
#pragma unroll
    for (int eight = 0; eight < ROWS / 8; ++eight) {
        // Two buffers, so that lanes meet once.
        float* buffer = room + eight % 2 * OUT_FLOATS;
        finish.put(sums, eight, lane, buffer);
        __syncwarp();
        const float4 y = four_of(buffer, lane);
        if (row < args.rows && there > 0) store_four(args, out, there, is_wide, y);
        row += 8;
        out += 8 * width;
    }
}

// Waits for the warp that has the same tile of the other of gate and up.
__device__ __forceinline__ void meet_partner(int warp) {
    meet_other_warp(1 + warp % (CONSUMERS / 2));
}

// Stores activation(gate) * up of a half of a tile: two warps, one of which has sums of the gate and the other of up,
// put theirs into their rooms, 16 rows at a time, and each takes eight rows of both.
template <int ROWS>
__device__ __forceinline__ void store_gated(const LinearManyArgs& args, const LinearMatrix& target,
                                            int first, int first_row, int warp, int lane,
                                            float* rooms, const float (&sums)[ROWS / 2]) {
    constexpr int ROOM_FLOATS = 2 * OUT_FLOATS;
    const LinearMatrix& gate = args.matrices[0];
    const int group = warp / (CONSUMERS / 2);
    float* room = rooms + warp * ROOM_FLOATS;
    const float* gate_room = rooms + warp % (CONSUMERS / 2) * ROOM_FLOATS + group * OUT_FLOATS;
    const float* up_room = gate_room + CONSUMERS / 2 * ROOM_FLOATS;
    const Finish finish(target, first, lane, 1.0f);
    int row = first_row + 8 * group + lane / 4;
    __half* out = reinterpret_cast<__half*>(gate.out) + int64_t(row) * gate.out_features + first +
                  lane % 4 * 4;
#pragma unroll
    for (int eight = 0; eight < ROWS / 8; eight += 2) {
        finish.put(sums, eight, lane, room);
        finish.put(sums, eight + 1, lane, room + OUT_FLOATS);
        meet_partner(warp);
        const float4 g = four_of(gate_room, lane);
        const float4 u = four_of(up_room, lane);
        meet_partner(warp);
        const auto gated = [&](float x, float y) {
            return gated_product(args.gate, x, y);
        };
        const __half2 low = clamped_half2(gated(g.x, u.x), gated(g.y, u.y));
        const __half2 high = clamped_half2(gated(g.z, u.z), gated(g.w, u.w));
        if (row < args.rows) {
            *reinterpret_cast<uint2*>(out) = make_uint2(reinterpret_cast<const uint32_t&>(low),
                                                        reinterpret_cast<const uint32_t&>(high));
        }
        row += 16;
        out += 16 * int64_t(gate.out_features);
    }
}

// Multiplies all of the CTA's items. Eight warps.
template <int ROWS>
__device__ __forceinline__ void consume(const LinearManyArgs& args, Ring<ROWS> ring, int warp,
                                        int lane, float* rooms) {
    const int slot = warp / 2;
    for (Items<ROWS> items(args); items.has_item(); items.advance()) {
        const LinearMatrix& target = items.target(slot);
        float sums[ROWS / 2];
        // A warp past the last tile multiplies what lies in the ring: its group needs it.
        multiply_item<ROWS>(target.matrix, ring, items.rank, warp, lane, sums);
        const int tile = items.tile(target, slot);
        if (tile >= target.matrix.tiles) continue;
        const int first = tile * TILE_OUTPUTS + warp % 2 * HALF_OUTPUTS;
        if (items.is_gated()) {
            store_gated<ROWS>(args, target, first, items.first_row(), warp, lane, rooms, sums);
        } else {
            float* room = rooms + warp * 2 * OUT_FLOATS;
            store_sums<ROWS>(args, target, first, items.first_row(), lane, room, sums);
        }
    }
}

template <int ROWS>
__device__ __forceinline__ void multiply_many(const LinearManyArgs& args) {
    DYNAMIC_SHARED(char, shared, 1024);
    __shared__ __align__(8) uint64_t barriers[2 * MOST_STAGES];
    __shared__ __align__(16) float rooms[CONSUMERS * 2 * OUT_FLOATS];
    const int warp = warp_number();
    const int lane = lane_number();
    const Ring<ROWS> ring = {shared_address(barriers),
                             (shared_address(shared) + 1023) & ~1023u,
                             CHUNK_BLOCKS * args.block_bytes,
                             args.stages,
                             0,
                             0};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < args.stages; ++stage) {
            // Full: what is fetched, and the lanes that prepare scales. Empty: `release` of both CTAs.
            barrier_init(ring.barriers + stage * BARRIER_BYTES, 1 + WARP_LANES);
            barrier_init(ring.barriers + (MOST_STAGES + stage) * BARRIER_BYTES,
                         CONSUMERS * (WARP_LANES + 1));
        }
        barriers_are_made();
    }
    cluster_meet();
    dependency_trigger();
    dependency_wait();
    if (warp < CONSUMERS) {
        take_registers<232>();
        consume<ROWS>(args, ring, warp, lane, rooms);
    } else {
        give_registers<40>();
        if (warp == CONSUMERS) {
            fetch<ROWS>(args, ring, lane);
        } else if (warp == CONSUMERS + 1) {
            prepare_scales<ROWS>(args, ring, lane);
        }
    }
    // Until then the other CTA may still write here.
    __syncwarp();
    cluster_meet();
}

}  // namespace oxl

// Grid: multiprocessors, in clusters of two, at most one cluster a pair of an item and ROWS rows. Dynamic shared
// memory: 1,024 bytes and `stages` times ROWS * 128 + 2,048 + 8 * block_bytes.
extern "C" __global__ void __cluster_dims__(oxl::CLUSTER, 1, 1)
    __launch_bounds__(oxl::MANY_THREADS, 1)
        oxl_linear_many_64(const __grid_constant__ LinearManyArgs args) {
    oxl::multiply_many<64>(args);
}

extern "C" __global__ void __cluster_dims__(oxl::CLUSTER, 1, 1)
    __launch_bounds__(oxl::MANY_THREADS, 1)
        oxl_linear_many_128(const __grid_constant__ LinearManyArgs args) {
    oxl::multiply_many<128>(args);
}

extern "C" __global__ void __cluster_dims__(oxl::CLUSTER, 1, 1)
    __launch_bounds__(oxl::MANY_THREADS, 1)
        oxl_linear_many_256(const __grid_constant__ LinearManyArgs args) {
    oxl::multiply_many<256>(args);
}

#endif
