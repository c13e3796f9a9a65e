// Products of a warp group (four warps) on tensor cores, which go on by themselves while the warps do
// something else: wgmma of compute capability 9.0, A from registers or shared memory, B from shared memory, sums in
// fp32. They are bit for bit what as many mma.m16n8k16 one after the other give.
#pragma once

#include "common.cuh"

namespace oxl {

constexpr int GROUP_THREADS = 4 * WARP_LANES;

// Describes an operand in shared memory: rows of 128 bytes, eight after each other, whose 16-byte pieces lie at
// piece ^ row % 8 and whose first begins at a multiple of 1,024 bytes. `columns_bytes`: from 64 columns to the next 64,
// where rows are k.
__device__ __forceinline__ uint64_t describe_swizzled(uint32_t place, uint32_t columns_bytes) {
    constexpr uint64_t SWIZZLED_128 = uint64_t(1) << 62;
    constexpr uint64_t EIGHT_ROWS = uint64_t(1024 / 16) << 32;
    return SWIZZLED_128 | EIGHT_ROWS | uint64_t(columns_bytes / 16) << 16 | (place & 0x3ffff) / 16;
}

// Of such rows that are A's or columns of B, of 64 halves of k. `place` is that of the first of 16 k.
__device__ __forceinline__ uint64_t describe_rows(uint32_t place) {
    constexpr uint32_t UNUSED = 16;
    return describe_swizzled(place, UNUSED);
}

// Of rows that are k, of 64 columns of B each. Sixteen k are two times eight rows.
__device__ __forceinline__ uint64_t describe_columns(uint32_t place, uint32_t columns_bytes) {
    return describe_swizzled(place, columns_bytes);
}

// What brings `describe_columns` to 16 rows that come so many steps later.
__device__ __forceinline__ constexpr uint64_t next_rows(int steps) { return steps * 2048 / 16; }

// What brings `describe_rows` to 16 inputs that come so many steps later in the rows.
__device__ __forceinline__ constexpr uint64_t next_inputs(int steps) { return steps * 32 / 16; }

// How B lies: as `describe_rows` says, or `describe_columns`.
constexpr int B_ROWS = 0;
constexpr int B_COLUMNS = 1;

}  // namespace oxl

#if !defined(OXL_EMULATED)

namespace oxl {

// Registers that wgmma uses are written: products that follow may read them.
__device__ __forceinline__ void group_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Makes one group of the products since the last.
__device__ __forceinline__ void group_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most so many groups go on.
template <int GROUPS>
__device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// sums (+)= A B of 64 x 16 and 16 x WIDTH. A's fragments are those of mma.m16n8k16, warp w having rows 16 w
// on; sums are those of WIDTH / 8 of its results.
template <int WIDTH, int B = B_ROWS>
struct GroupProduct;

#define OXL_SUMS_4(s, i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define OXL_SUMS_16(s, i) \
    OXL_SUMS_4(s, i), OXL_SUMS_4(s, i + 4), OXL_SUMS_4(s, i + 8), OXL_SUMS_4(s, i + 12)

template <int B>
struct GroupProduct<64, B> {
    static __device__ __forceinline__ void start(float (&sums)[32], uint32_t a0, uint32_t a1,
                                                 uint32_t a2, uint32_t a3, uint64_t b, bool adds) {
        asm volatile(
            "{\n"
            ".reg .pred adds;\n"
            "setp.ne.b32 adds, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, adds, 1, 1, %38;\n"
            "}"
            : OXL_SUMS_16(sums, 0),
              OXL_SUMS_16(sums, 16)
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(adds)), "n"(B));
    }
};

template <int B>
struct GroupProduct<128, B> {
    static __device__ __forceinline__ void start(float (&sums)[64], uint32_t a0, uint32_t a1,
                                                 uint32_t a2, uint32_t a3, uint64_t b, bool adds) {
        asm volatile(
            "{\n"
            ".reg .pred adds;\n"
            "setp.ne.b32 adds, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "{%64, %65, %66, %67}, %68, adds, 1, 1, %70;\n"
            "}"
            : OXL_SUMS_16(sums, 0),
              OXL_SUMS_16(sums, 16),
              OXL_SUMS_16(sums, 32),
              OXL_SUMS_16(sums, 48)
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(adds)), "n"(B));
    }
};

template <int B>
struct GroupProduct<256, B> {
    static __device__ __forceinline__ void start(float (&sums)[128], uint32_t a0, uint32_t a1,
                                                 uint32_t a2, uint32_t a3, uint64_t b, bool adds) {
        asm volatile(
            "{\n"
            ".reg .pred adds;\n"
            "setp.ne.b32 adds, %133, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
            "{%128, %129, %130, %131}, %132, adds, 1, 1, %134;\n"
            "}"
            : OXL_SUMS_16(sums, 0),
              OXL_SUMS_16(sums, 16),
              OXL_SUMS_16(sums, 32),
              OXL_SUMS_16(sums, 48),
              OXL_SUMS_16(sums, 64),
              OXL_SUMS_16(sums, 80),
              OXL_SUMS_16(sums, 96),
              OXL_SUMS_16(sums, 112)
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(adds)), "n"(B));
    }
};

// sums (+)= A B likewise, of A in shared memory: 64 rows as `describe_rows` says.
__device__ __forceinline__ void start_shared_product(float (&sums)[32], uint64_t a, uint64_t b,
                                                     bool adds) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.ne.b32 adds, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, adds, 1, 1, 0, 0;\n"
        "}"
        : OXL_SUMS_16(sums, 0),
          OXL_SUMS_16(sums, 16)
        : "l"(a), "l"(b), "r"(int(adds)));
}

#undef OXL_SUMS_16
#undef OXL_SUMS_4

}  // namespace oxl

#endif
