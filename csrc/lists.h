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
};

struct List {
  const char* name;
  const Tensors* tensors;  // null: absent
  enum Use { READ, WRITTEN, MASK } use;

  List(const char* name, const Tensors& tensors, Use use = READ) : name(name), tensors(&tensors), use(use) {}
  List(const char* name, const MaybeTensors& tensors, Use use = READ)
      : name(name), tensors(tensors ? &*tensors : nullptr), use(use) {}
};

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return left.size() == right.size() && std::equal(left.begin(), left.end(), right.begin());
}

// One row for each place of the lists, all on the device of `home`; the first list is always present.
inline std::vector<Row> rows_of(const Tensor& home, std::initializer_list<List> lists) {
  const List& lead = *lists.begin();
  std::vector<Row> rows(lead.tensors->size());
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
        STD_TORCH_CHECK(dtype == (list.use == List::MASK ? ScalarType::Bool : rows[i].dtype), list.name, "[", i,
                        "] has a dtype that does not go with ", lead.name, "[", i, "]");
        STD_TORCH_CHECK(same_shape(tensor, first), list.name, "[", i, "] and ", lead.name, "[", i,
                        "] differ in shape");
        STD_TORCH_CHECK(tensor.is_cpu() == home.is_cpu() && tensor.get_device_index() == home.get_device_index(),
                        list.name, "[", i, "] is on another device than the tensors or hyper-parameters beside it");
        rows[i].at[column] = list.use == List::WRITTEN ? tensor.mutable_data_ptr()
                                                       : const_cast<void*>(tensor.const_data_ptr());
      }
    }
    ++column;
  }
  return rows;
}

// The address of `least` or more float64 numbers on the device that the kernel runs on.
inline const double* numbers(const Tensor& tensor, const char* name, int64_t least, bool on_cpu) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.numel() >= least,
                  name, " must be a contiguous float64 tensor of at least ", least, " numbers");
  STD_TORCH_CHECK(tensor.is_cpu() == on_cpu, name, " must be on the device of the data");
  return static_cast<const double*>(tensor.const_data_ptr());
}

inline const double* numbers(const std::optional<Tensor>& tensor, const char* name, bool on_cpu) {
  return tensor ? numbers(*tensor, name, 1, on_cpu) : nullptr;
}

inline Tensor new_numbers(std::initializer_list<int64_t> shape, const Tensor& like) {
  return torch::stable::empty(shape, ScalarType::Double, std::nullopt, like.device());
}

}  // namespace fastlur
