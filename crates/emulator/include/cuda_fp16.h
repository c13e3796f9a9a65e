// fp16 as kernels use it, in software: what the toolkit's header of this name has.
#pragma once

#include <emulated.h>

struct __half {
    uint16_t bits;
};

struct __attribute__((aligned(4))) __half2 {
    __half x, y;
};

namespace emulated {

// Every number of fp16.
extern const float* const half_values;

inline uint16_t half_of(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    // From 65,520 on.
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        // Subnormal: a whole number of 2^-24.
        return sign | uint32_t(nearbyintf(bit_cast<float>(magnitude) * 16777216.0f));
    }
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return sign | (magnitude - 0x38000000) >> 13;
}

inline bool is_nan(__half x) { return (x.bits & 0x7fff) > 0x7c00; }

}  // namespace emulated

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return emulated::half_values[x.bits]; }
inline __half __float2half_rn(float x) { return {emulated::half_of(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half __hmul(__half a, __half b) {
    return __float2half_rn(__half2float(a) * __half2float(b));
}

inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __float2half2_rn(float x) { return __half2half2(__float2half_rn(x)); }
inline __half2 __floats2half2_rn(float x, float y) {
    return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half __low2half(__half2 x) { return x.x; }
inline __half __high2half(__half2 x) { return x.y; }
inline float __low2float(__half2 x) { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }
inline float2 __half22float2(__half2 x) { return {__low2float(x), __high2float(x)}; }

// A sum or product of two fp16 numbers in f32, rounded, is the one that rounds once.
inline __half2 __hadd2_rn(__half2 a, __half2 b) {
    return __floats2half2_rn(__low2float(a) + __low2float(b), __high2float(a) + __high2float(b));
}
inline __half2 __hsub2(__half2 a, __half2 b) {
    return __floats2half2_rn(__low2float(a) - __low2float(b), __high2float(a) - __high2float(b));
}
inline __half2 __hmul2_rn(__half2 a, __half2 b) {
    return {__hmul(a.x, b.x), __hmul(a.y, b.y)};
}
inline __half2 __hmul2(__half2 a, __half2 b) { return __hmul2_rn(a, b); }
inline __half2 __hneg2(__half2 x) {
    return {{uint16_t(x.x.bits ^ 0x8000)}, {uint16_t(x.y.bits ^ 0x8000)}};
}
namespace emulated {

inline __half larger(__half a, __half b) {
    if (is_nan(a) || is_nan(b)) return {0x7fff};
    return __half2float(a) > __half2float(b) ? a : b;
}

inline __half smaller(__half a, __half b) {
    if (is_nan(a) || is_nan(b)) return {0x7fff};
    return __half2float(a) < __half2float(b) ? a : b;
}

}  // namespace emulated

inline __half2 __hmax2_nan(__half2 a, __half2 b) {
    return {emulated::larger(a.x, b.x), emulated::larger(a.y, b.y)};
}
inline __half2 __hmin2_nan(__half2 a, __half2 b) {
    return {emulated::smaller(a.x, b.x), emulated::smaller(a.y, b.y)};
}
