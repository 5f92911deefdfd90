// From lists of tensors to rows of addresses, checked: what every kernel starts from, on the CPU and on CUDA.
//
// The stable ABI hands over `Tensor[]` as a std::vector of handles from torch 2.10 on; a handle refers to the caller's
// tensor, so writing through its address changes that tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <tuple>
#include <vector>

namespace fastlur {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensors = std::optional<Tensors>;

constexpr int MOST_LISTS = 8;

struct Row {
  void* at[MOST_LISTS] = {};  // null where a list is absent
  int64_t numel = 0;
  ScalarType dtype = ScalarType::Float;
  bool wide_moments = false;  // the moments are float32 though the rest is a half type
};

struct List {
  const char* name;
  const Tensors* tensors;  // null: absent
  enum Use { READ, WRITTEN, MOMENT, MASK } use;

  List(const char* name, const Tensors& tensors, Use use = READ) : name(name), tensors(&tensors), use(use) {}
  List(const char* name, const MaybeTensors& tensors, Use use = READ)
      : name(name), tensors(tensors ? &*tensors : nullptr), use(use) {}
};

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// The first tensor of a list, for what is told by the data alone where they are.
inline const Tensor& home_of(const Tensors& tensors, const char* name) {
  STD_TORCH_CHECK(!tensors.empty(), name, " has 0 tensors; it needs one at least");
  return tensors.front();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return left.size() == right.size() && std::equal(left.begin(), left.end(), right.begin());
}

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : dtype == ScalarType::Bool ? 1 : 2;
}

// The memory that one tensor occupies.
struct Extent {
  uintptr_t begin, end;
  size_t place;
  const List* list;
};

inline void refuse(const Extent& a, const Extent& b) {
  STD_TORCH_CHECK(false, a.list->name, "[", a.place, "] and ", b.list->name, "[", b.place,
                  "] overlap in memory, and one of them is written");
}

// What is written shares memory with nothing, except that a tensor may be read at the place where it is written.
inline void refuse_overlaps(std::vector<Extent>& written, const std::vector<Extent>& read) {
  std::sort(written.begin(), written.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < written.size(); ++i)
    if (written[i].begin < written[i - 1].end) refuse(written[i - 1], written[i]);
  for (const Extent& each : read) {
    // the last one that begins before this one ends: those before it end earlier still
    const auto above = std::lower_bound(written.begin(), written.end(), each.end,
                                        [](const Extent& a, uintptr_t end) { return a.begin < end; });
    if (above == written.begin()) continue;
    const Extent& last = *std::prev(above);
    const bool same = last.begin == each.begin && last.end == each.end && last.place == each.place;
    if (last.end > each.begin && !same) refuse(last, each);
  }
}

// One row for each place of the lists, all on the device of `home`; the first list is always present. Everything is
// looked at here, before anything is written: a caller whose operands are refused finds them as they were.
inline std::vector<Row> rows_of(const Tensor& home, std::initializer_list<List> lists) {
  const List& lead = *lists.begin();
  std::vector<Row> rows(lead.tensors->size());
  const List* moments = nullptr;
  std::vector<Extent> written, read;
  read.reserve(rows.size() * lists.size());
  int column = 0;
  for (const List& list : lists) {
    if (list.tensors != nullptr) {
      STD_TORCH_CHECK(list.tensors->size() == rows.size(), list.name, " has ", list.tensors->size(), " tensors, ",
                      lead.name, " has ", rows.size(), "; they go place by place");
      for (size_t i = 0; i < rows.size(); ++i) {
        const Tensor &tensor = (*list.tensors)[i], &first = (*lead.tensors)[i];
        const ScalarType dtype = tensor.scalar_type();
        if (column == 0) {
          STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                              dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                          list.name, "[", i, "] must be float32, float64, bfloat16 or float16");
          rows[i].dtype = dtype;
          rows[i].numel = tensor.numel();
        }
        STD_TORCH_CHECK(tensor.is_contiguous(), list.name, "[", i, "] is not contiguous");
        ScalarType wanted = list.use == List::MASK ? ScalarType::Bool : rows[i].dtype;
        if (list.use == List::MOMENT) {
          const bool half = wanted == ScalarType::BFloat16 || wanted == ScalarType::Half;
          if (moments == nullptr) rows[i].wide_moments = half && dtype == ScalarType::Float;
          if (rows[i].wide_moments) wanted = ScalarType::Float;
        }
        STD_TORCH_CHECK(dtype == wanted, list.name, "[", i, "] has a dtype that does not go with ", lead.name, "[", i,
                        "]");
        STD_TORCH_CHECK(same_shape(tensor, first), list.name, "[", i, "] and ", lead.name, "[", i,
                        "] differ in shape");
        STD_TORCH_CHECK(same_device(tensor, home), list.name, "[", i,
                        "] is on another device than the tensors or hyper-parameters beside it");
        const bool changed = list.use == List::WRITTEN || list.use == List::MOMENT;
        rows[i].at[column] = changed ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
        if (rows[i].numel == 0) continue;
        const auto begin = reinterpret_cast<uintptr_t>(rows[i].at[column]);
        (changed ? written : read).push_back({begin, begin + uintptr_t(rows[i].numel * bytes_of(dtype)), i, &list});
      }
      if (list.use == List::MOMENT) moments = &list;  // a second list of them has the dtypes of the first
    }
    ++column;
  }
  if (!written.empty()) refuse_overlaps(written, read);
  return rows;
}

// The address of a float64 scalar, or of a vector of them, on the device that the kernel runs on, that of `home`.
inline const double* numbers(const Tensor& tensor, const char* name, int64_t count, const Tensor& home) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.numel() == count &&
                      tensor.dim() == (count > 1 ? 1 : 0),
                  name, " must be a contiguous float64 tensor of ", count, " numbers");
  STD_TORCH_CHECK(same_device(tensor, home), name, " must be on the device of the data");
  return static_cast<const double*>(tensor.const_data_ptr());
}

inline const double* numbers(const std::optional<Tensor>& tensor, const char* name, const Tensor& home) {
  return tensor ? numbers(*tensor, name, 1, home) : nullptr;
}

inline Tensor new_numbers(std::initializer_list<int64_t> shape, const Tensor& like) {
  return torch::stable::empty(shape, ScalarType::Double, std::nullopt, like.device());
}

}  // namespace fastlur
