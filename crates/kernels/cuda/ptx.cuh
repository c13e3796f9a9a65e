// All instructions that C++ has no words for, but those that Hopper alone has (bulk.cuh, group_product.cuh): so that
// kernels can run where there is no GPU, with these few made by hand (the crate `emulator`).
#pragma once

#if !defined(OXL_EMULATED)

// Dynamic shared memory of a block as an array.
#define DYNAMIC_SHARED(TYPE, NAME, ALIGNMENT) extern __shared__ __align__(ALIGNMENT) TYPE NAME[]

namespace oxl {

// --- Threads and launches ---

// Where something lies in shared memory, as instructions on it take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// Waits until the kernels that this one depends on have finished and their writes are visible.
// Every thread that reads or writes what another kernel of the step touches calls it before.
// What no kernel writes during a step (weights) may be read earlier.
__device__ __forceinline__ void dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start as soon as every block of this one has come here (or
// ended); its own `dependency_wait` still waits for this kernel's end.
__device__ __forceinline__ void dependency_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ int lane_number() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// The thread's number, asked for anew, so that nothing that the compiler makes of it takes registers before.
__device__ __forceinline__ int fresh_thread() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// Has a word loaded here, whether it is used or not.
__device__ __forceinline__ void touch(uint32_t word) { asm volatile("" ::"r"(word)); }

// --- Arithmetic ---

// 2^x; 2^0 is 1 and 2^-inf is 0.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Of pairs of fp16.
__device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

__device__ __forceinline__ uint32_t times_plus(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// Bits of a word under a mask, and those of another: one operation, of which the compiler makes two where it knows one
// of the words.
__device__ __forceinline__ uint32_t masked_beside(uint32_t word, uint32_t mask, uint32_t beside) {
    constexpr int AND_OR = 0xea;
    uint32_t joined;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(joined) : "r"(word), "r"(mask), "r"(beside), "n"(AND_OR));
    return joined;
}

// --- Words at addresses in shared memory ---

__device__ __forceinline__ void store_shared(uint32_t place, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void load_shared(uint32_t place, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(place));
}

__device__ __forceinline__ void load_shared(uint32_t place, uint32_t& a, uint32_t& b) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(place));
}

__device__ __forceinline__ void load_shared(uint32_t place, uint32_t& a) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(a) : "r"(place));
}

__device__ __forceinline__ uint32_t load_shared_byte(uint32_t place) {
    uint32_t byte;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(place));
    return byte;
}

__device__ __forceinline__ uint32_t load_shared_half(uint32_t place) {
    uint32_t half;
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(half) : "r"(place));
    return half;
}

// --- Tensor cores. Lane l is g = l / 4, t = l % 4. ---

// c[16, 8] += a[16, 16] b[16, 8] of fp16. Lane (g, t) holds of c the columns 2 t and 2 t + 1 of row g,
// then those of row g + 8; of a the columns 2 t and 2 t + 1 of rows g and g + 8, then 2 t + 8 and 2 t + 9
// of them; of b the rows 2 t and 2 t + 1 of column g, then 2 t + 8 and 2 t + 9.
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 blocks of fp16; lane i names row i % 8 of block i / 8.
__device__ __forceinline__ void load_blocks(uint32_t (&out)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// The same, each block transposed.
__device__ __forceinline__ void load_blocks_transposed(uint32_t (&out)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// --- Copies to shared memory that go on beside the thread ---

// Copies 16 bytes.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Copies so many of 16 bytes, and writes zeros to the others.
__device__ __forceinline__ void copy_part_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

// Copies 16 bytes, or writes zeros where the source is not to be read.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool is_read) {
    copy_part_async(to, from, is_read ? 16 : 0);
}

// Copies 16 bytes if `left` is positive.
__device__ __forceinline__ void copy_async_if(int left, uint32_t to, const void* from) {
    asm volatile(
        "{\n\t"
        ".reg .pred is_asked;\n\t"
        "setp.gt.s32 is_asked, %2, 0;\n\t"
        "@is_asked cp.async.cg.shared.global [%0], [%1], 16;\n\t"
        "}" ::"r"(to),
        "l"(from), "r"(left)
        : "memory");
}

// Copies 8 bytes.
__device__ __forceinline__ void copy_two_async(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

// Copies 4 bytes, or writes zeros where the source is not to be read.
__device__ __forceinline__ void copy_word_async(uint32_t to, const void* from, bool is_read) {
    const int bytes = is_read ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

// Makes a group of the thread's copies since the last one.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most so many of the thread's latest groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace oxl

#endif
