// Copies by the GPU's copy engine, barriers in shared memory that they arrive at, clusters, and what else compute
// capability 9.0 alone has but for its products (group_product.cuh).
#pragma once

#include "common.cuh"

namespace oxl {

// Bytes of a barrier.
constexpr int BARRIER_BYTES = 8;

}  // namespace oxl

#if !defined(OXL_EMULATED)

namespace oxl {

// Every function takes addresses in shared memory as `shared_address` gives them.

// A barrier whose phase ends when `arrivals` have come, and all bytes that were announced.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers known to the copy engine before the block's threads meet.
__device__ __forceinline__ void barriers_are_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Arrives at the same barrier of a CTA of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Where the same place of shared memory is in a CTA of the cluster.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, int rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// Stores to shared memory of a CTA of the cluster, which announced bytes count at its barrier; both are cluster addresses.
__device__ __forceinline__ void send_async(uint32_t to, const float (&x)[4], uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     to),
                 "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void send_async(uint32_t to, const float (&x)[2], uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "f"(x[0]), "f"(x[1]), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void send_async(uint32_t to, const float (&x)[1], uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
                 "f"(x[0]), "r"(barrier)
                 : "memory");
}

// Waits for all threads of the cluster. Barriers that were made known are visible then, not whatever else
// they have written.
__device__ __forceinline__ void cluster_meet() {
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

// Waits for the end of the phase of this parity: 0 for the first one.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Starts a copy from memory; addresses and bytes are multiples of 16.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            to),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
        : "memory");
}

// The same to both CTAs of a cluster of two: to the same place of each, reported at the same barrier of each.
__device__ __forceinline__ void bulk_copy_to_both(uint32_t to, const void* from, uint32_t bytes,
                                                  uint32_t barrier) {
    constexpr uint16_t BOTH = 3;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier), "h"(BOTH)
        : "memory");
}

// Tensor cores read shared memory by another way than threads write it: what has been written is seen there from here on.
__device__ __forceinline__ void show_to_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Of a warp group, all four warps: registers that it may have from here on.
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Waits for the other warp of two that come here by this number, 1 to 15.
__device__ __forceinline__ void meet_other_warp(int number) {
    asm volatile("bar.sync %0, 64;" ::"r"(number) : "memory");
}

// Adds to memory without waiting for what is there.
__device__ __forceinline__ void add_four(float* to, const float4& y) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     __cvta_generic_to_global(to)),
                 "f"(y.x), "f"(y.y), "f"(y.z), "f"(y.w)
                 : "memory");
}

}  // namespace oxl

#endif
