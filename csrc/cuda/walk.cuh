// The one kernel behind every operation on lists: read a pack of each operand, apply the operation to each element,
// write the outputs, and leave one set of partial sums a tile.
//
// An operation `Op` says with LISTS, READS, WRITES (bits) and SUMS what it touches, MASK naming the list of booleans or
// -1, FLOATS (bits) the lists that are float32 whatever T is. `Op::Scalars<W>` is made on the device, once a block, from what the host cannot know without waiting.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <new>
#include <type_traits>

#include "../formulas.h"
#include "table.cuh"

namespace fastlur {

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float& to, float x) { to = x; }
__device__ __forceinline__ void narrow(double& to, double x) { to = x; }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(__half& to, float x) { to = __float2half_rn(x); }

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T item[N];
};

// Sums over the block in a fixed order; thread 0 holds the result.
template <int COUNT, int SUMS>
__device__ void block_sum(double (&sums)[SUMS]) {
  __shared__ double shared[SUMS][COUNT / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < SUMS; ++k) {
    for (int offset = 16; offset > 0; offset /= 2) sums[k] += __shfl_down_sync(0xffffffffu, sums[k], offset);
    if (lane == 0) shared[k][warp] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < SUMS; ++k) {
      sums[k] = shared[k][0];
      for (int w = 1; w < COUNT / 32; ++w) sums[k] += shared[k][w];
    }
  }
  __syncthreads();  // `shared` is used again for the next tile
}

template <class T, int N, class W>
__device__ __forceinline__ void fetch(W (&to)[N], const void* from, int64_t at, bool present) {
  Pack<T, N> pack{};
  if (present) pack = *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(from) + at);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(pack.item[i]);
}

template <class T, int N, class W>
__device__ __forceinline__ void put(void* to, int64_t at, const W (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(pack.item[i], from[i]);
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(to) + at) = pack;
}

// N elements from `at` on, of each list.
template <class T, class Op, int N, class S>
__device__ __forceinline__ void work(const Table<Op::LISTS>& table, int row, int64_t at, const S& scalars,
                                     Wide<T>* sums) {
  using W = Wide<T>;
  W v[Op::LISTS][N];
  bool has[Op::LISTS], keep[N];
#pragma unroll
  for (int k = 0; k < Op::LISTS; ++k) {
    has[k] = table.at[k][row] != nullptr;
    if (k == Op::MASK) {
      Pack<uint8_t, N> pack{};
      if (has[k]) pack = *reinterpret_cast<const Pack<uint8_t, N>*>(static_cast<const uint8_t*>(table.at[k][row]) + at);
#pragma unroll
      for (int i = 0; i < N; ++i) keep[i] = !has[k] || pack.item[i] != 0;
    } else if (Op::READS >> k & 1) {
      const bool present = has[k] && scalars.reads(k);
      if (Op::FLOATS >> k & 1)
        fetch<W, N>(v[k], table.at[k][row], at, present);
      else
        fetch<T, N>(v[k], table.at[k][row], at, present);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    W element[Op::LISTS];
#pragma unroll
    for (int k = 0; k < Op::LISTS; ++k) element[k] = v[k][i];
    scalars.apply(element, has, sums);
#pragma unroll
    for (int k = 0; k < Op::LISTS; ++k)
      if ((Op::WRITES >> k & 1) && (Op::MASK < 0 || keep[i])) v[k][i] = element[k];
  }
#pragma unroll
  for (int k = 0; k < Op::LISTS; ++k) {
    if ((Op::WRITES >> k & 1) && has[k]) {
      if (Op::FLOATS >> k & 1)
        put<W, N>(table.at[k][row], at, v[k]);
      else
        put<T, N>(table.at[k][row], at, v[k]);
    }
  }
}

template <class T, class Op>
__global__ void __launch_bounds__(THREADS)
    walk(const __grid_constant__ Table<Op::LISTS> table, const __grid_constant__ Op op, double* partial) {
  using W = Wide<T>;
  constexpr int N = 16 / sizeof(T);
  using Scalars = typename Op::template Scalars<W>;
  constexpr int SIZE = TILE<(Op::SUMS > 0)>;
  // one thread works them out: bias corrections are powers in double, dear on every thread
  __shared__ alignas(16) unsigned char place[sizeof(Scalars)];
  if (threadIdx.x == 0) new (place) Scalars(op);
  __syncthreads();
  const Scalars scalars = *reinterpret_cast<const Scalars*>(place);
  if (!scalars.go()) return;
  for (int tile = blockIdx.x; tile < table.first[table.rows]; tile += gridDim.x) {
    int row = 0, above = table.rows;
    while (above - row > 1) {
      const int middle = (row + above) / 2;
      (tile < table.first[middle] ? above : row) = middle;
    }
    const int local = tile - table.first[row];
    const int64_t start = int64_t(local) * SIZE;
    const int count = int(min(int64_t(SIZE), table.numel[row] - start));
    const int packed = table.aligned[row] ? count / N * N : 0;
    // the wide type holds a thread's share of one tile, some dozens of elements; double takes over from there
    W own[Op::SUMS > 0 ? Op::SUMS : 1] = {};
#pragma unroll 2
    for (int i = threadIdx.x * N; i < packed; i += THREADS * N) work<T, Op, N>(table, row, start + i, scalars, own);
    for (int i = packed + threadIdx.x; i < count; i += THREADS) work<T, Op, 1>(table, row, start + i, scalars, own);
    if constexpr (Op::SUMS > 0) {
      double sums[Op::SUMS];
#pragma unroll
      for (int k = 0; k < Op::SUMS; ++k) sums[k] = own[k];
      block_sum<THREADS>(sums);
      if (threadIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < Op::SUMS; ++k) partial[(table.partial[row] + local) * Op::SUMS + k] = sums[k];
      }
    }
  }
}

// Launches an operation on the rows, once for each dtype and each ROWS tensors; with FLOATS on those rows alone that
// have such lists, without on the others.
template <class Op>
void launch(const std::vector<Row>& rows, const Op& op, cudaStream_t stream, double* partial = nullptr) {
  constexpr int tile = TILE<(Op::SUMS > 0)>;
  const auto first = first_tiles(rows, tile);
  const auto with = [&](auto zero, ScalarType dtype) {
    using T = decltype(zero);
    if constexpr (Op::FLOATS == 0 || sizeof(T) == 2)
      in_tables<Op::LISTS>(rows, tile, first, dtype, Op::FLOATS != 0, [&](const Table<Op::LISTS>& table) {
        walk<T, Op><<<grid_for(table.first[table.rows]), THREADS, 0, stream>>>(table, op, partial);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
  };
  with(float{}, ScalarType::Float);
  with(double{}, ScalarType::Double);
  with(__nv_bfloat16{}, ScalarType::BFloat16);
  with(__half{}, ScalarType::Half);
}

}  // namespace fastlur
