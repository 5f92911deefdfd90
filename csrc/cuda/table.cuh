// Lists of tensors in kernel parameters: one launch serves many tensors of one dtype, and nothing is copied to the
// device beforehand, so a launch can be captured in a CUDA graph as it is.
//
// An operation is one launch for every dtype and every ROWS tensors of it; a sum is one more for every RANGES tensors, and
// one for the total. The vector work of a step (displacement, dots, decision, update) is so six launches for up to 256
// float32 tensors, and three more for each further 256 of them.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../lists.h"

namespace fastlur {

// Kernel parameters hold 32 KB from CUDA 12.1 on, 4 KB before.
#if CUDART_VERSION >= 12010
constexpr int ROWS = 256, RANGES = 2048;
constexpr size_t PARAMETERS = 32000;
#else
constexpr int ROWS = 40, RANGES = 400;
constexpr size_t PARAMETERS = 4000;
#endif

constexpr int THREADS = 256;

// Elements that a block works on at a time; a tile never crosses a tensor's border. Sums want few tiles, as each leaves
// something to add up; the others want many, to fill the device with a small model.
template <bool SUMS>
inline constexpr int TILE = SUMS ? 8192 : 4096;

template <int LISTS>
struct Table {
  void* at[LISTS][ROWS];
  int64_t numel[ROWS];
  int64_t partial[ROWS];  // the place of the tensor's first tile among the partial sums
  int first[ROWS + 1];    // the tensor's first tile in this launch
  bool aligned[ROWS];     // every address is a multiple of 16
  int rows;
};

struct Ranges {
  int64_t first[RANGES + 1];
  int rows;
};

inline int64_t tiles_of(const Row& row, int tile) { return (row.numel + tile - 1) / tile; }

// The first tile of every tensor, and the number of tiles.
inline std::vector<int64_t> first_tiles(const std::vector<Row>& rows, int tile = TILE<true>) {
  std::vector<int64_t> first(rows.size() + 1, 0);
  for (size_t i = 0; i < rows.size(); ++i) first[i + 1] = first[i] + tiles_of(rows[i], tile);
  return first;
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Enough blocks to fill the device; they stride over the tiles.
inline int grid_for(int64_t tiles) {
  int device = 0, processors = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return int(std::min<int64_t>(tiles, int64_t(processors) * 8));
}

// Calls launch(table) for the rows of one dtype and kind of moments, ROWS at a time; empty tensors are left out.
template <int LISTS, class F>
void in_tables(const std::vector<Row>& rows, int tile, const std::vector<int64_t>& partial, ScalarType dtype,
               bool wide_moments, const F& launch) {
  Table<LISTS> table;
  static_assert(sizeof(table) < PARAMETERS);
  table.rows = 0;
  const auto flush = [&] {
    if (table.rows > 0) launch(table);
    table.rows = 0;
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    if (row.dtype != dtype || row.wide_moments != wide_moments || row.numel == 0) continue;
    const int r = table.rows;
    if (r == 0) table.first[0] = 0;
    bool aligned = true;
    for (int k = 0; k < LISTS; ++k) {
      table.at[k][r] = row.at[k];
      aligned = aligned && reinterpret_cast<uintptr_t>(row.at[k]) % 16 == 0;
    }
    table.numel[r] = row.numel;
    table.partial[r] = partial[i];
    table.first[r + 1] = int(table.first[r] + tiles_of(row, tile));
    table.aligned[r] = aligned;
    if (++table.rows == ROWS) flush();
  }
  flush();
}

}  // namespace fastlur
