// The four dtypes as numbers: read in the wide type, rounded to nearest even when written.
//
// All conversions are free of branches, so that loops over them are vectorised on any instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../formulas.h"
#include "../lists.h"

// One copy of a function for each level of x86-64, chosen when the library is loaded: the binary runs everywhere.
// It needs the indirect functions of glibc; clang spells and restricts the attribute otherwise.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && !defined(FASTLUR_ONE_CLONE)
#define FASTLUR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTLUR_CLONES
#endif

// Says that an iteration never reads what another one wrote; an output may still be one of its own inputs.
#define FASTLUR_SIMD _Pragma("omp simd")

// A lambda has an instruction set of its own; only once it is inlined does it take that of its caller.
#define FASTLUR_LAMBDA __attribute__((always_inline))

namespace fastlur {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
FASTLUR_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

FASTLUR_INLINE float load(const float* p) { return *p; }
FASTLUR_INLINE double load(const double* p) { return *p; }
FASTLUR_INLINE float load(const BFloat16* p) { return bits_as<float>(uint32_t(p->bits) << 16); }
FASTLUR_INLINE float load(const Half* p) {
  const uint32_t magnitude = p->bits & 0x7fffu, sign = (p->bits & 0x8000u) << 16;
  // below 2^-14 a half is a whole number of 2^-24; from there on only the bias of the exponent differs
  const uint32_t small = bits_as<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t bias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
  return bits_as<float>((magnitude < 0x400u ? small : (magnitude << 13) + bias) | sign);
}

FASTLUR_INLINE void store(float* p, float x) { *p = x; }
FASTLUR_INLINE void store(double* p, double x) { *p = x; }
FASTLUR_INLINE void store(BFloat16* p, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
FASTLUR_INLINE void store(Half* p, float x) {
  const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // adding one half leaves exactly the bits from 2^-24 up, rounded by the addition
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  p->bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

// Calls f with a value of the element type of a row.
template <class F>
FASTLUR_INLINE void typed(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: return f(float{});
  }
}

// The part of a row's tensor, given by its list, that a span covers; absent lists stay null.
template <class T>
FASTLUR_INLINE T* part(const Row& row, int list, int64_t start) {
  return row.at[list] == nullptr ? nullptr : static_cast<T*>(row.at[list]) + start;
}

}  // namespace fastlur
