// Writing past the cache. An output that is only written would first be read into the cache line by line; where it is
// too large to stay there anyway, storing around the cache saves that read, a quarter of the traffic of `displace`.
#pragma once

#include "numbers.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastlur {

constexpr int64_t STREAMED = int64_t(1) << 25;  // bytes of output from which on it cannot be found in the cache later
constexpr int64_t STRIP = 64;                   // elements; longer ones measured slower

FASTLUR_INLINE bool worth_streaming(const std::vector<Row>& rows) {
  int64_t bytes = 0;
  for (const Row& row : rows) bytes += row.numel * (row.dtype == ScalarType::Double ? 8 : 4);
  return bytes >= STREAMED;
}

// out[i] = f(i) for i < n. Every element is computed in a short strip before it is stored, so f may read `out`.
template <class T, class F>
FASTLUR_INLINE void write(T* out, int64_t n, bool past_cache, const F& f) {
  int64_t done = 0;
#if defined(__SSE2__)
  if (past_cache) {
    alignas(64) T strip[STRIP];
    // whole lines only: a line stored in two parts costs more than it saves
    while (done < n && reinterpret_cast<uintptr_t>(out + done) % 64 != 0) {
      store(out + done, f(done));
      ++done;
    }
    for (; done + STRIP <= n; done += STRIP) {
      FASTLUR_SIMD
      for (int64_t i = 0; i < STRIP; ++i) store(strip + i, f(done + i));
      auto* to = reinterpret_cast<__m128i*>(out + done);
      const auto* from = reinterpret_cast<const __m128i*>(strip);
      for (int64_t i = 0; i < int64_t(STRIP * sizeof(T) / 16); ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
    }
    _mm_sfence();  // other threads will read what was stored
  }
#endif
  FASTLUR_SIMD
  for (int64_t i = done; i < n; ++i) store(out + i, f(i));
}

}  // namespace fastlur
