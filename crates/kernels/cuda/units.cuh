// Weights on their way through a warp's ring in shared memory, and their products: what the kernels
// of few and of more rows share.
//
// K is cut into ranges, one a warp, and a range into *units*: up to four neighbouring blocks of one
// group. What is done once a unit is a quarter of what would be done once a block: instructions
// are what these kernels run out of first. A warp copies the units of its range of one tile after
// the other, scales included, across tiles and matrices without a stop.
#pragma once

#include "linear.cuh"

namespace oxl {

// Units that a warp has in its ring.
constexpr int SLOTS = 2;

// Bytes of a unit at most, and of its place in a ring: weights, then scales.
constexpr int UNIT_BYTES = 2048;
constexpr int SLOT_BYTES = UNIT_BYTES + 128;

// Where GPTQ's zeros lie behind a unit's scales.
constexpr int ZEROS_AT = 64;

// Bytes of a lane's piece of a copy.
constexpr int PIECE_BYTES = 16;

// Blocks of a full unit.
__device__ __forceinline__ constexpr int unit_blocks(int bits) {
    return bits <= 4 ? 4 : bits <= 8 ? 2 : 1;
}

// A unit: the same for all tiles. `Unit` of `ranges.rs`. Units of a run look alike.
struct Unit {
    uint32_t shape;  // kind | blocks << 8 | ends its range << 11 | m_g (fp16 bits) << 16
    uint32_t place;  // bytes / BLOCK_UNIT_BYTES | units from it to its run's end << 5 | group << 12
};

// From a slot's first byte in its ring to the other's.
static_assert(SLOTS == 2, "slots take turns");
__device__ __forceinline__ int next_slot(int slot) { return SLOT_BYTES - slot; }

// Kinds of units are bits of a weight, and one more.
constexpr int KIND_GPTQ = 1;

__device__ __forceinline__ int kind_of(uint32_t shape) { return shape & 0xff; }
__device__ __forceinline__ int blocks_of(uint32_t shape) { return shape >> 8 & 7; }
__device__ __forceinline__ bool ends_range(uint32_t shape) { return (shape >> 11 & 1) != 0; }
__device__ __forceinline__ int bytes_of(uint32_t place) { return (place & 31) * BLOCK_UNIT_BYTES; }
__device__ __forceinline__ int run_of(uint32_t place) { return place >> 5 & 127; }

// A block in a ring, as `take_weights` reads it.
struct BlockReader {
    const char* block;

    __device__ __forceinline__ uint4 quad(int byte) const {
        return *reinterpret_cast<const uint4*>(block + byte);
    }
    __device__ __forceinline__ uint2 two(int byte) const {
        return *reinterpret_cast<const uint2*>(block + byte);
    }
    __device__ __forceinline__ uint32_t one(int byte) const {
        return *reinterpret_cast<const uint32_t*>(block + byte);
    }
};

// The matrix that has a column tile of the launch.
__device__ __forceinline__ int matrix_of(const LinearArgs& args, int item) {
    int index = 0;
#pragma unroll 1
    while (index + 1 < args.matrix_count && item >= args.matrices[index + 1].first_item) ++index;
    return index;
}

// What a warp multiplies of every tile of a matrix. `WarpRange` of `ranges.rs`.
struct WarpRange {
    int32_t units;       // how many
    int32_t first_unit;  // BLOCK_UNIT_BYTES before its bytes in a tile
    int32_t bytes;       // of it in a tile
    int32_t reserved;
};

// What a warp copies into its ring.
struct CopyCursor {
    const uint8_t* source;  // of the next unit, at this lane's piece
    const uint8_t* scales;  // of the tile's group 0, at this lane's piece
    int scale_bytes;        // from a group's piece to the next one's; 0: the lane copies none
    int skip;               // from the end of the range's bytes to those of the warp's next tile
    const Unit* units;      // of the matrix
    const Unit* unit;       // the next one
    const Unit* units_end;
    int slot;               // the next unit's
    int item;
    int matrix_end;         // first item past the matrix, or the CTA's end
    int index;              // of the matrix
    int stride;             // from the warp's tile to its next one

    // Goes to `item`, a tile of matrix `index`, whose units are `own_units`.
    __device__ __forceinline__ void begin_matrix(const LinearArgs& args, const WarpRange& range,
                                                 const Unit* own_units, int item_end, int lane) {
        const LinearMatrix& target = args.matrices[index];
        const TileMatrix& matrix = target.matrix;
        matrix_end = min(target.first_item + matrix.tiles, item_end);
        units = own_units;
        unit = units;
        units_end = units + range.units;
        const int tile = item - target.first_item;
        const int64_t first = int64_t(tile) * matrix.tile_units + range.first_unit;
        source = matrix.weights + first * BLOCK_UNIT_BYTES + lane * PIECE_BYTES;
        skip = stride * matrix.tile_units * BLOCK_UNIT_BYTES - range.bytes;
        scale_bytes = 0;
        const uint8_t* start = static_cast<const uint8_t*>(matrix.scales) + lane * PIECE_BYTES;
        if (matrix.encoding == ENCODING_EXL2) {
            if (lane == 0) scale_bytes = 16;
        } else if (matrix.encoding == ENCODING_GPTQ) {
            scale_bytes = lane < 4 ? 64 : lane < 6 ? 32 : 0;
            if (lane >= 4) {
                start = reinterpret_cast<const uint8_t*>(matrix.zeros) + (lane - 4) * PIECE_BYTES;
            }
        }
        const int scales_of_tile = matrix.groups * scale_bytes;
        scales = start + int64_t(tile) * scales_of_tile;
    }

    // Asks for the next unit.
    __device__ __forceinline__ void copy(char* ring, int lane) {
        char* to = ring + slot + lane * PIECE_BYTES;
        const uint32_t place = unit->place;
        const int bytes = bytes_of(place);
        constexpr int STEP = WARP_LANES * PIECE_BYTES;
        if (bytes == UNIT_BYTES) {
#pragma unroll
            for (int at = 0; at < UNIT_BYTES; at += STEP) {
                copy_async(shared_address(to + at), source + at);
            }
        } else {
            const int left = bytes - lane * PIECE_BYTES;
#pragma unroll
            for (int at = 0; at < UNIT_BYTES; at += STEP) {
                copy_async_if(left - at, shared_address(to + at), source + at);
            }
        }
        copy_async_if(scale_bytes, shared_address(to + UNIT_BYTES),
                      scales + uint64_t(place >> 12) * uint32_t(scale_bytes));
        source += bytes;
        slot = next_slot(slot);
        ++unit;
    }

    __device__ __forceinline__ void next_tile(const LinearArgs& args) {
        unit = units;
        source += skip;
        scales += stride * args.matrices[index].matrix.groups * scale_bytes;
    }
};

// A row's activations of a block.
constexpr int ROW_BLOCK_BYTES = BLOCK_INPUTS * sizeof(__half);

// A lane's activations of the next block, in shared memory: [block, row, 32].
struct SharedRows {
    const char* next;
    int block_bytes;

    // Of a block from the next one on.
    __device__ __forceinline__ uint4 of(int block, int tile) const {
        return *reinterpret_cast<const uint4*>(next + block * block_bytes +
                                               tile * ROWS_OF_TILE * ROW_BLOCK_BYTES);
    }
};

// Two to a power that a normal number has. Folds to a constant.
__device__ __forceinline__ float two_to(int power) { return __uint_as_float((127 + power) << 23); }

// The scales of a lane's outputs in a unit, times what makes codes of `take_weights`' numbers.
template <int BITS, bool IS_GPTQ>
__device__ __forceinline__ void unit_scales(const char* slot, uint32_t shape, int lane,
                                            float (&scales)[4]) {
    const char* at = slot + UNIT_BYTES;
    __half2 pairs[2];
    if constexpr (IS_GPTQ) {
        const uint2 stored = *reinterpret_cast<const uint2*>(at + lane / 4 * 8);
        pairs[0] = *reinterpret_cast<const __half2*>(&stored.x);
        pairs[1] = *reinterpret_cast<const __half2*>(&stored.y);
    } else {
        // Codes e as 1024 + e, in the order of outputs; (e + 1)^2 has at most nine bits, so that its product
        // with the group's largest scale is rounded once, as `decode_scales` does it.
        uint32_t codes = *reinterpret_cast<const uint16_t*>(at + lane / 4 * 2);
        codes |= codes << 12;
        const __half2 largest = __half2half2(__ushort_as_half(shape >> 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t code = (codes >> (8 * i) & 0x000f000fu) | MAGIC;
            const __half2 root =
                __hadd2_rn(*reinterpret_cast<const __half2*>(&code), __float2half2_rn(-1023.0f));
            pairs[i] = __hmul2_rn(__hmul2_rn(root, root), largest);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __half2 pair = pairs[i / 2];
        const float scale = i % 2 == 0 ? __low2float(pair) : __high2float(pair);
        scales[i] = scale * two_to(24 - field_bit(BITS, i));
    }
}

// Zero points of a lane's outputs in a unit, negated, in both halves as codes are.
template <int BITS, bool IS_GPTQ>
__device__ __forceinline__ void negative_zeros(const char* slot, int lane, uint32_t (&zeros)[4]) {
    uint32_t stored = 0;
    if constexpr (IS_GPTQ) {
        stored = *reinterpret_cast<const uint32_t*>(slot + UNIT_BYTES + ZEROS_AT + lane / 4 * 4);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t zero = IS_GPTQ ? stored >> (8 * i) & 0xff : 1u << (BITS - 1);
        zeros[i] = in_halves(zero, field_bit(BITS, i)) | 0x80008000u;
    }
}

template <int ROW_TILES>
__device__ __forceinline__ void clear(Sums<ROW_TILES>& sums) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[tile][i / 4][i % 4] = 0.0f;
    }
}

// A warp's stream of units through its ring, multiplied in turn. IS_GATED: it has tiles of gate, then as many of up.
template <int ROW_TILES, bool IS_GATED = false>
struct Stream {
    // Blocks of a full unit that are multiplied without a branch between them.
    static constexpr int UNROLLED_BLOCKS = ROW_TILES == 1 ? 4 : 2;

    const LinearArgs& args;
    char* ring;
    const Unit* all_units;    // of all matrices
    const WarpRange* ranges;  // of all matrices
    int matrix_units;         // room for a matrix' among `all_units`
    int lane;
    int item_end;
    CopyCursor cursor;
    int slot;  // of the next unit to multiply
    SharedRows x;
    Sums<ROW_TILES> sums;
    // If it is gated: the first item past its own of gate, and how many are between it and those of up.
    int gate_end;
    int skip;

    // Starts with `item`, which is of matrix `index` or a later one, or the CTA's end.
    __device__ __forceinline__ void start(int item, int index) {
        cursor.slot = 0;
        cursor.item = item;
        cursor.index = index;
        begin_matrix();
        find_matrix();
#pragma unroll 1
        for (int i = 0; i < SLOTS; ++i) copy_next();
    }

    __device__ __forceinline__ void begin_matrix() {
        const int index = cursor.index;
        cursor.begin_matrix(args, ranges[index], all_units + index * matrix_units, item_end, lane);
    }

    // Goes on to the matrix of the cursor's tile.
    __device__ __forceinline__ void find_matrix() {
        while (cursor.item >= cursor.matrix_end && cursor.item < item_end) {
            ++cursor.index;
            begin_matrix();
        }
    }

    // Asks for one more unit, if there is one.
    __device__ __forceinline__ void copy_next() {
        if (cursor.item < item_end) {
            cursor.copy(ring, lane);
            if (cursor.unit == cursor.units_end) {
                cursor.item += cursor.stride;
                if (IS_GATED && cursor.item == gate_end) cursor.item += skip;
                if (cursor.item < cursor.matrix_end) {
                    cursor.next_tile(args);
                } else {
                    find_matrix();
                }
            }
        }
        commit_copies();
    }

    // sums += weights * activations over a unit that begins at `first`.
    template <int BITS, bool IS_GPTQ, int UNROLL>
    __device__ __forceinline__ void multiply_unit(const Unit* unit, const char* first, int blocks) {
        Sums<ROW_TILES> part;
        clear<ROW_TILES>(part);
        uint32_t zeros[4];
        if constexpr (BITS != BITS_FLOAT) negative_zeros<BITS, IS_GPTQ>(first, lane, zeros);
#pragma unroll UNROLL
        for (int i = 0; i < blocks; ++i) {
            const BlockReader reader = {first + i * (BITS * BLOCK_UNIT_BYTES)};
            LaneWeights weights;
            take_weights<BITS>(reader, lane, weights);
            if constexpr (BITS != BITS_FLOAT) add_zeros(zeros, weights);
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                multiply_block(weights, x.of(i, tile), part[tile]);
            }
        }
        x.next += blocks * x.block_bytes;
        float scales[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        if constexpr (BITS != BITS_FLOAT) {
            unit_scales<BITS, IS_GPTQ>(first, unit->shape, lane, scales);
        }
        add_scaled<ROW_TILES>(scales, part, sums);
    }

    // The same over a run of units.
    template <int BITS, bool IS_GPTQ>
    __device__ __forceinline__ void multiply_run(const Unit* unit, const Unit* end) {
        const int blocks = blocks_of(unit->shape);
#pragma unroll 1
        for (; unit != end; ++unit) {
            wait_for_copies<SLOTS - 1>();
            __syncwarp();
            const char* first = ring + slot;
            if (blocks == unit_blocks(BITS)) {
                multiply_unit<BITS, IS_GPTQ, UNROLLED_BLOCKS>(unit, first, unit_blocks(BITS));
            } else {
                multiply_unit<BITS, IS_GPTQ, 1>(unit, first, blocks);
            }
            slot = next_slot(slot);
            __syncwarp();
            copy_next();
        }
    }

    // sums += weights * activations over the run that begins with `unit`; gives its end.
    __device__ __forceinline__ const Unit* multiply(const Unit* unit) {
        const Unit* end = unit + run_of(unit->place);
        const int kind = kind_of(unit->shape);
        // The usual one first.
        if (kind == 4) {
            multiply_run<4, false>(unit, end);
            return end;
        }
        switch (kind) {
            case KIND_GPTQ:
                multiply_run<4, true>(unit, end);
                break;
            case 2:
                multiply_run<2, false>(unit, end);
                break;
            case 3:
                multiply_run<3, false>(unit, end);
                break;
            case 5:
                multiply_run<5, false>(unit, end);
                break;
            case 6:
                multiply_run<6, false>(unit, end);
                break;
            case 8:
                multiply_run<8, false>(unit, end);
                break;
            default:
                multiply_run<BITS_FLOAT, false>(unit, end);
        }
        return end;
    }

    // The sums of one tile over the warp's range, whose units are `unit` to `units_end`; its
    // activations begin at `x_lane`.
    __device__ __forceinline__ void multiply_range(const Unit* unit, const Unit* units_end,
                                                   const char* x_lane) {
        x.next = x_lane;
        clear<ROW_TILES>(sums);
#pragma unroll 1
        while (unit != units_end) unit = multiply(unit);
    }
};

}  // namespace oxl
