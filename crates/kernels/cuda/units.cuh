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

// A unit: the same for all tiles. `Unit` of `ranges.rs`.
struct Unit {
    uint32_t shape;  // kind | blocks << 8 | ends its group << 11 | ends its range << 12 |
                     // m_g (fp16 bits) << 16
    uint32_t place;  // bytes | group << 12
};

// What neighbouring units have in common that are multiplied in one loop.
constexpr uint32_t SHAPE_OF_RUN = 0xffff;

// From a slot's first byte in its ring to the other's.
static_assert(SLOTS == 2, "slots take turns");
__device__ __forceinline__ int next_slot(int slot) { return SLOT_BYTES - slot; }

// Kinds of units are bits of a weight, and one more.
constexpr int KIND_GPTQ = 1;

__device__ __forceinline__ int kind_of(uint32_t shape) { return shape & 0xff; }
__device__ __forceinline__ int blocks_of(uint32_t shape) { return shape >> 8 & 7; }
__device__ __forceinline__ bool ends_group(uint32_t shape) { return (shape >> 11 & 1) != 0; }
__device__ __forceinline__ bool ends_range(uint32_t shape) { return (shape >> 12 & 1) != 0; }

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

// Copies so many bytes: 8 or 16.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(place), "l"(from) : "memory");
    }
}

// Copies a piece if `left` is positive.
__device__ __forceinline__ void copy_async(char* to, const uint8_t* from, int left) {
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile(
        "{\n\t"
        ".reg .pred is_asked;\n\t"
        "setp.gt.s32 is_asked, %2, 0;\n\t"
        "@is_asked cp.async.cg.shared.global [%0], [%1], 16;\n\t"
        "}" ::"r"(place),
        "l"(from), "r"(left)
        : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

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
    int tile_scales;        // from a tile's scales to those of the warp's next tile
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
        tile_scales = stride * scales_of_tile;
        scales = start + int64_t(tile) * scales_of_tile;
    }

    // Asks for the next unit.
    __device__ __forceinline__ void copy(char* ring, int lane) {
        char* to = ring + slot + lane * PIECE_BYTES;
        const uint32_t place = unit->place;
        const int bytes = place & 0xfff;
        const int left = bytes - lane * PIECE_BYTES;
#pragma unroll
        for (int at = 0; at < UNIT_BYTES; at += WARP_LANES * PIECE_BYTES) {
            copy_async(to + at, source + at, left - at);
        }
        copy_async(to + UNIT_BYTES, scales + (place >> 12) * uint32_t(scale_bytes), scale_bytes);
        source += bytes;
        slot = next_slot(slot);
        ++unit;
    }

    __device__ __forceinline__ void next_tile() {
        unit = units;
        source += skip;
        scales += tile_scales;
    }
};

// A row's activations of a block.
constexpr int ROW_BLOCK_BYTES = BLOCK_INPUTS * sizeof(__half);

// A lane's activations of the next block, in shared memory: [block, row, 32].
struct SharedRows {
    const char* next;
    int block_bytes;

    __device__ __forceinline__ uint4 of(int tile) const {
        return *reinterpret_cast<const uint4*>(next + tile * ROWS_OF_TILE * ROW_BLOCK_BYTES);
    }
};

// The scales of a lane's outputs in a unit's group: what `decode_scales` gives, in fewer instructions.
__device__ __forceinline__ void unit_scales(const char* slot, uint32_t shape, bool is_exl2, int lane,
                                            float (&scales)[4]) {
    const char* at = slot + UNIT_BYTES;
    uint32_t pairs[2];
    if (is_exl2) {
        // (e + 1)^2 has at most nine bits, so that the product is rounded once.
        uint32_t codes = *reinterpret_cast<const uint16_t*>(at + lane / 4 * 2);
        codes |= codes << 12;
        const __half2 largest = __half2half2(__ushort_as_half(shape >> 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t code = mask_to_half2(codes >> (8 * i), 0x000f000fu);
            const uint32_t bits = add(code, half2_of(-1023.0f));
            const __half2 root = *reinterpret_cast<const __half2*>(&bits);
            const __half2 scale = __hmul2_rn(__hmul2_rn(root, root), largest);
            pairs[i] = *reinterpret_cast<const uint32_t*>(&scale);
        }
    } else if (kind_of(shape) == KIND_GPTQ) {
        const uint2 stored = *reinterpret_cast<const uint2*>(at + lane / 4 * 8);
        pairs[0] = stored.x;
        pairs[1] = stored.y;
    } else {
        pairs[0] = pairs[1] = half2_of(1.0f);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const __half2 pair = *reinterpret_cast<const __half2*>(&pairs[i]);
        scales[2 * i] = __low2float(pair);
        scales[2 * i + 1] = __high2float(pair);
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

// A warp's stream of units through its ring, multiplied in turn.
template <int ROW_TILES>
struct Stream {
    // Blocks of a unit that are multiplied without a branch between them.
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
    Sums<ROW_TILES> part;

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
                if (cursor.item < cursor.matrix_end) {
                    cursor.next_tile();
                } else {
                    find_matrix();
                }
            }
        }
        commit_copies();
    }

    // part += weights * activations over a block.
    template <int BITS, bool ZEROED>
    __device__ __forceinline__ void multiply_one(const char* block, uint32_t zeros) {
        const BlockReader reader = {block};
        LaneWeights weights;
        if constexpr (ZEROED) {
            take_zeroed(reader, lane, zeros, weights);
        } else {
            take_weights<BITS>(reader, lane, weights);
        }
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            multiply_block(weights, x.of(tile), part[tile]);
        }
        x.next += x.block_bytes;
    }

    // sums += weights * activations over a run of units, which all look like the first.
    template <int BITS, bool ZEROED>
    __device__ __forceinline__ void multiply_run(const Unit* unit, const Unit* end, bool is_exl2) {
        constexpr int block_bytes = BITS * BLOCK_UNIT_BYTES;
        const uint32_t run = unit->shape;
        const bool is_full = blocks_of(run) == unit_blocks(BITS);
#pragma unroll 1
        for (; unit != end; ++unit) {
            wait_for_copies<SLOTS - 1>();
            __syncwarp();
            const char* first = ring + slot;
            uint32_t zeros = 0;
            if constexpr (ZEROED) {
                zeros = *reinterpret_cast<const uint32_t*>(first + UNIT_BYTES + ZEROS_AT +
                                                           lane / 4 * 4);
            }
            if (is_full) {
#pragma unroll UNROLLED_BLOCKS
                for (int i = 0; i < unit_blocks(BITS); ++i) {
                    multiply_one<BITS, ZEROED>(first + i * block_bytes, zeros);
                }
            } else {
#pragma unroll 1
                for (int i = 0; i < blocks_of(run); ++i) {
                    multiply_one<BITS, ZEROED>(first + i * block_bytes, zeros);
                }
            }
            if (ends_group(run)) {
                float scales[4];
                unit_scales(first, unit->shape, is_exl2, lane, scales);
                add_group<ROW_TILES>(scales, part, sums);
                clear<ROW_TILES>(part);
            }
            slot = next_slot(slot);
            __syncwarp();
            copy_next();
        }
    }

    // The same by what the run's units are.
    __device__ __forceinline__ void multiply(const Unit* unit, const Unit* end, bool is_exl2) {
        const int kind = kind_of(unit->shape);
        // The usual one first.
        if (kind == 4) {
            multiply_run<4, false>(unit, end, is_exl2);
            return;
        }
        switch (kind) {
            case KIND_GPTQ:
                multiply_run<4, true>(unit, end, is_exl2);
                break;
            case 2:
                multiply_run<2, false>(unit, end, is_exl2);
                break;
            case 3:
                multiply_run<3, false>(unit, end, is_exl2);
                break;
            case 5:
                multiply_run<5, false>(unit, end, is_exl2);
                break;
            case 6:
                multiply_run<6, false>(unit, end, is_exl2);
                break;
            case 8:
                multiply_run<8, false>(unit, end, is_exl2);
                break;
            default:
                multiply_run<BITS_FLOAT, false>(unit, end, is_exl2);
        }
    }

    // The end of the run of units that look like `unit`, within its range.
    __device__ __forceinline__ const Unit* run_end(const Unit* unit, const Unit* units_end) const {
        const uint32_t run = unit->shape & SHAPE_OF_RUN;
#pragma unroll 1
        do {
            ++unit;
        } while (unit != units_end && !ends_range(run) && (unit->shape & SHAPE_OF_RUN) == run);
        return unit;
    }

    // The sums of one tile over the warp's range, whose units are `unit` to `units_end`; its
    // activations begin at `x_lane`.
    __device__ __forceinline__ void multiply_range(const Unit* unit, const Unit* units_end,
                                                   bool is_exl2, const char* x_lane) {
        x.next = x_lane;
        clear<ROW_TILES>(sums);
        clear<ROW_TILES>(part);
#pragma unroll 1
        while (unit != units_end) {
            const Unit* next = run_end(unit, units_end);
            multiply(unit, next, is_exl2);
            unit = next;
        }
    }
};

}  // namespace oxl
