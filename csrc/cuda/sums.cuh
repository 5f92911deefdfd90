// The second stage of the reductions: partial sums of the tiles, to sums of the tensors, to the total. No atomics: every
// sum has one order, so that the bits are the same each time.
#pragma once

#include "walk.cuh"

namespace fastlur {

constexpr int SUMS = 3;
constexpr int MANY = 1024;  // one block adds up all tiles of a tensor: the more loads under way, the better

static __global__ void __launch_bounds__(MANY)
    sum_tiles(const __grid_constant__ Ranges ranges, const double* partial, double* each) {
  const int row = blockIdx.x;
  double sums[SUMS] = {};
#pragma unroll 4
  for (int64_t i = ranges.first[row] + threadIdx.x; i < ranges.first[row + 1]; i += MANY)
    for (int k = 0; k < SUMS; ++k) sums[k] += partial[i * SUMS + k];
  block_sum<MANY>(sums);
  if (threadIdx.x == 0)
    for (int k = 0; k < SUMS; ++k) each[row * SUMS + k] = sums[k];
}

// The total of all tensors; with `hyper`, the value of the penalties that follows from it.
static __global__ void __launch_bounds__(MANY)
    sum_rows(const double* each, int64_t rows, const double* hyper, double* out) {
  double sums[SUMS] = {};
  for (int64_t i = threadIdx.x; i < rows; i += MANY)
    for (int k = 0; k < SUMS; ++k) sums[k] += each[i * SUMS + k];
  block_sum<MANY>(sums);
  if (threadIdx.x != 0) return;
  if (hyper != nullptr) {
    *out = penalty_value(hyper, sums);
  } else {
    for (int k = 0; k < SUMS; ++k) out[k] = sums[k];
  }
}

inline void finish(const std::vector<Row>& rows, const double* partial, double* each, const double* hyper, double* out,
                   cudaStream_t stream) {
  const auto first = first_tiles(rows);
  const int64_t count = int64_t(rows.size());
  for (int64_t begin = 0; begin < count; begin += RANGES) {
    Ranges ranges;
    static_assert(sizeof(ranges) < PARAMETERS);
    ranges.rows = int(std::min<int64_t>(RANGES, count - begin));
    std::copy_n(first.begin() + begin, ranges.rows + 1, ranges.first);
    sum_tiles<<<ranges.rows, MANY, 0, stream>>>(ranges, partial, each + begin * SUMS);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  sum_rows<<<1, MANY, 0, stream>>>(each, count, hyper, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastlur
